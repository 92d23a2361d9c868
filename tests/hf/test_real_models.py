"""The same promises on trained models, where a checkout has them beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from mpocli.config.decompose import DecomposeConfig
from mpocli.methods.decompose import run as decompose
from mpocli.methods.inspect import run as inspect

MODELS = Path(__file__).resolve().parents[2].parent / "shared" / "models"
CLASSES = {
    "minilm-l6": transformers.AutoModel,  # two of its layers: the others and the table take ten seconds
    "llama-stories260k": transformers.AutoModelForCausalLM,
    "gpt2-wikitext2-mini": transformers.AutoModelForCausalLM,
    "t5-e2e-mini": transformers.AutoModelForSeq2SeqLM,
}


@pytest.mark.parametrize("name", CLASSES)
def test_lossless_logits_equal_the_dense_ones_on_text(name: str, tmp_path: Path) -> None:
    directory = MODELS / name
    if not directory.is_dir():
        pytest.skip(f"the trained model {name} is not beside this checkout")
    some = ("*layer.[01].*",) if name == "minilm-l6" else ()
    decompose.run(str(directory), DecomposeConfig(targets=some), tmp_path / "mpo")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "mpo")
    inputs = dict(tokenizer("The king of the north had a small house by the river .", return_tensors="pt"))
    if name == "t5-e2e-mini":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    outputs = []
    for place in (directory, tmp_path / "mpo"):
        model = CLASSES[name].from_pretrained(place).eval()
        with torch.no_grad():
            outputs.append(model(**inputs)[0])
    assert float((outputs[0] - outputs[1]).abs().max()) <= 1e-5 * max(1.0, float(outputs[0].abs().max()))
    report = inspect.run(str(tmp_path / "mpo"), verify=True, base=str(directory))
    assert report.problems == ()
    # As stored in float32; the decomposition itself is exact to 1e-14.
    assert max(view.relative_error or 0.0 for view in report.modules) < 1e-6
