"""One segment of training: modules, optimiser, schedule and data-parallel wrapping built from a saved state.

Whatever changes shapes in mid-training (resuming, squeezing, over-parameterising) ends one segment and begins the
next: no optimiser ever outlives the tensors it was built for.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import get_length_grouped_indices

from mpocli.config.optimisation import Optimisation
from mpocli.errors import InputError, NumericsError, UsageError
from mpocli.hf.foreign import foreign
from mpocli.io.disk import is_no_room
from mpocli.train.evaluate.predictions import predictions, shifted, shifts_labels
from mpocli.train.loop.distill import Distillation
from mpocli.train.loop.interrupt import CheckpointOnInterrupt
from mpocli.train.loop.optimizer_state import Moments, put_moments
from mpocli.train.loop.updates import parameter_groups

METRICS = "metrics.jsonl"
_CHECKPOINT = "checkpoint-"
_RAW = "parameters.safetensors"
# A checkpoint costs about as much as three steps: no more often than this, if nobody says so.
_LEAST_SAVE_STEPS = 100


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over `warmup` steps, then linearly to zero at `total`; `first` steps are behind this segment.

    >>> [round(Schedule(10, 2).factor(step), 2) for step in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    total: int
    warmup: int
    first: int = 0

    def factor(self, step: int) -> float:
        """Of the learning rate, at a step of this segment."""
        step += self.first
        if step < self.warmup:
            return step / self.warmup
        return max(0.0, (self.total - step) / max(1, self.total - self.warmup))


@dataclass(frozen=True)
class Place:
    """Where a segment of known length stands in a chain: its number, which seeds dropout and masks, and the steps
    before it, whose examples it does not see again."""

    number: int
    first_step: int


class SegmentTrainer(Trainer):  # type: ignore[misc]
    """HF's Trainer with parameter groups by role, this module's schedule, and an end at the first NaN.

    `next_token` says that labels are shifted in the model's loss: those of a causal language model. `place` is given
    where this is one of many segments, and `moments` are the optimiser's state by parameter name to begin with.
    Without `checkpoints` nothing is saved along the way but on an interrupt; `raw` ones hold the tensors by name and no
    model that could be loaded. `rates` are learning rates of parameters that have their own, by name.
    """

    def __init__(
        self,
        model: Any,
        features: Sequence[dict[str, Any]],
        collator: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]],
        optimisation: Optimisation,
        schedule: Schedule,
        steps: int,
        directory: Path,
        *,
        device: torch.device,
        callbacks: Sequence[TrainerCallback] = (),
        distillation: Distillation | None = None,
        next_token: bool = False,
        place: Place | None = None,
        moments: Moments | None = None,
        checkpoints: bool = True,
        raw: bool = False,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.rates = rates
        self.raw = raw
        self.next_token = next_token
        self.shift_before = next_token and not shifts_labels(model)
        self.moments = moments
        self.optimisation = optimisation
        self.schedule = schedule
        self.distillation = distillation
        self.running = _RunningLoss(self)
        lengths = [len(feature["input_ids"]) for feature in features]
        with _use_cache_as_before(model.config):
            super().__init__(
                model=model,
                args=_arguments(optimisation, steps, directory, device, place, checkpoints=checkpoints),
                train_dataset=list(features),
                data_collator=collator,
                callbacks=[*callbacks, self.running],
            )
        together = optimisation.batch_size * optimisation.accumulation * self.args.world_size
        grouped = together if optimisation.group_by_length else None
        self.sampler: Sampler[int] = ByLength(lengths, grouped, optimisation.seed)
        if place is not None:
            self.sampler = Stretch(self.sampler, together, place.first_step, steps)
        self.interrupt = CheckpointOnInterrupt()
        self.add_callback(self.interrupt)
        self.add_callback(_Epochs(self.sampler, collator, first=place.number if place else 0))
        self.model_accepts_loss_kwargs = True  # a loss is of a step's items: not to be divided by its batches again
        self.remove_callback(PrinterCallback)  # which prints to stdout
        if optimisation.gradient_checkpointing and model.supports_gradient_checkpointing:
            # The name changed on the way to transformers 6.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        if distillation is not None:
            distillation.teacher.to(self.args.device).eval()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        chosen = self.optimisation
        mpo_lr = chosen.lr if chosen.mpo_lr is None else chosen.mpo_lr
        groups = parameter_groups(self.model, chosen.lr, mpo_lr, chosen.weight_decay, rates=self.rates)
        self.optimizer = torch.optim.AdamW(groups, lr=chosen.lr)
        if self.moments:
            put_moments(self.model, self.optimizer, self.moments)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.schedule.factor)
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.sampler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """A step's batches, and how many predictions they ask for in all processes together.

        Counted by the rule that weights each batch's loss, not by transformers', which knows by the name of a class
        whether its loss shifts labels (and does not know GPT-2's).
        """
        if self.state.global_step >= self.state.max_steps:
            # Resumed after its last step, in the midst of an epoch: transformers would take another one.
            self.control.should_training_stop = True
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [predictions(batch["labels"], next_token=self.next_token) for batch in batches]
        if not counts:
            return batches, None
        return batches, self.accelerator.gather(torch.stack(counts).sum().to(device)).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over everything that is predicted in a step, however it is cut into batches and processes.

        A model's own loss is the mean over its batch (some take the step's count instead, most ignore it), so each
        batch is weighted by its share of the step's items. Data-parallel gradients are averaged: hence the factor.
        """
        asked = {"output_hidden_states": True} if self.distillation and self.distillation.hidden else {}
        outputs = model(**(shifted(inputs) if self.shift_before else inputs), **asked)
        loss = outputs["loss"]
        if self.distillation is not None:
            loss = self.distillation.loss(loss, outputs, inputs)
        if num_items_in_batch is not None:
            count = predictions(inputs["labels"], next_token=self.next_token)
            if count == 0:  # a window of one token: the mean over nothing is NaN
                loss = 0.0 * torch.nan_to_num(outputs["logits"]).sum()
            loss = loss * count * self.args.world_size / num_items_in_batch.clamp_min(1)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with foreign(f"a {type(self.model).__name__} cannot be trained on this data", hint="choose another --task"):
            loss: Tensor = super().training_step(*args, **kwargs)
        if not math.isfinite(float(loss)):
            raise NumericsError(
                f"the loss is {float(loss)} at step {self.state.global_step + 1}", hint="lower --lr or --mpo-lr"
            )
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.raw:
            super()._save(output_dir, state_dict)
            return
        place = Path(output_dir or str(self.args.output_dir))
        place.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().cpu().contiguous() for name, p in _tensors(self.model)}, place / _RAW)

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Through `from_pretrained`: a plain state dict lacks what transformers renames or fuses in saving."""
        if self.raw:
            weights = load_file(Path(resume_from_checkpoint) / _RAW)
            for name, tensor in _tensors(self.model):
                tensor.copy_(weights[name])
            return
        saved, report = type(self.model).from_pretrained(
            resume_from_checkpoint, dtype=torch.float32, output_loading_info=True
        )
        missing = sorted(report["missing_keys"])
        if missing:
            raise InputError(f"{resume_from_checkpoint}: lacks {missing[0]}", hint="begin anew with --overwrite")
        tensors = saved.state_dict(keep_vars=True)
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            tensor.copy_(tensors[name])

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise NumericsError(
                    f"{name} is not finite after step {self.state.global_step}", hint="lower --lr or --mpo-lr"
                )
        self.running.note()
        super()._save_checkpoint(*args, **kwargs)


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters, shared ones once, and the buffers that belong to a model's state."""
    yield from model.named_parameters()
    stored = set(model.state_dict())
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)


def _arguments(
    chosen: Optimisation, steps: int, directory: Path, device: torch.device, place: Place | None, *, checkpoints: bool
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=chosen.batch_size,
        gradient_accumulation_steps=chosen.accumulation,
        max_steps=steps,
        learning_rate=chosen.lr,
        max_grad_norm=chosen.clip,
        bf16=chosen.precision == "bf16",
        use_cpu=device.type == "cpu",
        logging_steps=chosen.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if checkpoints else "no",
        save_steps=chosen.save_steps or _save_steps(steps, chosen.log_steps),
        save_total_limit=2,
        report_to=list(chosen.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        seed=chosen.seed + (1_000_003 * place.number if place else 0),
        data_seed=chosen.seed,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several devices are several processes, never threads of one
    return arguments


def _save_steps(steps: int, log_steps: int) -> int:
    """A tenth of all steps, and a multiple of the logged ones: a resumed run then logs the same averages."""
    return math.ceil(max(_LEAST_SAVE_STEPS, steps // 10) / log_steps) * log_steps


def check_report_to(names: Sequence[str]) -> None:
    """`UsageError` for a `--report-to` that the Trainer does not know or that is not installed.

    Whether it is only its own constructor knows, which otherwise would be called after the first evaluation.
    """
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    asked = get_available_reporting_integrations() if "all" in names else [name for name in names if name != "none"]
    problem = ""
    for name in asked:
        with warnings.catch_warnings(), _unraisable_ignored():
            warnings.simplefilter("ignore")
            try:
                for callback in get_reporting_integration_callbacks([name]):
                    callback()
            except Exception as error:  # a reporter's own code: anything can come out of it
                problem = str(error).strip() or type(error).__name__
            if problem:  # out of the handler, so that what was half made is gone
                raise UsageError(f"--report-to {name}: {problem.splitlines()[0]}", hint="leave it out, or install it")


@contextmanager
def _unraisable_ignored() -> Iterator[None]:
    """Some reporters, half made, fail once more on being deleted, and Python would say so."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before


class _RunningLoss(TrainerCallback, ExportableState):  # type: ignore[misc]
    """The losses since the last log, in checkpoints: a run that is resumed between two logs logs what it would have.

    transformers keeps the sum of each process, and forgets it.
    """

    def __init__(self, trainer: SegmentTrainer) -> None:
        self.trainer = trainer
        self.sums: list[float] = []
        self.logged = 0

    def note(self) -> None:
        """In every process, before a checkpoint is written."""
        total = getattr(self.trainer, "_tr_loss", None)
        if total is not None:
            self.sums = self.trainer.accelerator.gather(total.detach().reshape(1)).tolist()
            self.logged = int(self.trainer._globalstep_last_logged)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}) if state.global_step else {}
        if len(saved.get("sums", ())) == args.world_size and hasattr(self.trainer, "_tr_loss"):
            self.trainer._tr_loss.fill_(saved["sums"][args.process_index])
            self.trainer._globalstep_last_logged = saved["logged"]

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"sums": self.sums, "logged": self.logged}}


class _Epochs(TrainerCallback):  # type: ignore[misc]
    """Tells sampler and collator the epoch: accelerate's wrappers, of a resumed run above all, do not."""

    def __init__(self, *listeners: Any, first: int = 0) -> None:
        self.listeners, self.first = listeners, first

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for listener in self.listeners:
            listener.epoch = self.first + int((state.epoch or 0.0) + 1e-6)


class ByLength(Sampler[int]):
    """All samples in a random order that keeps similar lengths together, or plainly random without `batch_size`.

    A function of seed and epoch alone, so that a resumed run sees the same batches.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int | None, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.batch_size is None:
            return iter(torch.randperm(len(self.lengths), generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class Stretch(Sampler[int]):
    """`steps` whole batches out of the endless row of a sampler's epochs, from batch `first` on.

    What does not fill a batch at an epoch's end is left out; it is other samples each time.
    """

    def __init__(self, epochs: ByLength, batch_size: int, first: int, steps: int) -> None:
        self.epochs, self.batch_size, self.first, self.steps = epochs, batch_size, first, steps
        self.epoch = 0

    def __len__(self) -> int:
        return self.batch_size * self.steps

    def __iter__(self) -> Iterator[int]:
        per_epoch = max(1, len(self.epochs) // self.batch_size)
        for step in range(self.first, self.first + self.steps):
            epoch, batch = divmod(step, per_epoch)
            if batch == 0 or step == self.first:
                self.epochs.epoch = epoch
                order = list(self.epochs)
                order = order * math.ceil(self.batch_size / len(order))  # fewer samples than one batch has
            yield from order[batch * self.batch_size : (batch + 1) * self.batch_size]


# --- what is written along the way ------------------------------------------------------------------------------------


class MetricsFile(TrainerCallback):  # type: ignore[misc]
    """`metrics.jsonl`: one line for every logged step, and for the last of a segment.

    A resumed run drops what lies behind its first step. `first` steps were logged by the segments before.
    """

    def __init__(self, path: Path, first: int = 0) -> None:
        self.path, self.first = path, first

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and self.path.exists():
            last = self.first + state.global_step
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= last]
            self.path.write_text("".join(f"{line}\n" for line in kept))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:  # a run shorter than the distance of two logs says something, too
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            keys = ("loss", "learning_rate", "grad_norm", "sparsity", *(() if self.first else ("epoch",)))
            line = {"step": self.first + state.global_step, **{key: _plain(logs[key]) for key in keys if key in logs}}
            with self.path.open("a") as stream:
                stream.write(json.dumps(line) + "\n")


def last_loss(path: Path) -> float | None:
    """The last loss in a `metrics.jsonl`, None where there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return float(json.loads(lines[-1])["loss"]) if lines else None


class Steps(TrainerCallback):  # type: ignore[misc]
    """Tells `progress(step, total, loss line)` after every step, of a segment or of the whole it is part of."""

    def __init__(self, progress: Callable[[int, int, str], None], first: int = 0, total: int | None = None) -> None:
        self.progress, self.first, self.total = progress, first, total
        self.line = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            step = self.first + state.global_step
            self.line = f"loss {logs['loss']:.4f}, lr {logs['learning_rate']:.1e} (step {step:,})"
            self._tell(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tell(state)

    def _tell(self, state: Any) -> None:
        if state.is_world_process_zero:
            self.progress(self.first + state.global_step, self.total or state.max_steps, self.line)


def _plain(value: Any) -> float:
    return float(value)


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # half a line, left by a kill


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of a training directory; the state file is the last that is written."""
    found = []
    for path in directory.glob(f"{_CHECKPOINT}*"):
        number = path.name.removeprefix(_CHECKPOINT)
        try:
            step = json.loads((path / "trainer_state.json").read_text())["global_step"]
        except (OSError, ValueError, KeyError):
            continue
        if number.isdigit() and int(number) == step:
            found.append((step, path))
    return max(found)[1] if found else None


def train_segment(trainer: SegmentTrainer, resume: Path | None = None) -> None:
    """Run a segment to its end, from a checkpoint of it if given.

    Raises `NumericsError` at a loss or tensor that is not finite and `InputError` where a checkpoint cannot be
    written; the last good one stays. On Ctrl-C, SIGTERM or SIGHUP a checkpoint is written after the step that runs.
    """
    had_forward = "forward" in trainer.model.__dict__
    try:
        with trainer.interrupt.catching(), _use_cache_as_before(trainer.model.config):
            trainer.model.config.use_cache = False
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except NumericsError as error:
        directory = Path(str(trainer.args.output_dir))
        if trainer.is_world_process_zero():  # finite or not, the weights of this very step gave what is not
            shutil.rmtree(directory / f"{_CHECKPOINT}{trainer.state.global_step}", ignore_errors=True)
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


@contextmanager
def _use_cache_as_before(config: Any) -> Iterator[None]:
    """Training keeps no keys and values of past tokens, and Trainer writes that into the configuration for good: the
    output would generate slowly, but for one that was resumed after its last step."""
    before = {name: value for name, value in vars(config).items() if name == "use_cache"}
    try:
        yield
    finally:
        vars(config).pop("use_cache", None)
        vars(config).update(before)


def _unwritable(trainer: SegmentTrainer, error: Exception) -> InputError:
    directory = Path(str(trainer.args.output_dir))
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError(
        f"{directory}: a checkpoint cannot be written ({first_line})",
        hint="free some space and run again" + (" with --resume" if last_checkpoint(directory) else ""),
    )
