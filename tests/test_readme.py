"""The commands in the README and the recipes run as they are printed, on tiny models of the same names."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    line.strip().removeprefix("$ ").partition(" #")[0].strip()
    for block in re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    for line in block.splitlines()
    if re.match(r"\s*(\$ )?mpocli \w", line)
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the README's hub names are local models."""
    directory = tmp_path_factory.mktemp("shop")
    bert = {"hidden_size": 768, "num_hidden_layers": 1, "vocab_size": 400, "intermediate_size": 3072}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tf.BertForMaskedLM(tf.BertConfig(**bert)).save_pretrained(directory / "bert-base-uncased")
        config = tf.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=300, n_positions=32)
        tf.GPT2LMHeadModel(config).save_pretrained(directory / "gpt2")
        t5 = tf.T5Config(d_model=768, d_ff=3072, num_layers=1, num_heads=2, vocab_size=300, decoder_start_token_id=0)
        tf.T5ForConditionalGeneration(t5).save_pretrained(directory / "t5-base")
    return directory


def run(arguments: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        arguments, cwd=directory, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 8
    assert any("--dry-run" in command for command in COMMANDS)


def test_the_readme_s_commands_run_in_their_order(shop: Path) -> None:
    for number, command in enumerate(COMMANDS):
        words = shlex.split(command)
        assert words[0] == "mpocli"
        # Printed one after the other they would meet outputs of the ones before.
        extra = ["--overwrite"] if words[1] in ("decompose", "merge") else []
        result = run([sys.executable, "-m", *words, *extra], shop)
        assert result.returncode == 0, (number, command, result.stderr)


def test_the_decompose_recipe_runs_from_end_to_end(shop: Path) -> None:
    result = run(["bash", str(ROOT / "recipes" / "decompose.sh"), "gpt2", "12", "recipe"], shop)
    assert result.returncode == 0, result.stderr
    assert "no mismatch" in result.stdout
    merged = tf.AutoModelForCausalLM.from_pretrained(shop / "recipe" / "dense")
    assert merged.num_parameters() == tf.AutoModelForCausalLM.from_pretrained(shop / "gpt2").num_parameters()
