"""`mpocli sparsify` without training: what becomes zero and what stays, on which inputs it looks, what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

from cli import tasks
from cli.shell import WEIGHTS, Cli, refused, rewrite, succeeded, tree

Sparsify = Callable[..., dict[str, Any]]
NEEDS_TEXT = ("wanda", "sparsegpt")


@pytest.fixture
def sparsify(cli: Cli, work: Path) -> Sparsify:
    """Prune a model to `out`; the report."""

    def run(model: Path | str, out: str, *more: object) -> dict[str, Any]:
        return succeeded(cli("sparsify", model, *more, "-o", out, "--json")).json

    return run


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of two layers with tokenizers."""
    made = tmp_path_factory.mktemp("deep")
    tasks.save("bert", made / "bert", layers=2, initializer_range=0.2)
    tasks.save("gpt2", made / "gpt2", layers=2, initializer_range=0.2)
    return made


def unpacked(directory: Path) -> dict[str, np.ndarray]:
    """All tensors as they are in a float32 model, by numpy's own reading of bitmasks."""
    stored = load_file(directory / WEIGHTS)
    shapes = json.loads((directory / "config.json").read_text()).get("quantization_config", {}).get("encodings", {})
    found = {name: t.float().numpy() for name, t in stored.items() if not name.endswith(("_bitmask", "_values"))}
    found.pop("an_mpo_checkpoint.import_mpocli_before_from_pretrained", None)
    for name, entry in shapes.items():
        bits = np.unpackbits(stored[f"{name}_bitmask"].numpy(), bitorder="little")
        dense = np.zeros(int(np.prod(entry["shape"])), np.float32)
        dense[bits[: dense.size].astype(bool)] = stored[f"{name}_values"].float().numpy()
        found[name] = dense.reshape(entry["shape"])
    return found


def smallest(scores: np.ndarray, count: int) -> set[int]:
    """Places of the `count` smallest, of equals the first."""
    return set(np.argsort(scores.reshape(-1), kind="stable")[:count].tolist())


def zeros(matrix: np.ndarray) -> set[int]:
    return set(np.flatnonzero(matrix == 0).tolist())


def assert_kept_as_they_were(after: np.ndarray, before: np.ndarray) -> None:
    kept = after != 0
    assert np.array_equal(after[kept], before[kept])


def assert_only_these_changed(after: dict[str, np.ndarray], before: dict[str, np.ndarray], names: set[str]) -> None:
    assert after.keys() == before.keys()
    assert {name for name in before if not np.array_equal(before[name], after[name])} == names


def pruned(report: dict[str, Any]) -> set[str]:
    return {tensor["name"] for tensor in report["tensors"]}


# --- by magnitude, without data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.37, 0.9])
@pytest.mark.parametrize("model", ["bert", "gpt2", "t5"])
def test_magnitude_prunes_exactly_the_smallest_of_every_chosen_matrix_and_nothing_else(
    model: str, sparsity: float, sparsify: Sparsify, work: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(model)
    report = sparsify(source, "out", "--method", "magnitude", "--sparsity", sparsity)
    before, after = unpacked(source), unpacked(work / "out")
    assert report["kept"] == [] and {tensor["role"] for tensor in report["tensors"]} == {"attention", "ffn"}
    keys = {name if name in before else name.removeprefix("transformer.") for name in pruned(report)}
    assert_only_these_changed(after, before, keys)
    for name in keys:
        # A Conv1D is (inputs, outputs) in the files, and ties there are none.
        assert zeros(after[name]) == smallest(np.abs(before[name]), int(before[name].size * sparsity)), name
        assert_kept_as_they_were(after[name], before[name])


def test_one_global_threshold_gives_the_exact_total_and_what_is_kept_is_larger(
    sparsify: Sparsify, bert: Path, work: Path
) -> None:
    report = sparsify(bert, "out", "--method", "magnitude", "--sparsity", 0.61, "--scope", "global")
    before, after = unpacked(bert), unpacked(work / "out")
    names = sorted(pruned(report))
    old, new = (np.concatenate([found[name].reshape(-1) for name in names]) for found in (before, after))
    assert int((new == 0).sum()) == report["zeros"] == int(old.size * 0.61) and report["entries"] == old.size
    assert np.abs(old[new == 0]).max() <= np.abs(old[new != 0]).min()
    assert len({tensor["sparsity"] for tensor in report["tensors"]}) > 1


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (4, 8)])
@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_n_of_m_along_the_input_dimension(
    model: str, keep: int, group: int, method: str, sparsify: Sparsify, deep: Path, lab: Path, work: Path
) -> None:
    """Of GPT-2's Conv1D, which stores the transpose, down the columns."""
    more = ["--calibrate", lab / "train.txt", "--seq-len", 16] if method in NEEDS_TEXT else []
    report = sparsify(deep / model, "out", "--method", method, "--pattern", f"{keep}:{group}", *more)
    before, after = unpacked(deep / model), unpacked(work / "out")
    assert len(report["tensors"]) == (12 if model == "bert" else 8) and report["sparsity"] == 0.5
    for name in pruned(report):
        old, new = (found[name].T if model == "gpt2" else found[name] for found in (before, after))
        groups = new.reshape(new.shape[0], -1, group)
        assert np.all((groups == 0).sum(-1) == group - keep), name
        if method == "magnitude":
            sizes = np.abs(old).reshape(groups.shape)
            order = np.sort(sizes, axis=-1)
            assert np.all(np.where(groups == 0, sizes, 0).max(-1) == order[..., group - keep - 1]), name


def test_a_matrix_that_n_does_not_divide_is_kept_and_says_why(
    cli: Cli, sparsify: Sparsify, llama: Path, work: Path
) -> None:
    report = sparsify(llama, "out", "--method", "magnitude", "--pattern", "2:4")
    kept = {one["name"]: one["reason"] for one in report["kept"]}
    assert kept.keys() == {f"model.layers.{k}.mlp.down_proj" for k in (0, 1)}
    assert set(kept.values()) == {"86 input columns are no multiple of 4"}
    before, after = unpacked(llama), unpacked(work / "out")
    assert_only_these_changed(after, before, pruned(report))
    shutil.rmtree(work / "out")
    options = ["--method", "magnitude", "--pattern", "2:4", "--target", "*down_proj"]
    refused(cli("sparsify", llama, *options, "-o", "out"), 3, "no matrix to prune", "86", "4")
    assert tree(work) == {}


SELECTED: list[tuple[list[str], set[str]]] = [
    (["--layers", "ffn"], {"intermediate.dense", "output.dense"}),
    (["--layers", "attention", "--target", "*key", "--target", "*intermediate*"], {"attention.self.key"}),
    (
        ["--layers", "attention", "--ignore", "*self*", "--ignore", "*layer.1*"],
        {"attention.output.dense"},
    ),
    (["--target", "*pooler*", "--target", "*query"], {"pooler.dense", "attention.self.query"}),
    (["--layers", "embedding,head"], {"word_embeddings", "classifier"}),
]


@pytest.mark.parametrize(("options", "wanted"), SELECTED, ids=[" ".join(row[0]) for row in SELECTED])
def test_only_what_is_selected_is_pruned(
    options: list[str], wanted: set[str], sparsify: Sparsify, bert: Path, work: Path
) -> None:
    report = sparsify(bert, "out", "--method", "magnitude", *options)
    endings = {
        next((end for end in sorted(wanted, key=len, reverse=True) if name.endswith(f"{end}.weight")), name)
        for name in pruned(report)
    }
    assert endings == wanted
    assert not [name for name in pruned(report) if "--ignore" in options and "layer.1" in name]
    assert_only_these_changed(unpacked(work / "out"), unpacked(bert), pruned(report))


def test_a_tied_matrix_is_kept_and_alone_refused(cli: Cli, sparsify: Sparsify, masked_lm: Path, work: Path) -> None:
    report = sparsify(masked_lm, "out", "--method", "magnitude", "--layers", "embedding,head")
    assert [one["reason"] for one in report["kept"]] == ["its weight is tied to cls.predictions.decoder"]
    assert pruned(report) == {"cls.predictions.transform.dense.weight"}
    refused(
        cli("sparsify", masked_lm, "--method", "magnitude", "--layers", "embedding", "-o", "no"), 3, "no matrix", "tied"
    )
    refused(cli("sparsify", masked_lm, "--method", "magnitude", "--layers", "pooler", "-o", "no"), 3, "no matrix")
    assert sorted(path.name for path in work.iterdir()) == ["out"]


def test_dense_storage_is_an_ordinary_checkpoint_of_the_same_zeros(sparsify: Sparsify, bert: Path, work: Path) -> None:
    packed = sparsify(bert, "packed", "--method", "magnitude", "--sparsity", 0.8)
    plain = sparsify(bert, "plain", "--method", "magnitude", "--sparsity", 0.8, "--storage", "dense")
    config = json.loads((work / "plain" / "config.json").read_text())
    assert "quantization_config" not in config and config == json.loads((bert / "config.json").read_text())
    assert unpacked(work / "plain").keys() == unpacked(bert).keys()
    assert_only_these_changed(unpacked(work / "plain"), unpacked(work / "packed"), set())
    assert plain["zeros"] == packed["zeros"] and plain["sparsity"] == packed["sparsity"]
    assert packed["totals"]["bytes"] < plain["totals"]["bytes"]
    assert json.loads((work / "plain" / "mpo.json").read_text())["history"][-1]["command"] == "sparsify"


def test_the_report_has_the_keys_that_scripts_rely_on(sparsify: Sparsify, bert: Path, work: Path) -> None:
    report = sparsify(bert, "out", "--method", "magnitude")
    assert report["schema"] == "mpocli.sparsify/1" and report["out"] == "out"
    assert report["metrics"] == report["metrics_before"] == {} and report["trainable_params"] == 0
    assert report["totals"].keys() == {"params", "dense_params", "ratio", "bytes", "dense_bytes"}
    stored = unpacked(work / "out")
    counted = sum(len(zeros(stored[name])) for name in pruned(report))
    entries = sum(stored[name].size for name in pruned(report))
    assert report["zeros"] == counted == sum(int(stored[name].size * 0.9) for name in pruned(report))
    assert report["sparsity"] == counted / entries
    assert report["totals"]["bytes"] == (work / "out" / WEIGHTS).stat().st_size


def test_the_same_again_gives_the_same_bytes(sparsify: Sparsify, deep: Path, lab: Path, work: Path) -> None:
    options = ["--method", "sparsegpt", "-s", 0.5, "--calibrate", lab / "train.txt", "--samples", 4, "--seq-len", 16]
    for out, seed in (("one", 3), ("two", 3), ("three", 4)):
        sparsify(deep / "gpt2", out, *options, "--seed", seed)
    assert tree(work / "one") == tree(work / "two")
    assert tree(work / "one")[WEIGHTS] != tree(work / "three")[WEIGHTS]
    text = (work / "one" / "mpo.json").read_text()
    assert str(lab) not in text and str(work) not in text and "/tmp" not in text
    assert json.loads(text)["history"][-1]["options"]["source"] == "train.txt"


# --- by activations -----------------------------------------------------------------------------------------------


def inputs_of(model: Any, names: list[str], rows: list[list[int]]) -> dict[str, np.ndarray]:
    """What reaches some modules, (tokens, inputs) in float64, row by row and so without any padding."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0].detach().reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).double().numpy() for name, parts in seen.items()}


def rows_of(kind: str, lab: Path, model: Path) -> tuple[list[list[int]], list[object]]:
    """Everything that there is to calibrate on, and the options that name it."""
    tokenizer = tf.AutoTokenizer.from_pretrained(model)
    if kind == "task":
        lines = (lab / "train.tsv").read_text().splitlines()[1:]
        rows = [tokenizer(line.rpartition("\t")[0])["input_ids"] for line in lines]
        return rows, ["--task", "sst2", "--calibrate", lab / "train.tsv", "--max-length", 32]
    tokens = tokenizer((lab / "train.txt").read_text(), add_special_tokens=False)["input_ids"]
    options: list[object] = ["--calibrate", lab / "train.txt", "--seq-len", 16]
    if kind == "causal":
        return [tokens[start : start + 16] for start in range(0, len(tokens), 16)], options
    cuts = [tokens[start : start + 14] for start in range(0, len(tokens), 14)]
    return [[tokenizer.cls_token_id, *cut, tokenizer.sep_token_id] for cut in cuts], options


@pytest.mark.parametrize(("model", "kind"), [("bert", "task"), ("bert", "masked"), ("gpt2", "causal")])
def test_wanda_keeps_what_is_large_times_its_inputs_norm_in_every_row_block_by_block(
    model: str, kind: str, sparsify: Sparsify, deep: Path, lab: Path, work: Path
) -> None:
    """The second block looks at what comes out of the pruned first one."""
    rows, options = rows_of(kind, lab, deep / model)
    assert len(rows) > 20
    report = sparsify(deep / model, "out", "--method", "wanda", "-s", 0.53, "--samples", 1000, *options)
    after = unpacked(work / "out")
    loaded = tf.AutoModel.from_pretrained(deep / model).eval()
    prefix = "transformer." if model == "gpt2" else ""
    block = "h" if model == "gpt2" else "encoder.layer"
    assert len(report["tensors"]) == (8 if model == "gpt2" else 12)
    for number in (0, 1):
        names = [
            name.removeprefix(prefix).removesuffix(".weight") for name in pruned(report) if f"{block}.{number}." in name
        ]
        found = inputs_of(loaded, names, rows)
        for name in names:
            weight = loaded.get_submodule(name).weight
            stored = after[f"{prefix}{name}.weight"]
            old, new = (m.T if model == "gpt2" else m for m in (weight.detach().double().numpy(), stored))
            scores = np.abs(old) * np.linalg.norm(found[name], axis=0)
            counts = (new == 0).sum(1)
            assert counts.sum() == int(new.size * 0.53) and counts.max() - counts.min() <= 1, name
            for row in range(len(new)):
                gone = new[row] == 0
                assert scores[row][gone].max() <= scores[row][~gone].min() * (1 + 1e-5), (name, row)
            # Neither magnitude alone nor the norms of unlike inputs would give the same.
            assert any(zeros(new[row]) != smallest(np.abs(old[row]), count) for row, count in enumerate(counts))
            assert_kept_as_they_were(new, old.astype(np.float32))
            with torch.no_grad():
                weight.copy_(torch.from_numpy(stored))


def test_sparsegpt_changes_outputs_less_than_wanda_and_wanda_less_than_magnitude(
    sparsify: Sparsify, deep: Path, lab: Path, work: Path
) -> None:
    """On the inputs that they looked at; each prunes exactly as much."""
    rows, options = rows_of("masked", lab, deep / "bert")
    name = "encoder.layer.0.attention.output.dense"  # its inputs' norms differ
    seen = inputs_of(tf.AutoModel.from_pretrained(deep / "bert").eval(), [name], rows)[name]
    dense = unpacked(deep / "bert")[f"{name}.weight"]
    lost = {}
    for method in ("magnitude", *NEEDS_TEXT):
        more = ["--samples", 1000, *options] if method in NEEDS_TEXT else []
        report = sparsify(deep / "bert", method, "--method", method, "-s", 0.6, *more)
        made = unpacked(work / method)
        assert all(len(zeros(made[key])) == int(made[key].size * 0.6) for key in pruned(report))
        lost[method] = np.linalg.norm(seen @ (made[f"{name}.weight"] - dense).T)
    assert lost["sparsegpt"] < 0.9 * lost["wanda"] < lost["magnitude"]


@pytest.mark.parametrize("method", NEEDS_TEXT)
def test_text_to_text_models_are_pruned_on_both_sides(
    method: str, sparsify: Sparsify, lab: Path, work: Path, cli: Cli
) -> None:
    for out, options in (
        ("text", ["--calibrate", lab / "train.txt", "--seq-len", 16]),
        ("rows", ["--task", "e2e", "--calibrate", lab / "e2e-train.csv", "--max-length", 24]),
    ):
        report = sparsify(lab / "t5", out, "--method", method, "-s", 0.5, *options)
        made = unpacked(work / out)
        assert {name.partition(".")[0] for name in pruned(report)} == {"encoder", "decoder"}
        assert all(len(zeros(made[name])) == made[name].size // 2 for name in pruned(report))


def test_samples_counts_rows_and_a_short_text_is_told(
    sparsify: Sparsify, cli: Cli, lab: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpocli.methods.data import by_blocks

    seen: list[int] = []
    real = by_blocks.sequential

    def watched(model: Any, batches: list[dict[str, Tensor]], *rest: Any, **more: Any) -> None:
        seen.append(sum(len(batch["input_ids"]) for batch in batches))
        real(model, batches, *rest, **more)

    monkeypatch.setattr(by_blocks, "sequential", watched)
    task = ["--task", "sst2", "--calibrate", lab / "train.tsv", "--max-length", 32]
    text = ["--calibrate", lab / "train.txt", "--seq-len", 16]
    for number, (options, samples) in enumerate([(task, 3), (task, 11), (text, 3), (text, 11)]):
        sparsify(lab / "body", f"out{number}", "--method", "wanda", "-s", 0.5, *options, "--samples", samples)
    assert seen == [3, 11, 3, 11]
    short = cli("sparsify", lab / "body", "--method", "sparsegpt", "-s", 0.5, *text, "--samples", 1, "-o", "short")
    assert "output.dense: 16 calibration tokens for 64 inputs" in succeeded(short).err


# --- of an MPO, of what is sparse already, in half precision --------------------------------------------------------


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_of_mpos_the_central_cores_are_pruned(method: str, cli: Cli, sparsify: Sparsify, lab: Path, work: Path) -> None:
    more = ["--calibrate", lab / "train.txt", "--seq-len", 16] if method in NEEDS_TEXT else []
    report = sparsify(lab / "mpo", "out", "--method", method, "-s", 0.7, *more)
    before, after = unpacked(lab / "mpo"), unpacked(work / "out")
    assert {name.rpartition(".")[2] for name in pruned(report)} == {"core_2"} and len(report["tensors"]) == 6
    assert_only_these_changed(after, before, pruned(report))
    for name in pruned(report):
        assert len(zeros(after[name])) == int(after[name].size * 0.7)
        if method == "magnitude":
            assert zeros(after[name]) == smallest(np.abs(before[name]), int(before[name].size * 0.7))
        if method != "sparsegpt":
            assert_kept_as_they_were(after[name], before[name])
    inspected = succeeded(cli("inspect", "out", "--verify", "--json")).json
    assert inspected["problems"] == [] and inspected["totals"] == report["totals"]
    assert inspected["sparsity"] == report["sparsity"]
    assert {m["relative_error"] for m in inspected["modules"] if m["sparsity"] is not None} == {None}
    succeeded(cli("merge", "out", "-o", "dense"))
    succeeded(cli("merge", lab / "mpo", "-o", "whole"))
    assert load_file(work / "dense" / WEIGHTS).keys() == load_file(work / "whole" / WEIGHTS).keys()


def test_pruning_again_keeps_the_zeros_and_the_other_sparse_tensors(sparsify: Sparsify, bert: Path, work: Path) -> None:
    sparsify(bert, "one", "--method", "magnitude", "-s", 0.5, "--layers", "ffn")
    second = sparsify(work / "one", "two", "--method", "magnitude", "-s", 0.8, "--target", "*intermediate*")
    third = sparsify(work / "two", "three", "--method", "magnitude", "-s", 0.3, "--layers", "attention")
    one, two, three = (unpacked(work / out) for out in ("one", "two", "three"))
    for name in pruned(second):
        assert zeros(one[name]) < zeros(two[name]) and len(zeros(two[name])) == int(two[name].size * 0.8)
    encoded = json.loads((work / "three" / "config.json").read_text())["quantization_config"]["encodings"]
    assert len(encoded) == 4 + 8 and encoded.keys() >= pruned(third) | pruned(second)
    assert_only_these_changed(three, two, pruned(third))
    assert third["totals"]["bytes"] < second["totals"]["bytes"]
    sparsify(work / "three", "four", "--method", "magnitude", "-s", 0.9, "--layers", "pooler", "--storage", "dense")
    four = unpacked(work / "four")
    assert "quantization_config" not in json.loads((work / "four" / "config.json").read_text())
    assert all(np.array_equal(four[name], three[name]) for name in encoded)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_half_precision_stays_so_and_what_is_kept_stays_bit_for_bit(
    method: str, sparsify: Sparsify, deep: Path, lab: Path, work: Path, tmp_path: Path
) -> None:
    tf.AutoModel.from_pretrained(deep / "bert", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    tasks.tokenizer("bert").save_pretrained(tmp_path / "half")
    more = ["--calibrate", lab / "train.txt", "--seq-len", 16] if method in NEEDS_TEXT else []
    report = sparsify(tmp_path / "half", "out", "--method", method, "-s", 0.53, *more)
    stored = load_file(work / "out" / WEIGHTS)
    assert {str(t.dtype) for name, t in stored.items() if name.endswith("_values")} == {"torch.bfloat16"}
    before, after = unpacked(tmp_path / "half"), unpacked(work / "out")
    for name in pruned(report):
        assert len(zeros(after[name])) == int(after[name].size * 0.53)
        if method != "sparsegpt":
            assert_kept_as_they_were(after[name], before[name])


# --- metrics without training -------------------------------------------------------------------------------------


def test_metrics_are_those_that_eval_finds_before_and_after(
    cli: Cli, sparsify: Sparsify, lab: Path, work: Path, tmp_path: Path
) -> None:
    tasks.save("bert", tmp_path / "head", cls=tf.BertForSequenceClassification, num_labels=1, initializer_range=0.3)
    task = ["--task", "stsb", "--max-length", 32]
    more = ["--eval", lab / "sts-dev.tsv", "--test", lab / "sts-train.tsv"]
    report = sparsify(tmp_path / "head", "out", "--method", "magnitude", "-s", 0.9, *task, *more)

    def measured(model: Path, data: str) -> dict[str, float]:
        metrics: dict[str, float] = succeeded(cli("eval", model, *task, "--eval", lab / data, "--json")).json["metrics"]
        return metrics

    assert report["metrics"] == pytest.approx(measured(work / "out", "sts-dev.tsv"), abs=1e-6)
    assert report["metrics_before"] == pytest.approx(measured(tmp_path / "head", "sts-dev.tsv"), abs=1e-6)
    assert report["test_metrics"] == pytest.approx(measured(work / "out", "sts-train.tsv"), abs=1e-6)
    assert report["metrics"] != report["metrics_before"]
    shown = succeeded(cli("sparsify", tmp_path / "head", "--method", "magnitude", *task, *more, "-o", "shown"))
    assert "spearmanr" in shown.out and "test" in shown.out


def test_a_head_that_was_never_trained_is_not_measured(cli: Cli, lab: Path, work: Path) -> None:
    task = ["--task", "sst2", "--max-length", 32, "--eval", lab / "dev.tsv"]
    refused(cli("sparsify", lab / "body", "--method", "magnitude", *task, "-o", "out"), 3, "no classification head")
    assert tree(work) == {}


# --- what is refused ----------------------------------------------------------------------------------------------

TRAIN = ["--task", "sst2", "--train", "{lab}/train.tsv", "--max-length", 32]
MAGNITUDE = ["--method", "magnitude"]
WANDA = ["--method", "wanda"]
TEXT = ["--calibrate", "{lab}/train.txt"]
REFUSED: dict[str, tuple[list[Any], int, list[str]]] = {
    "pst without data": ([], 2, ["--method pst", "--train"]),
    "movement without data": (["--method", "movement", "--task", "sst2"], 2, ["--task", "--train"]),
    "wanda in training": ([*WANDA, *TEXT, *TRAIN], 2, ["--method wanda", "--train"]),
    "wanda without data": (WANDA, 2, ["--method wanda", "--calibrate"]),
    "sparsegpt without data": (["--method", "sparsegpt"], 2, ["--method sparsegpt", "--calibrate"]),
    "magnitude with text": ([*MAGNITUDE, *TEXT], 2, ["--calibrate", "magnitude"]),
    "sparsity 0": ([*MAGNITUDE, "-s", 0], 2, ["--sparsity 0"]),
    "sparsity 1": ([*MAGNITUDE, "-s", 1], 2, ["--sparsity 1"]),
    "sparsity 90": ([*MAGNITUDE, "-s", 90], 2, ["--sparsity 90", "0.9"]),
    "sparsity nan": ([*MAGNITUDE, "-s", "nan"], 2, ["--sparsity"]),
    "pattern and sparsity": ([*MAGNITUDE, "-s", 0.9, "--pattern", "2:4"], 2, ["2:4", "0.5", "0.9"]),
    "pattern": ([*MAGNITUDE, "--pattern", "4:2"], 2, ["4:2", "N:M"]),
    "method": (["--method", "random"], 2, ["random", "sparsegpt"]),
    "scope": ([*MAGNITUDE, "--scope", "layer"], 2, ["layer", "global"]),
    "storage": ([*MAGNITUDE, "--storage", "csr"], 2, ["csr", "bitmask"]),
    "role": ([*MAGNITUDE, "--layers", "norms"], 2, ["norms"]),
    "glob": ([*MAGNITUDE, "--target", "*nowhere*"], 3, ["*nowhere*"]),
    "global pattern": ([*MAGNITUDE, "--pattern", "2:4", "--scope", "global"], 2, ["--scope global", "2:4"]),
    "global wanda": ([*WANDA, *TEXT, "--scope", "global"], 2, ["--scope global", "wanda"]),
    "warm-ups": ([*TRAIN, "--initial-warmup", 0.6, "--final-warmup", 0.4], 2, ["--initial-warmup", "below 1"]),
    "warm-up": ([*TRAIN, "--final-warmup", -0.1], 2, ["--final-warmup"]),
    "initial": ([*TRAIN, "--initial-sparsity", 0.95], 2, ["--initial-sparsity 0.95", "0.9"]),
    "train without a task": (["--train", "{lab}/train.tsv"], 2, ["--train", "--task"]),
    "eval without a task": ([*MAGNITUDE, "--eval", "{lab}/dev.tsv"], 2, ["--eval", "--task"]),
    "teacher without training": ([*MAGNITUDE, "--teacher", "{lab}/body"], 2, ["--teacher", "--train"]),
    "rank": ([*TRAIN, "--weight-rank", -1], 2, ["--weight-rank"]),
    "score rate": ([*TRAIN, "--score-lr", 0], 2, ["--score-lr"]),
    "nothing learnt": ([*TRAIN, "--mask-alpha1", "inf"], 2, ["--mask-alpha1"]),
    "resume of one shot": ([*MAGNITUDE, "--resume"], 2, ["--resume"]),
    "a score without training": ([*MAGNITUDE, "--score-lr", 1e-3], 2, ["--score-lr", "without --train"]),
    "a schedule without training": ([*MAGNITUDE, "--final-warmup", 0.2], 2, ["--final-warmup", "without --train"]),
    "a rank without PST": ([*TRAIN, "--method", "movement", "--mask-rank", 4], 2, ["--mask-rank", "movement"]),
    "steps without training": ([*MAGNITUDE, "--steps", 100], 2, ["--steps", "without --train"]),
    "a default that is written out": ([*MAGNITUDE, "--weight-rank", 8], 2, ["--weight-rank", "magnitude"]),
    "samples of nothing": ([*MAGNITUDE, "--samples", 4], 2, ["--samples without --calibrate"]),
    "a head without PST": ([*TRAIN, "--method", "magnitude", "--faithful"], 2, ["--faithful", "magnitude"]),
    "resume of nothing": ([*TRAIN, "--resume"], 3, ["no interrupted run"]),
    "absent text": ([*WANDA, "--calibrate", "nowhere.txt"], 3, ["nowhere.txt"]),
    "window": ([*WANDA, *TEXT, "--seq-len", 64], 2, ["--seq-len 64", "48"]),
    "embedding by wanda": ([*WANDA, *TEXT, "--seq-len", 16, "--layers", "embedding"], 3, ["no inputs"]),
    "unreached": ([*WANDA, *TEXT, "--seq-len", 1], 2, ["--seq-len"]),
    "absent": (["model=nowhere", *MAGNITUDE], 3, ["nowhere"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_or_used_is_one_line_and_writes_nothing(
    name: str, cli: Cli, lab: Path, work: Path
) -> None:
    options, code, words = REFUSED[name]
    filled = [option.format(lab=lab) if isinstance(option, str) else option for option in options]
    model: object = lab / "body"
    if filled and str(filled[0]).startswith("model="):
        model = filled.pop(0).removeprefix("model=")
    refused(cli("sparsify", model, *filled, "-o", "out"), code, *words)
    assert tree(work) == {}


def test_outputs_that_exist_or_hold_the_input_are_refused_and_kept(
    cli: Cli, sparsify: Sparsify, dense: Path, work: Path
) -> None:
    sparsify(dense, "out", *MAGNITUDE, "-s", 0.5)
    before = tree(work), tree(dense)
    refused(cli("sparsify", dense, *MAGNITUDE, "-o", "out"), 3, "out", "--overwrite")
    refused(cli("sparsify", dense, *MAGNITUDE, "-o", dense / "out"), 3, "inside")
    refused(cli("sparsify", dense, *MAGNITUDE, "-o", dense, "--overwrite"), 3, "inside")
    assert (tree(work), tree(dense)) == before
    assert sparsify(dense, "out", *MAGNITUDE, "-s", 0.7, "--overwrite")["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert [path.name for path in work.iterdir()] == ["out"] and tree(dense) == before[1]


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_a_weight_that_is_no_number_is_exit_3_and_named(scope: str, cli: Cli, dense: Path, work: Path) -> None:
    name = "bert.encoder.layer.1.output.dense.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][0, 3] = float("nan")

    rewrite(dense, spoil)
    refused(cli("sparsify", dense, *MAGNITUDE, "--scope", scope, "-o", "out"), 3, name)
    assert tree(work) == {}


def test_inspect_counts_zeros_that_are_stored_dense(sparsify: Sparsify, cli: Cli, bert: Path, work: Path) -> None:
    """Without being asked where the history says so, and in a merged checkpoint when it is."""
    packed = sparsify(bert, "packed", "--method", "magnitude", "--sparsity", 0.7)
    sparsify(bert, "plain", "--method", "magnitude", "--sparsity", 0.7, "--storage", "dense")
    succeeded(cli("merge", "packed", "-o", "merged"))
    shown = {
        name: succeeded(cli("inspect", name, *more, "--json")).json
        for name, more in {"packed": [], "plain": [], "merged": ["--count-zeros"]}.items()
    }
    for name, report in shown.items():
        assert report["zeros"] == packed["zeros"] and report["sparsity"] == pytest.approx(packed["sparsity"]), name
        assert {m["name"]: m["sparsity"] for m in report["modules"]} == {
            m["name"]: m["sparsity"] for m in shown["packed"]["modules"]
        }
    assert succeeded(cli("inspect", bert, "--count-zeros", "--json")).json["sparsity"] is None


def test_several_processes_are_refused_where_nothing_is_trained(
    cli: Cli, bert: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(cli("sparsify", bert, "--method", "magnitude", "-o", "out"), 2, "2 were launched")
    assert not tree(work)
