"""A masked update leaves a shared core as if the step had not been; all draws follow from seed, step and core."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers import TrainerCallback

from mpocli.config.expand_moe import ExpandConfig
from mpocli.config.optimisation import Optimisation
from mpocli.methods.expand_moe import run as expand_moe
from mpocli.mpo import SiteShape
from mpocli.nn import MPOExperts
from mpocli.train.data.collate import collate
from mpocli.train.loop.checkpoints import last_checkpoint
from mpocli.train.loop.gradient_mask import GradientMask
from mpocli.train.loop.schedule import Schedule
from mpocli.train.loop.segment import train_segment
from mpocli.train.loop.trainer import SegmentTrainer
from mpocli.train.loop.updates import roles

CPU = torch.device("cpu")
SITES = SiteShape((2, 2, 3), (3, 2, 2))


class Layers(nn.Module):
    """Some layers of experts, and an optimiser that decays."""

    def __init__(self, count: int = 3, share: Any = "central") -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        options: dict[str, Any] = {"experts": 3, "place": "in", "share": share}
        self.layers = nn.ModuleList([MPOExperts((12, 12), SITES, (1, 4, 5, 1), **options) for _ in range(count)])
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.2)

    @property
    def central(self) -> list[nn.Parameter]:
        return [layer.cores[1] for layer in self.layers]  # type: ignore[index]


class At:
    """What a Trainer says of its state."""

    def __init__(self, step: int) -> None:
        self.global_step = step


def step(model: Layers, mask: GradientMask | None, number: int) -> None:
    """One of training, with gradients that depend on nothing but its number."""
    draw = torch.Generator().manual_seed(100 + number)
    model.optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    if mask:
        mask.on_pre_optimizer_step(None, At(number), None, optimizer=model.optimizer)
    model.optimizer.step()
    if mask:
        mask.on_optimizer_step(None, At(number), None, optimizer=model.optimizer)


def moments(model: Layers, parameter: nn.Parameter) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.optimizer.state.get(parameter, {}).items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- draws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_share_of_masked_steps_is_within_binomial_bounds(probability: float) -> None:
    """5 σ for each core, and of all together; no core follows another, and no step the one before it."""
    mask, count = GradientMask(Layers(4), probability, seed=11), 2000
    drawn = torch.stack([torch.stack(mask.draw(number)) for number in range(count)]).double()  # (steps, cores)

    def bound(share: float, draws: int) -> float:
        return 5 * math.sqrt(share * (1 - share) / draws)

    assert float((drawn.mean(0) - probability).abs().max()) <= bound(probability, count)
    assert abs(float(drawn.mean()) - probability) <= bound(probability, 4 * count)
    agree = probability**2 + (1 - probability) ** 2
    for one in range(4):
        for other in range(one):
            assert abs(float((drawn[:, one] == drawn[:, other]).double().mean()) - agree) <= bound(agree, count)
        # Pairs of neighbours overlap, which at most doubles the variance.
        follows = float((drawn[1:, one] == drawn[:-1, one]).double().mean())
        assert abs(follows - agree) <= 1.5 * bound(agree, count)


def test_the_share_of_masked_elements_is_within_binomial_bounds() -> None:
    mask = GradientMask(Layers(3), 0.3, seed=0, elements=True)
    found = torch.cat([one.flatten() for number in range(50) for one in mask.draw(number)]).double()
    assert found.numel() == 50 * 3 * 4 * 2 * 2 * 5
    assert abs(float(found.mean()) - 0.3) <= 5 * math.sqrt(0.3 * 0.7 / found.numel())


@pytest.mark.parametrize("elements", [False, True])
def test_draws_are_equal_for_equal_seed_and_step_and_different_otherwise(elements: bool) -> None:
    def draws(seed: int, steps: range = range(64)) -> Tensor:
        made = GradientMask(Layers(2), 0.5, seed, elements=elements)
        return torch.stack([torch.stack(made.draw(number)) for number in steps])

    first = draws(1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first, draws(1))  # another object: another process
    assert torch.equal(torch.get_rng_state(), state)  # nor does it take from what dropout draws
    assert torch.equal(first[40:], draws(1, range(40, 64)))
    for other in (draws(2), draws(1, range(1, 65))):
        assert not torch.equal(first, other)
    assert not torch.equal(first[:, 0], first[:, 1])


def test_experts_that_share_no_core_are_never_masked() -> None:
    mask = GradientMask(Layers(2, share="none"), 1.0, seed=0)
    assert mask.draw(0) == []


def test_the_cores_that_are_drawn_for_are_the_central_ones() -> None:
    model = Layers(3)
    assert [id(core) for core in GradientMask(model, 0.5, 0).cores] == [id(core) for core in model.central]
    assert all(core.dim() == 4 for core in model.central)


# --- a step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [False, True])
def test_a_masked_step_leaves_value_and_moments_bit_for_bit(elements: bool) -> None:
    """Not even the decay; after steps that moved all of them. Auxiliary cores and biases move."""
    model = Layers()
    for number in range(3):
        step(model, None, number)
    before = [(core.detach().clone(), moments(model, core)) for core in model.central]
    others = [p for p in model.parameters() if not any(p is core for core in model.central)]
    old = [p.detach().clone() for p in others]
    mask = GradientMask(model, 1.0, seed=0, elements=elements)
    for number in range(3, 6):
        step(model, mask, number)
    for core, (value, kept) in zip(model.central, before, strict=True):
        found = moments(model, core)
        if elements:  # the step count is that of all elements
            del found["step"], kept["step"]
        assert float(kept["exp_avg"].abs().min()) > 0
        assert torch.equal(core, value) and equal(found, kept)
    for parameter, value in zip(others, old, strict=True):
        assert bool((parameter != value).all())


def test_a_core_that_is_always_masked_never_enters_the_optimisers_state() -> None:
    model = Layers()
    step(model, GradientMask(model, 1.0, seed=0), 0)
    assert all(moments(model, core) == {} for core in model.central)
    assert len(model.optimizer.state) == sum(1 for _ in model.parameters()) - 3


@pytest.mark.parametrize("elements", [False, True])
def test_a_probability_of_zero_is_no_mask(elements: bool) -> None:
    plain, masked = Layers(), Layers()
    for number in range(4):
        step(plain, None, number)
        step(masked, GradientMask(masked, 0.0, 0, elements=elements), number)
    for one, other in zip(plain.parameters(), masked.parameters(), strict=True):
        assert torch.equal(one, other) and equal(moments(plain, one), moments(masked, other))


def test_each_core_moves_in_the_steps_that_are_not_drawn_as_if_the_others_had_not_been() -> None:
    """The oracle trains every core alone, in its unmasked steps only."""
    masked, count = Layers(), 12
    mask = GradientMask(masked, 0.5, seed=4)
    drawn = torch.stack([torch.stack(mask.draw(number)) for number in range(count)])
    assert all(0 < int(column.sum()) < count for column in drawn.T)
    for number in range(count):
        step(masked, mask, number)
    for index, core in enumerate(masked.central):
        alone = Layers()
        for number in range(count):
            if not drawn[number, index]:
                step(alone, None, number)
        assert torch.equal(core, alone.central[index])
        assert equal(moments(masked, core), moments(alone, alone.central[index]))
    assert mask.drawn == 3 * count and mask.masked == int(drawn.sum())


def test_element_wise_masked_elements_stay_and_the_others_move_as_without_a_mask() -> None:
    """In every step, against a twin that is copied before it and goes unmasked."""
    model = Layers()
    mask = GradientMask(model, 0.5, seed=7, elements=True)
    for number in range(5):
        twin = copy.deepcopy(model)
        before = [(core.detach().clone(), moments(model, core)) for core in model.central]
        step(twin, None, number)
        step(model, mask, number)
        for core, other, (value, kept), masked in zip(
            model.central, twin.central, before, mask.draw(number), strict=True
        ):
            assert 0 < int(masked.sum()) < masked.numel()
            assert torch.equal(core[masked], value[masked])
            assert torch.equal(core[~masked], other[~masked]) and bool((core[~masked] != value[~masked]).all())
            found, free = moments(model, core), moments(twin, other)
            for key in ("exp_avg", "exp_avg_sq"):
                old = kept[key] if kept else torch.zeros_like(core)
                assert torch.equal(found[key][masked], old[masked])
                assert torch.equal(found[key][~masked], free[key][~masked])
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            if not any(one is core for core in model.central):
                assert torch.equal(one, other)


def test_a_core_without_a_gradient_is_passed_over() -> None:
    """A frozen one: nothing is drawn, nothing fails."""
    for elements in (False, True):
        model = Layers(2)
        mask = GradientMask(model, 1.0, 0, elements=elements)
        mask.on_pre_optimizer_step(None, At(0), None, optimizer=model.optimizer)
        mask.on_optimizer_step(None, At(0), None, optimizer=model.optimizer)
        assert mask.drawn == mask.masked == 0


# --- in training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier without dropout of two networks of experts: four shared cores."""
    directory = tmp_path_factory.mktemp("moe")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = tf.BertConfig(vocab_size=90, num_attention_heads=2, max_position_embeddings=32, **size, **still)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tf.BertForSequenceClassification(config).save_pretrained(directory / "dense")
    expand_moe.run(str(directory / "dense"), ExpandConfig(experts=3, noise=0.1), directory / "moe")
    return directory / "moe"


def load(directory: Path) -> tf.PreTrainedModel:
    return tf.AutoModelForSequenceClassification.from_pretrained(directory)


def features() -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(5, 90, (24, 6), generator=generator).tolist()
    return [{"input_ids": ids, "attention_mask": [1] * 6, "labels": k % 2} for k, ids in enumerate(rows)]


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Central cores and their moments after every step, the state at the beginning first."""

    def __init__(self, mask: GradientMask) -> None:
        self.mask = mask
        self.values: list[list[Tensor]] = [[core.detach().clone() for core in mask.cores]]
        self.moments: list[list[dict[str, Tensor]]] = [[{} for _ in mask.cores]]

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        self.values.append([core.detach().clone() for core in self.mask.cores])
        self.moments.append([{k: v.clone() for k, v in inner.state.get(c, {}).items()} for c in self.mask.cores])


def train(
    source: Path, directory: Path, probability: float | None, *, steps: int = 6, resume: bool = False, **options: Any
) -> tuple[tf.PreTrainedModel, Recorder]:
    model = load(source)
    mask = GradientMask(model, probability or 0.0, 5, **options)
    recorder = Recorder(mask)
    how: dict[str, Any] = {"lr": 1e-2, "batch_size": 2, "accumulation": 2, "clip": 0.05, "weight_decay": 0.1}
    trainer = SegmentTrainer(
        model,
        features(),
        lambda batch: collate(batch, 0),
        Optimisation(log_steps=1, save_steps=3, **how),
        Schedule(6, 0),
        steps,
        directory,
        device=CPU,
        callbacks=[recorder] if probability is None else [mask, recorder],
    )
    train_segment(trainer, last_checkpoint(directory) if resume else None)
    return model, recorder


@pytest.mark.parametrize("elements", [False, True])
def test_a_probability_of_one_freezes_the_shared_cores_in_training(moe: Path, tmp_path: Path, elements: bool) -> None:
    """With accumulation, clipping and decay; everything else moves."""
    before = {name: parameter.detach().clone() for name, parameter in load(moe).named_parameters()}
    model, recorder = train(moe, tmp_path, 1.0, elements=elements)
    seen = set()
    for name, parameter, role in roles(model):
        seen.add(role)
        assert torch.equal(parameter, before[name]) == (role == "central"), (name, role)
    assert seen == {"central", "auxiliary", "other"}
    for found in recorder.moments[-1]:
        if elements:
            assert not found["exp_avg"].any() and not found["exp_avg_sq"].any()
        else:
            assert found == {}


def test_one_draw_a_step_decides_however_many_batches_it_has(moe: Path, tmp_path: Path) -> None:
    """Each of the four cores moves in exactly the steps that are not drawn for it, and so do its moments."""
    _, recorder = train(moe, tmp_path, 0.5)
    mask = recorder.mask
    assert mask.drawn == 6 * 4
    outcomes = set()
    for number in range(6):
        for core, drawn in enumerate(mask.draw(number)):
            stays = torch.equal(recorder.values[number][core], recorder.values[number + 1][core])
            assert stays == bool(drawn), (number, core)
            assert equal(recorder.moments[number][core], recorder.moments[number + 1][core]) == bool(drawn)
            outcomes.add(stays)
    assert outcomes == {True, False}
    # A core that was masked in a step has counted one step less.
    for core, found in enumerate(recorder.moments[-1]):
        assert int(found["step"]) == sum(not bool(mask.draw(number)[core]) for number in range(6))


def test_the_trainers_first_step_is_that_of_an_unmasked_run_but_for_what_is_masked(moe: Path, tmp_path: Path) -> None:
    free, plain = train(moe, tmp_path / "free", None, steps=1)
    held, recorder = train(moe, tmp_path / "held", 0.5, steps=1, elements=True)
    assert recorder.mask.drawn == 4
    masks = recorder.mask.draw(0)
    for masked, start, one, other in zip(masks, recorder.values[0], recorder.values[1], plain.values[1], strict=True):
        assert torch.equal(one, torch.where(masked, start, other)) and not torch.equal(one, other)
    for (name, one, role), other in zip(roles(held), free.parameters(), strict=True):
        assert role == "central" or torch.equal(one, other), name


@pytest.mark.parametrize("elements", [False, True])
def test_a_resumed_run_draws_the_same(moe: Path, tmp_path: Path, elements: bool) -> None:
    whole, _ = train(moe, tmp_path, 0.5, elements=elements)
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed, recorder = train(moe, tmp_path, 0.5, elements=elements, resume=True)
    assert len(recorder.values) == 1 + 3
    assert recorder.mask.drawn == 3 * 4
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
