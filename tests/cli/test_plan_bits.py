"""Bits beside bonds: budgets of bytes that are met, errors that are those of what is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

from cli import tasks
from cli.shell import Cli, refused, succeeded, tree
from mpocli.hf.artifact import Checkpoint
from mpocli.io.encodings.corrected import Corrected
from mpocli.io.encodings.quantised import Quantised
from mpocli.methods.planner import rounded

Plan = Callable[..., dict[str, Any]]
BLOCKS = ["--layers", "attention,ffn"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 and a BERT of one layer."""
    made = tmp_path_factory.mktemp("wide")
    sizes: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": 64},
        "bert": {"hidden_size": 64, "intermediate_size": 128},
    }
    for kind, options in sizes.items():
        tasks.save(kind, made / kind, layers=1, initializer_range=0.2, **options)
    return made


@pytest.fixture
def run(cli: Cli, work: Path) -> Plan:
    """The report of a command that succeeds."""

    def done(verb: str, model: Path, *more: object) -> dict[str, Any]:
        out = ["-o", "out", "--overwrite"] if verb == "decompose" else []
        return succeeded(cli(verb, model, *BLOCKS, *more, *out, "--json")).json

    return done


def text(lab: Path) -> list[object]:
    return ["--calibrate", lab / "train.txt", "--samples", 24, "--seq-len", 16]


def chosen(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [module for module in report["modules"] if module["reason"] != "not selected"]


def weights(directory: Path) -> dict[str, Tensor]:
    """Of the layers, dense."""
    model = tf.AutoModelForCausalLM.from_pretrained(directory)
    found = {}
    for name, module in model.named_modules():
        weight = module.weight_matrix() if hasattr(module, "weight_matrix") else getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2 and ".h." in name:
            found[name] = (weight if hasattr(module, "weight_matrix") else weight.T).detach().double()
    return found


@pytest.mark.parametrize(
    ("share", "more"),
    [(0.16, []), (0.09, []), (0.2, ["--bits", "4,2"]), (0.28, ["--bits", "16,8"]), (0.1, ["--dtype", "bfloat16"])],
)
def test_the_bytes_of_a_plan_are_those_of_the_files_and_the_budget_is_met(
    share: float, more: list[object], run: Plan, wide: Path, lab: Path, work: Path
) -> None:
    bits = [] if "--bits" in more else ["--bits", "auto"]
    words = ["--ratio-bytes", share, *bits, *more, *text(lab)]
    plan, made = run("plan", wide / "gpt2", *words), run("decompose", wide / "gpt2", *words)
    stored = (work / "out" / "model.safetensors").stat().st_size
    assert plan["totals"]["bytes"] == made["totals"]["bytes"] == stored
    assert [module["form"] for module in plan["modules"]] == [module["form"] for module in made["modules"]]
    held = Checkpoint.open(str(work / "out")).encodings
    itemsize = 2 if "--dtype" in more else 4
    dense = itemsize * sum(module["dense_params"] for module in chosen(made))
    plain = run("decompose", wide / "gpt2", "--max-error", 1e-6, *(more if "--dtype" in more else []))
    limit = plain["totals"]["bytes"] - dense + int(share * dense)
    # A step of matrices this small is some per cent of what a budget leaves for them.
    assert limit - 0.03 * share * dense - 1500 < stored <= limit
    assert held and all(isinstance(one, Quantised | Corrected) for one in held.values())
    assert {one.code_bits for one in held.values()} <= set(
        map(int, more[1].split(",")) if "--bits" in more else (8, 4, 3, 2)  # type: ignore[attr-defined]
    )


def test_errors_are_those_of_what_is_loaded_and_few_bytes_are_ranks_and_bits(
    run: Plan, wide: Path, lab: Path, work: Path
) -> None:
    before = weights(wide / "gpt2")
    for share, is_chain in ((0.14, False), (0.035, True)):
        report = run("decompose", wide / "gpt2", "--ratio-bytes", share, "--bits", "auto", *text(lab))
        after = weights(work / "out")
        made = [module for module in chosen(report) if module["form"]]
        assert any("rank" in module["form"] for module in made) >= is_chain
        for module in made:
            old, new = before[module["name"]], after[module["name"]]
            assert module["relative_error"] == pytest.approx(float((old - new).norm() / old.norm()), rel=1e-3)
            assert module["action"] == ("mpo" if "rank" in module["form"] else "quantised")


def test_more_bytes_never_lose_more_and_bits_lose_less_than_bonds_alone(run: Plan, wide: Path, lab: Path) -> None:
    def lost(*words: object) -> float:
        modules = chosen(run("decompose", wide / "gpt2", "--weights", "input", *words, *text(lab)))
        return sum(module["weighted_error"] ** 2 for module in modules if module["weighted_error"])

    by_size = [lost("--ratio-bytes", share, "--bits", "auto") for share in (0.08, 0.14, 0.27)]
    assert by_size == sorted(by_size, reverse=True)
    assert by_size[1] < 0.2 * lost("--ratio-bytes", 0.14)


def test_tables_heads_and_models_without_text_are_rounded_too(run: Plan, wide: Path, work: Path, cli: Cli) -> None:
    made = succeeded(
        cli("decompose", wide / "bert", "--max-bytes", "45kB", "--bits", "8,4,3,2", "-o", "out", "--json")
    ).json
    assert any(module["form"] and module["role"] == "embedding" for module in made["modules"])
    assert (work / "out" / "model.safetensors").stat().st_size <= 45_000
    ids = torch.arange(6, 30).reshape(2, 12)
    with torch.no_grad():
        found = tf.AutoModel.from_pretrained(work / "out").eval()(ids).last_hidden_state
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ratio", 0.5, "--bits", "auto"], "--bits without --max-bytes or --ratio-bytes"),
        (["--ratio-bytes", 0.1, "--bits", "5"], "--bits '5': the widths are 16, 8, 4, 3, 2"),
        (["--ratio-bytes", 0.1, "--bits", "auto", "--sequential"], "--sequential with --bits"),
        (["--ratio-bytes", 0.1, "--bits", "auto", "--shapes", "paper"], "--bits with --shapes paper"),
        (["--ratio-bytes", 1.5], "--ratio-bytes 1.5"),
        (["--ratio-bytes", 0.1, "--ratio", 0.5], "a plan has one budget"),
        (["--ratio-bytes", "0.001", "--bits", "auto"], "smallest formats of the rest"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    words: list[object], said: str, cli: Cli, wide: Path, lab: Path, work: Path
) -> None:
    refused(cli("plan", wide / "gpt2", *BLOCKS, *words, *text(lab)), 2, said)
    assert not tree(work)


def test_a_correction_is_chosen_where_it_pays_and_comes_back_whole(
    run: Plan, wide: Path, lab: Path, work: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two bits and what corrects them alone, as if nothing else were there to choose from."""
    monkeypatch.setattr(rounded, "_MATRIX", {2: rounded._MATRIX[2][:1]})
    monkeypatch.setattr(rounded, "_FACTOR", {})
    before = weights(wide / "gpt2")
    report = run("decompose", wide / "gpt2", "--ratio-bytes", 0.2, "--bits", "8,2", *text(lab))
    made = [module for module in chosen(report) if "+ rank" in (module["form"] or "")]
    assert made and {"corrected"} <= {one.name for one in Checkpoint.open(str(work / "out")).encodings.values()}
    after = weights(work / "out")
    for module in made:
        old, new = before[module["name"]], after[module["name"]]
        assert module["relative_error"] == pytest.approx(float((old - new).norm() / old.norm()), rel=1e-3)
    model = tf.AutoModelForCausalLM.from_pretrained(work / "out")
    model.save_pretrained(work / "again")
    first, again = (load_file(work / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first if name in again)
    assert sum(name.endswith("_left") for name in again) == len(made)
    assert "no mismatch" in succeeded(cli("inspect", "out", "--verify")).out
    succeeded(cli("merge", "out", "-o", "merged"))
    for name, weight in weights(work / "merged").items():
        assert torch.equal(weight.float(), after[name].float())


def test_what_is_in_few_bits_already_is_left_and_a_share_is_of_the_bytes_that_there_are(
    cli: Cli, wide: Path, lab: Path, work: Path
) -> None:
    few = ["--layers", "ffn"]
    succeeded(cli("quantize", wide / "gpt2", *few, "-o", "few"))
    refused(cli("plan", "few", *few, "--ratio-bytes", 0.5, "--bits", "auto"), 3, "are in few bits already", "merge")
    done = succeeded(cli("decompose", "few", *BLOCKS, "--ratio-bytes", 0.2, "--bits", "auto", "-o", "more"))
    assert "left as it was: 2 ffn matrices: is in few bits already" in done.err and "load it with" in done.err
    assert "rounded" in done.out and "nothing was decomposed" not in done.err
    before, after = ((work / name / "model.safetensors").stat().st_size for name in ("few", "more"))
    attention = 4 * (64 * 192 + 64 * 64)
    assert before - attention < after <= before - 0.8 * attention
    report = succeeded(cli("inspect", "few", "--json")).json
    assert [m["relative_error"] for m in report["modules"] if m["bits"]] == [None, None]
    succeeded(cli("sparsify", wide / "gpt2", "--method", "magnitude", "--sparsity", 0.5, *few, "-o", "thin"))
    thin = (work / "thin" / "model.safetensors").stat().st_size
    succeeded(cli("decompose", "thin", *few, "--ratio-bytes", 0.4, "--bits", "auto", "-o", "thinner"))
    assert 0 < (work / "thinner" / "model.safetensors").stat().st_size < thin
