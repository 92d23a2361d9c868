"""Options of `mpocli quantize`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from mpocli.config import common
from mpocli.config.bounds import at_least, seed
from mpocli.config.budget import with_task
from mpocli.config.calibration import Calibration
from mpocli.config.data import ROWS_OF_TASK, DataOptions
from mpocli.config.modes import ALWAYS, OF_CORES, excludes, needs, of_model
from mpocli.config.option import Option, group, recorded
from mpocli.config.page import ROUNDED
from mpocli.errors import UsageError
from mpocli.quant.sizes import BITS

_LOOKED_AT = needs("--calibrate", why="there is nothing to look at")


def _bits(option: str, value: int) -> None:
    if value not in BITS:
        raise UsageError(f"{option} {value}: there are grids of 8, 4, 3 and 2 bits", hint=f"choose {option} 4")


@dataclass(frozen=True)
class QuantizeConfig:
    """Options of `mpocli quantize`. `group` 0 is a scale a row; `method` None is gptq with calibration data, else rtn;
    `offsets` None is the usual: grids of 2 and 3 bits have them."""

    bits: Annotated[int, Option("--bits", "8, 4, 3 or 2.", "N", ROUNDED, short="-b", check=_bits), ALWAYS] = 4
    group: Annotated[
        int, Option("--group", "Entries that share a scale; 0: a row.", "N", ROUNDED, check=at_least(0)), ALWAYS
    ] = 64
    offsets: Annotated[
        Literal["auto", "yes", "no"],
        Option("--zero-point", "Grids with an offset: auto (2 and 3 bits), yes, no.", "WHEN", ROUNDED),
        ALWAYS,
    ] = "auto"
    method: Annotated[
        Literal["rtn", "gptq"] | None,
        Option("--method", "rtn (to nearest) or gptq. Default: gptq with --calibrate, else rtn.", "HOW", ROUNDED),
        needs("--calibrate", of=("gptq",), why="it looks at a layer's inputs"),
        ALWAYS,
    ] = None
    cores: Annotated[
        Literal["all", "central"],
        Option("--cores", "Of an MPO: all, or the central one, which finetune leaves frozen.", "WHICH", ROUNDED),
        of_model("cores", of=("central",), lacking=OF_CORES.lacking, hint=OF_CORES.hint),
        ALWAYS,
    ] = "all"
    layers: Annotated[common.Roles, {"help": "Default: embedding,attention,ffn,pooler.", "panel": ROUNDED}, ALWAYS] = (
        None
    )
    targets: Annotated[common.Targets, {"panel": ROUNDED}] = ()
    ignore: Annotated[common.Ignored, {"panel": ROUNDED}] = ()
    calibration: Annotated[
        Calibration | None,
        group(
            source=(
                {"help": "Text; with --task rows of that task.", "panel": ROUNDED},
                excludes("--method rtn", why="it looks at no inputs"),
            ),
            samples=({"panel": ROUNDED}, _LOOKED_AT),
            seq_len=({"panel": ROUNDED}, _LOOKED_AT, excludes(ROWS_OF_TASK, why="rows are cut by --max-length")),
        ),
    ] = None
    data: Annotated[
        DataOptions | None,
        group(
            needs("--task"),
            without=("train", "eval", "test", "limit", "eval_batch_size", "max_new_tokens"),
            task=(needs("--calibrate"),),
            max_length=(needs(ROWS_OF_TASK, why="windows take --seq-len"),),
        ),
    ] = None
    seed: Annotated[
        int,
        Option("--seed", "Of the samples.", "N", recorded=False, check=seed(63)),
        needs("--calibrate", why="nothing is drawn"),
    ] = 0
    max_shard_bytes: Annotated[common.ShardBytes, {"recorded": False}] = 5 * 10**9
    device: common.Device = "auto"
    revision: common.Revision = None
    trust_remote_code: common.TrustRemoteCode = False

    @classmethod
    def from_options(cls, calibration: Calibration | None, data: DataOptions | None, **given: Any) -> QuantizeConfig:
        """A task may be named by the rows that are looked at."""
        calibration, data = with_task(calibration, data)
        return cls(calibration=calibration, data=data, **given)

    @property
    def rounds_by(self) -> str:
        """`method`, where it is not given too."""
        return self.method or ("gptq" if self.calibration else "rtn")

    @property
    def has_offsets(self) -> bool:
        return self.bits < 4 if self.offsets == "auto" else self.offsets == "yes"

    def recorded(self) -> dict[str, Any]:
        """The options for the manifest."""
        return recorded(self) | {"method": self.rounds_by}
