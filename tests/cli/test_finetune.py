"""`mpocli finetune`: killed and resumed, in two processes, on bad input, in a chain of commands, with a teacher."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cli import tasks
from cli.processes import Moment, Server
from cli.shell import WEIGHTS, Cli, Outcome, refused, succeeded, tree
from mpocli.train.loop.best import KeepBest

Train = Callable[..., dict[str, Any]]


def sst2(lab: Path, *more: object) -> list[object]:
    """The options of most runs here: twelve steps of eight sentences."""
    files = ["--task", "sst2", "--train", lab / "train.tsv", "--max-length", 32]
    files += [] if "--eval" in more else ["--eval", lab / "dev.tsv"]  # which may be given twice
    return [*files, "--batch-size", 8, "--lr", 1e-2, "--steps", 12, "--log-steps", 1, "--json", *more]


@pytest.fixture
def train(cli: Cli, lab: Path, work: Path) -> Train:
    """Fine-tune a model of the lab to `out`; the report."""

    def run(model: str, out: str, *more: object) -> dict[str, Any]:
        return succeeded(cli("finetune", lab / model, *sst2(lab, *more), "-o", out)).json

    return run


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models without dropout: what differs is then the arithmetic's alone."""
    made = tmp_path_factory.mktemp("calm")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tasks.save("bert", made / "bert", initializer_range=0.1, **still)
    tasks.save("gpt2", made / "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    tasks.save("t5", made / "t5", dropout_rate=0.0)
    return made


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / WEIGHTS)


def difference(a: Path, b: Path) -> float:
    """The largest, of any element of the two directories' tensors.

    Without the keys' biases: they shift all scores of a query alike, their gradient is zero but for rounding, and Adam
    makes a step of that.
    """
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    names = [name for name in first if not name.endswith("key.bias")]
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in names)


# --- killed and resumed -------------------------------------------------------------------------------------------

# Steps are logged one by one, after three other openings of the file: step k is opening k + 3.
STEP_8 = Moment("open", r"metrics\.jsonl", number=11)
HALF_WRITTEN = Moment("open", r"checkpoint-10/trainer_state\.json")
EPOCHS = ["--limit", 44, "--steps", 15, "--select", "best"]  # of 40 sentences, in five steps each


@pytest.mark.parametrize(
    ("model", "options", "moments"),
    [
        ("mpo", [], [STEP_8, HALF_WRITTEN]),
        ("mpo", EPOCHS, [STEP_8]),
        ("masked", ["--task", "lm", "--train", "{lab}/train.txt", "--eval", "{lab}/dev.txt"], [STEP_8]),
    ],
    ids=["last", "best", "masked"],
)
def test_kill_9_and_resume_gives_the_bytes_of_the_uninterrupted_run(
    model: str, options: list[Any], moments: list[Moment], lab: Path, trainer: Server, work: Path, tmp_path: Path
) -> None:
    """Weights, metrics.jsonl line by line and manifest; a half-written newest checkpoint is passed over."""
    filled = [option.format(lab=lab) if isinstance(option, str) else option for option in options]
    arguments = ["finetune", lab / model, *sst2(lab, "--save-steps", 5, *filled), "-o"]
    whole = trainer.run(*arguments, "whole", cwd=work, log=tmp_path / "log")
    assert whole.code == 0, whole.err
    wanted = json.loads(whole.out)
    for number, moment in enumerate(moments):
        killed = trainer.run(*arguments, f"cut{number}", cwd=work, log=tmp_path / "log", moment=moment)
        assert killed.code == -9 and not (work / f"cut{number}").exists()
        left = work / f"cut{number}.training"
        if moment is HALF_WRITTEN:
            assert (left / "checkpoint-10" / WEIGHTS).is_file()
            assert not (left / "checkpoint-10" / "trainer_state.json").exists()
        else:
            assert len(tasks.logged(left)) == 7
        ended = trainer.run(*arguments, f"cut{number}", "--resume", cwd=work, log=tmp_path / "log")
        assert ended.code == 0, ended.err
        found = json.loads(ended.out)
        assert found["resumed_from"] == 5
        for key in ("metrics", "metrics_before", "steps", "selected_step", "trainable_params"):
            assert found[key] == wanted[key], key
        assert tasks.logged(work / f"cut{number}") == tasks.logged(work / "whole")
        assert tree(work / f"cut{number}") == tree(work / "whole")
    assert not list(work.glob("*.training"))


def test_killed_before_the_first_checkpoint_resume_begins_anew(
    lab: Path, trainer: Server, work: Path, tmp_path: Path
) -> None:
    arguments = ["finetune", lab / "mpo", *sst2(lab), "-o"]
    moment = Moment("open", r"metrics\.jsonl", number=6)
    assert trainer.run(*arguments, "cut", cwd=work, log=tmp_path / "log", moment=moment).code == -9
    again = trainer.run(*arguments, "cut", cwd=work, log=tmp_path / "log")
    assert again.code == 3 and "--resume" in again.err
    ended = trainer.run(*arguments, "cut", "--resume", cwd=work, log=tmp_path / "log")
    assert ended.code == 0 and json.loads(ended.out)["resumed_from"] == 0
    assert [line["step"] for line in tasks.logged(work / "cut")] == list(range(1, 13))


def test_seeds_resume_in_the_seed_that_was_killed(lab: Path, trainer: Server, work: Path, tmp_path: Path) -> None:
    arguments = ["finetune", lab / "mpo", *sst2(lab, "--save-steps", 5, "--seeds", "1,2"), "-o"]
    whole = trainer.run(*arguments, "whole", cwd=work, log=tmp_path / "log")
    moment = Moment("open", r"seed-2\.training/metrics\.jsonl", number=11)
    assert trainer.run(*arguments, "cut", cwd=work, log=tmp_path / "log", moment=moment).code == -9
    ended = trainer.run(*arguments, "cut", "--resume", cwd=work, log=tmp_path / "log")
    assert ended.code == 0, ended.err
    found, wanted = json.loads(ended.out), json.loads(whole.out)
    assert [run["resumed_from"] for run in found["runs"]] == [0, 5]
    for key in ("metrics", "metrics_std", "metrics_before", "trainable_params", "totals"):
        assert found[key] == wanted[key]
    assert tree(work / "cut") == tree(work / "whole")


# --- several processes, several batches a step ----------------------------------------------------------------------


def test_two_processes_under_torchrun_train_as_one_with_twice_the_batch(
    cli: Cli, calm: Path, lab: Path, trainer: Server, work: Path, tmp_path: Path
) -> None:
    """One report, one output; the same examples in every step, hence the same weights but for summation."""
    options = ["--task", "stsb", "--train", lab / "sts-train.tsv", "--eval", lab / "sts-dev.tsv", "--max-length", 32]
    options += ["--lr", 5e-3, "--epochs", 2, "--log-steps", 1, "--device", "cpu", "--json"]
    command = ["finetune", calm / "bert", *options, "--batch-size", 8, "-o", "two"]
    done = trainer.run(*command, cwd=work, log=tmp_path / "log", ranks=2)
    assert done.code == 0, done.err
    assert done.out.count("\n") == 1
    two = json.loads(done.out)
    one = succeeded(cli("finetune", calm / "bert", *options, "--batch-size", 16, "-o", "one")).json
    assert sorted(path.name for path in work.iterdir()) == ["one", "two"]
    assert two["steps"] == one["steps"] == 12
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-4)
    assert two["metrics_before"] == one["metrics_before"]
    assert difference(work / "one", work / "two") <= 1e-4
    for ours, theirs in zip(tasks.logged(work / "two"), tasks.logged(work / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), ours["step"]


@pytest.mark.parametrize(
    ("model", "task", "file", "teacher"),
    [
        ("bert", "sst2", "train.tsv", False),
        ("bert", "stsb", "sts-train.tsv", True),
        ("gpt2", "lm", "train.txt", True),
        ("t5", "e2e", "e2e-train.csv", False),
    ],
)
def test_two_accumulated_batches_are_one_of_twice_the_size(
    model: str, task: str, file: str, teacher: bool, cli: Cli, calm: Path, lab: Path, work: Path
) -> None:
    """Loss and gradient are means over what a step predicts, however it is cut."""
    options = ["--task", task, "--train", lab / file, "--max-length", 32, "--lr", 2e-3, "--log-steps", 1, "--json"]
    if teacher:
        succeeded(cli("finetune", calm / model, *options, "--steps", 2, "--seed", 9, "-o", "teacher"))
        options += ["--teacher", "teacher"]
    for out, size, count in (("one", 8, 1), ("two", 4, 2)):
        more = ["--steps", 3, "--batch-size", size, "--accumulation", count]
        succeeded(cli("finetune", calm / model, *options, *more, "-o", out))
    for ours, theirs in zip(tasks.logged(work / "two"), tasks.logged(work / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


# --- what cannot be used ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, lab: Path) -> Path:
    made = tmp_path_factory.mktemp("bad")
    (made / "columns.tsv").write_text("text\tverdict\ntala rone\t1\n")
    (made / "labels.tsv").write_text("sentence\tlabel\ntala\t1\nrone\t0\nmipo\t7\n")
    (made / "empty.tsv").write_text("")
    (made / "header.tsv").write_text("sentence\tlabel\n")
    with torch.random.fork_rng(devices=[]):
        tasks.save("bert", made / "three", cls=tf.BertForSequenceClassification, num_labels=3)
    tasks.save("bert", made / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (made / "mute" / name).unlink()
    return made


REFUSED = [
    ("task", ["--task", "sst3"], 2, ["sst3", "sst2"]),
    ("no-columns", ["--task", "classification"], 2, ["--text-column"]),
    ("train-column", ["--train", "{bad}/columns.tsv"], 3, ["columns.tsv", "sentence", "text, verdict"]),
    ("eval-column", ["--eval", "{bad}/columns.tsv"], 3, ["columns.tsv", "sentence", "text, verdict"]),
    ("label", ["--train", "{bad}/labels.tsv"], 3, ["labels.tsv", "line 4", "7"]),
    ("empty", ["--train", "{bad}/empty.tsv"], 3, ["empty.tsv"]),
    ("header", ["--eval", "{bad}/header.tsv"], 3, ["header.tsv", "no rows"]),
    ("absent", ["--train", "nowhere.tsv"], 3, ["nowhere.tsv"]),
    ("classes", ["model={bad}/three"], 3, ["3 classes", "2"]),
    ("tokenizer", ["model={bad}/mute"], 3, ["tokenizer"]),
    ("positions", ["--max-length", 49], 2, ["--max-length 49", "48"]),
    ("resume", ["--resume"], 3, ["no interrupted run"]),
    ("seeds-resume", ["--resume", "--seeds", "1,2"], 3, ["no interrupted run"]),
    ("seeds", ["--seeds", "1,x"], 2, ["1,x"]),
    ("update", ["--update", "some"], 2, ["--update", "auxiliary"]),
    ("lr", ["--lr", 0], 2, ["--lr"]),
    ("lr-nan", ["--lr", "nan"], 2, ["--lr"]),
    ("teacher", ["--teacher", "{lab}/body"], 3, ["body", "head"]),
    ("lm", ["--task", "e2e", "--train", "{lab}/e2e-train.csv"], 3, ["bert", "cannot write text"]),
]


@pytest.mark.parametrize(("options", "code", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_cannot_be_used_is_one_line_and_writes_nothing(
    options: list[Any], code: int, words: list[str], cli: Cli, lab: Path, bad: Path, work: Path
) -> None:
    model: object = lab / "mpo"
    filled = [option.format(lab=lab, bad=bad) if isinstance(option, str) else option for option in options]
    if str(filled[0]).startswith("model="):
        model = filled.pop(0).removeprefix("model=")
    refused(cli("finetune", model, *sst2(lab, *filled), "-o", "out"), code, *words)
    assert tree(work) == {}


def test_a_head_that_begins_at_random_is_named(cli: Cli, lab: Path, work: Path) -> None:
    """Of a classifier and of a language model; one that the checkpoint has is not, nor can it be measured untrained."""
    text = ["--task", "lm", "--train", lab / "train.txt", "--max-length", 32, "--steps", 1, "--device", "cpu"]
    said = {
        name: succeeded(cli("finetune", lab / model, *options, "-o", name)).err
        for name, model, options in (
            ("classifier", "mpo", sst2(lab, "--steps", 1)),
            ("speaker", "mpo", text),
            ("masked", "masked", text),
        )
    }
    assert "new for task sst2" in said["classifier"] and "classifier.weight" in said["classifier"]
    assert "new for task lm" in said["speaker"] and "cls.predictions" in said["speaker"]
    assert (
        "new for" not in said["masked"]
        and "new for" not in succeeded(cli("finetune", "classifier", *sst2(lab, "--steps", 1), "-o", "again")).err
    )
    measured = cli("eval", lab / "mpo", "--task", "lm", "--eval", lab / "dev.txt", "--max-length", 32)
    refused(measured, 3, "cls.predictions", "mpocli finetune")


def test_an_output_that_exists_is_refused_and_kept(cli: Cli, train: Train, lab: Path, work: Path) -> None:
    train("mpo", "out", "--steps", 2)
    before = tree(work)
    refused(cli("finetune", lab / "mpo", *sst2(lab), "-o", "out"), 3, "out", "--overwrite")
    assert tree(work) == before
    train("mpo", "out", "--steps", 3, "--overwrite")
    assert len(tasks.logged(work / "out")) == 3


def test_resuming_a_finished_run_says_that_it_is_finished(cli: Cli, train: Train, lab: Path, work: Path) -> None:
    train("mpo", "out", "--steps", 2)
    before = tree(work)
    refused(cli("finetune", lab / "mpo", *sst2(lab), "-o", "out", "--resume"), 3, "finished", "--overwrite")
    assert tree(work) == before


def test_update_of_cores_is_refused_where_there_are_none(cli: Cli, lab: Path, work: Path) -> None:
    refused(cli("finetune", lab / "body", *sst2(lab), "-o", "out", "--update", "central"), 2, "--update", "no MPOs")
    assert tree(work) == {}


def test_one_taken_directory_among_seeds_is_told_before_any_training(
    cli: Cli, train: Train, lab: Path, work: Path
) -> None:
    train("mpo", "out/seed-2", "--steps", 2)
    before = tree(work)
    refused(cli("finetune", lab / "mpo", *sst2(lab, "--seeds", "1,2"), "-o", "out"), 3, "seed-2", "--overwrite")
    assert tree(work) == before


def test_a_loss_that_is_no_number_is_exit_4_and_leaves_a_checkpoint_to_use(
    cli: Cli, train: Train, lab: Path, work: Path
) -> None:
    arguments = ["finetune", lab / "mpo", *sst2(lab, "--clip", 1e9, "--save-steps", 1), "-o", "out"]
    said = refused(
        cli(*arguments, "--lr", 1e30), 4, "loss is", "out.training/checkpoint-1", "--lr", told="new for task sst2"
    )
    assert not (work / "out.training" / "checkpoint-2").exists()  # whose weights gave that loss
    assert not (work / "out").exists()
    kept = Path(said.partition("weights are ")[2].strip())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(kept).values())
    other = cli(*arguments, "--lr", 1e-3, "--resume")
    refused(other, 3, "lr = 1e+30", "0.001")
    refused(cli(*arguments, "--lr", 1e-3), 3, "interrupted", "--resume", "--overwrite")
    train("mpo", "out", "--lr", 1e-3, "--overwrite")
    assert [path.name for path in work.iterdir()] == ["out"]


def test_a_loss_that_is_no_number_before_any_checkpoint_leaves_nothing(cli: Cli, lab: Path, work: Path) -> None:
    refused(cli("finetune", lab / "mpo", *sst2(lab), "--lr", 1e30, "-o", "out"), 4, "--lr", told="new for task sst2")
    assert tree(work) == {}


@pytest.mark.parametrize("limit", [60_000, 120_000], ids=["weights", "optimiser"])
def test_a_full_disk_at_a_checkpoint_is_exit_3(
    limit: int, lab: Path, trainer: Server, work: Path, tmp_path: Path
) -> None:
    arguments = ["finetune", lab / "mpo", *sst2(lab, "--save-steps", 5, "--update", "all"), "-o", "out"]
    ended = trainer.run(*arguments, cwd=work, log=tmp_path / "log", limit=limit)
    refused(
        Outcome(ended.code, ended.out, ended.err),
        3,
        "out.training",
        "cannot be written",
        "free some space",
        told="new for task sst2",
    )
    assert tree(work) == {}


def test_a_full_disk_at_the_end_is_exit_3_and_can_be_resumed(
    cli: Cli, train: Train, lab: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is the one that safetensors raises where a device is full."""
    original = tf.PreTrainedModel.save_pretrained

    def save(model: Any, directory: Any, **options: Any) -> None:
        if ".training" not in str(directory):
            (Path(directory) / "half").write_text("written")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(model, directory, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tf.PreTrainedModel, "save_pretrained", save)
        refused(
            cli("finetune", lab / "mpo", *sst2(lab), "-o", "out"), 3, "out", "No space left", told="new for task sst2"
        )
    assert [path.name for path in work.iterdir()] == ["out.training"]
    resumed = train("mpo", "out", "--resume")
    assert resumed["resumed_from"] == 12
    assert resumed["metrics"] == train("mpo", "whole")["metrics"]
    assert tree(work / "out") == tree(work / "whole")


# --- a chain of commands ------------------------------------------------------------------------------------------


def test_decompose_finetune_decompose_merge_eval(cli: Cli, train: Train, lab: Path, work: Path) -> None:
    def measure(directory: str) -> dict[str, float]:
        data = ["--task", "sst2", "--eval", lab / "dev.tsv", "--max-length", 32]
        metrics: dict[str, float] = succeeded(cli("eval", directory, *data, "--json")).json["metrics"]
        return metrics

    succeeded(cli("decompose", lab / "body", "--layers", "ffn", "-o", "ffn"))
    report = succeeded(cli("finetune", "ffn", *sst2(lab, "--steps", 36), "-o", "tuned")).json
    assert report["update"] == "auxiliary"
    assert report["metrics"]["accuracy"] > max(0.7, report["metrics_before"]["accuracy"])
    inspected = succeeded(cli("inspect", "tuned", "--verify", "--json")).json
    made = [module for module in inspected["modules"] if module["action"] == "mpo"]
    assert len(made) == 2 and inspected["problems"] == []
    assert [module["relative_error"] for module in made] == [None, None]
    assert "discarded_weight" not in made[0] or not made[0]["discarded_weight"]
    assert inspected["totals"] == report["totals"]
    succeeded(cli("decompose", "tuned", "--layers", "attention,pooler", "-o", "more"))
    succeeded(cli("merge", "more", "-o", "dense"))
    assert measure("tuned") == report["metrics"]
    assert measure("dense") == pytest.approx(report["metrics"], abs=1e-4)
    manifest = json.loads((work / "dense" / "mpo.json").read_text())
    assert [entry["command"] for entry in manifest["history"]] == ["decompose", "finetune", "decompose", "merge"]
    assert manifest["history"][1]["metrics"] == report["metrics"]
    assert manifest["history"][1]["options"]["train"] == "train.tsv"
    for place in ("tuned", "dense"):
        for file in ("mpo.json", "config.json", "README.md", "metrics.jsonl"):
            if (work / place / file).exists():
                text = (work / place / file).read_text()
                assert str(lab) not in text and str(work) not in text and "/tmp" not in text, file


def test_a_dense_checkpoint_is_trained_whole_and_an_mpo_one_but_for_its_centres(train: Train, lab: Path, work: Path):
    dense, mpo = train("body", "dense", "--steps", 2), train("mpo", "mpo", "--steps", 2)
    assert dense["update"] == "all"
    assert dense["trainable_params"] == dense["totals"]["params"] == dense["trainable_by_role"]["other"]
    central = {name: tensor for name, tensor in weights(lab / "mpo").items() if name.endswith("core_2")}
    after = weights(work / "mpo")
    assert mpo["update"] == "auxiliary" and mpo["trainable_by_role"]["central"] == 0
    assert mpo["trainable_params"] == mpo["totals"]["params"] - sum(tensor.numel() for tensor in central.values())
    assert central and all(torch.equal(tensor, after[f"bert.{name}"]) for name, tensor in central.items())


@pytest.mark.parametrize("model", ["mpo", "body"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(model: str, train: Train, work: Path) -> None:
    reports = [train(model, out, "--steps", 4, "--seed", seed) for out, seed in (("one", 3), ("two", 3), ("three", 4))]
    assert tree(work / "one") == tree(work / "two")
    assert reports[0]["metrics"] == reports[1]["metrics"]
    assert tree(work / "one")[WEIGHTS] != tree(work / "three")[WEIGHTS]


def test_a_trained_model_generates_with_the_cache_it_had(cli: Cli, lab: Path, work: Path) -> None:
    """Trainer turns it off in the configuration, which is what is written."""
    data = ["--task", "lm", "--train", lab / "train.txt", "--max-length", 32, "--steps", 1, "-o", "out"]
    succeeded(cli("finetune", lab / "gpt2", *data))
    configs = [json.loads((place / "config.json").read_text()) for place in (lab / "gpt2", work / "out")]
    assert configs[1].get("use_cache") == configs[0].get("use_cache") is not False


def test_seeds_are_directories_with_mean_and_spread(train: Train, work: Path) -> None:
    report = train("mpo", "out", "--seeds", "1,2", "--steps", 4)
    assert sorted(path.name for path in (work / "out").iterdir()) == ["seed-1", "seed-2"]
    values = [run["metrics"]["accuracy"] for run in report["runs"]]
    assert report["seeds"] == [1, 2] and report["schema"] == "mpocli.finetune/1"
    assert report["metrics"]["accuracy"] == statistics.mean(values)
    assert report["metrics_std"]["accuracy"] == statistics.stdev(values)
    alone = train("mpo", "alone", "--seed", 2, "--steps", 4)
    assert alone["metrics"] == report["runs"][1]["metrics"]
    assert tree(work / "alone") == tree(work / "out" / "seed-2")


def test_select_best_keeps_the_weights_of_the_first_best_epoch(
    train: Train, lab: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three epochs of which the second is made the best, and the third as good."""
    seen: dict[int, dict[str, Tensor]] = {}
    look = KeepBest._look

    def watched(self: KeepBest, state: Any, model: Any) -> None:
        seen[state.global_step] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.measure = lambda _: min(state.global_step, 10)
        look(self, state, model)

    monkeypatch.setattr(KeepBest, "_look", watched)
    report = train("body", "best", *EPOCHS, "--test", lab / "dev.tsv")
    assert report["selected_step"] == 10 and report["steps"] == 15
    assert report["test_metrics"] == report["metrics"]
    stored = weights(work / "best")
    assert all(torch.equal(tensor, seen[10][name]) for name, tensor in stored.items())
    assert not all(torch.equal(tensor, seen[15][name]) for name, tensor in stored.items())


def test_reported_metrics_are_those_of_the_stored_weights(cli: Cli, lab: Path, work: Path) -> None:
    """A half-precision checkpoint is trained in full precision and rounded before it is measured."""
    succeeded(cli("decompose", lab / "body", "--dtype", "bfloat16", "-o", "half"))
    data = ["--task", "stsb", "--max-length", 32, "--eval", lab / "sts-dev.tsv"]
    more = ["--train", lab / "sts-train.tsv", "--test", lab / "sts-dev.tsv", "--lr", 1e-2, "--steps", 8]
    report = succeeded(cli("finetune", "half", *data, *more, "-o", "out", "--json")).json
    assert {t.dtype for name, t in weights(work / "out").items() if "core_" in name} == {torch.bfloat16}
    measured = succeeded(cli("eval", "out", *data, "--json")).json["metrics"]
    assert measured == pytest.approx(report["metrics"], abs=1e-6)
    assert report["test_metrics"] == pytest.approx(report["metrics"], abs=1e-6)


# --- teachers, and memory -----------------------------------------------------------------------------------------


def test_a_teacher_changes_the_result_and_one_that_weighs_nothing_does_not(train: Train, work: Path) -> None:
    train("body", "teacher", "--steps", 6, "--seed", 7)
    train("mpo", "alone", "--steps", 3)
    for out, more in (
        ("nothing", ["--distill-weight", 0]),
        ("half", []),
        ("hidden", ["--distill-hidden"]),
        ("hot", ["--temperature", 5]),
    ):
        train("mpo", out, "--steps", 3, "--teacher", "teacher", *more)
    assert difference(work / "alone", work / "nothing") == 0.0
    for one, other in (("alone", "half"), ("half", "hidden"), ("half", "hot")):
        assert difference(work / one, work / other) > 1e-4
    history = json.loads((work / "half" / "mpo.json").read_text())["history"]
    assert history[-1]["options"]["teacher"] == "teacher"


def test_recomputing_activations_or_weights_changes_no_result(train: Train, work: Path) -> None:
    """With dropout on: the second pass draws the same."""
    options = ["--update", "all", "--steps", 4, "--lr", 1e-3]
    train("mpo", "plain", *options)
    for name in ("gradient-checkpointing", "recompute-weights"):
        train("mpo", name, *options, f"--{name}")
        assert difference(work / "plain", work / name) <= 1e-5
        losses = [[line["loss"] for line in tasks.logged(work / out)] for out in ("plain", name)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_metrics_jsonl_has_every_logged_step_and_no_clock(train: Train, work: Path) -> None:
    train("mpo", "out")
    lines = tasks.logged(work / "out")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(line.keys() == {"step", "loss", "learning_rate", "grad_norm", "epoch"} for line in lines)
    # Warm-up over one step of twelve (6 % rounded up), then linearly down.
    wanted = [0.0] + [1e-2 * (12 - step) / 11 for step in range(1, 12)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(wanted)
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_a_run_that_ends_between_two_logs_still_tells_its_loss(train: Train, work: Path) -> None:
    every = train("mpo", "every")
    seldom = train("mpo", "seldom", "--log-steps", 5)
    lines = tasks.logged(work / "seldom")
    assert [line["step"] for line in lines] == [1, 5, 10, 12]
    last_two = [line["loss"] for line in tasks.logged(work / "every")][-2:]
    assert seldom["loss"] == lines[-1]["loss"] == pytest.approx(sum(last_two) / 2, abs=1e-4)
    assert every["loss"] == last_two[-1]
