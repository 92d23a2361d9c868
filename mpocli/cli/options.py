"""Where a command writes, the data that it reads, and the device that it runs on, settled before the work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from mpocli.config.budget import Budget
from mpocli.config.data import DataOptions, Precision
from mpocli.config.finetune import FinetuneConfig
from mpocli.config.quantize import QuantizeConfig
from mpocli.config.sparsify import SparsifyConfig
from mpocli.config.squeeze import SqueezeConfig
from mpocli.io.readable import real_path

Trained = TypeVar("Trained", FinetuneConfig, SqueezeConfig, SparsifyConfig)


def check_out_before_download(model: str, out: Path, *, overwrite: bool) -> None:
    """Refuse an output that no hub model could make right, before one is downloaded. A local one is soon read."""
    if not Path(model).expanduser().exists():
        from mpocli.io.output import check_output

        check_output(out, None, overwrite=overwrite)


def default_out(model: str, suffix: str) -> Path:
    """The model's bare name and what was done to it: in the working directory, or beside a model that holds it."""
    path = Path(model).expanduser()
    directory = real_path(path)
    name = f"{directory.name if path.name in ('', '..') else path.name}-{suffix}"
    working = Path.cwd()
    inside = path.is_dir() and (directory == working or directory in working.parents)
    return Path(os.path.relpath(directory.parent / name)) if inside else Path(name)


def check_calibration(asked: Budget | SparsifyConfig | QuantizeConfig | None) -> None:
    """`InputError` for a text to look at that is not there."""
    if asked is not None and asked.calibration is not None:
        from mpocli.train.data.local import check_source

        check_source(asked.calibration.source)


def check_sources(data: DataOptions | None) -> None:
    """`InputError` for a file of data that is not there, before anything slow."""
    from mpocli.train.data.local import check_source

    for source in (data.train, *data.eval, data.test) if data is not None else ():
        if source is not None:
            check_source(source)


def precision_of(name: Precision, device: str) -> Precision:
    """`fp32` or `bf16`; auto by the device."""
    if name != "auto":
        return name
    import torch

    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"


def ready_to_train(config: Trained) -> Trained:
    """With the precision that the device has, and with data that is there."""
    check_sources(config.data)
    precision = precision_of(config.optimisation.precision, config.device)
    return replace(config, optimisation=replace(config.optimisation, precision=precision))


@contextmanager
def resumable(out: Path, what: str = "checkpoints are") -> Iterator[None]:
    """Says after an interrupt where a run can go on from."""
    try:
        yield
    except KeyboardInterrupt:
        from mpocli.cli import console
        from mpocli.methods.training.directory import training_directory

        kept = training_directory(out)
        if kept.is_dir():
            console.err.print(f"{what} kept in {kept}: go on with --resume")
        raise
