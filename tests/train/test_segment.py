"""Training moves the right tensors, at the right rates, in an order that a resumed run repeats."""

from __future__ import annotations

import copy
import json
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch.nn import functional as F
from transformers.integrations import integration_utils

from mpocli.config.decompose import DecomposeConfig
from mpocli.config.optimisation import Optimisation
from mpocli.errors import NumericsError, UsageError
from mpocli.methods.decompose import run as decompose
from mpocli.nn import MPOModule, logits
from mpocli.train.data.collate import collate
from mpocli.train.loop.best import KeepBest
from mpocli.train.loop.checkpoints import last_checkpoint
from mpocli.train.loop.distill import Distillation, hidden_loss, soft_loss
from mpocli.train.loop.metrics_file import MetricsFile
from mpocli.train.loop.report_to import check_report_to
from mpocli.train.loop.sampler import ByLength
from mpocli.train.loop.schedule import Schedule
from mpocli.train.loop.segment import train_segment
from mpocli.train.loop.trainer import SegmentTrainer
from mpocli.train.loop.updates import parameter_groups, roles, set_update

CPU = torch.device("cpu")


def config(**more: object) -> tf.BertConfig:
    return tf.BertConfig(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **more,
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense classifier and its lossless MPO."""
    directory = tmp_path_factory.mktemp("pair")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tf.BertForSequenceClassification(config()).save_pretrained(directory / "dense")
    decompose.run(str(directory / "dense"), DecomposeConfig(), directory / "mpo")
    return directory / "dense", directory / "mpo"


def load(directory: Path) -> tf.PreTrainedModel:
    return tf.AutoModelForSequenceClassification.from_pretrained(directory)


def features(count: int = 24) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for index in range(count):
        ids = torch.randint(5, 90, (int(torch.randint(3, 12, (), generator=generator)),), generator=generator).tolist()
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": index % 2})
    return made


def trainer(model: tf.PreTrainedModel, directory: Path, steps: int = 6, **more: object) -> SegmentTrainer:
    optimisation = more.pop("optimisation", Optimisation(lr=1e-3, batch_size=4, log_steps=1, save_steps=3))
    return SegmentTrainer(
        model,
        features(),
        lambda batch: collate(batch, 0),
        optimisation,  # type: ignore[arg-type]
        Schedule(steps, 1),
        steps,
        directory,
        device=CPU,
        **more,  # type: ignore[arg-type]
    )


# --- which tensors move -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("update", "frozen"), [("auxiliary", "central"), ("central", "auxiliary"), ("all", None)])
def test_frozen_cores_keep_their_bits_and_all_others_move(
    pair, tmp_path: Path, update: str, frozen: str | None
) -> None:
    model = load(pair[1])
    set_update(model, update)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_segment(trainer(model, tmp_path))
    seen = set()
    for name, parameter, role in roles(model):
        seen.add(role)
        same = torch.equal(parameter, before[name])
        # Rows and positions that no batch uses have no gradient; a tensor moves if any of it does.
        assert same == (role == frozen), (name, role)
    assert seen == {"central", "auxiliary", "other"}


@pytest.mark.parametrize("update", ["auxiliary", "central", "all"])
def test_the_optimiser_holds_every_trained_tensor_once_and_no_frozen_one(pair, tmp_path: Path, update: str) -> None:
    model = load(pair[1])
    set_update(model, update)
    made = trainer(model, tmp_path, optimisation=Optimisation(lr=1e-3, mpo_lr=1e-4, weight_decay=0.1, batch_size=4))
    train_segment(made)
    held = [parameter for group in made.optimizer.param_groups for parameter in group["params"]]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(held) == len({id(parameter) for parameter in held})
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in trained}
    state = made.optimizer.optimizer.state if hasattr(made.optimizer, "optimizer") else made.optimizer.state
    assert {id(parameter) for parameter in state} == {id(parameter) for parameter in trained}


def test_groups_follow_roles_and_vectors_are_not_decayed(pair) -> None:
    model = load(pair[1])
    set_update(model, "all")
    groups = parameter_groups(model, lr=3.0, mpo_lr=2.0, weight_decay=0.5)
    where = {id(parameter): group for group in groups for parameter in group["params"]}
    cores = {id(core) for module in model.modules() if isinstance(module, MPOModule) for core in module.cores}
    for parameter in model.parameters():
        group = where[id(parameter)]
        assert group["lr"] == (2.0 if id(parameter) in cores else 3.0)
        assert group["weight_decay"] == (0.5 if parameter.dim() > 1 else 0.0)


def test_dense_and_lossless_mpo_begin_with_the_same_loss(pair, tmp_path: Path) -> None:
    curves = []
    for number, directory in enumerate(pair):
        model = load(directory)
        set_update(model, "all")
        path = tmp_path / f"{number}.jsonl"
        path.touch()
        one = Optimisation(lr=1e-5, batch_size=4, log_steps=1, save_steps=100)
        train_segment(trainer(model, tmp_path / str(number), callbacks=[MetricsFile(path)], optimisation=one))
        curves.append([json.loads(line)["loss"] for line in path.read_text().splitlines()])
    assert len(curves[0]) == len(curves[1]) == 6
    assert abs(curves[0][0] - curves[1][0]) <= 1e-5
    # The first step has rate 0 (warm-up), so that the second loss is of the same weights too.
    assert abs(curves[0][1] - curves[1][1]) <= 1e-5
    assert curves[0] != curves[1]  # cores move otherwise than matrices do


# --- order, schedule, resuming ----------------------------------------------------------------------------------------


def test_order_is_a_function_of_seed_and_epoch_and_keeps_lengths_together() -> None:
    lengths = torch.randint(1, 100, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = ByLength(lengths, 8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(1000))
    assert list(sampler) == first
    sampler.epoch = 1
    assert list(sampler) != first
    assert list(ByLength(lengths, 8, seed=4)) != first

    def padding(order: list[int]) -> int:
        batches = [[lengths[i] for i in order[k : k + 8]] for k in range(0, len(order), 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(first) < 0.3 * padding(list(ByLength(lengths, None, seed=3)))


def test_a_schedule_in_two_segments_is_the_schedule_in_one() -> None:
    whole = Schedule(100, 6)
    assert [whole.factor(s) for s in range(40, 101)] == [Schedule(100, 6, first=40).factor(s) for s in range(61)]
    assert whole.factor(6) == 1.0
    assert whole.factor(100) == 0.0
    assert Schedule(10, 0).factor(0) == 1.0


def test_a_resumed_segment_ends_with_the_same_bits(pair, tmp_path: Path) -> None:
    model = load(pair[1])
    set_update(model, "auxiliary")
    train_segment(trainer(model, tmp_path / "run", steps=8))
    resumed = load(pair[1])
    set_update(resumed, "auxiliary")
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-8"
    train_segment(trainer(resumed, tmp_path / "run", steps=8), tmp_path / "run" / "checkpoint-6")
    for (name, a), (_, b) in zip(model.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("steps", [4, 6])
def test_a_segment_that_is_resumed_after_its_last_step_takes_no_other(steps: int, pair, tmp_path: Path) -> None:
    """At an epoch's end (six steps) and in the midst of one."""
    train_segment(trainer(load(pair[1]), tmp_path, steps=steps))
    end = last_checkpoint(tmp_path)
    assert end is not None and end.name == f"checkpoint-{steps}"
    made = trainer(load(pair[1]), tmp_path, steps=steps)
    made.add_callback(MetricsFile(tmp_path / "metrics.jsonl"))
    train_segment(made, end)
    assert made.state.global_step == steps and not (tmp_path / "metrics.jsonl").exists()


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step, text in ((3, '{"global_step": 3}'), (6, '{"global_ste'), (9, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert last_checkpoint(tmp_path / "checkpoint-9") is None


def test_metrics_of_steps_behind_the_checkpoint_are_dropped_on_resuming(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    state = tf.TrainerState(global_step=3, is_world_process_zero=True)
    MetricsFile(path).on_train_begin(None, state, None)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_checkpoint(pair, tmp_path: Path) -> None:
    model = load(pair[1])
    made = trainer(model, tmp_path, steps=8)
    calls = 0
    loss_of = type(made).compute_loss

    def broken(*args: object, **kwargs: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss: torch.Tensor = loss_of(made, *args, **kwargs)  # type: ignore[arg-type]
        return loss * math.nan if calls == 5 else loss

    made.compute_loss = broken  # type: ignore[method-assign]
    with pytest.raises(NumericsError, match="step 5"):
        train_segment(made)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def test_the_best_weights_come_back_and_the_first_best_counts(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    values = iter([0.3, 0.9, 0.9, 0.1])
    best = KeepBest(tmp_path / "best", lambda model: next(values))
    state = tf.TrainerState(is_world_process_zero=True)
    weights = []
    for step in range(1, 5):
        state.global_step = step
        with torch.no_grad():
            model.weight.fill_(step)
        weights.append(copy.deepcopy(model.state_dict()))
        best.on_epoch_end(None, state, None, model=model)
    best.restore(model)
    assert best.step == 2
    assert torch.equal(model.weight, weights[1]["weight"])
    again = KeepBest(tmp_path / "best", lambda model: 0.0)
    again.on_train_begin(None, state, None)
    assert (again.step, again.value) == (2, 0.9)


# --- distillation -----------------------------------------------------------------------------------------------------


def test_soft_loss_is_hinton_s_and_zero_for_equal_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    temperature = 2.5
    p = torch.exp(teacher / temperature) / torch.exp(teacher / temperature).sum(1, keepdim=True)
    q = torch.exp(student / temperature) / torch.exp(student / temperature).sum(1, keepdim=True)
    expected = temperature**2 * float((p * (p / q).log()).sum(1).mean())
    assert float(soft_loss(student, teacher, None, temperature)) == pytest.approx(expected, rel=1e-5)
    assert float(soft_loss(teacher, teacher, None, temperature)) == pytest.approx(0.0, abs=1e-7)
    scores = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])
    assert float(soft_loss(*scores, None, temperature)) == 2.5  # a regression has no distribution: (1 + 4) / 2


def test_token_logits_count_where_labels_do() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 4, 7, generator=generator) for _ in range(2))
    labels = torch.full((2, 4), -100)
    labels[0, 1] = 3
    whole = soft_loss(student, teacher, labels, 1.0)
    assert float(whole) == pytest.approx(float(soft_loss(student[0, 1:2], teacher[0, 1:2], None, 1.0)), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_soft_loss_and_its_gradient_are_autograd_s_whatever_is_held_of_the_logits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows at a time of fourteen, nine of which count, and a logit that the teacher rules out."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 7, 5, generator=generator, dtype=dtype) for _ in range(2))
    teacher[0, 2, 1] = -torch.inf
    labels = torch.randint(0, 5, (2, 7), generator=generator)
    labels[1, 2:] = -100
    student.requires_grad_()
    temperature = 1.5
    log_p, log_q = ((z[labels != -100] / temperature).log_softmax(-1) for z in (teacher, student))
    expected = temperature**2 * F.kl_div(log_q, log_p.exp(), reduction="batchmean")
    (wanted,) = torch.autograd.grad(3 * expected, student)
    monkeypatch.setattr(logits, "MOST_LOGITS", 2 * 5)
    found = soft_loss(student, teacher, labels, temperature)
    (gradient,) = torch.autograd.grad(3 * found, student)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)


def test_hidden_states_are_compared_at_real_tokens_of_evenly_spaced_layers() -> None:
    student = tuple(torch.zeros(1, 2, 3) for _ in range(3))
    teacher = tuple(torch.full((1, 2, 3), float(k)) for k in range(5))  # layers 0, 2 and 4 are compared
    for state in teacher:
        state[0, 1] = 100.0  # padding
    mask = torch.tensor([[1, 0]])
    assert float(hidden_loss(student, teacher, mask)) == pytest.approx((0 + 4 + 16) / 3)


def test_a_teacher_changes_what_is_learnt_and_is_not_touched(pair, tmp_path: Path) -> None:
    teacher = load(pair[0])
    with torch.no_grad():
        teacher.classifier.bias.copy_(torch.tensor([3.0, -3.0]))
    before = copy.deepcopy(teacher.state_dict())
    ends = []
    for number, weight in enumerate((None, 0.0, 1.0)):
        model = load(pair[0])
        distillation = None if weight is None else Distillation(teacher, weight, 2.0)
        train_segment(trainer(model, tmp_path / str(number), distillation=distillation))
        ends.append(model.classifier.bias.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert float(ends[2][0] - ends[2][1]) > float(ends[0][0] - ends[0][1]) + 1e-3
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_accelerate_s_wrapper_is_gone_after_a_segment_and_the_model_s_own_forward_is_back(pair, tmp_path: Path) -> None:
    """Mixed precision wraps `forward`; left there, every segment would add one more, and evaluation be in bf16."""
    model = load(pair[1])
    own = model.forward
    for number in range(2):
        chosen = Optimisation(lr=1e-3, batch_size=4, log_steps=1, save_steps=100, precision="bf16")
        train_segment(trainer(model, tmp_path / str(number), steps=1, optimisation=chosen))
        assert model.forward == own and "_original_forward" not in vars(model)
    assert model(torch.tensor([[5, 6]])).logits.dtype == torch.float32


def _can_be_made(callback: type) -> bool:
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as quiet:
        warnings.simplefilter("ignore")
        quiet.setattr(sys, "unraisablehook", lambda _: None)
        try:
            callback()
        except Exception:
            return False
    return True


def test_a_reporter_that_cannot_be_made_is_one_line_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whichever: of what transformers knows, and of what is only half there."""
    known = integration_utils.INTEGRATION_TO_CALLBACK

    class Broken(tf.TrainerCallback):
        def __init__(self) -> None:
            raise RuntimeError("Broken requires broken to be installed.\nAnd so on.")

        def __del__(self) -> None:
            raise AttributeError("half made")

    monkeypatch.setitem(known, "broken", Broken)
    monkeypatch.setitem(known, "whole", tf.TrainerCallback)
    made = {name: _can_be_made(callback) for name, callback in known.items()}
    assert made["whole"] and not made["broken"]
    capfd.readouterr()
    for name, can in made.items():
        if can:
            check_report_to([name])
            continue
        with pytest.raises(UsageError) as refused:
            check_report_to([name])
        assert name in refused.value.message and "\n" not in refused.value.message
    assert capfd.readouterr().err == ""
    check_report_to(["none"])
    check_report_to([])
    with pytest.raises(UsageError, match="nothing-such"):
        check_report_to(["nothing-such"])
