"""What is asked of the hub, and what is said of repositories that cannot be used. No network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from mpocli.errors import InputError, UsageError
from mpocli.hf.hub import Source, resolve

COMMIT = "0123456789abcdef"
Hub = Callable[..., None]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Makes every hub name a repository of these files; `reachable` is whether they can be listed."""

    def make(*names: str, reachable: bool = True) -> None:
        def snapshot_download(model: str, *, allow_patterns: Any, ignore_patterns: Any, **_: object) -> str:
            for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
                path = tmp_path / COMMIT / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            return str(tmp_path / COMMIT)

        def list_repo_files(self: object, model: str, **_: object) -> list[str]:
            if not reachable:
                raise ConnectionError("no network")
            return list(names)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)

    return make


def _fetched(source: Source) -> set[str]:
    return {str(path.relative_to(source.directory)) for path in source.directory.rglob("*") if path.is_file()}


def test_a_hub_model_is_named_by_its_id_and_its_revision_is_the_commit(hub: Hub, tmp_path: Path) -> None:
    hub("config.json", "model.safetensors")
    assert resolve("some/model", revision="main") == Source(tmp_path / COMMIT, "some/model", COMMIT)


@pytest.mark.parametrize(
    "shards",
    [
        ("model.safetensors",),
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ("model.safetensors-00001-of-00002.safetensors", "model.safetensors-00002-of-00002.safetensors"),
        ("pytorch_model-00001-of-00001.safetensors",),
    ],
)
def test_the_weights_are_downloaded_once_whatever_copies_of_them_there_are(shards: tuple[str, ...], hub: Hub) -> None:
    wanted = {"config.json", "tokenizer.json", "model.safetensors.index.json", *shards}
    hub(
        *wanted,
        "pytorch_model.bin",
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "model.fp16.safetensors",
        "model.bf16-00001-of-00002.safetensors",
        "model-00001-of-00002.fp16.safetensors",
        "model.non_ema.safetensors",
        "onnx/model.safetensors",
        "original/consolidated.00.safetensors",
        "tf_model.h5",
        "modeling.py",
    )
    assert _fetched(resolve("some/model")) == wanted


def test_code_is_downloaded_only_where_it_is_trusted(hub: Hub) -> None:
    hub("config.json", "model.safetensors", "modeling.py")
    assert "modeling.py" not in _fetched(resolve("some/model"))
    assert "modeling.py" in _fetched(resolve("some/model", trust_remote_code=True))


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "a/b.ckpt"])
def test_a_repository_of_pickles_gets_the_advice_to_convert_it(pickle: str, hub: Hub) -> None:
    hub("config.json", "training_args.bin", pickle)
    with pytest.raises(InputError) as caught:
        resolve("some/model")
    assert "some/model" in caught.value.message and pickle in caught.value.message
    assert 'from_pretrained("some/model").save_pretrained' in caught.value.hint


def test_the_advice_comes_also_where_the_repository_cannot_be_listed(hub: Hub) -> None:
    hub("config.json", "pytorch_model.bin", reachable=False)
    with pytest.raises(InputError, match="no safetensors weights") as caught:
        resolve("some/model")
    assert "save_pretrained" in caught.value.hint


def test_a_repository_without_any_weights_gets_no_advice_about_pickles(hub: Hub) -> None:
    hub("config.json", "training_args.bin", "tokenizer.json")
    with pytest.raises(InputError, match="no safetensors weights") as caught:
        resolve("some/model")
    assert "pickle" not in str(caught.value) and "save_pretrained" not in caught.value.hint


def test_a_repository_without_a_config_is_refused(hub: Hub) -> None:
    hub("model.safetensors")
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve("some/model")


def test_a_revision_of_a_local_directory_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)).directory == tmp_path
    with pytest.raises(UsageError, match=r"‹revision› is for hub models, .* is a local directory"):
        resolve(str(tmp_path), revision="main")
