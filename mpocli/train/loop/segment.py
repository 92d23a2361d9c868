"""One segment of training: modules, optimiser, schedule and data-parallel wrapping built from a saved state.

Whatever changes shapes in mid-training (resuming, squeezing, over-parameterising) ends one segment and begins the
next: no optimiser ever outlives the tensors it was built for.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from mpocli.errors import InputError, NumericsError
from mpocli.io.disk import is_no_room
from mpocli.train.loop.checkpoints import CHECKPOINT, last_checkpoint
from mpocli.train.loop.trainer import SegmentTrainer
from mpocli.train.loop.use_cache import use_cache_as_before


def train_segment(trainer: SegmentTrainer, resume: Path | None = None) -> None:
    """Run a segment to its end, from a checkpoint of it if given.

    Raises `NumericsError` at a loss or tensor that is not finite and `InputError` where a checkpoint cannot be
    written; the last good one stays. On Ctrl-C, SIGTERM or SIGHUP a checkpoint is written after the step that runs.
    """
    had_forward = "forward" in trainer.model.__dict__
    try:
        with trainer.interrupt.catching(), use_cache_as_before(trainer.model.config):
            trainer.model.config.use_cache = False
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except NumericsError as error:
        directory = Path(str(trainer.args.output_dir))
        if trainer.is_world_process_zero():  # finite or not, the weights of this very step gave what is not
            shutil.rmtree(directory / f"{CHECKPOINT}{trainer.state.global_step}", ignore_errors=True)
        kept = last_checkpoint(directory)
        where = f"; the last good weights are {kept}" if kept else ""
        raise NumericsError(error.message, hint=f"{error.hint}{where}") from error
    except Exception as error:
        if is_no_room(error):
            raise _unwritable(trainer, error) from error
        raise
    finally:
        if not had_forward:  # accelerate's mixed precision: the next segment would wrap it once more
            trainer.model.__dict__.pop("forward", None)
            trainer.model.__dict__.pop("_original_forward", None)


def _unwritable(trainer: SegmentTrainer, error: Exception) -> InputError:
    directory = Path(str(trainer.args.output_dir))
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError(
        f"{directory}: a checkpoint cannot be written ({first_line})",
        hint="free some space and run again" + (" with ‹resume›" if last_checkpoint(directory) else ""),
    )
