"""`mpocli squeeze`: the right bond, bounds that hold, the last model inside the drop, killed and resumed."""

from __future__ import annotations

import json
import math
import shutil
import signal
import xml.etree.ElementTree as ET
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from cli import tasks
from cli.processes import Moment, Server
from cli.shell import WEIGHTS, Cli, edited, refused, rewrite, succeeded, tree
from mpocli.config.decompose import DecomposeConfig
from mpocli.hf.shrink import mpo_modules
from mpocli.methods.decompose import run as decompose
from mpocli.methods.squeeze.choice import Candidate, best
from mpocli.methods.training import fit as fitting
from mpocli.train.loop.optimizer_state import take_moments

Squeeze = Callable[..., dict[str, Any]]
PLANTED = "bert.encoder.layer.1.intermediate.dense"
RANK = 5


def sst2(lab: Path, *more: object) -> list[object]:
    files = ["--task", "sst2", "--train", lab / "train.tsv", "--eval", lab / "dev.tsv", "--max-length", 32]
    trains = ("--finetune-steps", 0) not in pairwise(more)
    return [*files, *(["--batch-size", 8, "--lr", 1e-3] if trains else []), "--json", *more]


@pytest.fixture(scope="module")
def tuned(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers that tells good words from bad ones, decomposed without loss; one matrix of it is poor:
    the unfolding at its left central bond has rank `RANK`."""
    made = tmp_path_factory.mktemp("tuned")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tasks.save("bert", made / "body", initializer_range=0.1, layers=2, **still)
    decompose.run(str(made / "body"), DecomposeConfig(), made / "mpo")
    from mpocli.config.data import DataOptions
    from mpocli.config.optimisation import Optimisation
    from mpocli.methods.finetune import run as finetune

    data = DataOptions("sst2", train=str(lab / "train.tsv"), max_length=32)
    how = Optimisation(lr=3e-3, batch_size=8)
    finetune.run(str(made / "mpo"), finetune.FinetuneConfig(data, how, epochs=8, update="all"), made / "tuned")
    rewrite(made / "tuned", _plant)
    # Not what was measured: the manifest's errors and hashes are of the weights before.
    (made / "tuned" / "mpo.json").unlink()
    return made / "tuned"


def _plant(tensors: dict[str, Any]) -> None:
    core = tensors[f"{PLANTED}.core_2"]
    left, right = core.shape[0], core[0].numel()
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(left, RANK, generator=generator), torch.randn(RANK, right, generator=generator)
    poor = factors[0] @ factors[1]
    tensors[f"{PLANTED}.core_2"] = (poor * core.norm() / poor.norm()).reshape(core.shape).contiguous()


@pytest.fixture
def squeeze(cli: Cli, lab: Path, tuned: Path, work: Path) -> Squeeze:
    def run(out: str, *more: object, code: int = 0, model: Path | None = None) -> dict[str, Any]:
        done = cli("squeeze", model or tuned, *sst2(lab, *more), "-o", out)
        assert done.code == code, done.err
        return done.json

    return run


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / WEIGHTS)


def load(directory: Path) -> Any:
    return tf.AutoModelForSequenceClassification.from_pretrained(directory)


# --- which bond, and what a cut costs ---------------------------------------------------------------------------------


def test_a_planted_redundant_matrix_is_found_first_and_taken_to_its_rank(
    squeeze: Squeeze, tuned: Path, work: Path
) -> None:
    start = mpo_modules(load(tuned))[PLANTED].bond_dims[2]
    rounds = start - RANK + 1
    report = squeeze("out", "--max-drop", 1, "--rounds", rounds, "--step", 1, "--finetune-steps", 2, "--lr", 1e-5)
    cuts = [cut for record in report["rounds"] for cut in record["cuts"]]
    assert len(cuts) == rounds
    # What carries nothing goes first, down to the planted rank and no further; the next cut costs, wherever it is.
    assert [(cut["module"], cut["bond"], cut["to_dim"]) for cut in cuts[:-1]] == [
        (PLANTED, 2, width) for width in range(start - 1, RANK - 1, -1)
    ]
    scale = float(mpo_modules(load(tuned))[PLANTED].weight_matrix().detach().norm())
    assert all(cut["true_error"] <= 1e-3 * scale for cut in cuts[:-1])
    assert cuts[-1]["true_error"] > 0.01 * scale


@pytest.mark.parametrize(
    "options", [["--tie", "kind", "--step", "20%"], ["--per-param", "--step", 4]], ids=["kind", "matrix"]
)
def test_the_recorded_bound_is_never_below_the_true_error_and_both_are_right(
    options: list[object], squeeze: Squeeze, tuned: Path, work: Path
) -> None:
    """With nothing trained in between, the first and the last model say what all cuts together have lost."""
    report = squeeze("out", "--max-drop", 1, "--rounds", 9, "--finetune-steps", 0, *options)
    cuts = [cut for record in report["rounds"] for cut in record["cuts"]]
    assert cuts and all(cut["error_bound"] >= cut["true_error"] > 0 for cut in cuts)
    before, after = mpo_modules(load(tuned)), mpo_modules(load(work / "out"))
    for name in {cut["module"] for cut in cuts}:
        own = [cut for cut in cuts if cut["module"] == name]
        lost = float((before[name].weight_matrix() - after[name].weight_matrix()).double().norm())
        if len(own) == 1:
            assert abs(lost - own[0]["true_error"]) <= 1e-4 * lost
        assert lost <= sum(cut["error_bound"] for cut in own)
        for cut in own:  # tight but for rounding, where no padding takes part
            padded = before[name].sites.padded_shape != before[name].shape
            assert padded or cut["error_bound"] <= cut["true_error"] + 1e-4 * float(before[name].weight_matrix().norm())


def cheapest(model: Any, share: float, *, per_param: bool = False) -> tuple[str, int, int, float]:
    """By numpy, from the unfolded matrices: module, bond, width to cut to, and what that loses."""
    found = []
    for name, module in mpo_modules(model).items():
        for bond in (module.central, module.central + 1):
            n, sites = module.sites.sites, module.sites
            padded = torch.zeros(sites.padded_shape)
            padded[: module.shape[0], : module.shape[1]] = module.weight_matrix().detach()
            axes = [axis for k in range(n) for axis in (k, n + k)]
            rows = math.prod(sites.site_sizes[:bond])
            unfolded = padded.reshape(*sites.out_dims, *sites.in_dims).permute(axes).reshape(rows, -1)
            values = np.linalg.svd(unfolded.numpy(), compute_uv=False)
            width = module.bond_dims[bond]
            kept = width - math.ceil(share * width)
            bound = float(np.linalg.norm(values[kept:width]))
            # Both cores that meet there lose a slice for every dimension.
            slices = sites.site_sizes[bond - 1] * module.bond_dims[bond - 1]
            slices += sites.site_sizes[bond] * module.bond_dims[bond + 1]
            score = bound / ((width - kept) * slices) if per_param else bound
            if name != PLANTED and sites.padded_shape == module.shape:
                found.append((score, name, bond, kept, bound))
    return min(found)[1:]


@pytest.mark.parametrize("per_param", [False, True])
def test_a_round_takes_the_least_bound_of_numpy(per_param: bool, squeeze: Squeeze, tuned: Path, work: Path) -> None:
    """The cut is the cheapest of all, or for what it saves; the second of the cores as training has left them."""
    options = ["--max-drop", 1, "--finetune-steps", 4, "--lr", 0.02, "--step", "30%"]
    options += ["--ignore", PLANTED, "--ignore", "*word_embeddings", *(["--per-param"] if per_param else [])]
    squeeze("one", *options, "--rounds", 1)
    report = squeeze("two", *options, "--rounds", 2)
    for record, directory in zip(report["rounds"], (tuned, work / "one"), strict=True):
        (cut,) = record["cuts"]
        name, bond, kept, bound = cheapest(load(directory), 0.3, per_param=per_param)
        assert (cut["module"], cut["bond"], cut["to_dim"]) == (name, bond, kept)
        assert abs(cut["error_bound"] - bound) <= 1e-4 * bound


def test_tied_kinds_are_cut_together_to_one_cap(squeeze: Squeeze, work: Path) -> None:
    report = squeeze(
        "out", "--max-drop", 1, "--rounds", 4, "--finetune-steps", 0, "--tie", "kind", "--layers", "attention"
    )
    for record in report["rounds"]:
        assert len(record["cuts"]) == 8  # q, k, v and o of two layers
        assert {cut["role"] for cut in record["cuts"]} == {"attention"}
        assert len({(cut["bond"], cut["from_dim"], cut["to_dim"]) for cut in record["cuts"]}) == 1


@pytest.mark.parametrize("order", ["error", "sensitivity"])
def test_an_output_that_nobody_hears_is_cut_first_by_sensitivity_alone(
    order: str, squeeze: Squeeze, tuned: Path, work: Path
) -> None:
    """Layer 1's value projection is turned off behind it, by an output projection of zero: the loss cannot feel its
    bonds, while its norm is the largest of all."""
    heard = "bert.encoder.layer.1.attention"

    def mute(tensors: dict[str, Any]) -> None:
        tensors[f"{heard}.output.dense.core_2"].zero_()
        tensors[f"{heard}.self.value.core_2"].mul_(100)

    shutil.copytree(tuned, work / "mute")
    rewrite(work / "mute", mute)
    chosen = ["--order", order, "--layers", "attention"]
    for glob in ("*output.dense", "*query", "*key"):
        chosen += ["--ignore", glob]
    report = squeeze(
        "out", "--max-drop", 1, "--rounds", 1, "--step", "70%", "--finetune-steps", 0, *chosen, model=work / "mute"
    )
    (cut,) = report["rounds"][0]["cuts"]
    assert (cut["module"] == f"{heard}.self.value") == (order == "sensitivity")


def test_entropy_takes_the_bond_that_uses_least_of_its_width(squeeze: Squeeze, work: Path, tuned: Path) -> None:
    """The planted one: five of sixteen directions."""
    report = squeeze("out", "--max-drop", 1, "--rounds", 2, "--order", "entropy", "--finetune-steps", 0)
    assert all((cut["module"], cut["bond"]) == (PLANTED, 2) for record in report["rounds"] for cut in record["cuts"])


@pytest.mark.parametrize("update", ["auxiliary", "all"])
def test_rounds_are_one_training_with_cuts_in_between(
    update: str, squeeze: Squeeze, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimiser counts its steps on and owns what lives, the data goes on, and the rate warms up once."""
    seen: list[dict[str, Any]] = []
    real = fitting.train_segment

    def watched(trainer: Any, resume: Any = None) -> None:
        given = trainer.moments
        order = list(trainer.sampler)
        real(trainer, resume)
        live = {id(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad}
        held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
        state = take_moments(trainer.model, trainer.optimizer)
        steps = {float(found["step"]) for found in state.values()}
        rates = [trainer.schedule.factor(step) for step in range(3)]
        seen.append({"owns": live == held, "steps": steps, "order": order, "rates": rates, "given": set(given)})

    monkeypatch.setattr(fitting, "train_segment", watched)
    options = ["--max-drop", 1, "--rounds", 4, "--finetune-steps", 3, "--step", "20%", "--per-param"]
    report = squeeze("out", *options, "--update", update)
    assert all(found["owns"] for found in seen)
    assert [found["steps"] for found in seen] == [{3.0}, {6.0}, {9.0}, {12.0}]
    assert not seen[0]["given"] and all(len(found["given"]) > 20 for found in seen[1:])
    # Twelve batches of eight are the whole of the training data: no sentence is seen twice.
    everything = [k for found in seen for k in found["order"]]
    assert len(everything) == len(set(everything)) == 96
    assert [found["rates"] for found in seen] == [[0.0, 1.0, 0.5], *[[1.0, 2 / 3, 1 / 3]] * 3]
    frozen = 0 if update == "all" else sum(core["params"] for core in _central_cores(report))
    assert report["trainable_params"] == report["totals"]["params"] - frozen


def _central_cores(report: dict[str, Any]) -> list[dict[str, int]]:
    model = load(Path(report["out"]))
    return [{"params": module.cores[module.central].numel()} for module in mpo_modules(model).values()]


# --- when it stops, and what is kept ----------------------------------------------------------------------------------


def test_the_last_model_inside_the_drop_is_kept(squeeze: Squeeze, tuned: Path, work: Path) -> None:
    """Its weights are those of a run that was told to stop there."""
    options = ["--max-drop", 0.05, "--step", "60%", "--finetune-steps", 1, "--tie", "kind", "--log-steps", 1]
    report = squeeze("out", *options)
    assert report["stopped"] == "max-drop" and report["kept_round"] == len(report["rounds"]) - 1 >= 1
    drops = [record["drop"] for record in report["rounds"]]
    assert drops[-1] > 0.05 and all(drop <= 0.05 for drop in drops[:-1])
    start = report["metrics_before"]["accuracy"]
    for record in report["rounds"]:
        assert abs(start - record["metrics"]["accuracy"] - record["drop"]) <= 1e-12
    assert report["metrics"] == report["rounds"][-2]["metrics"]
    assert report["totals"]["params"] == report["rounds"][-2]["params"]
    short = squeeze("short", *options, "--rounds", report["kept_round"])
    assert short["stopped"] == "rounds"
    first, second = weights(work / "out"), weights(work / "short")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_patience_goes_on_outside_and_still_keeps_what_was_inside(squeeze: Squeeze, work: Path) -> None:
    options = ["--max-drop", 0.05, "--step", "60%", "--finetune-steps", 1, "--tie", "kind"]
    strict, patient = squeeze("strict", *options), squeeze("patient", *options, "--patience", 2)
    assert patient["rounds"][: len(strict["rounds"])] == strict["rounds"]
    outside = [record["drop"] > 0.05 for record in patient["rounds"]]
    assert outside[-3:] == [True] * 3 and not outside[patient["kept_round"] - 1]
    assert patient["kept_round"] >= strict["kept_round"]


def test_nothing_inside_the_drop_leaves_the_model_as_it_came(squeeze: Squeeze, tuned: Path, work: Path) -> None:
    report = squeeze("out", "--max-drop", 0, "--reference", 1.5, "--finetune-steps", 1)
    assert report["kept_round"] == 0 and len(report["rounds"]) == 1
    first, second = weights(work / "out"), weights(tuned)
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize("direct", [False, True])
def test_targets_are_met_and_hardly_more_than_met(direct: bool, squeeze: Squeeze, tuned: Path, work: Path) -> None:
    more = ["--direct"] if direct else []
    before = sum(tensor.numel() for tensor in weights(tuned).values())
    report = squeeze("out", "--target-params", before - 3001, "--finetune-steps", 1, "--step", "20%", *more)
    assert report["stopped"] == "target" and report["target_met"] is True
    assert report["target_params"] - 250 <= report["totals"]["params"] <= report["target_params"]
    model = load(work / "out")
    stored = sum(parameter.numel() for parameter in model.parameters())
    assert stored == report["totals"]["params"] == report["rounds"][-1]["params"]
    assert len(report["rounds"]) == 1 if direct else len(report["rounds"]) > 1


@pytest.mark.parametrize("option", ["ratio", "bytes"])
def test_ratio_and_bytes_are_targets_too(option: str, squeeze: Squeeze, tuned: Path, work: Path) -> None:
    size = (tuned / WEIGHTS).stat().st_size
    value = 0.95 if option == "ratio" else size - 9000
    report = squeeze("out", f"--target-{option}", value, "--finetune-steps", 0, "--step", "10%", "--tie", "kind")
    found = report["totals"]
    assert found["ratio"] <= 0.95 if option == "ratio" else found["bytes"] <= size - 9000
    assert found["ratio"] > 0.93 if option == "ratio" else found["bytes"] > size - 11000


def test_a_target_that_is_missed_exits_with_5_and_the_output_is_there(squeeze: Squeeze, work: Path) -> None:
    report = squeeze("out", "--target-ratio", 0.5, "--rounds", 2, "--finetune-steps", 0, code=5)
    assert report["target_met"] is False and report["stopped"] == "rounds"
    assert load(work / "out")


def test_a_drop_of_exactly_the_limit_is_inside(squeeze: Squeeze) -> None:
    """1.0 − 0.95 is 0.050000000000000044."""
    start = squeeze("look", "--rounds", 1, "--finetune-steps", 0, "--step", 1)["rounds"][0]["metrics"]["accuracy"]
    options = ["--reference", start + 0.05, "--max-drop", 0.05, "--rounds", 1, "--finetune-steps", 0, "--step", 1]
    report = squeeze("out", *options)
    assert report["rounds"][0]["drop"] == pytest.approx(0.05) and report["kept_round"] == 1


def test_small_enough_and_outside_the_drop_it_only_trains(squeeze: Squeeze) -> None:
    """With patience: no bond is cut below a target that is met."""
    options = ["--target-ratio", 1.2, "--step", "30%", "--tie", "kind", "--finetune-steps", 2, "--max-drop", 0]
    report = squeeze("out", *options, "--reference", 1.5, "--patience", 30, "--rounds", 12, code=5)
    sizes = [record["params"] for record in report["rounds"]]
    met = [size <= report["target_params"] for size in sizes]
    assert any(met) and len(sizes) == 12
    first = met.index(True)
    assert len(set(sizes[first:])) == 1 and all(not record["cuts"] for record in report["rounds"][first + 1 :])


def test_a_round_that_leaves_the_finite_numbers_leaves_the_rounds_before_it(
    squeeze: Squeeze, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, rounds = fitting.train_segment, 0

    def third_fails(trainer: Any, resume: Any = None) -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 3:
            with torch.no_grad():
                next(p for p in trainer.model.parameters() if p.requires_grad).fill_(math.nan)
        real(trainer, resume)

    options = ["--max-drop", 1, "--finetune-steps", 2, "--step", "20%"]
    wanted = squeeze("two", *options, "--rounds", 2)
    monkeypatch.setattr(fitting, "train_segment", third_fails)
    report = squeeze("out", *options, "--rounds", 5)
    assert report["stopped"] == "not-finite" and report["kept_round"] == 2 and report["rounds"] == wanted["rounds"]
    first, second = weights(work / "out"), weights(work / "two")
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_a_head_that_the_files_lack_is_trained_before_bonds_are_judged_by_it(cli: Cli, lab: Path, work: Path) -> None:
    succeeded(cli("decompose", lab / "body", "-o", "mpo"))
    lm = ["--task", "lm", "--train", lab / "train.txt", "--eval", lab / "dev.txt", "--max-length", 24]
    refused(cli("squeeze", "mpo", *lm, "--rounds", 1, "-o", "out"), 3, "cls.predictions", "mpocli finetune")


def test_a_direct_target_below_what_is_left_is_missed_by_exhaustion(squeeze: Squeeze) -> None:
    report = squeeze("out", "--direct", "--target-params", 100, "--finetune-steps", 0, "--step", "50%", code=5)
    assert report["stopped"] == "exhausted" and report["target_met"] is False


def test_per_param_prefers_the_larger_saving_where_the_loss_falls() -> None:
    few, many = (Candidate({}, saved, 0.0) for saved in (10, 100_000))
    losses = iter((1.0, 0.99, 0.98))
    nothing: Any = None
    chosen = best([few, many], "sensitivity", nothing, nothing, per_param=True, loss_after=lambda _: next(losses))
    assert chosen is many


# --- the artifact ---------------------------------------------------------------------------------------------------


def test_history_and_jsonl_have_every_round_and_the_chain_goes_on(
    squeeze: Squeeze, cli: Cli, lab: Path, work: Path
) -> None:
    options = ["--max-drop", 1, "--rounds", 3, "--finetune-steps", 2, "--step", "30%", "--tie", "kind"]
    report = squeeze("out", *options, "--test", lab / "dev.tsv", "--plot", "rounds.svg")
    lines = [json.loads(line) for line in (work / "out" / "squeeze.jsonl").read_text().splitlines()]
    entry = json.loads((work / "out" / "mpo.json").read_text())["history"][-1]
    assert lines == report["rounds"] == entry["rounds"] and len(lines) == 3
    assert entry["command"] == "squeeze" and entry["options"]["step"] == "30%"
    assert report["test_metrics"] == report["metrics"]
    drawn = ET.fromstring((work / "rounds.svg").read_text())
    marks = {group: len(drawn.findall(f".//*[@id='{group}']//{{*}}use")) for group in ("rounds", "start", "kept")}
    assert marks == {"rounds": 4, "start": 1, "kept": 1}  # the start is on the line too
    assert drawn.find(".//*[@id='reference']//{*}path") is not None
    words = " ".join(drawn.itertext())
    assert f"kept: round 3, {report['rounds'][-1]['params']:,} parameters" in words and "accuracy" in words

    found = succeeded(
        cli("eval", "out", "--task", "sst2", "--eval", lab / "dev.tsv", "--max-length", 32, "--json")
    ).json
    assert found["metrics"] == report["metrics"]
    again = squeeze("again", "--max-drop", 1, "--rounds", 1, "--finetune-steps", 1, model=work / "out")
    assert again["totals_before"] == report["totals"]
    assert len((work / "again" / "squeeze.jsonl").read_text().splitlines()) == 1
    succeeded(cli("finetune", "out", *sst2(lab, "--steps", 2), "-o", "tuned"))
    succeeded(cli("merge", "out", "-o", "dense"))
    assert not (work / "tuned" / "squeeze.jsonl").exists() and not (work / "dense" / "squeeze.jsonl").exists()
    table = succeeded(cli("inspect", "out", "--json")).json
    bonds = {module["name"]: module["bond_dims"] for module in table["modules"]}
    for cut in lines[-1]["cuts"]:
        assert bonds[cut["module"]][cut["bond"]] == cut["to_dim"]


@pytest.mark.parametrize("kind", ["masked", "gpt2", "t5"])
def test_tied_heads_shrink_with_their_tables(kind: str, cli: Cli, lab: Path, work: Path) -> None:
    """One storage before and after, in a masked, a causal and an encoder-decoder model; saved, it loads again."""
    succeeded(cli("decompose", lab / kind, "--layers", "embedding,ffn", "-o", "mpo"))
    e2e = ["--task", "e2e", "--train", lab / "e2e-train.csv", "--eval", lab / "e2e-dev.csv", "--max-new-tokens", 4]
    lm = ["--task", "lm", "--train", lab / "train.txt", "--eval", lab / "dev.txt"]
    options = [*(e2e if kind == "t5" else lm), "--max-length", 24, "--batch-size", 8, "--json", "--tie", "kind"]
    options += ["--max-drop", 1e9, "--rounds", 2, "--step", "40%", "--finetune-steps", 2, "--layers", "embedding"]
    report = succeeded(cli("squeeze", "mpo", *options, "-o", "out")).json
    auto = {"masked": tf.AutoModelForMaskedLM, "gpt2": tf.AutoModelForCausalLM, "t5": tf.AutoModelForSeq2SeqLM}[kind]
    model = auto.from_pretrained(work / "out")
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert table.bond_dims == head.bond_dims and table.core_2 is head.core_2
    assert all(cut["to_dim"] == table.bond_dims[cut["bond"]] for record in report["rounds"] for cut in record["cuts"])
    assert sum(parameter.numel() for parameter in model.parameters()) == report["totals"]["params"]
    if kind != "t5":  # perplexity: more is worse
        record = report["rounds"][-1]
        assert record["drop"] == record["metrics"]["perplexity"] - report["metrics_before"]["perplexity"]


def test_half_precision_is_measured_in_every_round_as_it_is_stored(
    squeeze: Squeeze, cli: Cli, lab: Path, tuned: Path, work: Path
) -> None:
    made = load(tuned).to(torch.bfloat16)
    made.save_pretrained(work / "half")
    tasks.tokenizer("bert").save_pretrained(work / "half")
    report = squeeze("out", "--max-drop", 1, "--rounds", 2, "--finetune-steps", 2, "--step", "30%", model=work / "half")
    stored = weights(work / "out")
    assert {t.dtype for name, t in stored.items() if "core" in name} == {torch.bfloat16}
    found = succeeded(
        cli("eval", "out", "--task", "sst2", "--eval", lab / "dev.tsv", "--max-length", 32, "--json")
    ).json
    assert found["metrics"] == report["metrics"]


# --- killed and resumed -----------------------------------------------------------------------------------------------


def test_ctrl_c_in_the_middle_of_a_short_round_costs_no_step(
    lab: Path, tuned: Path, trainer: Server, work: Path, tmp_path: Path
) -> None:
    options = ["--max-drop", 1, "--rounds", 2, "--finetune-steps", 6, "--step", "20%", "-o"]
    arguments = ["squeeze", tuned, *sst2(lab, *options)]
    whole = trainer.run(*arguments, "whole", cwd=work, log=tmp_path / "log")
    assert whole.code == 0, whole.err
    stopped = trainer.run(*arguments, "cut", cwd=work, log=tmp_path / "log", before=tasks.signalled(8, "SIGINT"))
    assert stopped.code == 130 and "--resume" in stopped.err
    assert (work / "cut.training" / "segment-2" / "checkpoint-2" / "trainer_state.json").is_file()
    ended = trainer.run(*arguments, "cut", "--resume", cwd=work, log=tmp_path / "log")
    assert ended.code == 0, ended.err
    assert tree(work / "cut") == tree(work / "whole")


def test_a_long_round_resumes_from_its_own_checkpoints(
    lab: Path, tuned: Path, trainer: Server, work: Path, tmp_path: Path
) -> None:
    target = ["--direct", "--target-ratio", 1.1, "--finetune-steps", 12, "--save-steps", 4, "--log-steps", 4, "-o"]
    arguments = ["squeeze", tuned, *sst2(lab, *target)]
    whole = trainer.run(*arguments, "whole", cwd=work, log=tmp_path / "log")
    assert whole.code == 0, whole.err
    moment = Moment("open", r"segment-1/checkpoint-8/trainer_state\.json")
    assert trainer.run(*arguments, "cut", cwd=work, log=tmp_path / "log", moment=moment).code == -9
    assert (work / "cut.training" / "segment-1" / "checkpoint-4" / "trainer_state.json").is_file()
    ended = trainer.run(*arguments, "cut", "--resume", cwd=work, log=tmp_path / "log")
    assert ended.code == 0, ended.err
    assert tree(work / "cut") == tree(work / "whole")


def test_a_kill_after_a_long_round_does_not_mix_its_checkpoints_into_the_next(
    lab: Path, tuned: Path, trainer: Server, work: Path, tmp_path: Path
) -> None:
    """The round is written, its segment not yet deleted."""
    options = ["--rounds", 2, "--step", "20%", "--finetune-steps", 12, "--save-steps", 4, "--log-steps", 4, "-o"]
    arguments = ["squeeze", tuned, *sst2(lab, *options)]
    whole = trainer.run(*arguments, "whole", cwd=work, log=tmp_path / "log")
    assert whole.code == 0, whole.err
    moment = Moment("open", r"squeeze\.jsonl\.partial")
    assert trainer.run(*arguments, "cut", cwd=work, log=tmp_path / "log", moment=moment).code == -9
    assert (work / "cut.training" / "segment-1").is_dir() and (work / "cut.training" / "state-1").is_dir()
    ended = trainer.run(*arguments, "cut", "--resume", cwd=work, log=tmp_path / "log")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["resumed_from"] == 1 and tree(work / "cut") == tree(work / "whole")


def test_ctrl_c_in_a_long_first_round_leaves_its_checkpoints(
    lab: Path, tuned: Path, trainer: Server, work: Path, tmp_path: Path
) -> None:
    options = ["--direct", "--target-ratio", 1.1, "--finetune-steps", 12, "--save-steps", 4, "--log-steps", 4, "-o"]
    arguments = ["squeeze", tuned, *sst2(lab, *options)]
    moment = Moment("open", r"segment-1/checkpoint-8/trainer_state\.json", signal=signal.SIGINT)
    stopped = trainer.run(*arguments, "out", cwd=work, log=tmp_path / "log", moment=moment)
    assert stopped.code == 130 and "--resume" in stopped.err
    ended = trainer.run(*arguments, "out", "--resume", cwd=work, log=tmp_path / "log")
    assert ended.code == 0, ended.err


def test_what_was_begun_with_overwrite_resumes_over_the_old_output(
    lab: Path, tuned: Path, trainer: Server, cli: Cli, work: Path, tmp_path: Path
) -> None:
    options = sst2(lab, "--rounds", 2, "--finetune-steps", 1, "-o", "out")
    succeeded(cli("squeeze", tuned, *options))
    moment = Moment("open", r"squeeze\.jsonl\.partial")
    again = trainer.run("squeeze", tuned, *options, "--overwrite", cwd=work, log=tmp_path / "log", moment=moment)
    assert again.code == -9 and (work / "out" / "config.json").is_file()
    assert succeeded(cli("squeeze", tuned, *options, "--resume")).json["resumed_from"] == 1


def test_other_options_do_not_resume(
    cli: Cli, lab: Path, tuned: Path, work: Path, trainer: Server, tmp_path: Path
) -> None:
    options = sst2(lab, "--max-drop", 1, "--rounds", 2, "--finetune-steps", 1, "-o", "out")
    moment = Moment("open", r"squeeze\.jsonl\.partial", number=1)
    assert trainer.run("squeeze", tuned, *options, cwd=work, log=tmp_path / "log", moment=moment).code == -9
    refused(cli("squeeze", tuned, *options), 3, "out.training", "--resume")
    refused(cli("squeeze", tuned, *options, "--resume", "--step", 2), 3, "step", "'5%'", "2")
    succeeded(cli("squeeze", tuned, *options, "--resume"))
    refused(cli("squeeze", tuned, *options, "--resume", "--overwrite"), 3, "finished")


def test_a_full_disk_in_a_round_leaves_the_round_before(
    lab: Path, tuned: Path, trainer: Server, work: Path, tmp_path: Path
) -> None:
    options = sst2(lab, "--max-drop", 1, "--rounds", 2, "--finetune-steps", 1, "-o", "out")
    done = trainer.run("squeeze", tuned, *options, cwd=work, log=tmp_path / "log", limit=20_000)
    assert done.code == 3 and "state 1 cannot be written" in done.err and "Traceback" not in done.err
    assert not list(work.iterdir())


# --- bad input --------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[list[object], int, str]] = {
    "no end": ([], 2, "--max-drop"),
    "unknown order": (["--max-drop", 1, "--order", "size"], 2, "'size'"),
    "unknown tie": (["--max-drop", 1, "--tie", "all"], 2, "'all'"),
    "step of zero": (["--max-drop", 1, "--step", "0"], 2, "'0'"),
    "step of everything": (["--max-drop", 1, "--step", "100%"], 2, "'100%'"),
    "step of nonsense": (["--max-drop", 1, "--step", "x"], 2, "'x'"),
    "drop that is no number": (["--max-drop", "nan"], 2, "--max-drop nan"),
    "reference without end": (["--max-drop", 1, "--reference", "inf"], 2, "--reference inf"),
    "all ignored": (["--max-drop", 1, "--ignore", "*"], 2, "--ignore *: no MPO is left"),
    "negative drop": (["--max-drop", -1], 2, "--max-drop"),
    "direct without a target": (["--max-drop", 1, "--direct"], 2, "--direct"),
    "direct by loss": (["--target-ratio", 0.5, "--direct", "--order", "sensitivity"], 2, "--order"),
    "target above": (["--target-params", 10_000_000], 2, "10,000,000"),
    "ratio of nothing": (["--target-ratio", 0], 2, "--target-ratio"),
    "size of nothing": (["--target-bytes", "big"], 2, "'big'"),
    "glob without a match": (["--max-drop", 1, "--ignore", "nobody*"], 2, "nobody*"),
    "no module left": (["--max-drop", 1, "--layers", "head"], 2, "no MPO is left"),
    "picture of no kind": (["--max-drop", 1, "--plot", "x.bmp"], 2, "x.bmp"),
    "picture nowhere": (["--max-drop", 1, "--plot", "no/where.svg"], 3, "no"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused_before_any_work(name: str, cli: Cli, lab: Path, tuned: Path, work: Path) -> None:
    options, code, word = BAD[name]
    refused(cli("squeeze", tuned, *sst2(lab, *options), "-o", "out"), code, word)
    assert not list(work.iterdir())


def test_models_that_cannot_be_squeezed_are_refused(cli: Cli, lab: Path, tuned: Path, work: Path) -> None:
    refused(cli("squeeze", lab / "body", *sst2(lab, "--max-drop", 1), "-o", "out"), 3, "no MPOs", "decompose")
    refused(cli("squeeze", lab / "mpo", *sst2(lab, "--max-drop", 1), "-o", "out"), 3, "head", "finetune")
    options = ["--task", "sst2", "--train", lab / "train.tsv", "--max-length", 32, "--max-drop", 1, "-o", "out"]
    refused(cli("squeeze", tuned, *options), 2, "--eval")
    assert not list(work.iterdir())
    shutil.copytree(tuned, work / "broken")
    with edited(work / "broken" / "config.json") as config:
        config["quantization_config"]["modules"][PLANTED]["bond_dims"][2] += 1
    refused(cli("squeeze", "broken", *sst2(lab, "--max-drop", 1), "-o", "out"), 3, PLANTED)
