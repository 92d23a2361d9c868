"""The planner from the command line: budgets that are met, errors that are what was predicted, data that is poor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cli import tasks
from cli.shell import Cli, refused, succeeded, tree
from mpocli.config.budget import named_task
from mpocli.hf import moments
from mpocli.hf.moments import collect
from mpocli.hf.probe import Probe
from mpocli.methods.planner.divergence import RecordedOutputs, divergence
from mpocli.mpo.gram import regularised
from mpocli.nn import logits

Plan = Callable[..., dict[str, Any]]
BLOCKS = ["--layers", "attention,ffn"]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of two layers, the T5's on one side each, with tokenizers."""
    made = tmp_path_factory.mktemp("deep")
    for kind in ("bert", "gpt2"):
        tasks.save(kind, made / kind, layers=2, initializer_range=0.2)
    tasks.save("t5", made / "t5")
    return made


@pytest.fixture
def run(cli: Cli, work: Path) -> Plan:
    """The report of a command that succeeds."""

    def done(verb: str, model: Path, *more: object) -> dict[str, Any]:
        out = ["-o", "out", "--overwrite"] if verb == "decompose" else []
        return succeeded(cli(verb, model, *more, *out, "--json")).json

    return done


def text(lab: Path) -> list[object]:
    return ["--calibrate", lab / "train.txt", "--samples", 24, "--seq-len", 16]


def chosen(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [module for module in report["modules"] if module["reason"] != "not selected"]


def size_of(modules: list[dict[str, Any]]) -> tuple[int, int]:
    return sum(m["params"] for m in modules), sum(m["dense_params"] for m in modules)


@pytest.mark.parametrize(
    ("model", "ratio", "options"),
    [
        ("t5", 0.2, []),
        ("gpt2", 0.6, []),
        ("bert", 0.2, ["--weights", "input"]),
        ("gpt2", 0.3, ["--sequential"]),
        ("t5", 0.3, ["--sequential"]),
    ],
)
def test_the_ratio_is_met_and_the_plan_is_what_is_written(
    model: str, ratio: float, options: list[str], run: Plan, deep: Path, lab: Path, work: Path
) -> None:
    what = [*BLOCKS, "--ratio", ratio, "--sweeps", 2, *text(lab), *options]
    plan, made = run("plan", deep / model, *what), run("decompose", deep / model, *what)
    params, dense = size_of(chosen(made))
    # The smallest steps of matrices this small are 2 % of a budget.
    assert 0.97 * ratio * dense < params <= ratio * dense
    assert plan["schema"] == "mpocli.plan/1" and plan["out"] is None
    for field in ("totals", "modules"):
        assert plan[field] == made[field], field
    assert made["totals"]["bytes"] == (work / "out" / "model.safetensors").stat().st_size
    loaded = tf.AutoModel.from_pretrained(work / "out")
    assert sum(p.numel() for p in loaded.parameters()) <= made["totals"]["params"] + 100


def dense_matrices(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            found[name] = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
    return found


def gram_of(model: Any, name: str, rows: list[list[int]]) -> tuple[np.ndarray, int]:
    """Captured by a plain hook, one row after the other."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    hook.remove()
    inputs = torch.cat(seen).double().numpy()
    return inputs.T @ inputs, len(inputs)


@pytest.mark.parametrize("weights", ["fisher", "input"])
def test_the_predicted_error_is_the_one_of_the_stored_matrix_on_the_real_inputs(
    weights: str, run: Plan, deep: Path, lab: Path, work: Path
) -> None:
    text_ = ["--calibrate", lab / "train.txt", "--samples", 10_000, "--seq-len", 16]
    report = run("decompose", deep / "gpt2", *BLOCKS, "--ratio", 0.3, "--weights", weights, *text_)
    tokenizer = tf.AutoTokenizer.from_pretrained(deep / "gpt2")
    tokens = tokenizer((lab / "train.txt").read_text(), add_special_tokens=False)["input_ids"]
    rows = [tokens[start : start + 16] for start in range(0, len(tokens), 16)]
    rows = [row for row in rows if len(row) > 1]
    before = tf.AutoModelForCausalLM.from_pretrained(deep / "gpt2").eval()
    after = tf.AutoModelForCausalLM.from_pretrained(work / "out")
    modules = [module for module in chosen(report) if module["action"] == "mpo"]
    assert len(modules) > 4
    for module in modules[:5]:
        name = module["name"]
        old = dense_matrices(before)[name].double().numpy()
        new = after.get_submodule(name).weight_matrix().detach().double().numpy()
        gram, count = gram_of(before, name, rows)
        gram = regularised(torch.from_numpy(gram), count).numpy()
        difference = old - new
        wanted = np.sqrt(np.trace(difference @ gram @ difference.T) / np.trace(old @ gram @ old.T))
        assert module["weighted_error"] == pytest.approx(wanted, rel=1e-3), name
        assert module["relative_error"] == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(old), rel=1e-3)


@pytest.mark.parametrize("more", [[], ["--dtype", "bfloat16"]])
def test_max_bytes_is_a_limit_of_the_files_and_nearly_used_up(
    more: list[str], run: Plan, deep: Path, lab: Path, work: Path
) -> None:
    dense = (deep / "bert" / "model.safetensors").stat().st_size // (2 if more else 1)
    limit = int(0.75 * dense)
    report = run("decompose", deep / "bert", *BLOCKS, "--max-bytes", f"{limit}B", *more, *text(lab))
    stored = (work / "out" / "model.safetensors").stat().st_size
    assert 0.96 * limit < stored <= limit and report["totals"]["bytes"] == stored


def test_a_limit_that_cannot_be_met_is_refused_with_the_smallest_that_can(cli: Cli, deep: Path, work: Path) -> None:
    refused(cli("plan", deep / "bert", *BLOCKS, "--max-bytes", "1kB"), 2, "--max-bytes 1,000", "bytes\n")
    refused(cli("plan", deep / "bert", *BLOCKS, "--ratio", 0.001), 2, "budget of")
    assert not tree(work)


@pytest.mark.parametrize("calibrated", [False, True])
def test_max_error_bounds_every_matrix_and_is_nearly_reached(
    calibrated: bool, run: Plan, deep: Path, lab: Path
) -> None:
    more = text(lab) if calibrated else []
    report = run("decompose", deep / "gpt2", *BLOCKS, "--max-error", 0.3, *more)
    made = [module for module in chosen(report) if module["action"] == "mpo"]
    errors = [module["weighted_error"] if calibrated else module["relative_error"] for module in made]
    assert made and max(errors) <= 0.3 + 1e-6 and max(errors) > 0.2
    assert all(module["params"] < module["dense_params"] for module in made)
    for module in chosen(report):
        assert module["action"] == "mpo" or "no smaller form" in module["reason"]


def test_eight_samples_warn_and_give_a_sane_result(cli: Cli, deep: Path, lab: Path, work: Path) -> None:
    few = ["--calibrate", lab / "train.txt", "--samples", 2, "--seq-len", 8]
    done = succeeded(cli("decompose", deep / "bert", *BLOCKS, "--ratio", 0.5, *few, "-o", "out", "--json"))
    assert any("little calibration data for" in warning for warning in done.json["warnings"])
    before, after = (tf.AutoModel.from_pretrained(path).eval() for path in (deep / "bert", work / "out"))
    ids = torch.arange(6, 30).reshape(2, 12)
    with torch.no_grad():
        a, b = before(ids).last_hidden_state, after(ids).last_hidden_state
    assert bool(torch.isfinite(b).all()) and float((a - b).norm() / a.norm()) < 1.5


def test_a_task_by_its_name_means_the_hubs_rows() -> None:
    for name in ("sst2", "SST-2"):
        assert named_task(name, None) == named_task(name, "sst2") == ("nyu-mll/glue:sst2", "sst2")
    for given in (("rows.tsv", "sst2"), ("wiki.txt", None), ("./sst2", None), ("wikitext", None), (None, "sst2")):
        assert named_task(*given) == given


def test_the_same_seed_gives_the_same_bytes(run: Plan, deep: Path, lab: Path, work: Path) -> None:
    what = [*BLOCKS, "--ratio", 0.4, *text(lab)]
    run("decompose", deep / "gpt2", *what)
    first = (work / "out" / "model.safetensors").read_bytes()
    run("decompose", deep / "gpt2", *what)
    assert (work / "out" / "model.safetensors").read_bytes() == first
    run("decompose", deep / "gpt2", *what, "--seed", 1)
    assert (work / "out" / "model.safetensors").read_bytes() != first


def test_the_number_of_threads_changes_nothing(run: Plan, deep: Path, work: Path) -> None:
    """Matrices are worked on side by side, each on one thread, however many there are."""
    before, files = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            run("decompose", deep / "gpt2", *BLOCKS, "--ratio", 0.2, "--sweeps", 2)
            assert torch.get_num_threads() == threads
            files.append((work / "out" / "model.safetensors").read_bytes())
    finally:
        torch.set_num_threads(before)
    assert files[0] == files[1] == files[2]


def test_uniform_ratios_that_no_form_has_are_refused(cli: Cli, deep: Path, work: Path) -> None:
    refused(
        cli("decompose", deep / "bert", *BLOCKS, "--ratio", 0.01, "--shapes", "svd", "--allocation", "uniform"),
        2,
        "--ratio 0.01",
        "no form of",
    )
    assert tree(work) == {}


def test_a_tied_embedding_is_planned_once(run: Plan, deep: Path, lab: Path, work: Path) -> None:
    report = run("decompose", deep / "gpt2", "--layers", "embedding", "--ratio", 0.5, *text(lab))
    table = next(module for module in chosen(report) if module["role"] == "embedding")
    assert table["tied"] == ["lm_head"] and table["params"] < table["dense_params"]
    loaded = tf.AutoModelForCausalLM.from_pretrained(work / "out")
    assert loaded.lm_head.core_0 is loaded.transformer.wte.core_0


def test_calibrated_fits_change_outputs_less_than_plain_ones(run: Plan, deep: Path, lab: Path, work: Path) -> None:
    """At the same size, on text that was not looked at."""
    tokenizer = tf.AutoTokenizer.from_pretrained(deep / "gpt2")
    ids = torch.tensor([tokenizer((lab / "dev.txt").read_text())["input_ids"][:40]])
    before = tf.AutoModelForCausalLM.from_pretrained(deep / "gpt2").eval()
    lost = {}
    for name, options in {"plain": [], "fisher": text(lab)}.items():
        run("decompose", deep / "gpt2", *BLOCKS, "--ratio", 0.4, *options)
        after = tf.AutoModelForCausalLM.from_pretrained(work / "out").eval()
        with torch.no_grad():
            p, q = before(ids).logits.log_softmax(-1), after(ids).logits.log_softmax(-1)
        lost[name] = float((p.exp() * (p - q)).sum(-1).mean())
    assert lost["fisher"] < lost["plain"]


def test_the_probe_gives_the_fisher_information_of_the_outputs(deep: Path, tmp_path: Path) -> None:
    """Of the last layer's logits it is known: E[g gᵀ] = diag(p) − p pᵀ for every token."""
    model = tf.AutoModelForCausalLM.from_pretrained(deep / "gpt2").eval()
    ids = torch.randint(0, 40, (64, 16), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part} for part in ids.split(8)]
    store = collect(model, batches, ["lm_head"], tmp_path / "moments", probe=Probe(0))
    found = store["lm_head"]
    with torch.no_grad():
        p = model(ids).logits.softmax(-1).reshape(-1, model.config.vocab_size).double()
    wanted = torch.diag(p.sum(0)) - p.T @ p
    assert found.output is not None and found.output_trace is not None and found.tokens == 64 * 16
    assert float((found.output - wanted).norm() / wanted.norm()) < 0.25  # a sample of 1,024 draws
    assert found.output_trace == pytest.approx(float(wanted.trace()), rel=0.05)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "bert", "body"])
def test_moments_are_the_same_however_much_is_held_at_a_time(
    kind: str, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sample of a batch and two tokens of its logits, or all; with padding, and of models without a head."""
    cls = {"gpt2": tf.AutoModelForCausalLM, "bert": tf.AutoModelForSequenceClassification, "body": tf.AutoModel}[kind]
    torch.manual_seed(0)  # of a classification head
    model = cls.from_pretrained(deep / ("gpt2" if kind == "gpt2" else "bert")).eval()
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    ids = torch.randint(5, 40, (7, 16), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(16) < torch.tensor([16, 3, 9, 16, 1, 12, 5])[:, None]).long()
    batches = [{"input_ids": ids[part], "attention_mask": mask[part]} for part in (slice(0, 5), slice(5, 7))]
    whole = collect(model, batches, names, tmp_path / "whole", probe=Probe(3))
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda m, a, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True)
    monkeypatch.setattr(moments, "MOST_ACTIVATIONS", 1)
    monkeypatch.setattr(logits, "MOST_LOGITS", 2 * len(tasks.VOCABULARY))
    parts = collect(model, batches, names, tmp_path / "parts", probe=Probe(3))
    assert sizes == [1] * (1 + 7) and [name for name in names if name in whole] == [n for n in names if n in parts]
    for name in (name for name in names if name in whole):
        a, b = whole[name], parts[name]
        assert a.tokens == b.tokens and a.output_trace == pytest.approx(b.output_trace, rel=1e-4), name
        for one, other in ((a.gram, b.gram), (a.output, b.output)):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(one.abs().max()), msg=name)


def test_modules_that_read_the_same_vectors_share_one_gram_matrix(deep: Path, tmp_path: Path) -> None:
    model = tf.AutoModel.from_pretrained(deep / "bert").eval()
    names = [f"encoder.layer.0.attention.self.{part}" for part in ("query", "key", "value")]
    batch = {"input_ids": torch.tensor([[7, 8, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    store = collect(model, [batch, batch], [*names, "encoder.layer.0.output.dense"], tmp_path / "moments")
    assert len(list((tmp_path / "moments").iterdir())) == 2
    assert all(store[name].tokens == 6 for name in names)
    gram, _ = gram_of(model, names[0], [[7, 8, 9]])
    for name in names:
        assert torch.equal(store[name].gram, store[names[0]].gram)
    np.testing.assert_allclose(store[names[0]].gram.numpy() / 2, gram, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "0.5", "--trunc", "8"], "--trunc with --ratio 0.5"),
        (["--ratio", "0.5", "--max-error", "0.1"], "--ratio with --max-error"),
        (["--ratio", "1.5"], "--ratio 1.5"),
        (["--samples", "8"], "--samples without --calibrate"),
        (["--ratio", "0.5", "--samples", "8"], "--samples without --calibrate"),
        (["--max-error", "0.5", "--allocation", "uniform"], "--allocation uniform"),
        (["--ratio", "0.5", "--shapes", "round"], "--shapes 'round'"),
        (["--ratio", "0.5", "--calibrate", "no.txt"], "no.txt"),
        (["--ratio", "0.5", "--gauge", "symmetric"], "--gauge with --ratio 0.5"),
        (["--ratio", "0.5", "--max-length", "20"], "--max-length without --calibrate"),
        (["--ratio", "-0.5"], "between 0 and 1"),
        (["--ratio", "0.5", "--sites", "7"], "--sites with --ratio 0.5"),
        (["--ratio", "0.5", "--shapes", "svd", "--sweeps", "3"], "--sweeps with --shapes svd"),
        (["--ratio", "0.01", "--layers", "pooler"], "budget of"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    options: list[str], message: str, cli: Cli, deep: Path, work: Path
) -> None:
    done = cli("decompose", deep / "bert", *options, "-o", "out")
    refused(done, 3 if "no.txt" in message else 2, message)
    assert not tree(work)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "0.5", "--max-length", "20"], "--max-length with --calibrate"),
        (["--ratio", "0.5", "--label-column", "label"], "--label-column with --calibrate"),
        (["--ratio", "0.5", "--task", "sst2", "--seq-len", "20"], "--seq-len with --task sst2"),
        (["--max-error", "0.5", "--weights", "fisher"], "--weights with --max-error"),
    ],
)
def test_options_that_this_calibration_does_not_read_are_refused(
    options: list[str], message: str, cli: Cli, deep: Path, lab: Path, work: Path
) -> None:
    refused(cli("decompose", deep / "bert", *options, "--calibrate", lab / "train.txt", "-o", "out"), 2, message)
    assert not tree(work)


def test_a_folder_that_measured_losses_cannot_go_to_is_noticed_first(cli: Cli, deep: Path, lab: Path) -> None:
    options = ["--ratio", 0.5, "--sensitivity", "nowhere/s.json", *text(lab)]
    refused(cli("plan", deep / "bert", *options), 3, "--sensitivity nowhere/s.json", "folder")


def test_measured_losses_are_not_waited_for_at_a_pipe(cli: Cli, deep: Path, lab: Path, work: Path) -> None:
    os.mkfifo(work / "s.json")
    options = ["--ratio", 0.5, "--sensitivity", "s.json", *text(lab)]
    refused(cli("plan", deep / "bert", *options), 3, "--sensitivity s.json", "is a pipe")


def test_a_plan_without_a_budget_says_what_one_is(cli: Cli, deep: Path) -> None:
    refused(cli("plan", deep / "bert"), 2, "no budget", "--ratio 0.5")


def test_the_table_shows_every_matrix(cli: Cli, deep: Path, lab: Path, work: Path) -> None:
    shown = succeeded(cli("plan", deep / "gpt2", *BLOCKS, "--ratio", 0.3, *text(lab)))
    for column in ("form", "bonds", "output", "forward", "MACs"):
        assert column in shown.out
    assert shown.out.count("transformer.h.1.mlp.c_fc") == 1 and "dry run: nothing written" in shown.err
    assert not tree(work) and load_file(deep / "gpt2" / "model.safetensors")


@pytest.mark.parametrize("model", ["gpt2", "bert"])
def test_compare_measures_every_arm_at_the_plans_size(model: str, run: Plan, deep: Path, lab: Path) -> None:
    report = run("plan", deep / model, *BLOCKS, "--ratio", 0.4, *text(lab), "--compare")
    arms = {arm["name"]: arm for arm in report["compared"]}
    assert list(arms) == ["dense", "plain MPO", "plain SVD", "whitened SVD", "the plan"]
    planned = sum(module["params"] for module in chosen(report) if module["action"] == "mpo")
    assert arms["the plan"]["params"] == planned and arms["dense"]["divergence"] == 0.0
    assert all(arm["params"] <= planned for name, arm in arms.items() if name != "dense")
    assert all((arm["perplexity"] is not None) == (model == "gpt2") for arm in arms.values())
    assert arms["the plan"]["divergence"] < arms["plain SVD"]["divergence"]


def test_the_divergence_of_two_models_is_the_same_whatever_is_held_of_their_logits(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, other = (tf.AutoModelForCausalLM.from_pretrained(deep / "gpt2").eval() for _ in range(2))
    with torch.no_grad():
        other.transformer.wte.weight.mul_(1.1)
    ids = torch.randint(5, 40, (3, 16), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(16) < torch.tensor([16, 4, 9])[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    monkeypatch.setattr(logits, "MOST_LOGITS", 2 * len(tasks.VOCABULARY))
    with torch.no_grad():
        found, losses = divergence(other, RecordedOutputs(dense, [batch, batch], tmp_path), causal=True)
        p, q = (model(**batch).logits.log_softmax(-1) for model in (dense, other))
        expected = (p.exp() * (p - q)).sum(-1)[mask != 0].mean()
        next_ones = -q[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)[mask[:, 1:] != 0].mean()
    assert found == pytest.approx(float(expected), rel=1e-4) and found > 1e-4
    assert losses == [pytest.approx(float(next_ones), rel=1e-5)] * 2


def test_sensitivities_are_measured_once_and_belong_to_one_model_and_text(
    run: Plan, cli: Cli, deep: Path, lab: Path, work: Path
) -> None:
    what = [*BLOCKS, "--ratio", 0.3, *text(lab), "--sensitivity", "found.json"]
    first = run("plan", deep / "gpt2", *what)
    written = (work / "found.json").read_bytes()
    known = json.loads(written)["measured_over_predicted"]
    assert set(known) == {module["name"] for module in chosen(first)}
    assert all(0 < value < 1e3 for value in known.values())
    assert run("plan", deep / "gpt2", *what)["modules"] == first["modules"]
    assert (work / "found.json").read_bytes() == written
    # What it says is obeyed: a matrix that is said to be precious is given more.
    name = chosen(first)[0]["name"]
    data = json.loads(written)
    data["measured_over_predicted"][name] *= 1e4
    (work / "found.json").write_text(json.dumps(data))
    second = run("plan", deep / "gpt2", *what)
    sizes = [next(m["params"] for m in report["modules"] if m["name"] == name) for report in (first, second)]
    assert sizes[1] > sizes[0]
    refused(cli("plan", deep / "gpt2", *what, "--seed", 5), 3, "--sensitivity found.json", "seed 0", "5")
    (work / "found.json").write_text("[]")
    refused(cli("plan", deep / "gpt2", *what), 3, "--sensitivity found.json", "no measurements")


@pytest.mark.parametrize("part", [0.35, 0.5, 0.62, 0.71, 0.77, 0.86, 0.93])
@pytest.mark.parametrize("calibrated", [False, True])
def test_every_limit_on_the_files_that_can_be_met_is(
    part: float, calibrated: bool, run: Plan, deep: Path, lab: Path
) -> None:
    limit = int(part * (deep / "bert" / "model.safetensors").stat().st_size)
    more = [*text(lab), "--weights", "input"] if calibrated else []
    report = run("plan", deep / "bert", "--max-bytes", f"{limit}B", "--sweeps", 1, *more)
    assert 0.97 * limit < report["totals"]["bytes"] <= limit


def test_half_precision_is_counted_in_a_bound_on_the_error(run: Plan, deep: Path) -> None:
    report = run("decompose", deep / "gpt2", *BLOCKS, "--max-error", 0.02, "--dtype", "bfloat16")
    made = [module for module in chosen(report) if module["action"] == "mpo"]
    assert all(module["relative_error"] <= 0.02 for module in made)


def test_errors_of_half_precision_cores_are_those_of_the_exact_product(run: Plan, deep: Path, work: Path) -> None:
    report = run("decompose", deep / "gpt2", *BLOCKS, "--ratio", 0.5, "--dtype", "bfloat16")
    stored = load_file(work / "out" / "model.safetensors")
    old = dense_matrices(tf.AutoModelForCausalLM.from_pretrained(deep / "gpt2"))
    module = next(module for module in chosen(report) if module["form"] == "svd")
    cores = [stored[f"{module['name']}.core_{k}"].double() for k in (0, 1)]
    new = cores[0].reshape(module["shape"][0], -1) @ cores[1].reshape(-1, module["shape"][1])
    dense = old[module["name"]].double()
    assert module["relative_error"] == pytest.approx(float((dense - new).norm() / dense.norm()), rel=1e-6)


def test_cores_of_an_svd_are_canonical_whatever_the_weights(run: Plan, deep: Path, lab: Path, work: Path) -> None:
    report = run("decompose", deep / "gpt2", *BLOCKS, "--ratio", 0.5, "--shapes", "svd", *text(lab))
    stored = load_file(work / "out" / "model.safetensors")
    for module in (module for module in chosen(report) if module["action"] == "mpo"):
        second = stored[f"{module['name']}.core_1"].double()
        rows = second.reshape(len(second), -1)
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(second), dtype=torch.float64), rtol=0, atol=1e-5)


def test_tables_count_by_their_gradients_and_by_what_the_head_reads(
    run: Plan, deep: Path, lab: Path, work: Path
) -> None:
    """A tied table is not cut as if all directions were alike."""
    made = {}
    for name, more in {"plain": [], "input": [*text(lab), "--weights", "input"], "fisher": text(lab)}.items():
        run("decompose", deep / "gpt2", "--layers", "embedding", "--ratio", 0.5, "--shapes", "svd", *more)
        stored = load_file(work / "out" / "model.safetensors")
        first, second = (stored[f"transformer.wte.core_{k}"] for k in (0, 1))
        made[name] = first.reshape(first.shape[1], -1) @ second.reshape(second.shape[0], -1)
    assert float((made["plain"] - made["input"]).norm()) > 1e-2 * float(made["plain"].norm())
    assert float((made["plain"] - made["fisher"]).norm()) > 1e-2 * float(made["plain"].norm())


def test_an_untied_table_is_planned_without_gradients_too(run: Plan, deep: Path, lab: Path) -> None:
    report = run("plan", deep / "bert", "--ratio", 0.5, "--weights", "input", *text(lab))
    table = next(module for module in chosen(report) if module["role"] == "embedding")
    assert "depend" not in table["reason"]
    params, dense = size_of(chosen(report))
    assert 0.97 * dense < 2 * params <= dense


@pytest.mark.parametrize("options", [["--allocation", "uniform"], []])
def test_what_stays_dense_is_made_up_for_by_the_others(options: list[str], run: Plan, deep: Path, lab: Path) -> None:
    """A model's pooler counts for nothing in next tokens, for example: here position tables do not."""
    report = run("plan", deep / "bert", *BLOCKS, "--ratio", 0.5, *text(lab), *options)
    params, dense = size_of(chosen(report))
    assert 0.95 * dense < 2 * params <= dense


@pytest.mark.parametrize("cls", [tf.BertForQuestionAnswering, tf.BertForMaskedLM, tf.BertForTokenClassification])
def test_heads_of_other_kinds_are_compared_without_a_perplexity(cls: Any, run: Plan, lab: Path, tmp_path: Path) -> None:
    tasks.save("bert", tmp_path / "other", cls=cls, initializer_range=0.2)
    report = run("plan", tmp_path / "other", *BLOCKS, "--ratio", 0.5, *text(lab), "--compare")
    assert all(arm["perplexity"] is None for arm in report["compared"])
    assert report["compared"][-1]["divergence"] > 0


def test_an_encoder_decoder_without_a_head_is_calibrated(run: Plan, lab: Path, tmp_path: Path) -> None:
    tasks.save("t5", tmp_path / "body", cls=tf.T5Model)
    report = run("plan", tmp_path / "body", *BLOCKS, "--ratio", 0.5, *text(lab), "--compare")
    assert {name.partition(".")[0] for name in (m["name"] for m in chosen(report))} == {"encoder", "decoder"}
    assert all(module["action"] == "mpo" for module in chosen(report) if module["form"])


def test_one_bound_for_all_is_not_for_inputs_that_move(cli: Cli, deep: Path, lab: Path) -> None:
    refused(
        cli("plan", deep / "bert", "--max-error", 0.3, *text(lab), "--sequential"), 2, "--sequential with --max-error"
    )
