"""The model card of an output says how to load it, and that works as printed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import logits, make
from huggingface_hub.repocard import metadata_load

from mpocli.config.budget import Budget
from mpocli.config.decompose import DecomposeConfig
from mpocli.hf.card import license_of, model_card
from mpocli.io.manifest import Manifest
from mpocli.methods.decompose import run as decompose
from mpocli.nn import MPOModule


def test_the_card_names_what_the_modules_are(tmp_path: Path) -> None:
    make("gpt2", tmp_path / "dense")
    for name, budget, what in (
        ("svd", Budget(ratio=0.5, shapes="svd"), "truncated SVDs"),
        ("mpo", None, "matrix product"),
    ):
        decompose.run(str(tmp_path / "dense"), DecomposeConfig(budget=budget), tmp_path / name)
        assert f", as {what}" in (tmp_path / name / "README.md").read_text()


@pytest.mark.parametrize("family", ["bert-classifier", "gpt2", "t5"])
def test_the_code_on_the_card_loads_the_whole_model(family: str, tmp_path: Path) -> None:
    dense = make(family, tmp_path / "dense")
    decompose.run(str(tmp_path / "dense"), DecomposeConfig(), tmp_path / "mpo")
    card = (tmp_path / "mpo" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(code.replace("path/to/this/directory", str(tmp_path / "mpo")), names)
    model = names["model"]
    assert type(model) is type(dense) and any(isinstance(module, MPOModule) for module in model.modules())
    assert torch.allclose(logits(model.eval()), logits(dense), atol=1e-4)


def _card(path: Path, base: dict[str, Any], **more: Any) -> tuple[Any, str]:
    """The front matter as the hub reads it, and what is below it, without what stands in code spans."""
    manifest = Manifest(base_model=base, history=more.pop("history", ()))
    path.write_text(model_card(manifest, **more), encoding="utf-8")
    body = path.read_text(encoding="utf-8").split("---\n", 2)[2]
    return metadata_load(path), re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "<code>", body)


_BAD = [
    "org/model\nlicense: mit\ntags:\n- evil",
    "a: b",
    "x # y",
    "[click](https://example.org)",
    "<script>alert(1)</script>",
    "www.example.org",
    "`code` ``` more",
    "\x1b[31mred\u202e",
    "---",
    "true",
    "*bold* ![image](x.png)",
    "\ud800",
]


@pytest.mark.parametrize("name", _BAD)
def test_a_foreign_name_adds_no_key_and_no_markup_to_the_card(name: str, tmp_path: Path) -> None:
    step = {"command": name, "options": {name: name, "layers": [name]}}
    front, body = _card(tmp_path / "card.md", {"name": name, "revision": "abc"}, history=(step,), class_name=name)
    assert set(front) <= {"library_name", "base_model"} and front.get("base_model", name) == name
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e<*\[]|https?:|www[.]", body.replace("<code>", "")), body
    assert all(line.startswith(("#", "- <code>", "An ordinary", "Made by")) for line in body.splitlines() if line), body


def test_an_ordinary_name_stays_readable_on_the_card(tmp_path: Path) -> None:
    base = {"name": "google-bert/bert_base.v1-x", "revision": "abc"}
    front, body = _card(tmp_path / "card.md", base)
    assert front == {"library_name": "transformers", "base_model": base["name"]}
    assert f"# {base['name']}\n" in body


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        ("license: 'mit' # ours", {"license": "mit"}),
        ("license:\n- mit\n- cc-by-4.0", {"license": ["mit", "cc-by-4.0"]}),
        ("license: other\nlicense_name: my own\nlicense_link: https://example.org/l", None),
        ("license: 'x\\ny: z'", None),
        ('license: "mit\\nbase_model: other"', {"license": "mit\\nbase_model: other"}),
        ("license: {a: b}", {}),
        ("license: [1, 2]", {}),
        ("license: [unclosed", {}),
        ("- a list", {}),
    ],
)
def test_the_licence_of_the_source_is_kept_as_it_is_written_there(
    front: str, expected: dict[str, Any] | None, tmp_path: Path
) -> None:
    source = tmp_path / "source.md"
    source.write_text(f"---\n{front}\n---\n# A model\n")
    found, _ = _card(tmp_path / "card.md", {}, license=license_of(source))
    assert found == {"library_name": "transformers", **(metadata_load(source) if expected is None else expected)}
    assert license_of(tmp_path / "absent.md") == {}
    os.mkfifo(tmp_path / "pipe.md")
    assert license_of(tmp_path / "pipe.md") == {}
