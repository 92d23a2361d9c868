"""config.json, looked at before transformers builds anything of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpocli.errors import InputError
from mpocli.hf.foreign import foreign
from mpocli.io.json_file import read_json
from mpocli.io.readable import is_there

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG = "config.json"
# Layers that a configuration may have whatever the files hold, and labels and the like that it may count.
_LAYERS, _THINGS = 10_000, 1_000_000
# Beside config.json, what transformers reads of a directory as JSON objects; tokenizers have files of their own.
SIDE_FILES = ("generation_config.json", "adapter_config.json")
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as it stands. Raises `InputError` where it is no JSON object, and where what mpocli itself reads of
    it is not of the type that transformers writes."""
    path = directory / CONFIG
    data = read_json(path)
    for key, (is_right, expected) in _TYPES.items():
        if data.get(key) is not None and not is_right(data[key]):
            raise InputError(f"{path}: {key} is {_shown(data[key])}, {expected} was expected", hint=_RESTORE)
    return data


_RESTORE = "restore config.json from where the model came from"


def _is_names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _is_labels(value: object) -> bool:
    return isinstance(value, dict) and all(
        key.removeprefix("-").isdecimal() and isinstance(name, str | int) for key, name in value.items()
    )


_TYPES: dict[str, tuple[Any, str]] = {
    "architectures": (_is_names, "a list of class names"),
    "model_type": (lambda value: isinstance(value, str), "a name"),
    "id2label": (_is_labels, "an object of class names by number"),
    "quantization_config": (lambda value: isinstance(value, dict), "an object"),
    "is_encoder_decoder": (lambda value: isinstance(value, bool), "true or false"),
}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def class_name(config: PretrainedConfig) -> str:
    """The class that a checkpoint was saved from, "" where it does not say."""
    names = getattr(config, "architectures", None) or [""]
    return str(names[0] or "")


def check_counts(data: Mapping[str, Any], directory: Path, tensors: int) -> None:
    """`InputError` for more layers, labels or the like than a model of so many stored tensors can have.

    transformers makes a list or a module for each, which would take hours or all memory before anything was compared.
    """
    for key, value in _counts(data):
        most = max(_LAYERS, tensors) if "layer" in key else _THINGS
        if value > most:
            raise InputError(
                f"{directory / CONFIG}: {key} is {value:,}, and the files hold {tensors:,} tensors", hint=_RESTORE
            )


def _counts(data: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Integers that say how many there are of something, those of nested configurations too."""
    for key, value in data.items():
        if isinstance(value, dict) and key != "quantization_config":
            yield from _counts(value)
        elif isinstance(value, int) and ("layer" in key or key.startswith(("num_", "n_"))):
            yield key, value


def load_config(directory: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """transformers' configuration of a model directory; `InputError` where it has none that can be used."""
    from transformers import AutoConfig

    problem = f"{directory}: its config.json is not one that this transformers can use"
    try:
        with foreign(problem, hint="check `model_type`, or update transformers"):
            return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except InputError as error:
        if "trust_remote_code" in error.message:
            raise InputError(error.message, hint="pass ‹trust_remote_code› if you trust its code") from error
        raise


def check_side_files(directory: Path, names: tuple[str, ...] = SIDE_FILES) -> None:
    """`InputError` for a file that transformers would read as a JSON object, and that is none."""
    for name in names:
        if is_there(directory / name):
            read_json(directory / name)
