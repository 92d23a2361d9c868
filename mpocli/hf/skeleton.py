"""A model without weights: its modules and shapes on the meta device, and where each weight stands in the files."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpocli.errors import InputError
from mpocli.hf.config import class_name
from mpocli.hf.foreign import foreign
from mpocli.io.schema import QUANT_METHOD

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from mpocli.io.checkpoint import CheckpointReader


# The largest mixtures of experts have 200,000; each takes a tenth of a millisecond.
MOST_PARAMETERS = 1_000_000


def build_skeleton(
    config: PretrainedConfig, *, trust_remote_code: bool = False, most_parameters: int = MOST_PARAMETERS
) -> PreTrainedModel:
    """The dense model that `config` describes, on the meta device: every shape and no data.

    The class is the one the checkpoint was saved from (`architectures`), so that its heads are seen too. Raises
    `InputError` where there is no such class, and for a model of more than `most_parameters` tensors.
    """
    import torch
    import transformers

    config = copy.deepcopy(config)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        if method != QUANT_METHOD:
            raise InputError(
                f"the model is already quantised with {method!r}, and transformers allows one method per model",
                hint="start from the unquantised checkpoint",
            )
        del config.quantization_config
    name = class_name(config)
    cls: Any = getattr(transformers, name, None) if name else None
    problem = f"no model can be built for architecture {name or None!r} (model_type {config.model_type!r})"
    hint = "pass ‹trust_remote_code› if the model brings its own code, or update transformers"
    with foreign(problem, hint=hint), _bounded(most_parameters), torch.device("meta"):
        if cls is not None:
            return cls._from_config(config)
        auto = transformers.AutoModel
        for head, auto_class in _AUTO_CLASSES.items():
            if name.endswith(head):
                auto = getattr(transformers, auto_class)
        return auto.from_config(config, trust_remote_code=trust_remote_code)


@contextmanager
def _bounded(most: int) -> Iterator[None]:
    """`InputError` as soon as a model that is being built has more parameters than that."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    made = 0

    def count(module: Any, name: str, parameter: Any) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise InputError(
                f"config.json describes a model of more than {most:,} parameter tensors, many more than the files hold",
                hint="correct its numbers of layers and experts",
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


# For architectures that bring their own code: the auto class by the ending of the class name.
_AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
}


@dataclass(frozen=True)
class FileKeys:
    """Where a model's tensors stand in the files.

    `stored`: parameter or buffer name → key, for every tensor that is only renamed on loading. `converted`:
    parameter name → the keys that loading makes it of (fused experts, say). `together`: the parameters that loading
    splits off a tensor which holds others too.
    """

    stored: dict[str, str]
    converted: dict[str, tuple[str, ...]]
    together: frozenset[str]


def file_keys(model: PreTrainedModel, reader: CheckpointReader) -> FileKeys:
    """Match the keys of the files with the model's tensors.

    transformers' own rules do the renaming (base-model prefixes, old names), so that both agree.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    targets = {pattern: t.target_patterns for t in converters for pattern in t.source_patterns}
    # tied names are absent from some state dicts' files but valid targets
    state = model.state_dict()
    stored: dict[str, str] = {}
    converted: dict[str, tuple[str, ...]] = {}
    together: set[str] = set()
    for key in reader:
        renamed, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if renamed not in state:
            continue
        if converter is None:
            stored[renamed] = key
            continue
        # The name is that of the first of the tensors that the rule makes.
        first, *others = targets[converter]
        for name in (renamed, *(renamed.replace(first, other) for other in others)):
            if name in state:
                converted[name] = (*converted.get(name, ()), key)
                if others:
                    together.add(name)
    return FileKeys(stored, converted, frozenset(together))
