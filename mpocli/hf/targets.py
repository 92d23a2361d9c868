"""Survey a checkpoint's weight matrices: what the model's class says of the tensors in the files."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mpocli.errors import InputError
from mpocli.hf.matrices import Matrix, Member, checked
from mpocli.hf.replace import check_spec, embedding_scale
from mpocli.hf.roles import role_of
from mpocli.hf.routing import check_networks
from mpocli.hf.skeleton import FileKeys, build_skeleton, file_keys

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from mpocli.io.checkpoint import CheckpointReader
    from mpocli.io.manifest import Manifest
    from mpocli.io.module_entry import ModuleEntry


@dataclass(frozen=True)
class Weight(Matrix[torch.dtype]):
    """A weight matrix of the model. `follower_keys` are the keys of the members after the first, which the files need
    not hold; `sources` those of the tensors that it is read from, more than one where loading puts it together."""

    follower_keys: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def oriented(self, matrix: Tensor) -> Tensor:
        """O×I from what its layer stores, or back: GPT-2's `Conv1D` holds the transpose."""
        return matrix.T if self.kind == "conv1d" else matrix


@dataclass(frozen=True)
class Survey:
    """All weight matrices of a checkpoint, and the size of the whole dense model.

    `dense_params` counts every parameter once, tied ones too; `dense_bytes` the same in the stored dtypes.
    `other_keys` are the tensors in the files that are no parameters of the model: buffers, and what the class
    ignores. `token_rows` of the table that input ids are looked up in; `target_rows` the least of those that a decoder
    reads and that a head over the vocabulary writes; None for a model without. `reads` is the model's main input.
    """

    weights: tuple[Weight, ...]
    dense_params: int
    dense_bytes: int
    other_keys: frozenset[str] = frozenset()
    token_rows: int | None = None
    target_rows: int | None = None
    reads: str = "input_ids"

    @property
    def params(self) -> int:
        """Parameters as the checkpoint stands."""
        return self.dense_params + sum(
            weight.entry.spec.params - weight.dense_params for weight in self.weights if weight.entry
        )


# Of parameter tensors that are built to be compared with the files, whatever the files hold.
_LEAST_BOUND = 20_000


def survey(
    config: PretrainedConfig,
    reader: CheckpointReader,
    manifest: Manifest | None,
    *,
    trust_remote_code: bool = False,
) -> Survey:
    """List the weight matrices of a model without loading any.

    Raises `InputError` where the files lack cores that the manifest names or hold others, and where a dense
    tensor's shape is not the model's.
    """
    # Loading splits a stored tensor into a few at most, and ties some more.
    most = max(_LEAST_BOUND, 20 * len(reader.specs))
    model = build_skeleton(config, trust_remote_code=trust_remote_code, most_parameters=most)
    keys = file_keys(model, reader)
    _check_plain(model, keys, reader)
    entries = _entries(manifest, model)
    apart = _stored_apart(model, keys.stored, reader, entries)
    groups = _tied_groups(model, apart)
    modules = dict(model.named_modules(remove_duplicate=False))
    token_tables = _token_tables(model)
    readers = _direct_readers(model, token_tables)

    weights = []
    for parameters in groups:
        members, roles, obstacle = [], set(), ""
        for parameter in parameters:
            name, _, leaf = parameter.rpartition(".")
            kind, why_not = _kind(modules[name], leaf)
            if why_not == FUSED:
                name = parameter  # one module holds several
            obstacle = obstacle or why_not or (readers.get(name, "") if kind else "")
            members.append(Member(name, kind, embedding_scale(modules.get(name))))
            # a token table is one wherever it is tied to
            role = role_of(name, is_embedding=name in token_tables)
            roles |= {role} if role else set()
        if not members[0].kind and not obstacle:
            continue
        shape = tuple(model.get_parameter(parameters[0]).shape)
        if obstacle == FUSED:
            shape = (shape[0] * shape[1], shape[2])
        elif members[0].kind == "conv1d":
            shape = shape[::-1]
        present = [keys.stored[parameter] for parameter in parameters if parameter in keys.stored]
        key = present[0] if present else None
        names = [keys.stored.get(parameter, parameter) for parameter in parameters]
        followers = tuple(name for name in names if name != key)
        entry = next((entries[m.name] for m in members if m.name in entries and not entries[m.name].spec.tied_to), None)
        sources = (key,) if key else keys.converted.get(parameters[0], ())
        weight = Weight(
            tuple(members),
            frozenset(roles),
            (shape[0], shape[1]),
            key,
            _dtype_of(sources, reader),
            obstacle,
            entry,
            followers,
            sources,
        )
        weights.append(checked(weight, reader, _why_not_stored(parameters[0], keys)))
    _check_entries(model, weights, entries)
    parameter_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {key for name, key in keys.stored.items() if name not in parameter_names}
    known = {*keys.stored.values(), *(key for sources in keys.converted.values() for key in sources)}
    cores = {weight.key_of(part) for weight in weights if weight.entry for part in weight.entry.spec.stored_shapes()}
    ignored = {key for key in reader if key not in known and key not in cores}
    return Survey(
        tuple(weights),
        *_dense_size(model, keys, groups, apart, reader),
        other_keys=frozenset((buffers | ignored) - cores - {weight.key for weight in weights if weight.entry}),
        token_rows=_rows(model, "get_input_embeddings"),
        target_rows=_target_rows(model),
        reads=str(model.main_input_name),
    )


# Numbers that stand for themselves. Of any other a quantisation config has to say what they stand for, and those that
# are known are refused where the skeleton is built.
_PLAIN = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def _check_plain(model: PreTrainedModel, keys: FileKeys, reader: CheckpointReader) -> None:
    """`InputError` for a parameter, or the core of one, that is stored in another dtype."""
    for name, _ in model.named_parameters(remove_duplicate=False):
        sources = (keys.stored[name],) if name in keys.stored else keys.converted.get(name, ())
        cores = (f"{name.removesuffix('.weight')}.core_{k}" for k in range(len(reader.specs)))
        for key in (*sources, *takewhile(reader.specs.__contains__, cores)):
            dtype = reader.specs[key].dtype
            if dtype not in _PLAIN:
                stored = str(dtype).removeprefix("torch.")
                raise InputError(
                    f"{reader.directory}: tensor {key} is stored as {stored}, and config.json has no "
                    "quantization_config that says what its numbers stand for",
                    hint="start from the checkpoint before it was quantised",
                )


def _target_rows(model: PreTrainedModel) -> int | None:
    owner: Any = model.get_decoder() if model.config.is_encoder_decoder else model
    found = (_rows(owner, "get_input_embeddings"), _rows(model, "get_output_embeddings"))
    return min((rows for rows in found if rows is not None), default=None)


def _rows(owner: Any, table: str) -> int | None:
    """Rows of an embedding or of a head over the vocabulary, None where there is no such thing."""
    try:
        weight = getattr(owner, table)().weight
    except (NotImplementedError, AttributeError):
        return None
    return int(weight.shape[0]) if weight.dim() == 2 else None


FUSED = "fused expert weights (one 3-way tensor) are not decomposed"


def _kind(module: nn.Module, leaf: str) -> tuple[str, str]:
    """(kind, obstacle) of the module that owns a parameter; neither for parameters that are no matrix of ours."""
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
    from transformers.pytorch_utils import Conv1D

    name = type(module).__name__
    own_forward = f"its class {name} has a forward pass of its own"
    if leaf == "weight":
        if isinstance(module, Conv1D):
            return "conv1d", ""
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return "linear", "torch's attention reads its weight directly"
        if isinstance(module, nn.Linear):
            plain = type(module).forward is nn.Linear.forward or name in _PLAIN_LINEARS
            return "linear", "" if plain else own_forward
        if isinstance(module, nn.Embedding):
            plain = type(module).forward is nn.Embedding.forward or _is_scaled(module)
            return "embedding", "" if plain else own_forward
    parameter = getattr(module, leaf)
    if isinstance(module, nn.MultiheadAttention) and parameter.dim() == 2:
        return "", "torch's attention reads its weight directly"
    if parameter.dim() == 3 and "expert" in name.lower():
        return "", FUSED
    return "", ""


# A forward pass of their own that computes x Wᵀ + b all the same.
_PLAIN_LINEARS = {"FalconLinear"}


def _is_scaled(module: nn.Module) -> bool:
    """BART's and Gemma's embeddings, which multiply their rows by a number (that may be 1)."""
    return hasattr(module, "embed_scale") or hasattr(module, "scalar_embed_scale")


def _direct_readers(model: PreTrainedModel, token_tables: set[str]) -> dict[str, str]:
    """Modules whose `.weight` some forward pass reads as a matrix, past the module's own: name → obstacle.

    Told from the source (MobileBERT's and DeBERTa's masked-LM heads do this). Reading its dtype or device is
    no obstacle, since the tombstone has both.
    """
    classes: set[Any] = {type(module) for module in model.modules()}
    sources = {cls: _forward_source(cls) for cls in classes}
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(getattr(module, "weight", None), Tensor) and _kind(module, "weight")[0]:
            parent, _, leaf = name.rpartition(".")
            owner = type(model.get_submodule(parent))
            suspects = sources if name in token_tables else {owner: sources[owner]}
            prefix = r"\b" if name in token_tables else r"\bself\."
            reading = rf"{prefix}{re.escape(leaf)}\.weight\b(?!\.(dtype|device))"
            pattern = r"(?<!isinstance\()(?<!isinstance\(self\.)" + reading
            for cls, source in suspects.items():
                if re.search(pattern, source):
                    found[name] = f"{cls.__name__} reads its weight directly"
    return found


@functools.cache
def _forward_source(cls: Any) -> str:
    try:
        return inspect.getsource(cls.forward) if cls.__module__.startswith("transformers") else ""
    except (OSError, TypeError):
        return ""


def _stored_dtype(parameter: str, keys: FileKeys, reader: CheckpointReader) -> torch.dtype:
    """Of the files' tensor behind a parameter, of one that it is converted from, or float32 for a new one."""
    sources = (keys.stored[parameter],) if parameter in keys.stored else keys.converted.get(parameter, ())
    return _dtype_of(sources, reader)


def _dtype_of(sources: Sequence[str], reader: CheckpointReader) -> torch.dtype:
    return reader.specs[sources[0]].dtype if sources else torch.float32


def _token_tables(model: PreTrainedModel) -> set[str]:
    """Names of the token embedding tables, the decoder's own included."""
    tables = set()
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: list[Any] = [m for m in modules.values() if hasattr(m, "get_input_embeddings")]
    found = []
    for owner in owners:
        try:
            found.append(owner.get_input_embeddings())
        except (NotImplementedError, AttributeError):
            continue
    for name, module in modules.items():
        if isinstance(module, nn.Embedding) and any(module is table for table in found):
            tables.add(name)
    return tables


def _stored_apart(
    model: PreTrainedModel, stored: dict[str, str], reader: CheckpointReader, entries: Mapping[str, ModuleEntry]
) -> set[str]:
    """Parameters that the class declares tied and the files hold different: transformers keeps them apart."""
    owner_of: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})

    def differ(name: str, owner: str) -> bool:
        a, b = (entries.get(parameter.removesuffix(".weight")) for parameter in (name, owner))
        if a is None and b is None:
            return not _same(reader, stored[name], stored[owner])
        # Of a decomposed one the files hold a tombstone, and the manifest knows whose cores it has.
        return a is None or b is None or not (a.spec.tied_to or b.spec.tied_to)

    return {name for name, owner in owner_of.items() if name in stored and owner in stored and differ(name, owner)}


def _tied_groups(model: PreTrainedModel, apart: set[str]) -> list[list[str]]:
    """Matrix-like parameters, those that share one tensor together, the owner first."""
    owner_of: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    first_by_id: dict[int, str] = {}
    groups: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # The skeleton has tied them already, whatever the files say.
        owner = name if name in apart else first_by_id.setdefault(id(parameter), owner_of.get(name, name))
        if parameter.dim() in (2, 3):
            groups.setdefault(owner, []).append(name)
    return [
        [name for name in names if name == owner] + [name for name in names if name != owner]
        for owner, names in groups.items()
    ]


def _same(reader: CheckpointReader, a: str, b: str) -> bool:
    if a == b:
        return True
    if reader.specs[a].shape != reader.specs[b].shape:
        return False
    return torch.equal(reader.read(a), reader.read(b))


def _entries(manifest: Manifest | None, model: PreTrainedModel) -> dict[str, ModuleEntry]:
    if manifest is None:
        return {}
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    unknown = [entry.name for entry in manifest.modules if entry.name not in names]
    if unknown:
        raise InputError(
            f"the manifest names module {unknown[0]}, which a {type(model).__name__} does not have",
            hint="config.json's `architectures` must name the class that was decomposed",
        )
    return manifest.by_name


def _check_entries(model: PreTrainedModel, weights: Sequence[Weight], entries: Mapping[str, ModuleEntry]) -> None:
    """`InputError` where the manifest's structure is not that of the class: kind, scale, ties, networks."""
    owners = {member.name: weight.entry for weight in weights if weight.entry for member in weight.members}
    for name, entry in entries.items():
        check_spec(name, entry.spec, model.get_submodule(name))
        owner = owners.get(name)
        tied_to = owner.name if owner and owner.name != name else None
        if owner is None or entry.spec.tied_to != tied_to or entry.spec.core_shapes() != owner.spec.core_shapes():
            raise InputError(
                f"module {name} has, by the manifest, "
                + (f"the cores of {entry.spec.tied_to}" if entry.spec.tied_to else "cores of its own")
                + f", and in a {type(model).__name__} "
                + (f"its weight is that of {tied_to}" if tied_to else "a weight of its own" if owner else "no matrix"),
                hint="config.json was edited, or the model class changed",
            )
    owned = [weight.entry for weight in weights if weight.entry]
    check_networks({entry.name: entry.spec for entry in owned if entry.spec.experts})


def _why_not_stored(parameter: str, keys: FileKeys) -> str:
    """The obstacle of a parameter that the files do not hold as it is."""
    if parameter in keys.together:
        return "the files hold it in one tensor with others, which loading splits"
    sources = keys.converted.get(parameter, ())
    if len(sources) > 1:
        return "the files hold it in several tensors, which loading puts together"
    if sources:
        return "the files hold it in another form, which loading converts"
    return "the checkpoint does not store it (a new head, say)"


def _dense_size(
    model: PreTrainedModel, keys: FileKeys, groups: list[list[str]], apart: set[str], reader: CheckpointReader
) -> tuple[int, int]:
    """(parameters, bytes in the stored dtypes) of the dense model, every tensor once."""
    followers = {name for group in groups for name in group[1:]}
    owner_of = dict(getattr(model, "all_tied_weights_keys", None) or {})
    params = size = 0
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        one_way = parameter.dim() == 1 and name in owner_of
        if name not in apart and (name in followers or one_way or id(parameter) in seen):
            continue
        seen.add(id(parameter))
        params += parameter.numel()
        size += parameter.numel() * _stored_dtype(name, keys, reader).itemsize
    return params, size
