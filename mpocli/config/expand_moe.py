"""Options of `mpocli expand-moe`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from mpocli.config import bounds, common
from mpocli.config.bounds import at_least
from mpocli.config.modes import ALWAYS, excludes
from mpocli.config.option import Option, recorded
from mpocli.config.page import NETWORKS
from mpocli.config.routing import RouterOptions, RoutingConfig

_MPO = excludes("--baseline-moe", why="its experts are dense")
_HERE = {"panel": NETWORKS}


@dataclass(frozen=True)
class ExpandConfig:
    """Options of `mpocli expand-moe`. `share` None stands for dense experts (the baseline); `trunc` caps the bonds,
    None is lossless; `sites` None is 5; `noise` breaks the symmetry of the experts, relative to a core's root mean
    square."""

    experts: Annotated[
        int, Option("--experts", "Of every network.", "N", NETWORKS, short="-n", check=at_least(2)), ALWAYS
    ] = 8
    share: Annotated[
        Literal["central", "none"] | None,
        Option("--share", "central: one core for all; none: n full MPOs.", "WHAT", NETWORKS),
        _MPO,
    ] = "central"
    sites: Annotated[
        int | None,
        Option("--sites", "Cores per matrix. Default: 5.", "N", NETWORKS, check=bounds.sites),
        _MPO,
    ] = None
    trunc: Annotated[
        int | None,
        Option("--trunc", "Cap on the bonds. Default: lossless.", "N", NETWORKS, check=at_least(1)),
        _MPO,
    ] = None
    noise: Annotated[
        float,
        Option(
            "--noise", "On auxiliary cores, × their size: another start.", "X", NETWORKS, check=at_least(0), share=True
        ),
        ALWAYS,
    ] = 0.0
    layers: Annotated[common.Roles, _HERE, {"help": "Default: ffn."}, ALWAYS] = None
    targets: Annotated[common.Targets, _HERE] = ()
    ignore: Annotated[common.Ignored, _HERE] = ()
    shapes: Annotated[common.SiteShapes, _HERE, _MPO] = ()
    routing: RoutingConfig = field(default_factory=lambda: RoutingConfig(RouterOptions()))
    seed: Annotated[
        int, Option("--seed", "Of routers and noise.", "N", recorded=False, check=bounds.seed(63)), ALWAYS
    ] = 0
    max_shard_bytes: Annotated[common.ShardBytes, {"recorded": False}] = 5 * 10**9
    revision: common.Revision = None
    trust_remote_code: common.TrustRemoteCode = False

    def recorded(self) -> dict[str, Any]:
        """The options for the manifest."""
        return recorded(self, ("routing",)) | self.routing.to_dict()
