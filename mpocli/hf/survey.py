"""Survey a checkpoint's weight matrices: what the model's class says of the tensors in the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpocli.errors import InputError
from mpocli.hf.against_manifest import check_entries, entries_by_name
from mpocli.hf.dense_size import dense_size, dtype_of
from mpocli.hf.matrices import Member, checked
from mpocli.hf.module_kinds import FUSED, direct_readers, kind_of, token_tables_of
from mpocli.hf.replace import embedding_scale
from mpocli.hf.roles import role_of
from mpocli.hf.skeleton import FileKeys, build_skeleton, file_keys
from mpocli.hf.ties import stored_apart, tied_groups
from mpocli.hf.weight import Weight

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from mpocli.io.checkpoint import CheckpointReader
    from mpocli.io.manifest import Manifest


@dataclass(frozen=True)
class Survey:
    """All weight matrices of a checkpoint, and the size of the whole dense model.

    `dense_params` counts every parameter once, tied ones too; `dense_bytes` the same in the stored dtypes.
    `other_keys` are the tensors in the files that are no parameters of the model: buffers, and what the class
    ignores. `token_rows` are the rows of the table that input ids are looked up in; `target_rows` the lesser number of
    what a decoder reads and what a head over the vocabulary writes; None for a model without such a table. `reads` is
    the model's main input.
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


# So many parameter tensors are built to be compared with the files, whatever the files hold.
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
    entries = entries_by_name(manifest, model)
    apart = stored_apart(model, keys.stored, reader, entries)
    groups = tied_groups(model, apart)
    modules = dict(model.named_modules(remove_duplicate=False))
    token_tables = token_tables_of(model)
    readers = direct_readers(model, token_tables)

    weights = []
    for parameters in groups:
        members, obstacle = _members(parameters, modules, readers)
        if not members[0].kind and not obstacle:
            continue
        # A token table is one wherever it is tied to.
        roles = {role_of(member.name, is_embedding=member.name in token_tables) for member in members}
        present = [keys.stored[parameter] for parameter in parameters if parameter in keys.stored]
        key = present[0] if present else None
        names = [keys.stored.get(parameter, parameter) for parameter in parameters]
        followers = tuple(name for name in names if name != key)
        entry = next((entries[m.name] for m in members if m.name in entries and not entries[m.name].spec.tied_to), None)
        sources = (key,) if key else keys.converted.get(parameters[0], ())
        weight = Weight(
            members,
            frozenset(role for role in roles if role),
            _shape(model.get_parameter(parameters[0]), members[0], obstacle),
            key,
            dtype_of(sources, reader),
            obstacle,
            entry,
            followers,
            sources,
        )
        weights.append(checked(weight, reader, _why_not_stored(parameters[0], keys)))
    check_entries(model, weights, entries)
    return Survey(
        tuple(weights),
        *dense_size(model, keys, groups, apart, reader),
        other_keys=_other_keys(model, keys, weights, reader),
        token_rows=_rows(model, "get_input_embeddings"),
        target_rows=_target_rows(model),
        reads=str(model.main_input_name),
    )


def _members(
    parameters: Sequence[str], modules: Mapping[str, nn.Module], readers: Mapping[str, str]
) -> tuple[tuple[Member, ...], str]:
    """The modules of parameters that are tied to one another, and why their matrix stays what it is, if it does."""
    members, obstacle = [], ""
    for parameter in parameters:
        name, _, leaf = parameter.rpartition(".")
        kind, why_not = kind_of(modules[name], leaf)
        if why_not == FUSED:
            name = parameter  # one module holds several
        obstacle = obstacle or why_not or (readers.get(name, "") if kind else "")
        members.append(Member(name, kind, embedding_scale(modules.get(name))))
    return tuple(members), obstacle


def _shape(parameter: nn.Parameter, member: Member, obstacle: str) -> tuple[int, int]:
    """That of the matrix (O, I) that a parameter is, of fused experts with one below the other."""
    shape = tuple(parameter.shape)
    if obstacle == FUSED:
        return shape[0] * shape[1], shape[2]
    return (shape[1], shape[0]) if member.kind == "conv1d" else (shape[0], shape[1])


def _other_keys(
    model: PreTrainedModel, keys: FileKeys, weights: Sequence[Weight], reader: CheckpointReader
) -> frozenset[str]:
    """The tensors in the files that are no parameters."""
    parameter_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {key for name, key in keys.stored.items() if name not in parameter_names}
    known = {*keys.stored.values(), *(key for sources in keys.converted.values() for key in sources)}
    mpos = [weight for weight in weights if weight.entry]
    cores = {weight.key_of(part) for weight in mpos if weight.entry for part in weight.entry.spec.stored_shapes()}
    ignored = {key for key in reader if key not in known and key not in cores}
    return frozenset((buffers | ignored) - cores - {weight.key for weight in mpos})


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
    """Ids below this can be predicted, and read by a decoder; None for a model without a vocabulary."""
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
