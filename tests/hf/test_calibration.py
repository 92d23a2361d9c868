"""Calibration against inputs that a plain hook captured, and the order in which blocks are seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from families import FAMILIES, VOCABULARY
from models import BERT, GPT2, prepared
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mpocli.errors import InputError, NumericsError
from mpocli.hf.activations import Inputs
from mpocli.hf.calibration import blocks, sequential
from mpocli.mpo.mpo import MPO
from mpocli.mpo.shape import SiteShape
from mpocli.nn import MPOLinear

Batch = dict[str, Tensor]
LENGTHS = (9, 6, 7, 3)
TARGETS = (4, 8, 2, 8)


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], tf.PreTrainedModel]:
    return lambda family: prepared(FAMILIES[family], tmp_path, torch.float32)


def padded(lengths: tuple[int, ...], seed: int, side: str = "right") -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return (ids, mask) if side == "right" else (ids, mask.flip(1))


def batches_for(model: tf.PreTrainedModel, side: str = "right") -> list[Batch]:
    """Three batches with padding; source and target of an encoder-decoder model have different lengths."""
    made: list[Batch] = []
    for seed, lengths in enumerate([LENGTHS, (5, 5, 2, 5), (1, 1, 1, 1)]):
        ids, mask = padded(lengths, seed, side)
        batch = {"input_ids": ids, "attention_mask": mask}
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"], batch["decoder_attention_mask"] = padded(TARGETS, seed + 10)
        made.append(batch)
    return made


def matrices(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D, MPOLinear))]


@torch.no_grad()
def captured(model: tf.PreTrainedModel, batch: Batch, names: list[str]) -> dict[str, list[Tensor]]:
    """What each module was called with in one plain forward pass, padding and all."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0].detach().clone())
        )
        for name in names
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def expected_gram(
    model: tf.PreTrainedModel, batches: list[Batch], name: str, mask_of: Callable[[Batch, Tensor], Tensor | None]
) -> tuple[np.ndarray, int]:
    rows = []
    for batch in batches:
        for x in captured(model, batch, [name]).get(name, []):
            mask = mask_of(batch, x)
            flat = x.double().numpy().reshape(-1, x.shape[-1])
            rows.append(flat if mask is None else flat[mask.numpy().reshape(-1) == 1])
    x = np.concatenate(rows)
    return x.T @ x, len(x)


def unchanged(model: tf.PreTrainedModel, batches: list[Batch], names: list[str]) -> dict[str, Inputs]:
    found: dict[str, Inputs] = {}
    sequential(model, batches, names, lambda name, module, inputs: found.update({name: inputs}), gram=True)
    return found


def assert_same(inputs: Inputs, gram: np.ndarray, tokens: int) -> None:
    assert inputs.tokens == tokens and inputs.gram is not None
    bound = 1e-5 * np.abs(gram).max()
    np.testing.assert_allclose(inputs.gram.numpy(), gram, rtol=0, atol=bound)
    np.testing.assert_allclose(inputs.squared_norms.numpy(), np.diag(gram), rtol=0, atol=bound)


# --- sums ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["bert", "distilbert-masked-lm", "gpt2", "opt", "llama", "qwen2", "gpt-neox"])
def test_gram_is_that_of_the_inputs_without_padding(
    family: str, side: str, make: Callable[[str], tf.PreTrainedModel]
) -> None:
    model = make(family)
    batches, names = batches_for(model, side), matrices(model)
    found = unchanged(model, batches, names)
    assert sorted(found) == sorted(names)
    for name in names:
        pooled = "pooler" in name
        gram, tokens = expected_gram(
            model, batches, name, lambda batch, x, p=pooled: None if p else batch["attention_mask"]
        )
        assert tokens == (12 if pooled else sum(LENGTHS) + 17 + 4)
        assert_same(found[name], gram, tokens)


@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize("family", ["t5", "bart", "t5-gated-untied"])
def test_cross_attention_counts_the_source_and_the_decoder_the_target(
    family: str, same_length: bool, make: Callable[[str], tf.PreTrainedModel]
) -> None:
    """Of one length, the two masks cannot be told apart by their shapes."""
    model = make(family)
    batches, names = batches_for(model)[:1], matrices(model)
    if same_length:
        batches[0]["decoder_input_ids"], batches[0]["decoder_attention_mask"] = padded((4, 9, 2, 9), 20)
    targets = 24 if same_length else sum(TARGETS)
    found = unchanged(model, batches, names)
    sides = set()
    for name in names:
        cross = any(
            part in name for part in ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k", "encoder_attn.v")
        )
        source = cross or ".encoder." in f".{name}"
        mask = "attention_mask" if source else "decoder_attention_mask"
        gram, tokens = expected_gram(model, batches, name, lambda batch, x, m=mask: batch[m])
        assert tokens == (sum(LENGTHS) if source else targets), name
        assert_same(found[name], gram, tokens)
        sides.add((cross, source))
    assert sides == {(True, True), (False, True), (False, False)}


def test_without_a_mask_labels_or_ids_say_where_the_decoder_stands_at_a_token(
    make: Callable[[str], tf.PreTrainedModel],
) -> None:
    model = make("t5")
    batch = batches_for(model)[0]
    ids, mask = batch.pop("decoder_input_ids"), batch.pop("decoder_attention_mask")
    name = "decoder.block.1.layer.2.DenseReluDense.wo"
    labelled = {**batch, "labels": ids.masked_fill(mask == 0, -100)}
    assert_same(unchanged(model, [labelled], [name])[name], *expected_gram(model, [labelled], name, lambda b, x: mask))
    bare = {**batch, "decoder_input_ids": ids.masked_fill(mask == 0, model.config.pad_token_id)}
    assert_same(unchanged(model, [bare], [name])[name], *expected_gram(model, [bare], name, lambda b, x: mask))


def test_without_an_attention_mask_every_token_counts(make: Callable[[str], tf.PreTrainedModel]) -> None:
    model = make("gpt2")
    batch = {"input_ids": batches_for(model)[0]["input_ids"]}
    assert unchanged(model, [batch], ["transformer.h.1.mlp.c_fc"])["transformer.h.1.mlp.c_fc"].tokens == 36


def test_a_module_that_is_called_several_times_counts_all_its_calls(make: Callable[[str], tf.PreTrainedModel]) -> None:
    model = make("albert")  # two layers, one set of weights
    batches, names = batches_for(model), matrices(model)
    found = unchanged(model, batches, names)
    inner = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output"
    assert len(captured(model, batches[0], [inner])[inner]) == 2
    for name in names:
        gram, tokens = expected_gram(model, batches, name, lambda batch, x: batch["attention_mask"])
        assert_same(found[name], gram, tokens)
    assert found[inner].tokens == 2 * (sum(LENGTHS) + 17 + 4)


def test_an_expert_counts_the_tokens_that_are_sent_to_it(make: Callable[[str], tf.PreTrainedModel]) -> None:
    model = make("switch")
    one = torch.ones(1, 1, dtype=torch.long)
    # The order is taken from the first batch, whose one token goes to one expert of each layer.
    first = {"input_ids": one, "attention_mask": one, "decoder_input_ids": one, "decoder_attention_mask": one}
    batches = [first, *batches_for(model)]
    experts = [name for name in matrices(model) if ".experts." in name]
    reached = {name for batch in batches for name in captured(model, batch, experts)}
    assert reached > captured(model, first, experts).keys()
    found = unchanged(model, batches, sorted(reached))
    for name in reached:
        gram, tokens = expected_gram(model, batches, name, lambda batch, x: None)
        assert_same(found[name], gram, tokens)


def test_inputs_sum_half_precision_in_float32() -> None:
    x = torch.full((3, 2), 300.0, dtype=torch.float16)  # its square overflows
    inputs = Inputs(2, gram=True)
    inputs.add(x)
    assert inputs.tokens == 3 and inputs.gram is not None
    assert inputs.squared_norms.tolist() == [270000.0, 270000.0]
    assert inputs.gram.tolist() == [[270000.0, 270000.0], [270000.0, 270000.0]]


def test_norms_do_not_stop_growing_where_float32_would() -> None:
    inputs = Inputs(1)
    inputs.add(torch.tensor([[2.0**13]]))  # 2²⁶: float32 has no place for what follows
    for _ in range(10):
        inputs.add(torch.ones(1, 1))
    assert inputs.squared_norms.item() == 2**26 + 10 and inputs.gram is None


def test_inputs_in_float64_stay_in_it(tmp_path: Path) -> None:
    model = prepared(FAMILIES["bert"], tmp_path, torch.float64)
    batches, name = batches_for(model), "encoder.layer.1.output.dense"
    gram, _ = expected_gram(model, batches, name, lambda batch, x: batch["attention_mask"])
    found = unchanged(model, batches, [name])[name].gram
    assert found is not None and found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), gram, rtol=0, atol=1e-13 * np.abs(gram).max())


# --- blocks -------------------------------------------------------------------------------------------------------


def test_blocks_are_the_layers_in_the_order_of_their_execution(make: Callable[[str], tf.PreTrainedModel]) -> None:
    model = make("bert-classifier")
    names = matrices(model)
    groups = blocks(model, names[::-1], batches_for(model)[0])
    layers = [
        [
            f"bert.encoder.layer.{layer}.{part}"
            for part in (
                *(f"attention.self.{kind}" for kind in ("query", "key", "value")),
                "attention.output.dense",
                "intermediate.dense",
                "output.dense",
            )
        ]
        for layer in range(2)
    ]
    assert groups == [*layers, ["bert.pooler.dense"], ["classifier"]]


def test_the_encoder_comes_before_the_decoder_whatever_the_order_of_the_names(
    make: Callable[[str], tf.PreTrainedModel],
) -> None:
    model = make("t5")
    groups = blocks(model, sorted(matrices(model)), batches_for(model)[0])
    homes = [{".".join(name.split(".")[:3]) for name in group} for group in groups]
    assert homes == [{"encoder.block.0"}, {"encoder.block.1"}, {"decoder.block.0"}, {"decoder.block.1"}, {"lm_head"}]


def test_a_shared_block_is_one_block_between_what_is_outside_of_it(make: Callable[[str], tf.PreTrainedModel]) -> None:
    model = make("albert")
    groups = blocks(model, sorted(matrices(model)), batches_for(model)[0])
    assert [len(group) for group in groups] == [1, 6, 1, 1]
    assert groups[0] == ["albert.encoder.embedding_hidden_mapping_in"]


def test_lists_of_lists_have_their_inner_elements_as_blocks(tmp_path: Path) -> None:
    config = tf.FunnelConfig(
        vocab_size=VOCABULARY, block_sizes=[2, 1], num_decoder_layers=1, d_model=16, n_head=2, d_head=8, d_inner=24
    )
    model = prepared(lambda: tf.FunnelModel(config), tmp_path, torch.float32)
    names = [name for name in matrices(model) if ".ffn." in name]
    batch = {"input_ids": torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))}
    groups = blocks(model, names, batch)
    assert [group[0].rpartition(".ffn.")[0] for group in groups] == [
        "encoder.blocks.0.0",
        "encoder.blocks.0.1",
        "encoder.blocks.1.0",
        "decoder.layers.0",
    ]


# --- sequence -----------------------------------------------------------------------------------------------------


# Read by T5's decoder before it looks at the encoder.
TARGET_ONLY = ("decoder.block.0.layer.0.", "decoder.block.0.layer.1.EncDecAttention.q")


def halve(name: str, module: nn.Module, inputs: Inputs) -> None:
    """Zero the inputs of the smaller norms, in place."""
    small = inputs.squared_norms < inputs.squared_norms.median()
    weight: Any = module.weight
    if isinstance(module, Conv1D):
        weight[small] = 0
    else:
        weight[:, small] = 0


@pytest.mark.parametrize("family", ["bert-classifier", "gpt2", "llama", "t5", "albert"])
def test_every_block_sees_what_became_of_the_blocks_before_it(
    family: str, make: Callable[[str], tf.PreTrainedModel]
) -> None:
    model = make(family)
    batches = batches_for(model)
    names = matrices(model)
    groups = blocks(model, names, batches[0])
    seen: dict[str, Inputs] = {}
    before: dict[str, nn.Module] = {}  # the model as it was when a block's first module was visited

    def visit(name: str, module: nn.Module, inputs: Inputs) -> None:
        assert module is model.get_submodule(name)
        for group in groups:
            if name == group[0]:
                before.update(dict.fromkeys(group, copy.deepcopy(model)))
        seen[name] = inputs
        halve(name, module, inputs)

    sequential(model, batches, names, visit, gram=True)
    assert list(seen) == [name for group in groups for name in group]
    first = unchanged(make(family), batches, names)
    for name in names:
        fresh = unchanged(before[name], batches, [name])[name]
        assert seen[name].tokens == fresh.tokens
        assert torch.equal(seen[name].gram, fresh.gram)
        if name not in groups[0] and not name.startswith(TARGET_ONLY):
            # And that is not what the untouched model would have shown.
            assert not torch.allclose(seen[name].gram, first[name].gram, rtol=1e-3)


def test_mpo_modules_are_seen_as_the_dense_ones_they_stand_for(tmp_path: Path) -> None:
    model = prepared(lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)), tmp_path, torch.float32)
    batches = batches_for(model)
    names = [f"transformer.h.{layer}.mlp.{part}" for layer in range(2) for part in ("c_fc", "c_proj")]
    dense = unchanged(model, batches, names)
    name = names[0]
    weight, bias = model.get_submodule(name).weight.detach(), model.get_submodule(name).bias
    mpo = MPO.from_matrix(weight.T.double(), SiteShape((12, 4, 4), (4, 3, 4)))
    model.set_submodule(name, MPOLinear.from_mpo(mpo, bias, kind="conv1d"))
    found = unchanged(model, batches, names)
    for each in names:
        assert found[each].tokens == dense[each].tokens
        scale = float(dense[each].gram.abs().max())
        torch.testing.assert_close(found[each].gram, dense[each].gram, rtol=0, atol=1e-4 * scale)


def test_a_pass_stops_at_the_end_of_its_block_and_norms_need_no_gram(make: Callable[[str], tf.PreTrainedModel]) -> None:
    model = make("bert")
    calls = {0: 0, 1: 0}
    for layer in calls:
        model.encoder.layer[layer].register_forward_pre_hook(
            lambda module, args, layer=layer: calls.update({layer: calls[layer] + 1})
        )
    batches = batches_for(model)
    done: list[tuple[int, int]] = []
    sums: list[Inputs] = []
    names = [f"encoder.layer.{layer}.output.dense" for layer in calls]
    sequential(
        model,
        batches,
        names,
        lambda name, module, inputs: sums.append(inputs),
        gram=False,
        progress=lambda at, total: done.append((at, total)),
    )
    # One pass to find the order, then the three batches: for both blocks, and for the second only.
    assert calls == {0: 1 + 3 + 3, 1: 1 + 3}
    assert done == [(1, 2), (2, 2)]
    assert [inputs.gram for inputs in sums] == [None, None]


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_hooks_are_put_back_errors_or_not(fails: bool, make: Callable[[str], tf.PreTrainedModel]) -> None:
    model = make("t5").train()
    model.decoder.eval()
    modes = [module.training for module in model.modules()]
    seen: list[tuple[bool, bool]] = []

    def visit(name: str, module: nn.Module, inputs: Inputs) -> None:
        seen.append((module.training, torch.is_grad_enabled()))
        if fails:
            raise RuntimeError("a visit that fails")

    try:
        sequential(model, batches_for(model), matrices(model), visit, gram=False)
    except RuntimeError:
        assert fails
    assert set(seen) == {(False, False)} and len(seen) == (1 if fails else len(matrices(model)))
    assert [module.training for module in model.modules()] == modes and any(modes)
    assert hooks_of(model) == 0 and torch.is_grad_enabled()


def test_an_error_inside_the_model_leaves_no_hooks(make: Callable[[str], tf.PreTrainedModel]) -> None:
    model = make("t5")
    batches = batches_for(model)
    batches[1]["input_ids"][0, 0] = VOCABULARY + 50
    with pytest.raises(InputError, match="index out of range"):
        sequential(model, batches, matrices(model), lambda *args: None, gram=True)
    assert hooks_of(model) == 0


def test_a_module_that_no_batch_reaches_is_an_error(tmp_path: Path) -> None:
    model = prepared(lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)), tmp_path, torch.float32)
    batches = batches_for(model)
    model.bert.unused = nn.Linear(3, 3)
    with pytest.raises(InputError, match=r"bert\.unused"):
        blocks(model, [*matrices(model)], batches[0])
    # Found before the block it belongs to is touched, even where the rest of that block is reached.
    model.bert.encoder.layer[1].unused, model.bert.unused = nn.Linear(3, 3), None
    visited: list[str] = []
    names = [name for name in matrices(model) if ".layer." in name]
    with pytest.raises(InputError, match=r"layer\.1\.unused: no token of 3 calibration batches"):
        sequential(model, batches, names, lambda name, module, inputs: visited.append(name), gram=False)
    assert visited and not any(".layer.1." in name for name in visited)


def test_only_padding_is_no_calibration(make: Callable[[str], tf.PreTrainedModel]) -> None:
    model = make("gpt2")
    batch = batches_for(model)[0]
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    with pytest.raises(InputError, match="no token of 1 calibration batch reaches it"):
        unchanged(model, [batch], ["transformer.h.0.mlp.c_fc"])
    with pytest.raises(InputError, match="no calibration batches"):
        unchanged(model, [], ["transformer.h.0.mlp.c_fc"])


def test_inputs_that_are_not_finite_are_an_error_that_names_the_module(
    make: Callable[[str], tf.PreTrainedModel],
) -> None:
    model = make("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[3] = torch.inf
    with pytest.raises(NumericsError, match=r"transformer\.h\.0\.mlp\.c_proj"):
        unchanged(model, batches_for(model), matrices(model))
