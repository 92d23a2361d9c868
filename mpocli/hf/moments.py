"""Second moments of what goes into a model's matrices and of the gradients that come back, kept on disk between uses.

One streaming pass over the calibration data for as many modules as fit in memory at a time. Modules that read the same
vectors (query, key and value) share one Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpocli.errors import InputError, NumericsError
from mpocli.hf.activations import Batch, Inputs, Padding, run, watch_inputs
from mpocli.hf.probe import Probe, samples_of
from mpocli.nn.evaluating import evaluating
from mpocli.progress import StepProgress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Sums held at one time, in elements; more modules take more passes over the data.
MOST_ELEMENTS = 2**29
# Activations kept for the gradients at one time, in elements, or those of one sample where that is more.
MOST_ACTIVATIONS = 2**28
# A layer with more outputs (a vocabulary) is weighted by one number instead of a matrix.
WIDEST_OUTPUT = 16_384


@dataclass(frozen=True)
class Moments:
    """Second moments of one module over the calibration data, as sums.

    `gram` = Σ x xᵀ (I, I) over `tokens` inputs, None for an embedding, whose inputs are rows of the identity.
    `output` = Σ g gᵀ (O, O) of the gradients g of the probe's loss by the module's outputs, and `output_trace` its
    trace; None without a probe, `output` also for a layer of too many outputs.
    """

    tokens: int
    gram: Tensor | None
    output: Tensor | None = None
    output_trace: float | None = None


@dataclass
class Store:
    """Moments by module name in a folder, one file for each distinct input and one for each output."""

    folder: Path
    _inputs: dict[str, tuple[Path | None, int]] = field(default_factory=dict)
    _outputs: dict[str, tuple[Path | None, float]] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self._inputs

    def __getitem__(self, name: str) -> Moments:
        """Read from disk."""
        path, tokens = self._inputs[name]
        gram = load_file(path)["sum"] if path else None
        if name not in self._outputs:
            return Moments(tokens, gram)
        where, trace = self._outputs[name]
        return Moments(tokens, gram, load_file(where)["sum"] if where else None, trace)

    def tokens(self, name: str) -> int:
        """How many inputs a module had, 0 where none reached it."""
        return self._inputs[name][1] if name in self else 0

    def put_input(self, names: Sequence[str], gram: Tensor | None, tokens: int) -> None:
        path = self._write(gram)
        for name in names:
            self._inputs[name] = path, tokens

    def put_output(self, name: str, total: Tensor | None, trace: float) -> None:
        self._outputs[name] = self._write(total), trace

    def _write(self, total: Tensor | None) -> Path | None:
        if total is None:
            return None
        path = self.folder / f"{len(list(self.folder.iterdir()))}.safetensors"
        save_file({"sum": total.cpu().contiguous()}, path)
        return path


@dataclass
class _Sums:
    """The sums of one module while a pass goes on."""

    tokens: int = 0
    inputs: Inputs | None = None  # none of an embedding, whose tokens are counted alone
    output: Tensor | None = None
    trace: float = 0.0


def collect(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    names: Sequence[str],
    folder: Path,
    *,
    probe: Probe | None = None,
    progress: StepProgress | None = None,
) -> Store:
    """The moments of the named modules (Linear, Conv1D or Embedding), in as few passes as memory allows.

    With a `probe` every batch is also run backwards, from the loss that it makes of the outputs, for `output`. Padding
    does not count. Evaluation mode; modes, hooks and gradients are as before in the end, errors or not. Raises
    `InputError` without batches, `NumericsError` for inputs that are not finite. A module that no token reaches is
    not in the store.
    """
    if not batches:
        raise InputError("there are no calibration batches", hint="name a file with text")
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder)
    batches = list(_portions(model, batches, probe is not None))
    leaders = _leaders(model, names, batches[0])
    chunks = list(_chunks(model, [name for name in names if leaders[name] == name], probe is not None))
    followers: dict[str, list[str]] = {}
    for name in names:
        if leaders[name] != name:
            followers.setdefault(leaders[name], []).append(name)
    total = len(chunks) * len(batches)
    for number, chunk in enumerate(chunks):
        sums = {name: _Sums() for leader in chunk for name in (leader, *followers.get(leader, ()))}

        def step(done: int, number: int = number) -> None:
            if progress is not None:
                progress(number * len(batches) + done, total)

        _pass(model, batches, sums, leaders, probe, step)
        _keep(store, sums, leaders, probe is not None)
    return store


def _leaders(model: PreTrainedModel, names: Sequence[str], batch: Batch) -> dict[str, str]:
    """For every module the first one that reads the very same tensors in every call, maybe itself."""
    seen: dict[str, list[int]] = {name: [] for name in names}
    last: list[Tensor] = []  # held, so that its identity means something until the next one comes
    number = 0
    with ExitStack() as hooks:
        hooks.enter_context(evaluating(model))

        def note(name: str, module: nn.Module, x: Tensor) -> None:
            nonlocal number
            if not (last and last[0] is x):
                last[:] = [x]
                number += 1
            seen[name].append(number)

        watch_inputs(model, names, hooks, note)
        run(model, batch)
    first: dict[tuple[int, ...], str] = {}
    # A module without a call, or an embedding, whose inputs are no vectors, stands for itself.
    alone = {name for name in names if not seen[name] or isinstance(model.get_submodule(name), nn.Embedding)}
    return {name: name if name in alone else first.setdefault(tuple(seen[name]), name) for name in names}


def _keep(store: Store, sums: Mapping[str, _Sums], leaders: Mapping[str, str], probed: bool) -> None:
    for name, found in sums.items():
        if leaders[name] != name or not found.tokens:
            continue
        if found.inputs is not None:
            found.inputs.check_finite(name)
        gram = None if found.inputs is None else found.inputs.gram
        store.put_input([other for other in sums if leaders[other] == name], gram, found.tokens)
    for name, found in sums.items():
        if probed and name in store:
            if not torch.isfinite(torch.tensor(found.trace)):
                raise NumericsError(
                    f"module {name}: its gradients are not finite", hint="run the model in float32, or ‹weights› input"
                )
            store.put_output(name, found.output, found.trace)


def _portions(model: PreTrainedModel, batches: Sequence[Batch], probed: bool) -> Iterator[Batch]:
    """The batches, cut where what a model keeps of them for its gradients would be more than the limit."""
    # Of a token about one and a half times what linear layers take and give, a head's logits among it.
    weights = [getattr(module, "weight", None) for module in model.modules() if not isinstance(module, nn.Embedding)]
    each = 1 + 3 * sum(sum(weight.shape) for weight in weights if weight is not None and weight.dim() == 2) // 2
    for batch in batches:
        length = max(value.shape[1] if value.dim() > 1 else 1 for value in batch.values())
        rows = max(1, MOST_ACTIVATIONS // (length * each)) if probed else samples_of(batch)
        for first in range(0, samples_of(batch), rows):
            yield {key: value[first : first + rows] for key, value in batch.items()}


def _chunks(model: PreTrainedModel, names: Sequence[str], probed: bool) -> Iterator[list[str]]:
    chunk: list[str] = []
    room = MOST_ELEMENTS
    for name in names:
        rows, columns = _sizes(model.get_submodule(name))
        need = (columns or 0) ** 2 + (rows**2 if probed and rows <= WIDEST_OUTPUT else 0)
        if chunk and need > room:
            yield chunk
            chunk, room = [], MOST_ELEMENTS
        chunk.append(name)
        room -= need
    if chunk:
        yield chunk


def _sizes(module: nn.Module) -> tuple[int, int | None]:
    """Outputs and inputs; None for an embedding."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, None
    weight: Any = module.weight
    if isinstance(module, nn.Linear):
        return weight.shape[0], weight.shape[1]
    return weight.shape[1], weight.shape[0]  # Conv1D holds the transpose


def _pass(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    sums: dict[str, _Sums],
    leaders: Mapping[str, str],
    probe: Probe | None,
    step: Callable[[int], None],
) -> None:
    with ExitStack() as hooks:
        hooks.enter_context(evaluating(model, gradients=probe is not None))
        padding = Padding(model, hooks)

        def before(name: str, module: nn.Module, x: Tensor) -> None:
            mine, keep = sums[name], padding.keep(module, x)
            if isinstance(module, nn.Embedding):
                mine.tokens += x.numel() if keep is None else int(keep.sum())
                return
            if mine.inputs is None:
                mine.inputs = Inputs(x.shape[-1], gram=True, device=x.device)
            mine.inputs.add(x, keep)
            mine.tokens = mine.inputs.tokens

        def after(module: nn.Module, args: Any, output: Any, name: str) -> None:
            if not output.requires_grad:
                return

            def backward(gradient: Tensor) -> None:
                rows = gradient.detach().reshape(-1, gradient.shape[-1]).float()
                mine = sums[name]
                mine.trace += float(rows.square().sum(dtype=torch.float64))
                if rows.shape[1] <= WIDEST_OUTPUT:
                    if mine.output is None:
                        mine.output = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
                    mine.output.addmm_(rows.T, rows)

            output.register_hook(backward)

        watch_inputs(model, (name for name in sums if leaders[name] == name), hooks, before)
        for name in sums if probe is not None else ():

            def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                after(module, args, output, name)

            hooks.callback(model.get_submodule(name).register_forward_hook(leave).remove)
        # Gradients of activations need parameters ahead of them that have some: tables. All others are frozen.
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        tables = [*tables, model.get_input_embeddings()] if probe is not None else []
        learnt = {parameter for table in tables for parameter in table.parameters()}
        for parameter in learnt:
            parameter.requires_grad_(True)
        samples = 0
        for number, batch in enumerate(batches):
            padding.start(batch)
            output = run(model, batch)
            if probe is not None:
                probe.backward(output, batch, samples)
                for parameter in learnt:
                    parameter.grad = None
            samples += samples_of(batch)
            step(number + 1)
