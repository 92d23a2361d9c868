"""The trainer of one segment: loss, parameter groups, schedule and order of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from mpocli.config.optimisation import Optimisation
from mpocli.errors import InputError, NumericsError
from mpocli.hf.foreign import foreign
from mpocli.hf.memory import keep_packed
from mpocli.train.evaluate.predictions import predictions, shifted, shifts_labels
from mpocli.train.loop.arguments import training_arguments
from mpocli.train.loop.checkpoints import load_tensors, save_tensors
from mpocli.train.loop.distill import Distillation
from mpocli.train.loop.interrupt import CheckpointOnInterrupt
from mpocli.train.loop.optimizer_state import Moments, put_moments
from mpocli.train.loop.sampler import ByLength, Epochs, Stretch
from mpocli.train.loop.schedule import Schedule, SegmentPlace
from mpocli.train.loop.updates import parameter_groups
from mpocli.train.loop.use_cache import use_cache_as_before


class SegmentTrainer(Trainer):  # type: ignore[misc]
    """HF's Trainer with parameter groups by role, a linear schedule, and an end at the first NaN.

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
        place: SegmentPlace | None = None,
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
        with use_cache_as_before(model.config):
            super().__init__(
                model=model,
                args=training_arguments(optimisation, steps, directory, device, place, checkpoints=checkpoints),
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
        self.add_callback(Epochs(self.sampler, collator, first=place.number if place else 0))
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
        with foreign(f"a {type(self.model).__name__} cannot be trained on this data", hint="choose another ‹task›"):
            loss: Tensor = super().training_step(*args, **kwargs)
        if not math.isfinite(float(loss)):
            raise NumericsError(
                f"the loss is {float(loss)} at step {self.state.global_step + 1}", hint="lower ‹lr› or ‹mpo_lr›"
            )
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.raw:
            save_tensors(self.model, Path(output_dir or str(self.args.output_dir)))
        else:
            super()._save(output_dir, state_dict)

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Through `from_pretrained`, since a plain state dict lacks what transformers renames or fuses in saving."""
        if self.raw:
            load_tensors(self.model, Path(resume_from_checkpoint))
            return
        with keep_packed():
            saved, report = type(self.model).from_pretrained(
                resume_from_checkpoint, dtype=torch.float32, output_loading_info=True
            )
        missing = sorted(report["missing_keys"])
        if missing:
            raise InputError(f"{resume_from_checkpoint}: lacks {missing[0]}", hint="begin anew with ‹overwrite›")
        tensors = saved.state_dict(keep_vars=True)
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            tensor.copy_(tensors[name])

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise NumericsError(
                    f"{name} is not finite after step {self.state.global_step}", hint="lower ‹lr› or ‹mpo_lr›"
                )
        self.running.note()
        super()._save_checkpoint(*args, **kwargs)


class _RunningLoss(TrainerCallback, ExportableState):  # type: ignore[misc]
    """The losses since the last log, in checkpoints: a run that is resumed between two logs logs what it would have.

    transformers keeps the sum of each process, and forgets it.
    """

    def __init__(self, trainer: SegmentTrainer) -> None:
        self.trainer = trainer
        self.sums: list[float] = []
        self.logged = 0

    def note(self) -> None:
        """Take the losses down, in every process, before a checkpoint is written."""
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
