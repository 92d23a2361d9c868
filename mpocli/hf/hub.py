"""Turn what a user calls a model, a directory or a hub name, into a local directory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mpocli.errors import InputError, UsageError
from mpocli.io.readable import is_there, real_path, why_unreadable
from mpocli.io.stored import PICKLE_HINT

_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What a checkpoint needs: never pickles, never the other frameworks' copies of the weights. In the numbered folders are
# the modules that sentence-transformers puts after the model; mpocli carries them and opens none.
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "[0-9]*_*/*"]
_SUBFOLDERS = ["onnx/*", "openvino/*", "original/*", "coreml/*"]
# The same weights once more: as their authors' own code wants them, or in another precision.
_VARIANTS = ("fp32", "fp16", "bf16", "fp8", "int8", "int4", "8bit", "4bit", "non_ema")
_COPIES = [
    "consolidated*.safetensors",
    *(f"*.{variant}{end}.safetensors" for variant in _VARIANTS for end in ("", "-*")),
]
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Source:
    """A model directory, and the name (hub id or bare folder name) and revision that stand for it."""

    directory: Path
    name: str
    revision: str | None = None


def resolve(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Find a local model directory, or download a hub model with progress bars.

    Raises `InputError` for a path that does not exist, a directory without `config.json`, and a hub model
    that cannot be had (unknown, or no network) or has no safetensors weights; `UsageError` for a revision of
    a local directory.
    """
    path = Path(model).expanduser()
    try:
        here, is_directory = path.exists(), path.is_dir()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise InputError(f"{model}: cannot be read ({error.strerror})", hint="check the path") from error
    if is_directory:
        if revision is not None:
            raise UsageError(
                f"‹revision› is for hub models, {model} is a local directory",
                hint="leave ‹revision› out, or name the hub model as organisation/name",
            )
        if (why := why_unreadable(path / "config.json")) is not None:
            if is_there(path / "config.json"):
                raise InputError(f"{path / 'config.json'}: {why}", hint="download or write the file again")
            raise InputError(f"{model}: no config.json in this directory", hint="name a transformers model directory")
        return Source(path, real_path(path).name, None)
    if here:
        raise InputError(f"{model}: is a file", hint="name the model's directory")
    if not _REPO_ID.fullmatch(model) or model.startswith("."):
        raise InputError(f"{model}: no such directory", hint="check the path, or name a hub model such as gpt2")
    return _download(model, revision, trust_remote_code)


def _download(model: str, revision: str | None, trust_remote_code: bool) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*_PATTERNS, "*.py"] if trust_remote_code else _PATTERNS
    try:
        directory = Path(
            snapshot_download(
                model, revision=revision, allow_patterns=patterns, ignore_patterns=[*_SUBFOLDERS, *_COPIES]
            )
        )
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{model}: no such directory here, and the hub cannot be reached",
            hint="check the spelling and the network, or name a local model directory",
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{model}: neither a directory here nor a model on the hub ({first_line})",
            hint="check the name and ‹revision›; a gated model needs `hf auth login`",
        ) from error
    if not (directory / "config.json").is_file():
        raise InputError(f"{model}: the hub repository has no config.json", hint="it is not a transformers model")
    if not any(directory.glob("*.safetensors")):
        raise _without_safetensors(model, revision)
    # A snapshot's folder is named by its commit.
    return Source(directory, model, directory.name)


def _without_safetensors(model: str, revision: str | None) -> InputError:
    """What a hub repository has instead, and what to do about it."""
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(model, revision=revision)
    except Exception:  # it would only have made the message better, whatever a network can raise
        names = []
    pickles = sorted(name for name in names if name.endswith(_PICKLE_SUFFIXES) and name != "training_args.bin")
    if pickles or not names:
        found = f" but {pickles[0]}, a pickle, which can run code when it is opened" if pickles else ""
        return InputError(
            f"{model}: the hub repository has no safetensors weights{found}",
            hint=PICKLE_HINT.format(model=model),
        )
    return InputError(
        f"{model}: the hub repository has no safetensors weights", hint="name a repository that has model.safetensors"
    )
