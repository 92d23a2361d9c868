"""The model card of an output says how to load it, and that works as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from families import logits, make

from mpocli.methods import decompose
from mpocli.methods.budget import Budget
from mpocli.methods.decompose_plan import DecomposeConfig
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
