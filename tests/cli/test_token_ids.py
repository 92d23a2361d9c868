"""A tokenizer that knows more tokens than the model has rows, in every command that feeds tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cli import tasks
from cli.shell import Cli, refused, succeeded

SIZE = len(tasks.VOCABULARY)
LM = ["--task", "lm", "--max-length", 16]
SST = ["--task", "sst2", "--max-length", 16]
E2E = ["--task", "text2text", "--text-column", "mr", "--label-column", "ref", "--max-length", 24]
FILES = ("dev.txt", "dev.tsv", "e2e-dev.csv")
TEXT = ["--seq-len", 16, "--samples", 4]


@pytest.fixture
def larger(lab: Path, tmp_path: Path) -> Path:
    """Copies of the models, to whose tokenizers a word of the texts was added, and a padding token."""
    for name in ("gpt2", "t5", "masked", "body"):
        made = Path(shutil.copytree(lab / name, tmp_path / "models" / name))
        words = AutoTokenizer.from_pretrained(made)
        words.add_tokens(["strange"])
        words.add_special_tokens({"pad_token": "[NEWPAD]"})
        words.save_pretrained(made)
    for name in FILES:
        text = (lab / name).read_text()
        (tmp_path / name).write_text(text)
        lines = text.splitlines()
        quote = '"' if lines[-1].startswith('"') else ""
        lines[-1] = f"{quote}strange {lines[-1].removeprefix(quote)}"
        (tmp_path / f"strange-{name}").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_padding_token_that_was_never_resized_for_pads_with_another(larger: Path, cli: Cli, lab: Path) -> None:
    """The last window is a partial one, the rows are of several lengths, and the metrics are those of the tokenizer
    that the model was made with."""
    for name, options, file in (("gpt2", LM, "dev.txt"), ("masked", LM, "dev.txt"), ("t5", E2E, "e2e-dev.csv")):
        options = [*options, "--eval", larger / file, "--json"]
        found = succeeded(cli("eval", larger / "models" / name, *options)).json
        assert found["metrics"] == succeeded(cli("eval", lab / name, *options)).json["metrics"]


COMMANDS = {
    "eval of a decoder": ("gpt2", ["eval", *LM, "--eval", "dev.txt"]),
    "eval of an encoder": ("masked", ["eval", *LM, "--eval", "dev.txt"]),
    "eval of an encoder-decoder": ("t5", ["eval", *E2E, "--eval", "e2e-dev.csv"]),
    "plan": ("gpt2", ["plan", "--ratio", "0.5", "--calibrate", "dev.txt", *TEXT]),
    "decompose of an encoder-decoder": ("t5", ["decompose", "--ratio", "0.5", "--calibrate", "dev.txt", *TEXT]),
    "wanda": ("gpt2", ["sparsify", "--method", "wanda", "--sparsity", "0.5", "--calibrate", "dev.txt", *TEXT]),
    "finetune": ("body", ["finetune", *SST, "--train", "dev.tsv", "--steps", 1]),
    "sparsify with training": (
        "gpt2",
        ["sparsify", "--method", "movement", "--sparsity", "0.5", *LM, "--train", "dev.txt", "--steps", 2],
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_token_that_the_model_has_no_row_for_is_named_with_both_numbers(
    case: str, larger: Path, cli: Cli, work: Path
) -> None:
    name, command = COMMANDS[case]
    verb, *options = [larger / f"strange-{word}" if word in FILES else word for word in command]
    words = ("'strange'", f"id {SIZE}", f"{SIZE} rows")
    refused(cli(verb, larger / "models" / name, *options), 3, *words)
    assert not list(work.iterdir())
