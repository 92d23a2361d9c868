"""Options of `mpocli finetune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from mpocli.config import bounds, common
from mpocli.config.bounds import at_least, positive
from mpocli.config.data import DataOptions, required
from mpocli.config.distillation import DistillationOptions
from mpocli.config.modes import OF_CORES_ALONE, OF_EXPERTS, OF_SHARED, excludes, needs
from mpocli.config.optimisation import UPDATE, Epochs, Optimisation, RecomputeWeights, StepCount
from mpocli.config.option import Option, group, recorded
from mpocli.config.overparam import Overparam
from mpocli.config.page import EXPERTS

_EXPANDED = ("--overparam static", "--overparam dynamic", "--overparam svd")
_MEASURED = needs("--eval", "--test", "--select best", why="nothing is measured")


@dataclass(frozen=True)
class RoutingChanges:
    """What `finetune` is told to do otherwise than the checkpoint says; None leaves it."""

    mask_prob: Annotated[
        float | None,
        Option("--mask-prob", "Discard a shared core's update.", "P", EXPERTS, check=bounds.share, share=True),
        OF_SHARED,
    ] = None
    balance_loss: Annotated[
        float | None, Option("--balance-loss", "Times Switch's.", "X", EXPERTS, check=at_least(0)), OF_EXPERTS
    ] = None
    z_loss: Annotated[
        float | None, Option("--z-loss", "Times the router's.", "X", EXPERTS, check=at_least(0)), OF_EXPERTS
    ] = None
    capacity_factor: Annotated[
        float | None, Option("--capacity-factor", "Drop what exceeds it.", "F", EXPERTS, check=positive), OF_EXPERTS
    ] = None

    def given(self) -> dict[str, float]:
        """Those that are given."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class FinetuneConfig:
    """Options of `mpocli finetune`. `epochs` counts where `steps` is None; `update` None stands for auxiliary cores
    where there are any and no experts, and for everything otherwise. `raise_layers` names the roles whose dense
    matrices train at `mpo_lr`: the sceptic's arm beside `overparam`."""

    data: Annotated[DataOptions, group(eval_batch_size=(_MEASURED,), max_new_tokens=(_MEASURED,))]
    optimisation: Annotated[
        Optimisation, group(seed=({"help": "Of head, order and dropout."}, excludes("--seeds")))
    ] = field(default_factory=Optimisation)
    update: Annotated[
        str | None,
        UPDATE,
        OF_CORES_ALONE,
        excludes(*_EXPANDED, of=("auxiliary", "central"), why="all cores are trained"),
    ] = None
    epochs: Epochs = 3.0
    steps: StepCount = None
    select: Annotated[
        Literal["last", "best"],
        Option("--select", "last, or best on a held-out tenth of --train, once an epoch.", "WHICH"),
        excludes(*_EXPANDED, of=("best",), why="shapes change in between"),
    ] = "last"
    distillation: DistillationOptions | None = None
    overparam: Overparam | None = None
    raise_layers: tuple[str, ...] = ()
    routing: RoutingChanges = field(default_factory=RoutingChanges)
    recompute_weights: RecomputeWeights = False
    device: common.Device = "auto"
    revision: common.Revision = None
    trust_remote_code: common.TrustRemoteCode = False

    @classmethod
    def from_options(cls, data: DataOptions | None, overparam: Overparam | None, **given: Any) -> FinetuneConfig:
        if overparam is not None and overparam.method == "none":
            return cls(required(data), raise_layers=overparam.layers, **given)
        return cls(required(data), overparam=overparam, **given)

    def recorded(self) -> dict[str, Any]:
        """The options for the manifest: names of files without their folders, nothing of the machine."""
        raised = {"overparam": "none", "overparam_layers": self.raise_layers} if self.raise_layers else {}
        return recorded(self, ("routing",)) | raised | self.routing.given()
