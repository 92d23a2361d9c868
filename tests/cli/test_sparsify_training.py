"""`mpocli sparsify` with training: what moves and what is frozen, the schedule, kills and resumption, chains."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

import mpocli  # noqa: F401 (its loader)
from cli import tasks
from cli.processes import Ended, Moment, Server
from cli.shell import WEIGHTS, Cli, Outcome, refused, succeeded, tree
from mpocli.config.scoring import Scoring
from mpocli.methods.training import fit as fitting
from mpocli.sparse import Pattern
from mpocli.train.sparse.masks import MaskTarget, put_masks

Sparsify = Callable[..., dict[str, Any]]
LAYER = "bert.encoder.layer.0"
MATRICES = [
    *(f"{LAYER}.attention.self.{name}.weight" for name in ("query", "key", "value")),
    *(f"{LAYER}.{name}.dense.weight" for name in ("attention.output", "intermediate", "output")),
]
CENTRES = [name.replace(".weight", ".core_2") for name in MATRICES]
HEAD = {"classifier.weight", "classifier.bias"}


def sst2(lab: Path, *more: object) -> list[object]:
    """The options of most runs here: twelve steps of eight sentences."""
    files = ["--task", "sst2", "--train", lab / "train.tsv", "--eval", lab / "dev.tsv", "--max-length", 32]
    return [*files, "--batch-size", 8, "--lr", 1e-2, "--steps", 12, "--log-steps", 1, "--json", *more]


@pytest.fixture
def sparsify(cli: Cli, lab: Path, work: Path) -> Sparsify:
    """Train a model sparse on sentences to `out`; the report."""

    def run(model: Path, out: str, *more: object) -> dict[str, Any]:
        return succeeded(cli("sparsify", model, *sst2(lab, *more), "-o", out)).json

    return run


@pytest.fixture(scope="module")
def tuned(lab: Path, trainer: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense` and `mpo`: fine-tuned, with heads and all names of a classifier, and `calm` without dropout."""
    made = tmp_path_factory.mktemp("tuned")
    for name, model in (("dense", "body"), ("mpo", "mpo")):
        ended = trainer.run(
            "finetune", lab / model, *sst2(lab, "--steps", 24), "-o", name, cwd=made, log=made.parent / "tuned"
        )
        assert ended.code == 0, ended.err
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tasks.save("bert", made / "calm", initializer_range=0.1, **still)
    return made


def weights(directory: Path) -> dict[str, Tensor]:
    """As a model holds them, in the dtype of the files."""
    return dict(tf.AutoModelForSequenceClassification.from_pretrained(directory, dtype="auto").named_parameters())


def zeros(tensor: Tensor) -> int:
    return int((tensor == 0).sum())


def assert_exact(directory: Path, report: dict[str, Any], sparsity: float) -> None:
    """⌊n·s⌋ zeros in every pruned tensor of a classifier, no others, and so reported."""
    found, names = weights(directory), {tensor["name"] for tensor in report["tensors"]}
    names = {name if name in found else f"bert.{name}" for name in names}
    assert len(names) == 6
    assert all(zeros(found[name]) == int(found[name].numel() * sparsity) for name in names)
    counted = sum(zeros(found[name]) for name in names)
    assert report["zeros"] == counted
    assert report["sparsity"] == counted / sum(found[name].numel() for name in names)


# --- one run of PST, killed at its end ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A finished run of PST in `directory`, its report, its source, and its parameters after the last step."""

    source: dict[str, Tensor]
    directory: Path
    report: dict[str, Any]
    raw: dict[str, Tensor]

    @property
    def stored(self) -> dict[str, Tensor]:
        return weights(self.directory)


@pytest.fixture(scope="module", params=["dense", "mpo"])
def pst(
    request: pytest.FixtureRequest, lab: Path, tuned: Path, trainer: Server, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """Killed when the last checkpoint was written and the output was begun, and resumed from there."""
    made = tmp_path_factory.mktemp("pst")
    scales = ["--weight-beta", 0.5, "--mask-alpha1", 0.25, "--mask-alpha2", 2, "--weight-rank", 2, "--mask-rank", 3]
    arguments = ["sparsify", tuned / request.param, *sst2(lab, "--sparsity", 0.7, *scales), "-o", "out"]
    moment = Moment("os.mkdir", r"\.out\.partial[^/]*/new")
    assert trainer.run(*arguments, cwd=made, log=made.parent / "pst", moment=moment).code == -9
    raw = load_file(made / "out.training" / "checkpoint-12" / "parameters.safetensors")
    assert not (made / "out").exists()
    ended = trainer.run(*arguments, "--resume", cwd=made, log=made.parent / "pst")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["resumed_from"] == 12 and [path.name for path in made.iterdir()] == ["out"]
    return Trained(weights(tuned / request.param), made / "out", report, raw)


def names_of(pst: Trained) -> list[str]:
    return CENTRES if any("core_" in name for name in pst.source) else MATRICES


def as_matrix(tensor: Tensor) -> np.ndarray:
    """A core's rows are (left bond, out), its columns (in, right bond)."""
    array = tensor.detach().double().numpy()
    return array if array.ndim == 2 else array.reshape(array.shape[0] * array.shape[1], -1)


def test_what_is_stored_is_the_updated_weight_where_its_score_is_largest(pst: Trained) -> None:
    """Ŵ = M ⊙ (W₀ + β U V), M from |W₀ + β U V| + α₁ A B + α₂ (R + C), with the trained parameters."""
    assert {tensor["name"] for tensor in pst.report["tensors"]} == set(names_of(pst))
    assert_exact(pst.directory, pst.report, 0.7)
    moved = 0.0
    for name in names_of(pst):
        owner, _, leaf = name.rpartition(".")
        part = {key: pst.raw[f"{owner}.parametrizations.{leaf}.0.{key}"].double().numpy() for key in "uvabrc"}
        frozen = pst.raw[f"{owner}.parametrizations.{leaf}.original"]
        assert torch.equal(frozen, pst.source[name])
        new = as_matrix(frozen) + 0.5 * part["u"] @ part["v"]
        score = np.abs(new) + 0.25 * part["a"] @ part["b"] + 2 * (part["r"][:, None] + part["c"][None, :])
        found = as_matrix(pst.stored[name])
        gone = found == 0
        assert part["u"].shape[1] == 2 and part["a"].shape[1] == 3
        assert score[gone].max() <= score[~gone].min() + 1e-6, name
        assert np.abs(found - np.where(gone, 0, new)).max() <= 1e-6, name
        assert min(np.abs(part[key]).max() for key in "vbrc") > 1e-3, name
        moved = max(moved, float(np.mean(gone != (np.abs(new) <= np.sort(np.abs(new), axis=None)[gone.sum() - 1]))))
    assert moved > 0.01  # the learnt scores decided something


def test_all_but_the_update_the_scores_the_head_and_auxiliary_cores_is_frozen(pst: Trained) -> None:
    """Norms, biases, embeddings and pooler are bit-equal; the published code freezes the head too."""
    stored = pst.stored
    assert stored.keys() == pst.source.keys()
    centres = {name for name in stored if name.endswith(".core_2")}
    cores = {name for name in stored if ".core_" in name} - centres
    moved = {name for name in stored if not torch.equal(stored[name], pst.source[name])}
    assert moved == set(names_of(pst)) | HEAD | cores
    kinds = {"head": sum(stored[name].numel() for name in HEAD)}
    sides = [as_matrix(stored[name]).shape for name in names_of(pst)]
    kinds |= {"update": 2 * sum(map(sum, sides)), "score": (3 + 1) * sum(map(sum, sides))}
    kinds |= {"auxiliary": sum(stored[name].numel() for name in cores)} if cores else {}
    assert pst.report["trainable_by_kind"] == kinds
    assert pst.report["trainable_params"] == sum(kinds.values())
    size = sum(tensor.numel() for tensor in stored.values())
    assert pst.report["dense_and_scores"] == size + sum(rows * columns for rows, columns in sides)
    history = json.loads((pst.directory / "mpo.json").read_text())["history"]
    assert history[-1]["command"] == "sparsify" and history[-1]["trainable_params"] == kinds
    assert history[-1]["metrics"] == pst.report["metrics"]


def test_reloaded_in_another_process_it_predicts_what_was_measured(
    pst: Trained, lab: Path, trainer: Server, tmp_path: Path
) -> None:
    """The published code's `from_pretrained` gives the dense weights back."""
    task = ["--task", "sst2", "--eval", lab / "dev.tsv", "--max-length", 32, "--json", "--predictions", "rows.jsonl"]
    ended = trainer.run("eval", pst.directory, *task, cwd=tmp_path, log=tmp_path / "log")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["metrics"] == pst.report["metrics"]
    assert pst.report["metrics"]["accuracy"] != pst.report["metrics_before"]["accuracy"]


def test_metrics_jsonl_tells_the_sparsity_of_each_step_s_loss_by_the_cubic_schedule(
    sparsify: Sparsify, pst: Trained, tuned: Path, work: Path
) -> None:
    def expected(step: int, total: int, final: float, initial: float, before: float, after: float) -> float:
        if step <= before * total:
            return initial
        if step > total - after * total:
            return final
        left = 1 - (step - before * total) / (total - (before + after) * total)
        return final + (initial - final) * left**3

    lines = tasks.logged(pst.directory)
    assert [line["step"] for line in lines] == list(range(1, 13))
    wanted = [expected(step, 12, 0.7, 0.0, 0.1, 0.3) for step in range(12)]
    assert [line["sparsity"] for line in lines] == pytest.approx(wanted, abs=1e-12)
    more = ["--initial-sparsity", 0.3, "--initial-warmup", 0.25, "--final-warmup", 0.5, "--sparsity", 0.8]
    sparsify(tuned / "dense", "out", *more, "--steps", 8)
    wanted = [expected(step, 8, 0.8, 0.3, 0.25, 0.5) for step in range(8)]
    assert [line["sparsity"] for line in tasks.logged(work / "out")] == pytest.approx(wanted, abs=1e-12)
    assert wanted[0] == 0.3 and wanted[-1] == 0.8


def test_it_begins_as_magnitude_pruning_at_the_initial_sparsity(
    cli: Cli, sparsify: Sparsify, tuned: Path, lab: Path, work: Path
) -> None:
    """All learnt scores are zero then; the published code's first forward pass is dense whatever was asked."""
    sparsify(tuned / "calm", "out", "--initial-sparsity", 0.6, "--sparsity", 0.7, "--steps", 2)
    sparsify(tuned / "calm", "dense", "--sparsity", 0.7, "--steps", 2)
    succeeded(cli("sparsify", tuned / "calm", "--method", "magnitude", "--sparsity", 0.6, "-o", "pruned"))
    succeeded(cli("finetune", "pruned", *sst2(lab, "--steps", 2), "-o", "tuned"))
    losses = {out: tasks.logged(work / out)[0]["loss"] for out in ("out", "tuned", "dense")}
    assert losses["out"] == pytest.approx(losses["tuned"], rel=1e-6)
    assert losses["out"] != pytest.approx(losses["dense"], rel=1e-4)


# --- who trains what ------------------------------------------------------------------------------------------------


@dataclass
class Watched:
    """What an optimiser held: names with their rates, their elements, and who gathers gradients."""

    rates: dict[str, float]
    held: int
    with_gradients: set[str]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    seen: list[Watched] = []
    real = fitting.train_segment

    def train(trainer: Any, resume: Any = None) -> None:
        real(trainer, resume)
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        groups = trainer.optimizer.param_groups
        held = [parameter for group in groups for parameter in group["params"]]
        rates = {names[id(p)]: group["initial_lr"] for group in groups for p in group["params"]}
        assert len(rates) == len(held)
        trainer.model.zero_grad()
        trainer.model(**next(iter(trainer.get_train_dataloader()))).loss.backward()
        with_gradients = {name for name, p in trainer.model.named_parameters() if p.grad is not None}
        seen.append(Watched(rates, sum(parameter.numel() for parameter in held), with_gradients))

    monkeypatch.setattr(fitting, "train_segment", train)
    return seen


@pytest.mark.parametrize("method", ["pst", "faithful", "magnitude", "movement"])
def test_what_no_optimiser_holds_gathers_no_gradient_and_scores_have_their_own_rate(
    method: str, sparsify: Sparsify, tuned: Path, work: Path, watched: list[Watched]
) -> None:
    """Published: heads in no optimiser, and gradients of everything piling up."""
    how = ["--method", "pst", "--faithful"] if method == "faithful" else ["--method", method]
    rate = ["--score-lr", 0.03] if method != "magnitude" else []
    report = sparsify(tuned / "dense", "out", *how, *rate, "--steps", 4)
    (seen,) = watched
    assert seen.held == report["trainable_params"] == sum(report["trainable_by_kind"].values())
    assert seen.with_gradients == seen.rates.keys()
    scores = {name for name in seen.rates if name.endswith((".0.a", ".0.b", ".0.r", ".0.c", ".0.full"))}
    assert len(scores) == {"pst": 24, "faithful": 24, "magnitude": 0, "movement": 6}[method]
    assert {seen.rates[name] for name in scores} <= {0.03}
    assert {rate for name, rate in seen.rates.items() if name not in scores} == {1e-2}
    before, after = weights(tuned / "dense"), weights(work / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    if method in ("magnitude", "movement"):
        size = sum(tensor.numel() for tensor in before.values())
        entries = sum(before[name].numel() for name in MATRICES)
        assert report["trainable_params"] == size + (entries if method == "movement" else 0)
        assert report["dense_and_scores"] == size + entries
        unseen = {f"bert.embeddings.{name}_embeddings.weight" for name in ("position", "token_type")}
        assert moved >= before.keys() - unseen
    else:
        assert moved == set(MATRICES) | (HEAD if method == "pst" else set())
    assert_exact(work / "out", report, 0.9)


@pytest.mark.parametrize("method", ["pst", "magnitude", "movement"])
def test_one_threshold_for_all_and_n_of_m_hold_in_training_too(
    method: str, sparsify: Sparsify, lab: Path, work: Path
) -> None:
    options = ["--method", method, "--steps", 4]
    report = sparsify(lab / "body", "global", *options, "--scope", "global", "--sparsity", 0.61)
    found = weights(work / "global")
    assert sum(zeros(found[name]) for name in MATRICES) == report["zeros"] == int(report["entries"] * 0.61)
    assert len({zeros(found[name]) / found[name].numel() for name in MATRICES}) > 1
    report = sparsify(lab / "body", "pattern", *options, "--pattern", "2:4")
    found = weights(work / "pattern")
    for name in MATRICES:
        assert bool(((found[name].reshape(-1, 4) == 0).sum(1) == 2).all()), name
    encodings = json.loads((work / "pattern" / "config.json").read_text())["quantization_config"]["encodings"]
    assert {entry["pattern"] for entry in encodings.values()} == {"2:4"} and encodings.keys() == set(MATRICES)


def test_a_constant_in_the_scores_of_one_matrix_moves_no_global_mask_and_an_unseen_step_all() -> None:
    """R + c, C − c and a constant cannot be told from the threshold. Fused optimisers change tensors unnoticed."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in "ab"})
    places = [MaskTarget(name, "weight", "matrix") for name in "ab"]
    masked = put_masks(model, places, Scoring(), Pattern(), together=True, seed=0)

    def kept(sparsity: float) -> list[bool]:
        for one in masked.values():
            one.step(sparsity)
        return torch.cat([(model[name].weight != 0).flatten() for name in "ab"]).tolist()

    before = kept(0.5)
    assert before.count(False) == 64
    masked["a.weight"].r.data.add_(5.0)  # `.data` counts no version up
    assert kept(0.5) == before
    masked["a.weight"].r.data[3] += 5.0
    assert kept(0.5) != before


@pytest.mark.parametrize("kind", ["gpt2", "t5", "masked"])
def test_other_families_train_sparse_and_measure_what_they_store(kind: str, cli: Cli, lab: Path, work: Path) -> None:
    """Published: in a transposed matrix (Conv1D) nothing at all was pruned."""
    lm = ["--task", "lm", "--train", lab / "train.txt", "--eval", lab / "dev.txt"]
    e2e = ["--task", "e2e", "--train", lab / "e2e-train.csv", "--eval", lab / "e2e-dev.csv", "--max-new-tokens", 4]
    options = [*(e2e if kind == "t5" else lm), "--max-length", 24, "--batch-size", 8, "--steps", 4, "--lr", 1e-2]
    pattern = ["--pattern", "2:4"] if kind == "gpt2" else ["--sparsity", 0.7]
    report = succeeded(cli("sparsify", lab / kind, *options, *pattern, "-o", "out", "--json")).json
    classes = {"gpt2": tf.GPT2LMHeadModel, "t5": tf.T5ForConditionalGeneration, "masked": tf.BertForMaskedLM}
    found = dict(classes[kind].from_pretrained(work / "out").named_parameters())
    before = dict(classes[kind].from_pretrained(lab / kind).named_parameters())
    names = {tensor["name"] for tensor in report["tensors"]}
    assert len(names) == {"gpt2": 4, "t5": 16, "masked": 6}[kind]
    for name in names:
        if kind == "gpt2":
            assert bool(((found[name].T.reshape(-1, 4) == 0).sum(1) == 2).all()), name
        else:
            assert zeros(found[name]) == int(found[name].numel() * 0.7), name
    assert {name for name in found if not torch.equal(found[name], before[name])} == names
    chosen = ["--task", "e2e", "--max-new-tokens", 4] if kind == "t5" else ["--task", "lm"]
    dev = lab / ("e2e-dev.csv" if kind == "t5" else "dev.txt")
    measured = succeeded(cli("eval", "out", *chosen, "--eval", dev, "--max-length", 24, "--json")).json["metrics"]
    assert measured == pytest.approx(report["metrics"], rel=1e-6)


def test_batches_accumulated_or_recomputed_change_no_result(
    sparsify: Sparsify, tuned: Path, lab: Path, work: Path
) -> None:
    options = ["--lr", 2e-3, "--steps", 4, "--sparsity", 0.5]
    sparsify(tuned / "calm", "plain", *options)
    sparsify(tuned / "calm", "halves", *options, "--batch-size", 4, "--accumulation", 2)
    sparsify(tuned / "calm", "again", *options, "--gradient-checkpointing")
    sparsify(tuned / "calm", "other", *options, "--seed", 1)
    lines = {out: tasks.logged(work / out) for out in ("plain", "halves", "again", "other")}
    for out in ("halves", "again"):
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in lines[out]] == pytest.approx(
                [line[key] for line in lines["plain"]], rel=1e-3
            ), (out, key)
    assert lines["other"][-1]["loss"] != pytest.approx(lines["plain"][-1]["loss"], rel=1e-3)
    assert all(line["grad_norm"] > 0 for line in lines["again"])


def test_a_teacher_changes_the_result_and_one_that_weighs_nothing_does_not(
    sparsify: Sparsify, tuned: Path, work: Path
) -> None:
    options = ["--steps", 3, "--sparsity", 0.5]
    sparsify(tuned / "dense", "alone", *options)
    teacher = ["--teacher", tuned / "mpo"]
    sparsify(tuned / "dense", "nothing", *options, *teacher, "--distill-weight", 0)
    sparsify(tuned / "dense", "half", *options, *teacher)
    digests = {out: tree(work / out)[WEIGHTS] for out in ("alone", "nothing", "half")}
    assert digests["alone"] == digests["nothing"] != digests["half"]
    assert json.loads((work / "half" / "mpo.json").read_text())["history"][-1]["options"]["teacher"] == "mpo"


def test_half_precision_is_trained_in_full_measured_and_stored_in_its_own(
    cli: Cli, tuned: Path, lab: Path, work: Path, tmp_path: Path
) -> None:
    tf.AutoModel.from_pretrained(lab / "body", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    tasks.tokenizer("bert").save_pretrained(tmp_path / "half")
    data = ["--task", "stsb", "--max-length", 32, "--eval", lab / "sts-dev.tsv", "--json"]
    more = ["--train", lab / "sts-train.tsv", "--test", lab / "sts-dev.tsv", "--lr", 1e-2, "--steps", 8, "-s", 0.53]
    report = succeeded(cli("sparsify", tmp_path / "half", *data, *more, "-o", "out")).json
    stored = load_file(work / "out" / WEIGHTS)
    assert {t.dtype for name, t in stored.items() if name.endswith("_values")} == {torch.bfloat16}
    assert {t.dtype for name, t in weights(work / "out").items()} == {torch.bfloat16}
    assert_exact(work / "out", report, 0.53)
    assert report["totals"]["bytes"] == (work / "out" / WEIGHTS).stat().st_size
    assert succeeded(cli("eval", "out", *data)).json["metrics"] == pytest.approx(report["metrics"], abs=1e-6)
    assert report["test_metrics"] == report["metrics"]


@pytest.mark.parametrize("method", ["pst", "movement"])
def test_what_was_sparse_before_stays_so_and_is_pruned_further(
    method: str, cli: Cli, sparsify: Sparsify, tuned: Path, work: Path
) -> None:
    succeeded(cli("sparsify", tuned / "dense", "--method", "magnitude", "--sparsity", 0.5, "-o", "half"))
    report = sparsify(work / "half", "out", "--method", method, "--layers", "attention", "--steps", 4)
    before, after = weights(work / "half"), weights(work / "out")
    attention = [tensor["name"] for tensor in report["tensors"]]
    assert len(attention) == 4 and all(zeros(after[name]) == 921 for name in attention)
    for name in set(MATRICES) - set(attention):
        assert torch.equal(after[name] == 0, before[name] == 0), name
        assert torch.equal(after[name], before[name]) == (method == "pst"), name
    encodings = json.loads((work / "out" / "config.json").read_text())["quantization_config"]["encodings"]
    assert encodings.keys() == set(MATRICES)


# --- chains -----------------------------------------------------------------------------------------------------------


def test_decompose_finetune_sparsify_eval_merge_in_one_directory(cli: Cli, pst: Trained, lab: Path, work: Path) -> None:
    task = ["--task", "sst2", "--eval", lab / "dev.tsv", "--max-length", 32, "--json"]
    history = json.loads((pst.directory / "mpo.json").read_text())["history"]
    commands = [entry["command"] for entry in history]
    assert commands == [*(["decompose"] if names_of(pst) == CENTRES else []), "finetune", "sparsify"]
    inspected = succeeded(cli("inspect", pst.directory, "--verify", "--json")).json
    assert inspected["problems"] == [] and inspected["totals"] == pst.report["totals"]
    assert inspected["sparsity"] == pst.report["sparsity"]
    assert {m["name"] for m in inspected["modules"] if m["sparsity"]} == {n.rpartition(".")[0] for n in names_of(pst)}
    text = (pst.directory / "mpo.json").read_text() + (pst.directory / "README.md").read_text()
    assert str(lab) not in text and str(work) not in text and "/tmp" not in text
    succeeded(cli("merge", pst.directory, "-o", "merged"))
    plain = load_file(work / "merged" / WEIGHTS)
    if names_of(pst) == MATRICES:
        assert all(torch.equal(plain[name], tensor) for name, tensor in pst.stored.items())
    assert "quantization_config" not in json.loads((work / "merged" / "config.json").read_text())
    assert succeeded(cli("eval", "merged", *task)).json["metrics"] == pytest.approx(pst.report["metrics"], abs=1e-4)
    manifest = json.loads((work / "merged" / "mpo.json").read_text())
    assert [entry["command"] for entry in manifest["history"]] == [*commands, "merge"]


@pytest.mark.parametrize("update", ["auxiliary", "all"])
def test_finetune_keeps_every_zero_and_stays_small(update: str, cli: Cli, pst: Trained, lab: Path, work: Path) -> None:
    options = ["--weight-decay", 0.1] if names_of(pst) == MATRICES else ["--update", update]
    report = succeeded(cli("finetune", pst.directory, *sst2(lab, "--steps", 4, *options), "-o", "out")).json
    before, after = pst.stored, weights(work / "out")
    for name in names_of(pst):
        assert torch.equal(after[name] == 0, before[name] == 0), name
        frozen = update == "auxiliary" and "core_" in name
        assert torch.equal(after[name], before[name]) == frozen, name
    assert report["totals"]["bytes"] == pst.report["totals"]["bytes"]
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])
    assert json.loads((work / "out" / "mpo.json").read_text())["history"][-2]["command"] == "sparsify"


def test_what_would_fill_the_zeros_is_refused(cli: Cli, pst: Trained, lab: Path, work: Path) -> None:
    if names_of(pst) == CENTRES:
        data = ["--task", "sst2", "--train", lab / "train.tsv", "--eval", lab / "dev.tsv", "--max-length", 32]
        refused(cli("squeeze", pst.directory, *data, "--rounds", 1, "-o", "out"), 3, "sparse", "squeeze first")
    else:
        refused(cli("finetune", pst.directory, *sst2(lab, "--overparam", "svd"), "-o", "out"), 3, "sparse", "sparsify")
    assert tree(work) == {}


# --- killed, out of room, out of range --------------------------------------------------------------------------------

STEP_8 = Moment("open", r"metrics\.jsonl", number=11)  # after three other openings, one for every step
HALF_WRITTEN = Moment("open", r"checkpoint-10/trainer_state\.json")


@pytest.mark.parametrize(
    ("model", "options", "moments"),
    [
        ("body", ["--accumulation", 2, "--batch-size", 4], [STEP_8, HALF_WRITTEN]),
        ("mpo", ["--method", "movement", "--scope", "global"], [STEP_8]),
    ],
    ids=["pst", "movement"],
)
def test_kill_9_and_resume_gives_the_bytes_of_the_uninterrupted_run(
    model: str, options: list[Any], moments: list[Moment], lab: Path, trainer: Server, work: Path, tmp_path: Path
) -> None:
    arguments = ["sparsify", lab / model, *sst2(lab, "--save-steps", 5, *options), "-o"]

    def run(out: str, *more: object, moment: Moment | None = None) -> Ended:
        return trainer.run(*arguments, out, *more, cwd=work, log=tmp_path / "log", moment=moment)

    whole = run("whole")
    assert whole.code == 0, whole.err
    wanted = json.loads(whole.out)
    for number, moment in enumerate(moments):
        assert run(f"cut{number}", moment=moment).code == -9
        assert not (work / f"cut{number}").exists() and (work / f"cut{number}.training").is_dir()
        if number == 0:
            for option, value, words in (("--sparsity", 0.8, "sparsity = 0.9"), ("--clip", 2.0, "clip = 1.0")):
                changed = run("cut0", "--resume", option, value)
                refused(Outcome(changed.code, changed.out, changed.err), 3, words, str(value))
            again = run("cut0")
            refused(Outcome(again.code, again.out, again.err), 3, "--resume", "--overwrite")
        ended = run(f"cut{number}", "--resume")
        assert ended.code == 0, ended.err
        found = json.loads(ended.out)
        assert found["resumed_from"] == 5
        for key in ("metrics", "metrics_before", "steps", "sparsity", "tensors", "trainable_params", "totals"):
            assert found[key] == wanted[key], key
        assert tree(work / f"cut{number}") == tree(work / "whole")
    assert not list(work.glob("*.training"))


def test_a_loss_that_is_no_number_is_exit_4_and_leaves_no_output(cli: Cli, lab: Path, work: Path) -> None:
    arguments = ["sparsify", lab / "body", *sst2(lab, "--clip", 1e9, "--lr", 1e30), "-o", "out"]
    refused(cli(*arguments), 4, "--lr", told="new for task sst2")
    assert tree(work) == {}
    refused(cli(*arguments, "--save-steps", 1), 4, "out.training/checkpoint-1", "--lr", told="new for task sst2")
    assert [path.name for path in work.iterdir()] == ["out.training"]


def test_a_full_disk_at_a_checkpoint_and_at_the_end_is_exit_3(
    lab: Path, trainer: Server, work: Path, tmp_path: Path
) -> None:
    arguments = ["sparsify", lab / "body", *sst2(lab, "--save-steps", 5), "-o", "out"]
    ended = trainer.run(*arguments, cwd=work, log=tmp_path / "log", limit=60_000)
    refused(
        Outcome(ended.code, ended.out, ended.err),
        3,
        "out.training",
        "cannot be written",
        "free some space",
        told="new for task sst2",
    )
    assert tree(work) == {}


def test_outputs_that_exist_are_refused_before_training_and_replaced_when_asked(
    cli: Cli, sparsify: Sparsify, lab: Path, work: Path
) -> None:
    sparsify(lab / "body", "out", "--steps", 2)
    before = tree(work)
    refused(cli("sparsify", lab / "body", *sst2(lab), "-o", "out"), 3, "out", "--overwrite")
    refused(cli("sparsify", lab / "body", *sst2(lab), "-o", "out", "--resume"), 3, "finished", "--overwrite")
    assert tree(work) == before
    sparsify(lab / "body", "out", "--steps", 3, "--overwrite")
    assert len(tasks.logged(work / "out")) == 3 and [path.name for path in work.iterdir()] == ["out"]


def test_dense_storage_after_training_loads_anywhere(sparsify: Sparsify, lab: Path, work: Path) -> None:
    options = ["--steps", 3, "--sparsity", 0.5]
    reports = [sparsify(lab / "body", how, *options, "--storage", how) for how in ("bitmask", "dense")]
    assert "quantization_config" not in json.loads((work / "dense" / "config.json").read_text())
    plain, packed = load_file(work / "dense" / WEIGHTS), weights(work / "bitmask")
    assert plain.keys() == packed.keys() and all(torch.equal(plain[name], packed[name]) for name in plain)
    assert reports[0]["metrics"] == reports[1]["metrics"]
    assert reports[1]["totals"]["bytes"] == (work / "dense" / WEIGHTS).stat().st_size


def test_two_processes_under_torchrun_train_as_one_with_twice_the_batch(
    sparsify: Sparsify, tuned: Path, lab: Path, trainer: Server, work: Path, tmp_path: Path
) -> None:
    options = ["--lr", 2e-3, "--steps", 6, "--sparsity", 0.7, "--device", "cpu"]
    command = ["sparsify", tuned / "calm", *sst2(lab, *options, "--batch-size", 4), "-o", "two"]
    done = trainer.run(*command, cwd=work, log=tmp_path / "log", ranks=2)
    assert done.code == 0, done.err
    two = json.loads(done.out)
    one = sparsify(tuned / "calm", "one", *options)
    assert sorted(path.name for path in work.iterdir()) == ["one", "two"]
    assert two["zeros"] == one["zeros"] and two["trainable_params"] == one["trainable_params"]
    first, second = weights(work / "one"), weights(work / "two")
    apart = [int(((first[name] == 0) != (second[name] == 0)).sum()) for name in MATRICES]
    assert max(apart) <= 4  # a score beside the threshold may fall on either side of it
    for ours, theirs in zip(tasks.logged(work / "two"), tasks.logged(work / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3), ours["step"]
