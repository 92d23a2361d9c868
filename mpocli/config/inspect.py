"""Options of `mpocli inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mpocli.config import common
from mpocli.config.modes import ALWAYS, needs
from mpocli.config.option import Option


@dataclass(frozen=True)
class InspectConfig:
    """What to look at: `module` names matrices by glob, `sites` splits dense ones for their `spectrum`."""

    module: Annotated[
        tuple[str, ...],
        Option("--module", "Only these matrices, one row each. Repeatable.", "GLOB", several=True),
        ALWAYS,
    ] = ()
    spectrum: Annotated[
        bool, Option("--spectrum", "Singular values and entropy of every bond (of a dense matrix too)."), ALWAYS
    ] = False
    sites: Annotated[common.Sites, {"help": "Sites for a dense matrix's spectrum."}, needs("--spectrum")] = 5
    verify: Annotated[
        bool, Option("--verify", "Check hashes, shapes, counts and canonical form; exit 3 on a mismatch."), ALWAYS
    ] = False
    count_zeros: Annotated[
        bool, Option("--count-zeros", "Read weights that are stored dense too, and count their zeros."), ALWAYS
    ] = False
    base: Annotated[
        str | None,
        Option("--base", "With --verify: recompute every claimed error against it.", "MODEL"),
        needs("--verify"),
    ] = None
    revision: common.Revision = None
    trust_remote_code: common.TrustRemoteCode = False
