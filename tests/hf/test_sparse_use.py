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
from mpocli.methods.sparsify import run as sparsify
from mpocli.methods.training.student import load_student


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


class Mixing(torch.optim.Optimizer):
    """Moves every entry by a mixture of all gradients, as Muon and Shampoo do, and adds noise."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * (parameter.grad.mean() + torch.randn_like(parameter)))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "mixing": lambda p: Mixing(p, {"lr": 1e-3}),
}


def loops(model: tf.PreTrainedModel, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    """Training as anyone writes it."""
    model.train()
    batch = torch.utils.data.default_collate([Sentences()[k] for k in range(8)])
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def assert_trained_around_zeros(model: tf.PreTrainedModel, made: SimpleNamespace) -> None:
    """Every zero of the checkpoint is one, bit by bit, and all other entries of its sparse tensors have moved."""
    before = made.cls.from_pretrained(made.sparse)
    names = [tensor.removesuffix("_bitmask") for tensor in stored(made.sparse) if tensor.endswith("_bitmask")]
    assert len(names) == 12
    for name in names:
        old, new = before.get_parameter(name).detach(), model.get_parameter(name).detach()
        assert not bits(new)[old == 0].any(), name
        assert (new != old.to(new))[old != 0].any(), name


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("how", ["loaded", "copied", "converted", "frozen first", "its body"])
def test_a_plain_loop_of_any_optimiser_keeps_zeros(
    kind: str, how: str, case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    made = case()
    model = made.cls.from_pretrained(made.sparse)
    if how == "copied":
        loops(model, OPTIMIZERS["adamw"](model.parameters()), steps=1)
        model = copy.deepcopy(model)
    elif how == "converted":
        model = model.to(torch.float64)
    elif how == "frozen first":
        model.requires_grad_(False)
        model = copy.deepcopy(model).requires_grad_(True)
    elif how == "its body":  # called past the model around it
        optimizer = OPTIMIZERS[kind](model.parameters())
        model.base_model(Sentences()[0]["input_ids"][None]).last_hidden_state.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    loops(model, OPTIMIZERS[kind](model.parameters()))
    assert_trained_around_zeros(model, made)
    if how == "loaded":
        model.save_pretrained(tmp_path / "trained")
        assert weights_size(tmp_path / "trained") < 1.02 * weights_size(made.sparse)
        assert_same(made.cls.from_pretrained(tmp_path / "trained"), model)


def test_released_zeros_are_filled_and_saved_as_an_ordinary_model(
    case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    made = case()
    model = made.cls.from_pretrained(made.sparse)
    loops(model, OPTIMIZERS["adamw"](model.parameters()), steps=1)
    mpocli.release_zeros(model)
    loops(model, OPTIMIZERS["adamw"](model.parameters()))
    assert (model.get_parameter(NAME) == 0).float().mean() < 0.01
    model.save_pretrained(tmp_path / "full")
    assert not any(name.endswith("_bitmask") for name in stored(tmp_path / "full"))
    assert_same(made.cls.from_pretrained(tmp_path / "full"), model)


def test_the_zeros_of_another_state_are_kept_after_it_was_loaded(case: Callable[..., SimpleNamespace]) -> None:
    made = case()
    model = made.cls.from_pretrained(made.sparse)
    loops(model, OPTIMIZERS["mixing"](model.parameters()), steps=1)
    other = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other[NAME] = other[NAME].flip(0)
    model.load_state_dict(other)
    loops(model, OPTIMIZERS["mixing"](model.parameters()))
    assert torch.equal(model.get_parameter(NAME) == 0, other[NAME] == 0)


def test_what_was_merged_into_a_sparse_matrix_is_stored_as_an_ordinary_one(
    case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    made = case()
    model = made.cls.from_pretrained(made.sparse)
    with torch.no_grad():
        model.get_parameter(NAME).add_(torch.rand_like(model.get_parameter(NAME)) + 9.0)
    model.save_pretrained(tmp_path / "merged")
    assert NAME in stored(tmp_path / "merged") and f"{NAME}_bitmask" not in stored(tmp_path / "merged")
    assert_same(made.cls.from_pretrained(tmp_path / "merged"), model)


def test_a_held_model_compiles_as_one_graph_and_its_gradients_are_masked(case: Callable[..., SimpleNamespace]) -> None:
    made = case()
    model = made.cls.from_pretrained(made.sparse)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = Sentences()[0]["input_ids"][None]
    compiled(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    parameter = model.get_parameter(NAME)
    assert not parameter.grad[parameter == 0].any() and parameter.grad.any()


def test_load_student_keeps_zeros_under_decay_and_moves_everything_else(case: Callable[..., SimpleNamespace]) -> None:
    made = case()
    task = SimpleNamespace(name="any", kind="classification")
    data = SimpleNamespace(task=task, family="encoder", label_names=("a", "b", "c"), train=None, pad=0)
    data.vocabulary = SimpleNamespace(knows=lambda token: token is not None, pad=0)
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
