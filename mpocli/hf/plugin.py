"""The loader that `import mpocli` registers with transformers: `from_pretrained` and `save_pretrained` of its files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mpocli.config.routing import RoutingConfig
from mpocli.errors import InputError
from mpocli.hf.encoded import (
    encodings_of,
    packed_state,
    postpone_ties,
    reserve,
    stored_encodings,
    unchanged_parts,
    unpack,
    with_saved_keys,
)
from mpocli.hf.memory import forget_parts, make_dense
from mpocli.hf.overrides import initialised, override, restore
from mpocli.hf.renaming import keep_parts_together, loading_parts
from mpocli.hf.replace import install, local_name, remove
from mpocli.hf.routing import connect
from mpocli.hf.sparse import keep_zeros, sparse_parameters
from mpocli.io.encodings.known import encodings_from
from mpocli.io.read_manifest import specs_from_config
from mpocli.io.readable import why_unreadable
from mpocli.io.schema import QUANT_METHOD, SCHEMA_VERSION
from mpocli.io.signpost import SIGNPOST, check_seal, signpost
from mpocli.nn import TOMBSTONE, DenseExperts, MPOModule, Router
from mpocli.nn.held_zeros import release_zeros_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Patterns(set[str]):
    """Patterns of keys to ignore: transformers 5.0 adds lists to them, later releases unite them with sets."""

    def __add__(self, other: Iterable[str]) -> list[str]:
        return [*self, *other]


@register_quantization_config(QUANT_METHOD)
class MPOConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a checkpoint: the structure of every decomposed module, and of every encoded tensor."""

    def __init__(
        self,
        modules: dict[str, Any] | None = None,
        schema_version: int = SCHEMA_VERSION,
        encodings: dict[str, Any] | None = None,
        routing: dict[str, Any] | None = None,
        **_unused: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.schema_version = schema_version
        self.modules = modules or {}
        self.encodings = encodings or {}
        self.routing = routing or {}

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = super().to_dict()
        for name in ("encodings", "routing"):
            if not data[name]:
                del data[name]
        return data


@register_quantizer(QUANT_METHOD)
class MPOQuantizer(HfQuantizer):  # type: ignore[misc]
    """transformers' plug-in point for storage formats; MPOs go through it although nothing is quantised."""

    # `from_pretrained(dense_dir, quantization_config=MPOConfig())` cannot mean anything: let it be an error.
    requires_calibration = True

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Without this HF's Trainer refuses to train the cores of a "purely quantised" model."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None, checkpoint_files: Any = None, **_: Any
    ) -> None:
        config = self.quantization_config
        specs = specs_from_config({"schema_version": config.schema_version, "modules": config.modules})
        self.sealed = config.to_dict(), _stored_seal(checkpoint_files)
        self.stored = stored = _stored_shapes(checkpoint_files)
        _check_no_extra_cores(model, specs, stored)
        # A dense weight of its own, which is more than a tombstone.
        own = {key.removesuffix(f".{TOMBSTONE}") for key, shape in stored.items() if shape != [1]}

        def has_own(name: str) -> bool:
            return bool(own & _spellings(model, name))

        specs = install(model, specs, dtype, has_own=has_own)
        if config.routing:
            connect(model, specs, RoutingConfig.from_dict(config.routing))
        # A head that this class lacks must not be promised by what it saves.
        config.modules = {name: spec.to_dict() for name, spec in specs.items()}
        encodings = reserve(model, encodings_from(config.encodings), stored)
        config.encodings = {name: encoding.to_dict() for name, encoding in encodings.items()}
        self.followers = postpone_ties(model, encodings, has_own)
        override(model, {name: encoding.shape for name, encoding in encodings.items()})
        # Tombstones of tied heads need not be stored; the signpost is never loaded.
        missing = [rf"^{re.escape(name)}\.{TOMBSTONE}$" for name, spec in specs.items() if spec.tied_to]
        missing += [rf"^{re.escape(name)}$" for name in self.followers]
        unexpected = [rf"{re.escape(SIGNPOST)}$"]
        model._keys_to_ignore_on_load_missing = _Patterns((*(model._keys_to_ignore_on_load_missing or ()), *missing))
        model._keys_to_ignore_on_load_unexpected = _Patterns(
            (*(model._keys_to_ignore_on_load_unexpected or ()), *unexpected)
        )

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        rules: list[Any] = super().update_weight_conversions(weight_conversions, model)
        return [*rules, *loading_parts(model, rules, self.stored)]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        initialised(model)
        encodings = encodings_from(self.quantization_config.encodings)
        unpack(model, encodings, self.followers)
        if any(encoding.holds_zeros for encoding in encodings.values()):
            keep_zeros(model)
        _check_experts(model)
        for name, module in model.named_modules():
            if not isinstance(module, MPOModule):
                continue
            expected = module.core_shapes()
            for k, core in enumerate(module.cores):
                if not _is_loaded(core) or tuple(core.shape) != expected[k]:
                    raise InputError(
                        f"core {name}.core_{k} was not loaded: the files lack it, or hold another shape than "
                        f"{expected[k]}",
                        hint="the weight files are incomplete or belong to another checkpoint",
                    )
            bias = getattr(module, "bias", None)
            if bias is None or _is_loaded(bias):
                continue
            if module.tied_to is None:
                raise InputError(
                    f"{name}.bias was not loaded: the files lack it",
                    hint="the weight files are incomplete or belong to another checkpoint",
                )
            with torch.no_grad():  # of a head that is new, and has another module's cores
                bias.zero_()
        check_seal(type(model).__name__, *self.sealed)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, str]]:
        """The state dict to save: shared cores once, encoded tensors packed, and the signpost."""
        state = dict(model.state_dict())
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, MPOModule) and module.tied_to is not None:
                for k in range(module.sites.sites):
                    state.pop(f"{name}.core_{k}", None)
        encodings = encodings_from(self.quantization_config.encodings)
        unchanged = unchanged_parts(model, state, encodings)
        encodings = stored_encodings(model, state, encodings, unchanged)
        state = packed_state(model, state, encodings, unchanged)
        keep_parts_together(model, state)
        encodings = with_saved_keys(model, state, encodings)
        self.quantization_config.encodings = {name: encoding.to_dict() for name, encoding in encodings.items()}
        if self.quantization_config.encodings or any(
            isinstance(module, MPOModule | DenseExperts) for module in model.modules()
        ):
            state[SIGNPOST] = signpost(self.quantization_config.to_dict())
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for parameter in sparse_parameters(model).values():
            release_zeros_of(parameter)
        rounded = [name for name, found in encodings_of(model).items() if not found.is_exact]
        self.quantization_config.encodings = {}
        make_dense(model)
        forget_parts(model)
        for name in rounded:
            model.get_parameter(name).requires_grad_(True)
        remove(model, dtype)
        restore(model)
        return model


def _is_loaded(parameter: torch.Tensor) -> bool:
    """transformers fills what the files lack with uninitialised memory, and marks what it loaded; what lies on disk is
    a tensor without data."""
    return parameter.device.type == "meta" or getattr(parameter, "_is_hf_initialized", False)


def _check_experts(model: PreTrainedModel) -> None:
    """Routers and dense experts that the files lack would hold uninitialised memory."""
    for name, module in model.named_modules():
        if isinstance(module, Router | DenseExperts):
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.device.type == "meta" or not getattr(parameter, "_is_hf_initialized", False):
                    raise InputError(
                        f"{name}.{leaf} was not loaded: the files lack it",
                        hint="the weight files are incomplete or belong to another checkpoint",
                    )


def _stored_shapes(files: Any) -> dict[str, list[int]]:
    """Shape of every tensor in the safetensors files."""
    shapes: dict[str, list[int]] = {}
    for file in files or ():
        with _opened(file) as handle:
            shapes |= {key: list(handle.get_slice(key).get_shape()) for key in (handle.keys() if handle else ())}
    return shapes


def _stored_seal(files: Any) -> int | None:
    for file in files or ():
        with _opened(file) as handle:
            if handle and SIGNPOST in handle.keys() and handle.get_slice(SIGNPOST).get_dtype() == "I64":
                return int(handle.get_tensor(SIGNPOST))
    return None


@contextmanager
def _opened(file: Any) -> Iterator[Any]:
    """A safetensors file, None for one of another kind; `InputError` where what the block asks of it is unreadable."""
    if not str(file).endswith(".safetensors"):
        yield None
        return
    why = why_unreadable(Path(file))  # a pipe would be waited for
    if why:
        raise InputError(f"{file}: {why}", hint="download or write the file again")
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file}: not a readable safetensors file ({error})",
            hint="the file is truncated or corrupt: download or write it again",
        ) from error


def _check_no_extra_cores(model: PreTrainedModel, specs: dict[str, Any], stored: Iterable[str]) -> None:
    """A core that nobody asked for means files and config of different checkpoints; transformers only warns."""
    by_place = {local_name(model, name) or name: spec for name, spec in specs.items()}
    for key in stored:
        match = re.fullmatch(r"(.+)\.core_(\d+)", key)
        names = _spellings(model, match[1]) if match else set()
        spec = next((by_place[name] for name in names if name in by_place), None)
        if match and spec is not None and int(match[2]) >= spec.sites.sites:
            raise InputError(
                f"core {key} is in the files, config.json has {spec.sites.sites} cores there",
                hint="the weight files belong to another checkpoint",
            )


def _spellings(model: PreTrainedModel, name: str) -> set[str]:
    """A module's name with and without the base model's prefix."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return {name, prefix + name, name.removeprefix(prefix)}
