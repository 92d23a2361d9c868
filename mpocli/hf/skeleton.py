"""A model without weights: its modules and shapes on the meta device, and where each weight stands in the files."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpocli.errors import InputError
from mpocli.io.manifest import QUANT_METHOD

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from mpocli.io.checkpoint import CheckpointReader


def load_config(directory: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """transformers' configuration of a model directory; `InputError` where it has none that can be used."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers' own code on a user's file: anything can come out of it
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "pass --trust-remote-code if you trust its code" if "trust_remote_code" in str(error) else ""
        raise InputError(
            f"{directory}: its config.json is not one that this transformers can use ({first_line})",
            hint=hint or "check `model_type`, or update transformers",
        ) from error


def build_skeleton(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The dense model that `config` describes, on the meta device: every shape and no data.

    The class is the one the checkpoint was saved from (`architectures`), so that its heads are seen too.
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
    names = getattr(config, "architectures", None) or [None]
    name = names[0]
    if not isinstance(name, str | None):
        raise InputError(f"config.json: architecture {name!r} is no class name", hint="restore config.json")
    cls: Any = getattr(transformers, name, None) if name else None
    try:
        with torch.device("meta"):
            if cls is not None:
                return cls._from_config(config)
            auto = transformers.AutoModel
            for head, auto_class in _AUTO_CLASSES.items():
                if name and name.endswith(head):
                    auto = getattr(transformers, auto_class)
            return auto.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a model's own code on a user's configuration: anything can come out of it
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"no model can be built for architecture {name!r} (model_type {config.model_type!r}): {first_line}",
            hint="pass --trust-remote-code if the model brings its own code, or update transformers",
        ) from error


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
    parameter name → the keys that loading makes it of (fused experts, say).
    """

    stored: dict[str, str]
    converted: dict[str, tuple[str, ...]]


def file_keys(model: PreTrainedModel, reader: CheckpointReader) -> FileKeys:
    """Match the keys of the files with the model's tensors.

    transformers' own rules do the renaming (base-model prefixes, old names), so that both agree.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    # tied names are absent from some state dicts' files but valid targets
    state = model.state_dict()
    stored: dict[str, str] = {}
    converted: dict[str, tuple[str, ...]] = {}
    for key in reader:
        renamed, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if renamed not in state:
            continue
        if converter is None:
            stored[renamed] = key
        else:
            converted[renamed] = (*converted.get(renamed, ()), key)
    return FileKeys(stored, converted)
