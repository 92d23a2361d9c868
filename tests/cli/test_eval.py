"""`mpocli eval`: its metrics against computations that share no code with it, its baseline and its gates."""

from __future__ import annotations

import json
import math
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from cli import tasks
from cli.shell import Cli, edited, refused, rewrite, succeeded, tree
from mpocli.config.data import DataOptions
from mpocli.config.decompose import DecomposeConfig
from mpocli.config.optimisation import Optimisation
from mpocli.hf import quiet
from mpocli.methods.decompose import run as decompose
from mpocli.methods.finetune import run as finetune
from mpocli.nn import logits
from mpocli.train.evaluate import predict


@pytest.fixture(scope="module")
def tuned(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sst2` and `stsb`, classifiers that have learnt something, as MPOs and dense, and one of them `cut`."""
    made = tmp_path_factory.mktemp("tuned")
    decompose.run(str(lab / "body"), DecomposeConfig(layers=("ffn",)), made / "mpo")
    for task, prefix in (("sst2", ""), ("stsb", "sts-")):
        data = DataOptions(task, train=str(lab / f"{prefix}train.tsv"), max_length=32)
        config = finetune.FinetuneConfig(data, Optimisation(lr=1e-2, batch_size=8), steps=36, device="cpu")
        with quiet.transformers():
            finetune.run(str(made / "mpo"), config, made / task)
            finetune.run(str(lab / "body"), config, made / f"{task}-dense")
    decompose.run(str(made / "sst2-dense"), DecomposeConfig(trunc=2), made / "cut")
    return made


def sst2(lab: Path, *more: object) -> list[object]:
    return ["--task", "sst2", "--eval", lab / "dev.tsv", "--max-length", 32, "--json", *more]


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- metrics against other computations -----------------------------------------------------------------------------


def test_accuracy_and_predictions_are_those_of_a_plain_transformers_loop(
    cli: Cli, lab: Path, tuned: Path, work: Path
) -> None:
    report = succeeded(cli("eval", tuned / "sst2", *sst2(lab, "--predictions", "said.jsonl"))).json
    rows = written(work / "said.jsonl")
    lines = [line.split("\t") for line in (lab / "dev.tsv").read_text().splitlines()[1:]]
    assert [row["text"] for row in rows] == [line[0] for line in lines]
    guess, truth = (np.array([row[key] for row in rows]) for key in ("prediction", "label"))
    assert truth.tolist() == [int(line[1]) for line in lines]
    assert report["metrics"] == {"accuracy": float((guess == truth).mean())}
    assert report["metrics"]["accuracy"] > 0.6 and report["samples"] == len(rows) == 40
    model = tf.AutoModelForSequenceClassification.from_pretrained(tuned / "sst2").eval()
    words = tasks.tokenizer("bert")
    with torch.no_grad():
        alone = torch.cat([model(**words(row["text"], return_tensors="pt")).logits for row in rows])
    assert torch.allclose(alone, torch.tensor([row["logits"] for row in rows]), atol=1e-4)
    assert guess.tolist() == np.array([row["logits"] for row in rows]).argmax(1).tolist()
    assert {row["prediction_name"] for row in rows} <= {"negative", "positive"}


@pytest.mark.parametrize("task", ["cola", "mrpc"])
def test_matthews_and_f1_agree_with_counts_of_the_written_predictions(
    task: str, cli: Cli, lab: Path, tuned: Path, work: Path, tmp_path: Path
) -> None:
    """Two columns more, the same words: a classifier of two classes does each of these tasks."""
    rows = [line.split("\t") for line in (lab / "dev.tsv").read_text().splitlines()[1:]]
    header = {"cola": "sentence\tlabel", "mrpc": "sentence1\tsentence2\tlabel"}[task]
    lines = [f"{text}\t{label}" if task == "cola" else f"{text}\tlane\t{label}" for text, label in rows]
    (work / "dev.tsv").write_text("\n".join([header, *lines]) + "\n")
    copytree(tuned / "sst2", tmp_path / "model")
    with edited(tmp_path / "model" / "config.json") as config:
        names = {"cola": ("unacceptable", "acceptable"), "mrpc": ("not_equivalent", "equivalent")}[task]
        config["id2label"], config["label2id"] = dict(enumerate(names)), {name: k for k, name in enumerate(names)}
    options = ["--task", task, "--eval", "dev.tsv", "--max-length", 32, "--predictions", "said", "--json"]
    metrics = succeeded(cli("eval", tmp_path / "model", *options)).json["metrics"]
    guess, truth = (np.array([row[key] for row in written(work / "said")]) for key in ("prediction", "label"))
    both, neither = int((guess & truth).sum()), int(((1 - guess) & (1 - truth)).sum())
    false, missed = int((guess & (1 - truth)).sum()), int(((1 - guess) & truth).sum())
    assert metrics["accuracy"] == pytest.approx((both + neither) / len(guess))
    if task == "mrpc":
        assert metrics["f1"] == pytest.approx(2 * both / (2 * both + false + missed))
    else:
        below = (both + false) * (both + missed) * (neither + false) * (neither + missed)
        assert metrics["matthews_correlation"] == pytest.approx((both * neither - false * missed) / math.sqrt(below))


def test_correlations_agree_with_numpy_on_the_written_predictions(cli: Cli, lab: Path, tuned: Path, work: Path) -> None:
    options = ["--task", "stsb", "--eval", lab / "sts-dev.tsv", "--max-length", 32, "--predictions", "said", "--json"]
    report = succeeded(cli("eval", tuned / "stsb", *options)).json
    rows = written(work / "said")
    guess, truth = (np.array([row[key] for row in rows], dtype=np.float64) for key in ("prediction", "label"))

    def ranks(values: Any) -> Any:
        """Equal values share the mean of their places."""
        return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])

    assert report["metrics"]["pearson"] == pytest.approx(float(np.corrcoef(guess, truth)[0, 1]), abs=1e-9)
    expected = float(np.corrcoef(ranks(guess), ranks(truth))[0, 1])
    assert report["metrics"]["spearmanr"] == pytest.approx(expected, abs=1e-9)
    assert report["metrics"]["pearson"] > 0.5
    assert all(row.keys() == {"text", "pair", "prediction", "label"} for row in rows)


def test_causal_perplexity_is_that_of_a_plain_transformers_loop(cli: Cli, lab: Path, work: Path) -> None:
    """Non-overlapping windows, the last partial one counted; words are whitespace tokens plus one per line."""
    succeeded(cli("decompose", lab / "gpt2", "--trunc", 6, "-o", "gpt2"))
    text = (lab / "dev.txt").read_text()
    ids = tasks.tokenizer("gpt2")(text)["input_ids"]
    assert len(ids) % 16 > 1  # a last window that is not full
    for directory in (work / "gpt2", lab / "gpt2"):
        options = ["--task", "lm", "--eval", lab / "dev.txt", "--max-length", 16, "--batch-size", 5, "--json"]
        report = succeeded(cli("eval", directory, *options)).json
        model = tf.AutoModelForCausalLM.from_pretrained(directory).eval()
        nll, count = 0.0, 0
        for start in range(0, len(ids), 16):
            window = torch.tensor([ids[start : start + 16]])
            with torch.no_grad():
                nll += float(model(window, labels=window).loss) * (window.shape[1] - 1)
            count += window.shape[1] - 1
        assert report["metrics"]["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
        words = len(text.split()) + text.count("\n")
        assert report["metrics"]["word_perplexity"] == pytest.approx(math.exp(nll / words), rel=1e-4)
        assert report["samples"] == -(-len(ids) // 16)


def test_masked_perplexity_is_that_of_a_loop_over_what_was_hidden(
    cli: Cli, lab: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masked batches are watched on their way into the model; the text says what stood there."""
    seen: list[torch.Tensor] = []
    forward = tf.BertForMaskedLM.forward

    def watched(self: Any, *args: Any, **inputs: Any) -> Any:
        seen.append(inputs["input_ids"].clone())
        return forward(self, *args, **inputs)

    options = ["--task", "lm", "--eval", lab / "dev.txt", "--max-length", 16, "--batch-size", 4, "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(tf.BertForMaskedLM, "forward", watched)
        report = succeeded(cli("eval", lab / "masked", *options)).json
    assert report["metrics"].keys() == {"perplexity"}
    ids = tasks.tokenizer("bert")((lab / "dev.txt").read_text(), add_special_tokens=False)["input_ids"]
    cls, sep, mask, pad = (tasks.VOCABULARY.index(token) for token in ("[CLS]", "[SEP]", "[MASK]", "[PAD]"))
    model = tf.AutoModelForMaskedLM.from_pretrained(lab / "masked").eval()
    rows = [row[row != pad] for batch in seen for row in batch]
    nll = count = total = 0
    for number, row in enumerate(rows):
        window = torch.tensor([cls, *ids[number * 14 : number * 14 + 14], sep])
        hidden = row == mask
        assert torch.equal(row[~hidden], window[~hidden]) and hidden.any() and not hidden[[0, -1]].any()
        with torch.no_grad():
            chances = model(row[None]).logits[0].double().log_softmax(-1)
        nll -= float(chances[hidden, window[hidden]].sum())
        count, total = count + int(hidden.sum()), total + len(row) - 2
    assert total == len(ids) and report["samples"] == len(rows)
    assert 0.1 < count / total < 0.22
    assert report["metrics"]["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    again = succeeded(cli("eval", lab / "masked", *options)).json
    assert again["metrics"] == report["metrics"]


def test_masked_perplexity_hides_the_same_whatever_the_batch_size(cli: Cli, lab: Path, work: Path) -> None:
    options = ["--task", "lm", "--eval", lab / "dev.txt", "--max-length", 16, "--json", "--batch-size"]
    values = [succeeded(cli("eval", lab / "masked", *options, size)).json["metrics"]["perplexity"] for size in (1, 8)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize("model", ["t5", "gpt2"])
def test_bleu_is_sacrebleu_s_on_the_written_texts(model: str, cli: Cli, lab: Path, work: Path) -> None:
    import sacrebleu

    options = ["--task", "e2e", "--max-length", 32, "--json"]
    more = ["--train", lab / "e2e-train.csv", "--lr", 1e-2, "--steps", 20, "--batch-size", 8]
    succeeded(cli("finetune", lab / model, *options, *more, "-o", "out"))
    options += ["--eval", lab / "e2e-dev.csv", "--max-new-tokens", 8]
    report = succeeded(cli("eval", "out", *options, "--predictions", "said", "--baseline", "out")).json
    rows = written(work / "said")
    assert report["samples"] == len(rows) == len({row["text"] for row in rows})
    most = max(len(row["label"]) for row in rows)
    streams: Any = [[row["label"][k] if k < len(row["label"]) else None for row in rows] for k in range(most)]
    expected = sacrebleu.corpus_bleu([row["prediction"] for row in rows], streams).score
    assert most == 2 and any(row["prediction"] for row in rows)
    assert report["metrics"] == {"bleu": pytest.approx(expected)}
    assert report["agreement"] == {"equal_texts": 1.0}


# --- the report -------------------------------------------------------------------------------------------------------


def test_json_is_one_object_with_the_house_keys_and_the_input_is_not_touched(
    cli: Cli, lab: Path, tuned: Path, work: Path
) -> None:
    before = tree(tuned / "sst2")
    report = succeeded(cli("eval", tuned / "sst2", *sst2(lab, "--baseline", tuned / "sst2-dense"))).json
    assert report["schema"] == "mpocli.eval/1"
    for found, name in ((report, "sst2"), (report["baseline"], "sst2-dense")):
        tensors = tf.AutoModelForSequenceClassification.from_pretrained(tuned / name)
        totals = found["totals"]
        assert totals["bytes"] == (tuned / name / "model.safetensors").stat().st_size
        assert totals["params"] == sum(parameter.numel() for parameter in tensors.parameters())
        assert totals["ratio"] == totals["params"] / totals["dense_params"]
        assert found["speed"]["batch_seconds_p50"] > 0 and found["speed"]["tokens_per_second"] > 0
        assert found["speed"]["peak_memory_bytes"] > 0
        assert found["metrics"].keys() == {"accuracy"}
    assert report["samples"] == 40 and report["truncated"] == 0
    assert tree(tuned / "sst2") == before and tree(work) == {}


def test_sizes_alone_need_no_data(cli: Cli, tuned: Path, work: Path) -> None:
    report = succeeded(cli("eval", tuned / "cut", "--baseline", tuned / "sst2-dense", "--json")).json
    assert report["metrics"] == {} and report["samples"] == 0
    assert report["totals"]["params"] < report["baseline"]["totals"]["params"]


def test_a_model_agrees_with_itself_and_less_with_its_truncation(cli: Cli, lab: Path, tuned: Path, work: Path) -> None:
    dense, cut = tuned / "sst2-dense", tuned / "cut"
    same = succeeded(cli("eval", dense, *sst2(lab, "--baseline", dense))).json
    assert same["agreement"]["labels"] == 1.0 and same["agreement"]["kl_nats"] == 0.0
    assert same["metrics"] == same["baseline"]["metrics"] and same["totals"] == same["baseline"]["totals"]
    options = sst2(lab, "--baseline", dense, "--predictions", "cut.jsonl")
    other = succeeded(cli("eval", cut, *options)).json
    succeeded(cli("eval", dense, *sst2(lab, "--predictions", "dense.jsonl")))
    ours, theirs = (np.array([row["logits"] for row in written(work / f"{n}.jsonl")]) for n in ("cut", "dense"))
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (theirs, ours))
    assert other["agreement"]["kl_nats"] == pytest.approx(float((p * np.log(p / q)).sum(1).mean()), abs=1e-5)
    assert other["agreement"]["labels"] == float((ours.argmax(1) == theirs.argmax(1)).mean())
    assert other["agreement"]["kl_nats"] > 1e-4


@pytest.mark.parametrize("model", ["gpt2", "masked"])
def test_a_language_model_agrees_with_itself_and_less_with_another(
    model: str, cli: Cli, lab: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the limit of logits that are held: here 3 tokens, of batches of a row."""
    succeeded(cli("decompose", lab / model, "--trunc", 2, "-o", "cut"))
    options = ["--task", "lm", "--eval", lab / "dev.txt", "--max-length", 16, "--batch-size", 4, "--json"]
    same = succeeded(cli("eval", lab / model, *options, "--baseline", lab / model)).json["agreement"]
    assert same["tokens"] == 1.0 and same["kl_nats"] == 0.0
    other = succeeded(cli("eval", "cut", *options, "--baseline", lab / model)).json
    assert other["agreement"]["tokens"] < 1.0 and other["agreement"]["kl_nats"] > 1e-4

    size = len(tasks.VOCABULARY)
    held: list[int] = []
    looked = predict.slices
    monkeypatch.setattr(logits, "MOST_LOGITS", 3 * size)
    monkeypatch.setattr(predict, "slices", lambda *a: [held.append(p.stop - p.start) or p for p in looked(*a)])
    parts = succeeded(cli("eval", "cut", *options, "--baseline", lab / model)).json
    assert max(held) == 3
    for found, expected in ((parts, other), (parts["baseline"], other["baseline"])):
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    assert parts["agreement"] == pytest.approx(other["agreement"], rel=1e-5)


def test_models_of_another_number_of_logits_agree_token_by_token(
    cli: Cli, lab: Path, work: Path, tmp_path: Path
) -> None:
    """A table padded for speed: the tokenizer's tokens are the same, the distributions are not over the same."""
    larger = tf.AutoModelForCausalLM.from_pretrained(lab / "gpt2")
    larger.resize_token_embeddings(len(tasks.VOCABULARY) + 7, mean_resizing=False)
    larger.save_pretrained(tmp_path / "larger")
    tasks.tokenizer("gpt2").save_pretrained(tmp_path / "larger")
    options = ["--task", "lm", "--eval", lab / "dev.txt", "--max-length", 16, "--json"]
    for one, two in (("larger", lab / "gpt2"), (lab / "gpt2", "larger")):
        report = succeeded(cli("eval", tmp_path / one, *options, "--baseline", tmp_path / two)).json
        assert report["agreement"].keys() == {"tokens"} and report["agreement"]["tokens"] > 0.5


# --- sparse kernels ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thinned(tuned: Path) -> Path:
    """`sst2-dense` with zeros at three of four places of its attention and feed-forward weights."""
    made = Path(copytree(tuned / "sst2-dense", tuned / "thinned"))

    def thin(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(4)
        for name, tensor in tensors.items():
            if "encoder" in name and tensor.dim() == 2:
                tensor.view(-1)[torch.randperm(tensor.numel(), generator=generator)[tensor.numel() // 4 :]] = 0

    rewrite(made, thin)
    return made


def test_both_paths_give_the_same_metrics_and_both_latencies(cli: Cli, lab: Path, thinned: Path, work: Path) -> None:
    reports, said = {}, {}
    for path in ("dense", "sparse", "auto"):
        options = sst2(lab, "--path", path, "--predictions", path, "--batch-size", 4, "--baseline", thinned)
        reports[path] = succeeded(cli("eval", thinned, *options)).json
        said[path] = np.array([row["logits"] for row in written(work / path)])
    lengths = [len(tasks.tokenizer("bert")(row["text"])["input_ids"]) for row in written(work / "auto")]
    for path, report in reports.items():
        assert report["metrics"] == reports["dense"]["metrics"]
        assert np.allclose(said[path], said["dense"], atol=1e-5)
        for paths in (report["paths"], report["baseline"]["paths"]):
            found = {tuple(row["shape"]): row for row in paths}
            assert len(paths) == 3 and {shape: row["modules"] for shape, row in found.items()} == {
                (32, 32): 4,
                (64, 32): 1,
                (32, 64): 1,
            }
            for row in paths:
                assert row["dense_seconds"] > 0 and row["sparse_seconds"] > 0
                assert row["sparsity"] == 0.75 and row["tokens"] == 4 * sorted(lengths)[19]
                assert row["path"] in {"dense": ["dense"], "sparse": ["csr"], "auto": ["csr", "dense"]}[path]


def test_the_sparse_path_is_what_runs(
    cli: Cli, lab: Path, thinned: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpocli.nn.sparse_linear import SparseLinear

    rows: list[int] = []
    product = SparseLinear._product

    def watched(self: SparseLinear, x: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return product(self, x)

    monkeypatch.setattr(SparseLinear, "_product", watched)
    options = sst2(lab, "--batch-size", 40, "--path")
    succeeded(cli("eval", thinned, *options, "sparse"))
    assert rows.count(max(rows)) == 6  # the only batch: a layer each, padded to the longest example
    rows.clear()
    succeeded(cli("eval", thinned, *options, "dense"))
    assert len(set(rows)) == 1  # the measurements, on examples of median length


@pytest.mark.parametrize(("model", "task", "expected"), [("gpt2", "lm", 4 * 16), ("t5", "e2e", 4), ("gpt2", "e2e", 4)])
def test_the_paths_are_measured_on_the_rows_of_a_typical_call(
    model: str, task: str, expected: int, cli: Cli, lab: Path, work: Path, tmp_path: Path
) -> None:
    """A full window of each; where texts are written, one token of each."""
    copytree(lab / model, tmp_path / "thin")
    rewrite(tmp_path / "thin", lambda tensors: [t.zero_() for n, t in tensors.items() if "mlp.c_fc" in n or ".wi" in n])
    data = {"lm": "dev.txt", "e2e": "e2e-dev.csv"}[task]
    options = ["--task", task, "--eval", lab / data, "--max-length", 16, "--batch-size", 4, "--path", "sparse"]
    options += ["--max-new-tokens", 3] if task == "e2e" else []
    (report,) = succeeded(cli("eval", tmp_path / "thin", *options, "--json")).json["paths"]
    assert report["tokens"] == expected and report["path"] == "csr" and report["sparsity"] == 1.0


def test_the_table_of_paths_is_there_where_a_layer_is_sparse(
    cli: Cli, lab: Path, tuned: Path, thinned: Path, work: Path
) -> None:
    options = [option for option in sst2(lab, "--path", "sparse") if option != "--json"]
    out = succeeded(cli("eval", thinned, *options)).out
    assert "sparse layers" in out and "the baseline's" not in out
    row = next(line.split() for line in out.splitlines() if "64x32" in line)
    assert row[1:3] == ["75.0%", "1"] and row[-1] == "csr" and float(row[4]) > 0 and float(row[5]) > 0
    out = succeeded(cli("eval", thinned, *options, "--precision", "bf16")).out
    row = next(line.split() for line in out.splitlines() if "64x32" in line)
    assert row[-2:] == ["none", "dense"]
    out = succeeded(cli("eval", tuned / "sst2-dense", *options, "--baseline", thinned)).out
    assert "sparse layers" not in out and "the baseline's" in out
    report = succeeded(cli("eval", tuned / "sst2-dense", *sst2(lab, "--path", "sparse"))).json
    assert report["paths"] == []


# --- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("json_wanted", [True, False], ids=["json", "table"])
def test_a_missed_gate_is_exit_5_after_the_report(
    json_wanted: bool, cli: Cli, lab: Path, tuned: Path, work: Path
) -> None:
    options = sst2(lab, "--baseline", tuned / "sst2-dense")
    if not json_wanted:
        options.remove("--json")
    for model, gate, met, word in (
        ("sst2", "--fail-below", "accuracy=0.1", ""),
        ("sst2", "--fail-below", "accuracy=1.01", "at least 1.01"),
        ("sst2", "--max-drop", "accuracy=1", ""),
        ("sst2-dense", "--max-drop", "accuracy=-0.01", "-0.01 was allowed"),
        ("sst2-dense", "--max-drop", "accuracy=0", ""),
    ):
        outcome = cli("eval", tuned / model, *options, gate, met)
        assert outcome.code == (5 if word else 0), (gate, met, outcome.err)
        assert "Traceback" not in outcome.err and word in outcome.err
        assert outcome.err.count("error: ") == (1 if word else 0)
        if json_wanted:
            assert outcome.json["metrics"].keys() == {"accuracy"}
        else:
            assert "accuracy" in outcome.out and "parameters" in outcome.out


def test_a_gate_on_perplexity_is_a_bound_from_above(cli: Cli, lab: Path, work: Path) -> None:
    options = ["--task", "lm", "--eval", lab / "dev.txt", "--max-length", 16, "--json"]
    assert cli("eval", lab / "gpt2", *options, "--fail-below", "perplexity=1000").code == 0
    assert cli("eval", lab / "gpt2", *options, "--fail-below", "perplexity=2").code == 5


# --- what cannot be used ------------------------------------------------------------------------------------------


REFUSED = [
    ("task", ["--task", "sstb", "--eval", "{lab}/dev.tsv"], 2, ["sstb", "stsb"]),
    ("no-task", [], 2, ["--task"]),
    ("no-eval", ["--task", "sst2"], 2, ["--eval"]),
    ("column", ["--task", "sst2", "--eval", "{lab}/sts-dev.tsv"], 3, ["sentence1, sentence2, score"]),
    ("body", ["model={lab}/body", "--task", "sst2", "--eval", "{lab}/dev.tsv"], 3, ["body", "mpocli finetune"]),
    ("classes", ["model={tuned}/stsb", "--task", "sst2", "--eval", "{lab}/dev.tsv"], 3, ["1 classes", "2"]),
    ("no-lm", ["model={lab}/t5", "--task", "lm", "--eval", "{lab}/dev.txt"], 3, ["t5", "text2text"]),
    ("length", ["--task", "sst2", "--eval", "{lab}/dev.tsv", "--max-length", "49"], 2, ["49", "48"]),
    ("gate", ["--task", "sst2", "--eval", "{lab}/dev.tsv", "--fail-below", "accuracy"], 2, ["--fail-below"]),
    ("drop", ["--task", "sst2", "--eval", "{lab}/dev.tsv", "--max-drop", "accuracy=0"], 2, ["--baseline"]),
    ("lm-eval", ["--lm-eval", "lambada"], 3, ["lm_eval"]),
    ("path", ["--task", "sst2", "--eval", "{lab}/dev.tsv", "--path", "fast"], 2, ["--path", "fast", "sparse"]),
    ("place", ["--task", "sst2", "--eval", "{lab}/dev.tsv", "--predictions", "no/f"], 3, ["no/f"]),
]


@pytest.mark.parametrize(("options", "code", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_cannot_be_used_is_one_line(
    options: list[str], code: int, words: list[str], cli: Cli, lab: Path, tuned: Path, work: Path
) -> None:
    filled = [option.format(lab=lab, tuned=tuned) for option in options]
    model = filled.pop(0).removeprefix("model=") if options and options[0].startswith("model=") else tuned / "sst2"
    if not options:
        filled = ["--eval", str(lab / "dev.tsv")]
    length = [] if "--max-length" in filled else ["--max-length", "32"]
    refused(cli("eval", model, *filled, *length), code, *words)
    assert tree(work) == {}


def test_a_metric_that_was_not_measured_is_told_before_the_model_runs(
    cli: Cli, lab: Path, tuned: Path, work: Path
) -> None:
    """A typing error in a gate must not cost an evaluation."""
    refused(cli("eval", tuned / "sst2", *sst2(lab, "--fail-below", "acuracy=0.5")), 2, "acuracy", "accuracy")


def test_weights_that_are_no_numbers_are_exit_4(cli: Cli, lab: Path, tuned: Path, tmp_path: Path, work: Path) -> None:
    copytree(tuned / "sst2", tmp_path / "spoilt")
    rewrite(tmp_path / "spoilt", lambda tensors: tensors["classifier.bias"].fill_(math.nan))
    refused(cli("eval", tmp_path / "spoilt", *sst2(lab)), 4, "not finite")
