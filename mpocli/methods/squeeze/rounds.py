"""The rounds of a squeeze: cut, train, evaluate, save; and when there is no next one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mpocli.config.squeeze import SqueezeConfig
from mpocli.errors import NumericsError, UsageError
from mpocli.hf.shrink import mpo_modules, set_mpo
from mpocli.hf.stored import rounded, stored_dtypes
from mpocli.io.totals import Totals
from mpocli.methods.data.scoring import evaluate
from mpocli.methods.squeeze.choice import Bond, Spectra, Widths, at_once, best, candidates, groups
from mpocli.methods.squeeze.state import Cut, Progressed, RoundRecord, save_round
from mpocli.methods.training.fit import fit
from mpocli.methods.training.run import TrainingRun
from mpocli.methods.training.schedule import warmed_up
from mpocli.methods.training.student import roles_of
from mpocli.mpo import MPO, BondCut, cut_bond, stored_error
from mpocli.nn import MPOModule
from mpocli.progress import Progress
from mpocli.train.importance import mean_loss
from mpocli.train.loop.optimizer_state import cut_moments, take_moments
from mpocli.train.loop.processes import on_first
from mpocli.train.loop.schedule import Schedule, SegmentPlace

# Batches of training data on which `--order sensitivity` measures the loss.
SENSITIVITY_BATCHES = 2
# Shorter rounds are trained again from their beginning after a kill; longer ones keep checkpoints along the way.
_LONG_ROUND = 199
_SEGMENT = "segment"


@dataclass(frozen=True)
class Watch:
    """Who is told: `step` of (done, total, line) within a round, `round` of every finished one and the main metric."""

    step: Progress | None = None
    round: Callable[[RoundRecord, str], None] | None = None


class Squeezer:
    """One squeeze: the model that shrinks, and everything that stays."""

    def __init__(
        self, run: TrainingRun, config: SqueezeConfig, target: int | None, before: Totals, watch: Watch
    ) -> None:
        self.run, self.config, self.target, self.before, self.watch = run, config, target, before, watch
        self.model, self.data, checkpoint = run.student, run.data, run.checkpoint
        model = self.model
        self.roles = roles_of(model, checkpoint)
        self.dtypes = stored_dtypes(model, checkpoint)
        self.modules = _chosen(mpo_modules(model), self.roles, config)
        self.tied = groups(self.modules, self.roles, config.tie)
        # Before a state of this run is loaded: the model as it came.
        self.spectra = Spectra(self.modules) if config.order == "cumulative" else None
        self.start = {name: module.sites.num_params(module.bond_dims) for name, module in self.modules.items()}

    def begin(self) -> Progressed:
        return Progressed((), {}, 0, self.run.measure_before())

    def reference(self, state: Progressed) -> float:
        """The metric that the drop is measured from."""
        found = self.config.reference
        return state.before[self.data.task.main_metric] if found is None else found

    def params(self) -> int:
        """Of the whole model, now."""
        now = sum(module.sites.num_params(module.bond_dims) for module in self.modules.values())
        return self.before.params - sum(self.start.values()) + now

    def round(self, state: Progressed) -> tuple[Progressed, str | None]:
        """Cut, train, evaluate, save. Returns the state after it, and why there is no next round, None if there is."""
        config, number = self.config, len(state.records) + 1
        met = self.target is not None and self.params() <= self.target
        # Small enough, but outside the drop: this round only trains.
        # One process chooses: sums that differ in the last bit must not lead to different models.
        to = {} if met else on_first(self._choice)
        if not to and not met:
            return state, "exhausted"
        cuts = self._cut(to, state)
        moments = state.moments
        if config.finetune_steps:
            try:
                moments = self._train(number, state)
            except NumericsError:
                if not state.kept:
                    raise
                return state, "not-finite"
        with rounded(self.model, self.dtypes):  # measured is what would be stored
            metrics = on_first(lambda: evaluate(self.model, self.data, config.data))
        params = self.params()
        drop = self.reference(state) - metrics[self.data.task.main_metric]
        drop = drop if self.data.task.greater_is_better else -drop
        record = RoundRecord(number, cuts, params, params / self.before.dense_params, metrics, drop)
        # A drop of 0.05 is 0.050000000000000044 in floating point.
        inside = config.max_drop is None or drop <= config.max_drop + 1e-9 * max(1.0, abs(self.reference(state)))
        state = Progressed((*state.records, record), moments, number if inside else state.kept, state.before)
        if self.run.is_writer:
            save_round(self.run.directory, self.model, state)
            shutil.rmtree(self.run.directory / f"{_SEGMENT}-{number}", ignore_errors=True)
            if self.watch.round:
                self.watch.round(record, self.data.task.main_metric)
        return state, self.stopped(state)

    def stopped(self, state: Progressed) -> str | None:
        """Why no round follows on this state, None where one does."""
        outside = len(state.records) - state.kept
        if outside > self.config.patience:
            return "max-drop"
        met = self.target is not None and self.params() <= self.target
        if met and not outside:
            return "target"
        if met and not self.config.finetune_steps:
            return "max-drop"  # nothing would change any more
        if self.config.direct and state.records and not met:
            return "exhausted"
        if self.config.rounds is not None and len(state.records) >= self.config.rounds:
            return "rounds"
        return None

    def _choice(self) -> dict[Bond, int]:
        config = self.config
        how: dict[str, Any]
        widths, spectra = Widths(self.modules), Spectra(self.modules)
        save = None if self.target is None else max(1, self.params() - self.target)
        if config.direct:
            assert save is not None
            how = {"per_param": config.per_param, "save": save}
            return at_once(self.tied, widths, spectra, config.step, config.order, **how)
        found = candidates(self.tied, widths, spectra, config.step, save=save)
        if not found:
            return {}
        chosen = best(
            found,
            config.order,
            spectra,
            widths,
            per_param=config.per_param,
            start=self.spectra,
            loss_after=self._loss_after,
        )
        return chosen.to

    def _cut(self, to: Mapping[Bond, int], state: Progressed) -> tuple[Cut, ...]:
        """Cut the bonds for good; the optimiser's state follows."""
        cuts = []
        for bond, width in to.items():
            before = self.modules[bond.module].to_mpo()
            after, cut = cut_bond(before, bond.bond, width)
            set_mpo(self.model, bond.module, after)
            cut_moments(state.moments, bond.module, cut)
            cuts.append(self._recorded(bond, cut, before, after))
        return tuple(cuts)

    def _recorded(self, bond: Bond, cut: BondCut, before: MPO, after: MPO) -> Cut:
        true, _ = stored_error(before.to(dtype=torch.float64).to_matrix(), after)
        role = self.roles.get(bond.module)
        return Cut(bond.module, role, bond.bond, cut.before, cut.after, cut.error_bound, true)

    @cached_property
    def _sample(self) -> list[dict[str, Tensor]]:
        chosen = self.config.optimisation
        return self.data.sample(chosen.batch_size, SENSITIVITY_BATCHES, chosen.seed, self.model.device)

    def _loss_after(self, to: Mapping[Bond, int]) -> float:
        """The mean loss on a fixed sample of the training data with these bonds cut, which are then restored."""
        kept: dict[str, MPO] = {}
        for bond, width in to.items():
            mpo = self.modules[bond.module].to_mpo()
            kept.setdefault(bond.module, mpo)
            set_mpo(self.model, bond.module, cut_bond(mpo, bond.bond, width)[0])
        loss = mean_loss(self.model, self._sample)
        for name, mpo in kept.items():
            set_mpo(self.model, name, mpo)
        return loss

    def _train(self, number: int, state: Progressed) -> Any:
        """Fine-tune for one round, a training segment of its own; the optimiser's state after it."""
        config, steps = self.config, self.config.finetune_steps
        # The optimiser has to warm up once; afterwards its state goes on.
        schedule = warmed_up(config.optimisation, steps) if number == 1 else Schedule(steps, 0)
        trainer = fit(
            self.run,
            schedule,
            segment=f"{_SEGMENT}-{number}",
            is_logged=False,
            place=SegmentPlace(number, (number - 1) * steps),
            moments=state.moments,
            checkpoints=steps > (config.optimisation.save_steps or _LONG_ROUND),
        )
        return take_moments(self.model, trainer.optimizer)


def _chosen(
    modules: Mapping[str, MPOModule], roles: Mapping[str, str | None], config: SqueezeConfig
) -> dict[str, MPOModule]:
    """The modules that may shrink; `UsageError` where none is left, or a glob matches nothing."""
    for glob in config.ignore:
        if not any(fnmatchcase(name, glob) for name in modules):
            raise UsageError(f"--ignore {glob!r} matches no MPO", hint="mpocli inspect lists their names")
    found = {
        name: module
        for name, module in modules.items()
        if (config.layers is None or roles.get(name) in config.layers)
        and not any(fnmatchcase(name, glob) for glob in config.ignore)
    }
    if not found:
        chosen = [f"--layers {','.join(config.layers)}"] if config.layers else []
        chosen += [f"--ignore {glob}" for glob in config.ignore]
        raise UsageError(f"{' '.join(chosen)}: no MPO is left", hint="mpocli inspect lists them")
    return found
