"""What users do with sparse models: change, copy, train, resume, save."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from families import VOCABULARY, make
from safetensors.torch import load_file
from sparse_checkpoints import BRAIN, NAME, WEIGHTS, assert_same, bits, pruning, stored, weights_size
from torch import Tensor

import mpocli
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.sparse import keep_zeros
from mpocli.methods import sparsify
from mpocli.methods.student import load_student


def test_a_resized_vocabulary_and_removed_layers_are_saved_as_they_are(tmp_path: Path) -> None:
    make("llama", tmp_path / "dense")
    sparsify.run(str(tmp_path / "dense"), pruning(layers=("embedding", "head", "ffn")), tmp_path / "sparse")
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "sparse")
    model.resize_token_embeddings(VOCABULARY + 9, mean_resizing=False)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path / "changed")
    assert_same(tf.LlamaForCausalLM.from_pretrained(tmp_path / "changed"), model)
    kept = Checkpoint.open(str(tmp_path / "changed"))
    assert kept.totals().params == model.num_parameters()
    assert sorted(kept.encodings) == sorted(
        ["lm_head.weight", "model.embed_tokens.weight"]
        + [f"model.layers.0.mlp.{name}_proj.weight" for name in ("down", "gate", "up")]
    )


def test_dequantize_makes_an_ordinary_model_of_it(case: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    made = case("bert-masked-lm", BRAIN)
    model = made.cls.from_pretrained(made.sparse)
    model.dequantize()
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert_same(load_file(tmp_path / "plain" / WEIGHTS), load_file(made.oracle / WEIGHTS))


def test_a_deep_copy_is_a_model_of_its_own_that_saves_itself(
    case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    made = case()
    model = made.cls.from_pretrained(made.sparse)
    clone = copy.deepcopy(model)
    assert_same(clone, model)
    with torch.no_grad():
        clone.get_parameter(NAME).mul_(2)
    clone.save_pretrained(tmp_path / "clone")
    assert_same(made.cls.from_pretrained(tmp_path / "clone"), clone)
    assert_same(model, made.cls.from_pretrained(made.oracle))


class Sentences(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(3, VOCABULARY, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 3}


def test_trainer_trains_saves_small_resumes_and_goes_back_to_the_best(
    case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    made = case()
    arguments = tf.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        learning_rate=1e-3,
        weight_decay=0.1,
        disable_tqdm=True,
    )

    def trained(**resume: Any) -> Any:
        model = made.cls.from_pretrained(made.sparse)
        assert keep_zeros(model) == 12
        trainer = tf.Trainer(model=model, args=arguments, train_dataset=Sentences(), eval_dataset=Sentences())
        trainer.train(**resume)
        return trainer

    trainer = trained()
    last = made.cls.from_pretrained(tmp_path / "run" / "checkpoint-2")
    best = made.cls.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same(trainer.model, best)
    before = made.cls.from_pretrained(made.sparse).get_parameter(NAME)
    assert torch.equal(last.get_parameter(NAME) == 0, before == 0) and not torch.equal(last.get_parameter(NAME), before)
    assert weights_size(tmp_path / "run" / "checkpoint-2") < 1.02 * weights_size(made.sparse)
    trained(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    again = made.cls.from_pretrained(tmp_path / "run" / "checkpoint-2")
    for (name, a), (_, b) in zip(last.named_parameters(), again.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name
    assert torch.equal(again.get_parameter(NAME) == 0, before == 0)


def test_load_student_keeps_zeros_under_decay_and_moves_everything_else(case: Callable[..., SimpleNamespace]) -> None:
    made = case()
    task = SimpleNamespace(name="any", kind="classification")
    data = SimpleNamespace(task=task, family="encoder", label_names=("a", "b", "c"), train=None, pad=0)
    model = load_student(Checkpoint.open(str(made.sparse)), data, trust_remote_code=False).train()  # type: ignore[arg-type]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    batch = torch.utils.data.default_collate([Sentences()[k] for k in range(8)])
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    sparse = {tensor.removesuffix("_bitmask") for tensor in stored(made.sparse) if tensor.endswith("_bitmask")}
    assert len(sparse) == 12
    for name in sparse:
        after, zero = model.get_parameter(name).detach(), before[name] == 0
        assert int(zero.sum()) == math.floor(zero.numel() * 0.8)
        assert not bits(after)[zero].any(), name
        assert not (after == before[name])[~zero].any(), name
    # A dense matrix has no mask.
    name = "bert.pooler.dense.weight"
    assert not torch.equal(model.get_parameter(name), before[name]) and not (model.get_parameter(name) == 0).any()


def test_sparse_tensors_cannot_be_offloaded_to_disk(case: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    made = case()
    places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    with pytest.raises(mpocli.InputError, match=r"sent to disk.*cannot be offloaded"):
        made.cls.from_pretrained(made.sparse, device_map=places, offload_folder=str(tmp_path / "offload"))
