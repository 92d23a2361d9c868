"""Load the model class that a task needs from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mpocli.config.tasks import Task
from mpocli.errors import InputError
from mpocli.hf.config import class_name
from mpocli.hf.loading import load

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Family = Literal["encoder", "causal", "masked", "seq2seq"]


def family_of(task: Task, config: PretrainedConfig) -> Family:
    """How a model of this configuration does the task: as classifier (`encoder`), or by one kind of language model.

    The architecture that was saved decides; a bare body counts as what its type is mostly used for. Raises
    `InputError` for a task that the model cannot do.
    """
    if task.kind in ("classification", "regression"):
        return "encoder"
    from transformers.models.auto import modeling_auto as auto

    name = class_name(config)
    kind = config.model_type
    if config.is_encoder_decoder:
        family: Family = "seq2seq"
    elif name.endswith(("ForMaskedLM", "ForPreTraining")):
        family = "masked"
    elif name.endswith(("ForCausalLM", "LMHeadModel")):
        family = "causal"
    elif kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        family = "masked"
    elif kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        family = "causal"
    else:
        raise InputError(f"‹task› {task.name}: a {kind} model is no language model", hint="choose another ‹task›")
    if task.kind == "lm" and family == "seq2seq":
        raise InputError(
            f"‹task› lm: a {kind} model is an encoder-decoder, and lm needs a causal or a masked one",
            hint="use ‹task› text2text",
        )
    if task.kind == "text2text" and family == "masked":
        raise InputError(f"‹task› {task.name}: a {kind} encoder cannot write text", hint="name a causal or seq2seq one")
    return family


def load_model(
    directory: Path,
    config: PretrainedConfig,
    task: Task,
    family: Family,
    label_names: tuple[str, ...],
    *,
    trust_remote_code: bool = False,
    on_new: Callable[[list[str]], None] | None = None,
) -> PreTrainedModel:
    """The model in float32. What the checkpoint lacks of it (a head) is drawn from torch's generator, if `on_new` is
    there to be told the names.

    A head of another kind of task that has the same name and another shape makes way for a new one. Raises `InputError`
    where the checkpoint has a classification head for another number of classes, and without `on_new` for one that
    lacks something: what was never trained can only guess.
    """
    import transformers as tf

    auto: Any = {
        "encoder": tf.AutoModelForSequenceClassification,
        "causal": tf.AutoModelForCausalLM,
        "masked": tf.AutoModelForMaskedLM,
        "seq2seq": tf.AutoModelForSeq2SeqLM,
    }[family]
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    if family == "encoder":
        count = 1 if task.kind == "regression" else len(label_names)
        _check_head(config, task, count)
        options["num_labels"] = count
        options["problem_type"] = "regression" if task.kind == "regression" else "single_label_classification"
        if label_names:
            options["id2label"] = dict(enumerate(label_names))
            options["label2id"] = {name: index for index, name in enumerate(label_names)}
    hint = "choose a ‹task› that the model can do"
    # The head of another task may have this one's name: it makes way, and nothing else does.
    makes_way = family == "encoder" and not class_name(config).endswith(_CLASSIFIER)
    options |= {"output_loading_info": True, **({"ignore_mismatched_sizes": True} if makes_way else {})}
    model, found = load(auto, directory, hint=hint, **options)
    for name, stored, expected in sorted(found["mismatched_keys"], key=str):
        if name.startswith(f"{model.base_model_prefix}."):
            raise InputError(
                f"{directory}: tensor {name} is {_by(stored)}, config.json implies {_by(expected)}",
                hint="config.json and the weights belong to different models",
            )
    learnt = dict(model.named_parameters(remove_duplicate=False))
    without = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    new = sorted(name for name in without if name in learnt)
    if new and on_new is None:
        raise InputError(
            f"{directory}: has no {listed(new)}, which task {task.name} needs", hint="run mpocli finetune first"
        )
    if new and on_new is not None:
        on_new(new)
    made: PreTrainedModel = model
    return made


def listed(names: Sequence[str]) -> str:
    """The first names on one line, and how many more there are.

    >>> listed(["a", "b", "c", "d"])
    'a, b and 2 more'
    """
    return ", ".join(names) if len(names) < 4 else f"{', '.join(names[:2])} and {len(names) - 2} more"


_CLASSIFIER = "ForSequenceClassification"


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _check_head(config: PretrainedConfig, task: Task, count: int) -> None:
    if class_name(config).endswith(_CLASSIFIER) and config.num_labels != count:
        raise InputError(
            f"the checkpoint's head has {config.num_labels} classes, task {task.name} has {count}",
            hint="start from the body, or from a checkpoint of the same task",
        )


def vocabulary_of(config: PretrainedConfig) -> int:
    """How many tokens a model tells apart; 1 where its configuration says nothing of a vocabulary."""
    return int(getattr(config.get_text_config(), "vocab_size", None) or 1)
