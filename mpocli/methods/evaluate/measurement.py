"""One checkpoint measured on a task: metrics, speed and memory."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mpocli.config.data import DataOptions
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.memory import forget_parts, keep_packed
from mpocli.hf.sparse_paths import PathChoice, PathReport, choose_paths
from mpocli.io.totals import Totals
from mpocli.methods.data.scoring import run_set, score_set
from mpocli.methods.data.task import TaskData, check_trained_head
from mpocli.methods.memory import peak_memory, reset_peak_memory
from mpocli.methods.training.student import load_student
from mpocli.nn.packed import resident_bytes
from mpocli.progress import Progress
from mpocli.train.evaluate.predict import Run

Memory = Literal["fast", "lean"]


@dataclass(frozen=True)
class Speed:
    """p50 of the seconds a batch takes, real tokens per second, and the peak of the process's memory in bytes while
    this model was loaded and run (of the device's, on a GPU); `weights_bytes` are those of its parameters and buffers
    as memory holds them."""

    batch_seconds_p50: float
    tokens_per_second: float
    peak_memory_bytes: int
    weights_bytes: int


@dataclass(frozen=True)
class Arm:
    """One checkpoint's figures."""

    model: str
    metrics: dict[str, float]
    totals: Totals
    speed: Speed | None
    paths: tuple[PathReport, ...] = ()


class Measurement:
    """A checkpoint being measured: loaded, run over every set, and let go."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: TaskData,
        options: DataOptions,
        device: torch.device,
        path: PathChoice,
        memory: Memory,
        trust_remote_code: bool,
    ) -> None:
        self.checkpoint, self.data, self.options, self.device = checkpoint, data, options, device
        self.path, self.memory, self.trust_remote_code = path, memory, trust_remote_code
        self.runs: list[Run] = []
        self.metrics: dict[str, float] = {}
        self.speed: Speed | None = None
        self.paths: tuple[PathReport, ...] = ()

    def load(self) -> Any:
        data = self.data
        check_trained_head(self.checkpoint, data)
        with keep_packed(self.memory == "lean"):
            model = load_student(self.checkpoint, data, trust_remote_code=self.trust_remote_code)
        forget_parts(model)  # nobody saves it
        return model.to(self.device).eval()

    def measure(self, progress: Progress | None, what: str) -> None:
        reset_peak_memory(self.device)
        model = self.load()
        weights = resident_bytes(model)
        rows = _rows_per_call(self.data, self.options.eval_batch_size)
        self.paths = tuple(choose_paths(model, rows, precision=self.options.precision, path=self.path))
        for found in self.data.eval:

            def tell(done: int, total: int) -> None:
                if progress:
                    progress(done, total, what)

            self.runs.append(run_set(model, self.data, found, self.options, progress=tell))
            self.metrics |= score_set(self.data, found, self.runs[-1])
        seconds = [value for run in self.runs for value in run.seconds]
        tokens = sum(size for run in self.runs for size in run.sizes)
        p50, peak = statistics.median(seconds), peak_memory(self.device)
        self.speed = Speed(p50, tokens / sum(seconds), peak, weights)

    def arm(self, name: str) -> Arm:
        return Arm(name, self.metrics, self.checkpoint.totals(), self.speed, self.paths)


def _rows_per_call(data: TaskData, batch_size: int) -> int:
    """Rows that a linear layer is typically given: the tokens of a batch; where texts are written, one of each."""
    texts = [
        found.windows.ids if found.windows else [row["input_ids"] for row in found.features] for found in data.eval
    ]
    lengths = [len(ids) for found in texts for ids in found]
    length = 1 if data.task.kind == "text2text" else statistics.median_low(lengths)
    return min(batch_size, len(lengths)) * length
