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
from mpocli.hf.calibration import Batch, Padding, evaluating, run
from mpocli.hf.foreign import foreign
from mpocli.hf.padding import decoder_mask
from mpocli.nn.logits import drawn, slices

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
    """Of one module over the calibration data, as sums.

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
    """Of one module in a pass."""

    tokens: int = 0
    gram: Tensor | None = None
    output: Tensor | None = None
    trace: float = 0.0


def collect(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    names: Sequence[str],
    folder: Path,
    *,
    probe: Probe | None = None,
    progress: Callable[[int, int], None] | None = None,
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
        for name in names:

            def note(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                nonlocal number
                x: Tensor = args[0] if args else next(iter(kwargs.values()))
                if not (last and last[0] is x):
                    last[:] = [x]
                    number += 1
                seen[name].append(number)

            hooks.callback(model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True).remove)
        run(model, batch)
    first: dict[tuple[int, ...], str] = {}
    # A module without a call, or an embedding, whose inputs are no vectors, stands for itself.
    alone = {name for name in names if not seen[name] or isinstance(model.get_submodule(name), nn.Embedding)}
    return {name: name if name in alone else first.setdefault(tuple(seen[name]), name) for name in names}


def _keep(store: Store, sums: Mapping[str, _Sums], leaders: Mapping[str, str], probed: bool) -> None:
    for name, found in sums.items():
        if leaders[name] != name or not found.tokens:
            continue
        if found.gram is not None and not bool(torch.isfinite(found.gram.diagonal()).all()):
            raise NumericsError(
                f"module {name}: its inputs are not finite", hint="run the model in float32 or bfloat16"
            )
        store.put_input([other for other in sums if leaders[other] == name], found.gram, found.tokens)
    for name, found in sums.items():
        if probed and name in store:
            if not torch.isfinite(torch.tensor(found.trace)):
                raise NumericsError(
                    f"module {name}: its gradients are not finite", hint="run the model in float32, or --weights input"
                )
            store.put_output(name, found.output, found.trace)


def _portions(model: PreTrainedModel, batches: Sequence[Batch], probed: bool) -> Iterator[Batch]:
    """The batches, cut where what a model keeps of them for its gradients would be more than the limit."""
    # Of a token about one and a half times what linear layers take and give, a head's logits among it.
    weights = [getattr(module, "weight", None) for module in model.modules() if not isinstance(module, nn.Embedding)]
    each = 1 + 3 * sum(sum(weight.shape) for weight in weights if weight is not None and weight.dim() == 2) // 2
    for batch in batches:
        length = max(value.shape[1] if value.dim() > 1 else 1 for value in batch.values())
        rows = max(1, MOST_ACTIVATIONS // (length * each)) if probed else _samples(batch)
        for first in range(0, _samples(batch), rows):
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

        def before(module: nn.Module, args: Any, kwargs: Any, name: str) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            mine = sums[name]
            keep = padding.keep(module, x)
            if isinstance(module, nn.Embedding):
                mine.tokens += x.numel() if keep is None else int(keep.sum())
                return
            rows = x.detach().reshape(-1, x.shape[-1])
            rows = (rows if keep is None else rows[keep.reshape(-1)]).float()
            mine.tokens += len(rows)
            if mine.gram is None:
                mine.gram = torch.zeros(rows.shape[1], rows.shape[1], device=x.device)
            mine.gram.addmm_(rows.T, rows)

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

        for name in sums:
            module = model.get_submodule(name)

            def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                before(module, args, kwargs, name)

            def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                after(module, args, output, name)

            if leaders[name] == name:
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            if probe is not None:
                hooks.callback(module.register_forward_hook(leave).remove)
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
            samples += _samples(batch)
            step(number + 1)


@dataclass(frozen=True)
class Probe:
    """A loss whose gradients say which outputs of a layer matter, with no labels needed.

    For logits: the negative log-likelihood of labels drawn from the model's own distribution, so that the second
    moments of gradients are the Fisher information, and a change D of a weight costs about ½ tr(H D G Dᵀ) of it in
    Kullback-Leibler divergence (K-FAC: Martens and Grosse 2015, §3). For a model without a head, or with a single
    output: inner products with standard normal vectors, whose gradients' second moments are the Gauss-Newton matrix
    of ½ the squared change of the output. Sums over tokens; padding does not count. Each sample draws from a seed of
    its own, so that the batches which samples come in change nothing.
    """

    seed: int = 0

    def backward(self, outputs: Any, batch: Batch, first: int) -> None:
        """Run the gradients of the loss back from a model's outputs on the samples `first` and following.

        Raises `NumericsError` for logits that are not finite.
        """
        logits = outputs.get("logits")
        if logits is not None and logits.shape[-1] > 1:
            gradient: Callable[[Tensor, Batch, Sequence[torch.Generator]], Tensor] = self._sampled
            found = [logits]
        else:
            gradient = self._projected
            found = [outputs[key] for key in ("logits", "last_hidden_state", "pooler_output") if key in outputs]
        if not found:
            found = [value for value in outputs.values() if isinstance(value, Tensor) and value.requires_grad]
        if not found:
            raise InputError("the model's outputs hold nothing to take gradients of", hint="try --weights input")
        generators = [torch.Generator().manual_seed(self.seed * 1_000_003 + first + k) for k in range(_samples(batch))]
        gradients = [gradient(tensor, batch, generators) for tensor in found]
        with foreign("the model's own code gives no gradients", hint="try --weights input"):
            torch.autograd.backward(found, gradients)

    @torch.no_grad()
    def _sampled(self, logits: Tensor, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """softmax(z) − e_label: of a few tokens at a time, since a vocabulary's logits fill the memory."""
        made, mask = torch.zeros_like(logits), token_mask(batch, logits)
        for k, generator in enumerate(generators):
            rows, kept = logits[k].reshape(-1, logits.shape[-1]), made[k].view(-1, logits.shape[-1])
            places = torch.arange(len(rows), device=logits.device)
            places = places if mask is None else places[mask[k].reshape(-1)]
            for part in slices(len(places), logits.shape[-1]):
                gradient, labels = drawn(rows[places[part]], generator)
                if not bool(torch.isfinite(gradient).all()):
                    raise NumericsError("the model's logits are not finite", hint="run the model in float32")
                gradient[torch.arange(len(labels)), labels] -= 1.0
                kept[places[part]] = gradient.to(kept)
        return made

    @torch.no_grad()
    def _projected(self, tensor: Tensor, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        if not tensor.dim() or len(tensor) != len(generators):  # not one for each sample
            return torch.randn(tensor.shape, generator=generators[0]).to(tensor)
        made, mask = torch.zeros_like(tensor), token_mask(batch, tensor)
        for k, generator in enumerate(generators):
            places = ... if mask is None else mask[k]
            made[k][places] = torch.randn(made[k][places].shape, generator=generator).to(tensor)
        return made


def _samples(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def token_mask(batch: Batch, tensor: Tensor) -> Tensor | None:
    """True for the vectors of an output that stand for tokens; None where all count."""
    for mask in (decoder_mask(batch, None), batch.get("attention_mask")):
        if mask is not None and mask.dim() == 2 and tensor.shape[:-1] == mask.shape:
            return mask.to(tensor.device) != 0
    return None
