"""Plain transformers loads sparse checkpoints as the dense models with the same zeros, and never loads them wrong."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from families import VOCABULARY, logits, make
from models import bert_classifier, save
from safetensors.torch import load_file, save_file
from torch import Tensor

import mpocli
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.sparse import keep_zeros
from mpocli.methods import decompose, inspect, merge, sparsify
from mpocli.methods.decompose_plan import DecomposeConfig
from mpocli.methods.sparsify_config import SparsifyConfig
from mpocli.methods.student import load_student

WEIGHTS = "model.safetensors"
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
HALF, BRAIN = torch.float16, torch.bfloat16
CASES = [
    ("bert-classifier", torch.float32),
    ("bert-masked-lm", BRAIN),
    ("gpt2", torch.float32),
    ("gpt2", HALF),
    ("llama", BRAIN),
    ("t5", torch.float32),
    ("t5-gated-untied", HALF),  # transformers keeps some of its weights in float32
    ("albert", torch.float32),
    ("roberta", HALF),
    ("distilbert", torch.float32),
    ("bart", torch.float32),
    ("switch", BRAIN),
    ("electra", torch.float32),
    ("opt", HALF),
]
NAME = "bert.encoder.layer.1.output.dense.weight"


def pruning(sparsity: float = 0.8, **options: Any) -> SparsifyConfig:
    return SparsifyConfig(method="magnitude", sparsity=sparsity, **options)


# --- the oracle: numpy on the dense files, nothing of the package -------------------------------------------

# Of the families here: whatever is no attention and no feed-forward matrix.
_KEPT = re.compile("embed|wte|wpe|shared|lm_head|classifier|pooler|predictions|router|relative_attention|mapping_in")


def zeroed(tensor: Tensor, sparsity: float, *, transposed: bool = False) -> Tensor:
    """⌊n·s⌋ smallest |w| at zero; of equals the first ones, read by rows of (O, I)."""
    values = tensor.float().numpy()
    matrix = np.array(values.T if transposed else values)
    order = np.argsort(np.abs(matrix).reshape(-1), kind="stable")[: math.floor(matrix.size * sparsity)]
    mask = np.ones(matrix.size, dtype=bool)
    mask[order] = False
    mask = mask.reshape(matrix.shape)
    pruned = tensor.clone()
    pruned[torch.from_numpy(np.array(~(mask.T if transposed else mask)))] = 0.0
    return pruned


def prunes(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and tensor.dim() == 2 and not _KEPT.search(name)


def dense_with_zeros(source: Path, target: Path, chosen: Callable[[str, Tensor], bool] = prunes) -> set[str]:
    """An ordinary checkpoint beside `source`, pruned at 0.8; returns what was pruned."""
    shutil.copytree(source, target)
    tensors = load_file(source / WEIGHTS)
    is_conv1d = json.loads((source / "config.json").read_text())["model_type"] == "gpt2"
    pruned = {name for name, tensor in tensors.items() if chosen(name, tensor)}
    for name in pruned:
        tensors[name] = zeroed(tensors[name], 0.8, transposed=is_conv1d and ".h." in name)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    return pruned


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SimpleNamespace]:
    """dense/, oracle/ (dense with zeros) and sparse/ of a family, made once; nobody writes into them."""

    @functools.cache
    def made(family: str = "bert-classifier", dtype: torch.dtype = torch.float32) -> SimpleNamespace:
        path = tmp_path_factory.mktemp(family)
        model = make(family, path / "dense", dtype=dtype)
        pruned = dense_with_zeros(path / "dense", path / "oracle")
        report = sparsify.run(str(path / "dense"), pruning(), path / "sparse")
        assert {tensor.name for tensor in report.tensors} == pruned and len(pruned) >= 6
        return SimpleNamespace(
            cls=type(model), path=path, dense=path / "dense", oracle=path / "oracle", sparse=path / "sparse"
        )

    return made


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(WORDS[tensor.element_size()])


def assert_same(found: Any, expected: Any) -> None:
    """Two state dicts, or two models', bit for bit."""
    found, expected = (x if isinstance(x, dict) else x.state_dict() for x in (found, expected))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def weights_size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def stored(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


# --- the same model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_a_sparse_checkpoint_loads_as_the_dense_model_with_the_same_zeros(
    family: str, dtype: torch.dtype, case: Callable[..., SimpleNamespace]
) -> None:
    made = case(family, dtype)
    loaded, info = made.cls.from_pretrained(made.sparse, output_loading_info=True)
    expected = made.cls.from_pretrained(made.oracle)
    assert_same(loaded, expected)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert {name: type(p) for name, p in loaded.named_parameters()} == {
        name: type(p) for name, p in expected.named_parameters()
    }
    assert all(p.requires_grad for p in loaded.parameters())
    assert weights_size(made.sparse) < weights_size(made.dense)


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_save_pretrained_gives_the_same_bits_twice_and_stays_small(
    family: str, dtype: torch.dtype, case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    made = case(family, dtype)
    model = expected = made.cls.from_pretrained(made.sparse)
    for place in ("first", "second"):
        model.save_pretrained(tmp_path / place)
        model = made.cls.from_pretrained(tmp_path / place)
        assert_same(model, expected)
    before, after = stored(made.sparse), stored(tmp_path / "second")
    packed = {name for name in before if name.endswith(("_bitmask", "_values"))}
    assert packed and packed == {name for name in after if name.endswith(("_bitmask", "_values"))}
    assert sum(t.nbytes for t in after.values()) <= sum(t.nbytes for t in before.values()) * (
        2 if family == "t5-gated-untied" else 1  # what transformers holds in float32 it stores so
    )
    assert "an_mpo_checkpoint.import_mpocli_before_from_pretrained" in after
    # And mpocli's own commands read what a user saved.
    assert (
        Checkpoint.open(str(tmp_path / "second")).totals().params == Checkpoint.open(str(made.sparse)).totals().params
    )


@pytest.mark.parametrize("family", ["bert-masked-lm", "gpt2", "switch"])
def test_loading_in_a_given_dtype_is_loading_the_dense_model_in_it(
    family: str, case: Callable[..., SimpleNamespace]
) -> None:
    made = case(family, BRAIN)
    for dtype in (torch.float32, HALF, torch.float64):
        assert_same(
            made.cls.from_pretrained(made.sparse, dtype=dtype), made.cls.from_pretrained(made.oracle, dtype=dtype)
        )


@pytest.mark.parametrize("most", [4_000, 30_000])
def test_shards_of_any_size_load_and_save_the_same_bits(
    most: int, case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    """At 4000 bytes the mask, the values and the tombstone of a matrix lie in different files."""
    made = case("gpt2")
    sparsify.run(str(made.dense), pruning(max_shard_bytes=most), tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    loaded = made.cls.from_pretrained(tmp_path / "sharded")
    assert_same(loaded, made.cls.from_pretrained(made.oracle))
    loaded.save_pretrained(tmp_path / "again", max_shard_size=most)
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 2
    assert_same(made.cls.from_pretrained(tmp_path / "again"), loaded)


def test_options_of_from_pretrained_change_no_bit(case: Callable[..., SimpleNamespace]) -> None:
    made = case()
    expected = made.cls.from_pretrained(made.oracle)
    for options in ({"device_map": "cpu"}, {"device_map": "auto"}, {"ignore_mismatched_sizes": True}):
        assert_same(made.cls.from_pretrained(made.sparse, **options), expected)


def test_a_model_of_all_zero_and_of_full_matrices_comes_back(tmp_path: Path) -> None:
    """Empty tensors of values share the address 0, and are not shared."""
    dense = make("bert-classifier", tmp_path / "dense")
    layers = dense.bert.encoder.layer
    with torch.no_grad():
        for name in ("attention.self.query", "intermediate.dense"):
            for layer in layers:
                layer.get_submodule(name).weight.zero_()
        layers[0].output.dense.weight.fill_(-0.0)
    dense.save_pretrained(tmp_path / "dense")
    sparsify.run(str(tmp_path / "dense"), pruning(1e-6), tmp_path / "sparse")  # ⌊n·s⌋ = 0: no matrix loses an entry
    loaded = type(dense).from_pretrained(tmp_path / "sparse")
    assert_same(loaded, dense)
    loaded.save_pretrained(tmp_path / "again")
    assert_same(type(dense).from_pretrained(tmp_path / "again"), dense)
    sizes = {name: len(t) for name, t in stored(tmp_path / "again").items() if name.endswith("_values")}
    assert sorted(sizes.values()) == [0] * 4 + [48 * 48] * 6 + [48 * 96] * 2
    merge.run(str(tmp_path / "again"), tmp_path / "merged")
    assert_same(type(dense).from_pretrained(tmp_path / "merged"), dense)


# --- other classes of the same weights ------------------------------------------------------------------------------


def test_a_classifier_loads_as_encoder_and_an_encoder_under_a_new_head(
    case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    made = case()
    whole = made.cls.from_pretrained(made.oracle)
    encoder = tf.AutoModel.from_pretrained(made.sparse)
    assert_same(encoder, whole.bert)
    encoder.save_pretrained(tmp_path / "encoder")
    assert weights_size(tmp_path / "encoder") < 1.02 * weights_size(made.sparse)
    headed, info = made.cls.from_pretrained(tmp_path / "encoder", num_labels=3, output_loading_info=True)
    assert_same(headed.bert, whole.bert)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    headed.save_pretrained(tmp_path / "headed")
    assert_same(made.cls.from_pretrained(tmp_path / "headed"), headed)
    # The commands read a base model's files too.
    views = {view.name: view.sparsity for view in inspect.run(str(tmp_path / "encoder")).modules}
    assert views["encoder.layer.1.output.dense"] == pytest.approx(0.8, abs=1e-3)


def test_a_sparse_head_is_left_out_of_what_a_headless_class_saves(tmp_path: Path) -> None:
    make("llama", tmp_path / "dense")
    sparsify.run(str(tmp_path / "dense"), pruning(layers=("head", "ffn")), tmp_path / "sparse")
    whole = tf.LlamaForCausalLM.from_pretrained(tmp_path / "sparse")
    assert float((whole.lm_head.weight == 0).float().mean()) == pytest.approx(0.8, abs=1e-3)
    body = tf.AutoModel.from_pretrained(tmp_path / "sparse")
    assert_same(body, whole.model)
    body.save_pretrained(tmp_path / "body")
    said = json.loads((tmp_path / "body" / "config.json").read_text())["quantization_config"]["encodings"]
    assert len(said) == 6 and not any("lm_head" in name for name in said)
    assert_same(tf.AutoModel.from_pretrained(tmp_path / "body"), body)


def test_files_whose_names_lack_the_base_prefix_go_through_every_command(
    case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    """As those of the GPT-2 on the hub, whose config says GPT2LMHeadModel."""
    made = case("gpt2")
    for place in ("dense", "oracle"):
        shutil.copytree(made.path / place, tmp_path / place)
        tensors = {n.removeprefix("transformer."): t for n, t in load_file(made.path / place / WEIGHTS).items()}
        save_file(tensors, tmp_path / place / WEIGHTS, metadata={"format": "pt"})
    expected = made.cls.from_pretrained(made.oracle)
    sparsify.run(str(tmp_path / "dense"), pruning(), tmp_path / "sparse")
    assert "h.0.mlp.c_fc.weight_bitmask" in stored(tmp_path / "sparse")
    assert_same(made.cls.from_pretrained(tmp_path / "sparse"), expected)
    assert_same(tf.AutoModel.from_pretrained(tmp_path / "sparse"), expected.transformer)
    sparsify.run(str(tmp_path / "sparse"), pruning(), tmp_path / "anew")
    assert_same(made.cls.from_pretrained(tmp_path / "anew"), expected)
    assert_same(stored(tmp_path / "anew"), stored(tmp_path / "sparse"))
    merge.run(str(tmp_path / "anew"), tmp_path / "merged")
    assert_same(stored(tmp_path / "merged"), stored(tmp_path / "oracle"))
    decompose.run(str(tmp_path / "sparse"), DecomposeConfig(targets=("*.c_attn",)), tmp_path / "some")
    name = "transformer.h.1.mlp.c_fc.weight"
    some = made.cls.from_pretrained(tmp_path / "some")
    assert torch.equal(bits(some.get_parameter(name)), bits(expected.get_parameter(name)))
    assert inspect.run(str(tmp_path / "some"), verify=True).problems == ()


@pytest.mark.parametrize(
    ("base", "config", "headed"),
    [
        (
            tf.GPT2Model,
            tf.GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=1, n_head=2, n_positions=40),
            tf.GPT2LMHeadModel,
        ),
        (
            tf.BertModel,
            tf.BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=40,
            ),
            tf.BertForMaskedLM,
        ),
    ],
    ids=["gpt2", "bert"],
)
def test_a_sparse_table_of_a_base_model_is_tied_to_the_head_that_another_class_adds(
    base: Any, config: Any, headed: Any, tmp_path: Path
) -> None:
    save(base, config, tmp_path / "dense", torch.float32)
    dense_with_zeros(
        tmp_path / "dense", tmp_path / "oracle", lambda name, tensor: "word_embeddings" in name or "wte" in name
    )
    sparsify.run(str(tmp_path / "dense"), pruning(layers=("embedding",)), tmp_path / "sparse")
    loaded, info = headed.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    table, head = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    expected = base.from_pretrained(tmp_path / "oracle").get_input_embeddings().weight
    assert head is table and torch.equal(bits(table), bits(expected))
    assert not {name for name in info["missing_keys"] if name.endswith(("decoder.weight", "lm_head.weight"))}
    loaded.tie_weights()
    assert loaded.get_output_embeddings().weight is table
    loaded.save_pretrained(tmp_path / "again")
    assert sum(t.numel() >= expected.numel() for t in stored(tmp_path / "again").values()) == 0  # no dense copy
    again = headed.from_pretrained(tmp_path / "again")
    assert_same(again, loaded)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    found = Checkpoint.open(str(tmp_path / "again")).totals()
    assert found.params == found.dense_params == loaded.num_parameters()
    merge.run(str(tmp_path / "again"), tmp_path / "merged")
    assert_same(headed.from_pretrained(tmp_path / "merged"), loaded)


def test_a_head_that_is_stored_apart_from_a_sparse_table_stays_apart(tmp_path: Path) -> None:
    dense = make("llama", tmp_path / "dense")
    sparsify.run(str(tmp_path / "dense"), pruning(layers=("embedding",)), tmp_path / "sparse")
    edit_json(tmp_path / "sparse" / "config.json", lambda config: config.update(tie_word_embeddings=True))
    loaded = tf.LlamaForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(loaded.lm_head.weight, dense.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, zeroed(dense.model.embed_tokens.weight.detach(), 0.8))


# --- what users do with models --------------------------------------------------------------------------------------


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


# --- MPOs with a sparse central core --------------------------------------------------------------------------------

FEW = DecomposeConfig(trunc=6, when_larger="decompose", layers=("embedding", "attention"))


@pytest.fixture(scope="module", params=[("bert-masked-lm", torch.float32), ("gpt2", BRAIN)], ids=lambda case: case[0])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """mpo/: table and attention decomposed; sparse/: its central cores and the dense feed-forward pruned; oracle/: mpo/
    with the same zeros."""
    family, dtype = request.param
    path = tmp_path_factory.mktemp("both")
    model = make(family, path / "dense", dtype=dtype)
    decompose.run(str(path / "dense"), FEW, path / "mpo")
    report = sparsify.run(str(path / "mpo"), pruning(layers=("embedding", "attention", "ffn")), path / "sparse")
    tensors = load_file(path / "mpo" / WEIGHTS)
    table = "wte" if family == "gpt2" else "word_embeddings"
    cores = {name for name in tensors if name.endswith(".core_2") and table not in name}  # the middle one of five
    matrices = {name for name, tensor in tensors.items() if prunes(name, tensor) and tensor.dim() == 2}
    for name in cores | matrices:
        tensors[name] = zeroed(tensors[name], 0.8, transposed=name in matrices and family == "gpt2")
    shutil.copytree(path / "mpo", path / "oracle")
    save_file(tensors, path / "oracle" / WEIGHTS, metadata={"format": "pt"})
    assert {tensor.name for tensor in report.tensors} == cores | matrices and len(cores) >= 4 and len(matrices) == 4
    assert [kept.reason.startswith("its weight is tied") for kept in report.kept] == [True]
    return SimpleNamespace(
        cls=type(model), path=path, mpo=path / "mpo", oracle=path / "oracle", sparse=path / "sparse", cores=cores
    )


def test_sparse_central_cores_load_save_and_copy_bit_for_bit(both: SimpleNamespace, tmp_path: Path) -> None:
    expected = both.cls.from_pretrained(both.oracle).eval()
    loaded = both.cls.from_pretrained(both.sparse).eval()
    assert_same(loaded, expected)
    assert torch.equal(bits(logits(loaded)), bits(logits(expected)))
    assert_same(copy.deepcopy(loaded), expected)
    model = loaded
    for place in ("first", "second"):
        model.save_pretrained(tmp_path / place)
        model = both.cls.from_pretrained(tmp_path / place)
        assert_same(model, expected)
    assert weights_size(tmp_path / "second") < 1.05 * weights_size(both.sparse) < weights_size(both.mpo)
    assert_same(both.cls.from_pretrained(both.sparse, device_map="cpu"), expected)
    assert_same(both.cls.from_pretrained(both.sparse, dtype=HALF), both.cls.from_pretrained(both.oracle, dtype=HALF))


def test_a_tied_table_keeps_its_cores_and_stays_tied_beside_sparse_ones(both: SimpleNamespace) -> None:
    before, after = stored(both.mpo), stored(both.sparse)
    pruned = {name.removesuffix("_bitmask") for name in after if name.endswith("_bitmask")}
    untouched = [name for name in before if ".core_" in name and name not in pruned]
    assert len(untouched) >= 5 and all(torch.equal(bits(before[name]), bits(after[name])) for name in untouched)
    loaded = both.cls.from_pretrained(both.sparse)
    table, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert all(a is b for a, b in zip(table.cores, head.cores, strict=True))


def test_merge_of_sparse_cores_and_matrices_is_the_merge_of_dense_ones(both: SimpleNamespace, tmp_path: Path) -> None:
    merge.run(str(both.sparse), tmp_path / "merged")
    (both.oracle / "mpo.json").unlink(missing_ok=True)  # its weights have changed
    merge.run(str(both.oracle), tmp_path / "expected")
    assert_same(stored(tmp_path / "merged"), stored(tmp_path / "expected"))


def test_dequantize_of_sparse_cores_and_matrices_saves_an_ordinary_model(both: SimpleNamespace, tmp_path: Path) -> None:
    model = both.cls.from_pretrained(both.sparse)
    expected = logits(model.eval())
    model.dequantize()
    assert float((logits(model) - expected).abs().max()) <= 0.05 * float(expected.abs().max())
    model.save_pretrained(tmp_path / "plain")
    plain = stored(tmp_path / "plain")
    assert not any(name.endswith(("_bitmask", "_values")) or ".core_" in name for name in plain)
    assert_same(both.cls.from_pretrained(tmp_path / "plain"), model)


def test_keep_zeros_keeps_those_of_a_core(both: SimpleNamespace) -> None:
    model = both.cls.from_pretrained(both.sparse, dtype=torch.float32)
    assert keep_zeros(model) == len(both.cores) + 4
    before = {name: model.get_parameter(name).detach().clone() for name in both.cores}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    ids = torch.arange(5, 21)[None]
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for name, old in before.items():
        new = model.get_parameter(name).detach()
        assert torch.equal(new == 0, old == 0) and not (new == old)[old != 0].any(), name


# --- never a wrong model --------------------------------------------------------------------------------------------

_LOAD = """
import sys
import torch, transformers
assert "mpocli" not in sys.modules
for directory in sys.argv[1:]:
    try:
        model = transformers.AutoModelForMaskedLM.from_pretrained(directory)
    except Exception as error:
        print("error", type(error).__name__)
    else:
        assert "mpocli" not in sys.modules
        torch.save(model.state_dict(), directory + "/loaded.pt")
        print("loaded")
"""


def test_without_the_import_loading_is_an_error_and_merged_checkpoints_load_bit_for_bit(
    case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    made = case("bert-masked-lm", BRAIN)
    decompose.run(str(made.dense), FEW, tmp_path / "mpo")
    sparsify.run(str(tmp_path / "mpo"), pruning(targets=("*.query",)), tmp_path / "cores")
    merge.run(str(made.sparse), tmp_path / "merged")
    merge.run(str(tmp_path / "cores"), tmp_path / "merged cores")
    places = [made.sparse, tmp_path / "cores", tmp_path / "merged", tmp_path / "merged cores"]
    command = [sys.executable, "-c", _LOAD, *map(str, places)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.split("\n")[:4] == ["error RuntimeError", "error RuntimeError", "loaded", "loaded"], (
        result.stderr
    )
    assert "import_mpocli_before_from_pretrained" in result.stderr
    loaded = torch.load(tmp_path / "merged" / "loaded.pt")
    assert_same(loaded, made.cls.from_pretrained(made.oracle))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert_same(stored(tmp_path / "merged"), stored(made.oracle))


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def _encodings(directory: Path, change: Callable[[Any], object]) -> None:
    """In both files, as a hand that edits one edits the other."""
    edit_json(directory / "config.json", lambda config: change(config["quantization_config"]["encodings"]))
    edit_json(directory / "mpo.json", lambda manifest: change(manifest["encodings"]))


def _part(name: str, change: Callable[[Tensor], Tensor] | None) -> Callable[[Path], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        old = tensors.pop(name)
        if change is not None:
            tensors[name] = change(old).contiguous()

    return lambda directory: edit_weights(directory, edit)


@pytest.mark.parametrize(
    ("damage", "loading", "opening"),
    [
        (_part(f"{NAME}_bitmask", None), "lack its bitmask", "lack its bitmask"),
        (_part(f"{NAME}_values", None), "_values is not in the files", "lack its bitmask or values"),
        (_part(f"{NAME}_bitmask", lambda bits: bits[:-1]), "575 .* 576 bytes", "has 575 .* needs 576"),
        (_part(f"{NAME}_values", lambda v: v[:-1]), "keeps 922 entries, and 921 values", "keeps 922 .* 921 values"),
        (_part(f"{NAME}_values", lambda v: v[None]), "and 922 values|shape", r"values of shape \(1, 922\)"),
        (
            lambda d: _encodings(d, lambda e: e[NAME].update(shape=[96, 48])),
            r"\(48, 96\).*\(96, 48\)",
            "is 96x48, .* 48x96",
        ),
        (lambda d: _encodings(d, lambda e: e[NAME].update(shape=[48, 95])), r"\(48, 96\).*\(48, 95\)", "needs 570"),
        (lambda d: _encodings(d, lambda e: e[NAME].update(encoding="zipped")), "'zipped'", "'zipped'"),
        (lambda d: _encodings(d, lambda e: e.pop(NAME)), "no encoding for it", "no encoding for it"),
        (
            lambda d: edit_json(d / "config.json", lambda config: config["quantization_config"].pop("encodings")),
            "has no encoding for it",
            "mpo.json and config.json disagree",
        ),
    ],
    ids=[
        "no bitmask",
        "no values",
        "short bitmask",
        "short values",
        "values in two dimensions",
        "transposed shape",
        "smaller shape",
        "unknown encoding",
        "no entry",
        "only in mpo.json",
    ],
)
def test_files_that_contradict_the_encodings_are_an_error_that_names_the_tensor(
    damage: Callable[[Path], None], loading: str, opening: str, case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    made = case()
    directory = tmp_path / "damaged"
    shutil.copytree(made.sparse, directory)
    damage(directory)
    with pytest.raises(mpocli.InputError, match=loading) as error:
        made.cls.from_pretrained(directory)
    assert re.search(r"bert\.encoder\.layer\.\d\.[a-z.]*\.weight", str(error.value))
    with pytest.raises(mpocli.InputError, match=loading):
        tf.AutoModel.from_pretrained(directory, ignore_mismatched_sizes=True)
    with pytest.raises(mpocli.InputError, match=opening) as error:
        checkpoint = Checkpoint.open(str(directory))
        checkpoint.survey  # noqa: B018
        checkpoint.reader.read(NAME)
    assert re.search(r"bert\.encoder\.layer\.\d\.[a-z.]*\.weight", str(error.value))


def test_encodings_in_the_config_alone_load_and_a_manifest_that_lacks_them_is_refused(
    case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    """Loading never looks at mpo.json; the commands do, and without it the config suffices."""
    made = case()
    shutil.copytree(made.sparse, tmp_path / "sparse")
    edit_json(tmp_path / "sparse" / "mpo.json", lambda manifest: manifest.update(encodings={}))
    assert_same(made.cls.from_pretrained(tmp_path / "sparse"), made.cls.from_pretrained(made.oracle))
    with pytest.raises(mpocli.InputError, match=r"disagree about how bert\.encoder.* is stored"):
        Checkpoint.open(str(tmp_path / "sparse"))
    (tmp_path / "sparse" / "mpo.json").unlink()
    assert len(Checkpoint.open(str(tmp_path / "sparse")).encodings) == 12


def test_a_missing_part_of_a_sparse_core_is_an_error(both: SimpleNamespace, tmp_path: Path) -> None:
    name = sorted(both.cores)[0]
    for part in ("_bitmask", "_values"):
        directory = tmp_path / part
        shutil.copytree(both.sparse, directory)
        edit_weights(directory, lambda tensors, part=part: tensors.pop(name + part))
        for read in (both.cls.from_pretrained, lambda place: Checkpoint.open(str(place))):
            with pytest.raises(mpocli.InputError, match=re.escape(name)):
                read(directory)


# --- what the commands count and write ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BRAIN])
def test_the_file_has_the_size_of_the_bitmask_formula_and_inspect_tells_it(dtype: torch.dtype, tmp_path: Path) -> None:
    bert_classifier(
        tmp_path / "dense", dtype=dtype, vocab_size=64, hidden_size=128, num_hidden_layers=4, intermediate_size=512
    )
    report = sparsify.run(str(tmp_path / "dense"), pruning(0.9), tmp_path / "sparse")
    dense, tensors = load_file(tmp_path / "dense" / WEIGHTS), stored(tmp_path / "sparse")
    size = dtype.itemsize
    expected = 0
    for name, tensor in dense.items():
        entries = tensor.numel()
        kept = entries - math.floor(entries * 0.9)
        expected += math.ceil(entries / 8) + kept * size if prunes(name, tensor) else entries * size
    assert weights_size(tmp_path / "sparse") == pytest.approx(expected, rel=0.05)
    assert report.bytes_expected == pytest.approx(expected, rel=0.05)
    assert report.totals.bytes == weights_size(tmp_path / "sparse")
    found = inspect.run(str(tmp_path / "sparse"), verify=True)
    assert found.problems == ()
    packed = {view.name: view for view in found.modules if view.sparsity is not None}
    assert {f"{name}.weight" for name in packed} == {name for name, tensor in dense.items() if prunes(name, tensor)}
    for name, view in packed.items():
        mask, values = (tensors[f"{name}.weight_{part}"] for part in ("bitmask", "values"))
        entries = dense[f"{name}.weight"].numel()
        assert view.bytes == mask.nbytes + values.nbytes
        assert view.zeros == math.floor(entries * 0.9) == entries - len(values)
        assert view.sparsity == view.zeros / entries
    assert {tensor.name: (tensor.bytes, tensor.zeros) for tensor in report.tensors} == {
        f"{name}.weight": (view.bytes, view.zeros) for name, view in packed.items()
    }
    assert found.zeros == report.zeros and found.sparsity == report.sparsity
    assert found.totals.params == found.totals.dense_params == sum(tensor.numel() for tensor in dense.values())


def test_decompose_of_some_matrices_leaves_the_others_packed_and_a_dry_run_foretells_the_bytes(
    case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    made = case()
    config = DecomposeConfig(trunc=6, when_larger="decompose", targets=("*.attention.self.*",))
    foretold = decompose.run(str(made.sparse), config, tmp_path / "none", dry_run=True)
    assert not (tmp_path / "none").exists()
    decompose.run(str(made.sparse), config, tmp_path / "some")
    assert foretold.totals.bytes == weights_size(tmp_path / "some")
    before, after = stored(made.sparse), stored(tmp_path / "some")
    left = {name for name in before if ".attention.self." not in name}
    assert sum(name.endswith("_bitmask") for name in left) == 6
    assert_same({name: after[name] for name in left}, {name: before[name] for name in left})
    gone = {name for name in before if name.endswith(("_bitmask", "_values"))} - left
    assert len(gone) == 12 and not gone & after.keys()
    loaded, oracle = made.cls.from_pretrained(tmp_path / "some"), made.cls.from_pretrained(made.oracle)
    assert torch.equal(bits(loaded.get_parameter(NAME)), bits(oracle.get_parameter(NAME)))
    assert inspect.run(str(tmp_path / "some"), verify=True).problems == ()


def test_pruning_anew_and_storing_dense_are_the_same_model(
    case: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    made = case()
    sparsify.run(str(made.dense), pruning(storage="dense"), tmp_path / "dense")
    assert_same(stored(tmp_path / "dense"), stored(made.oracle))
    # Zeros are the smallest entries: less sparsity than before keeps them all, in those that are not chosen too.
    sparsify.run(str(made.sparse), pruning(0.3, layers=("ffn",)), tmp_path / "again")
    assert_same(made.cls.from_pretrained(tmp_path / "again"), made.cls.from_pretrained(made.oracle))
    assert len(Checkpoint.open(str(tmp_path / "again")).encodings) == 12


def test_the_same_input_and_options_give_the_same_bytes(case: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    made = case("gpt2")
    for options in ({}, {"scope": "global"}, {"max_shard_bytes": 30_000}):
        place = tmp_path / str(len(options) and next(iter(options)))
        for out in ("one", "two"):
            sparsify.run(str(made.dense), pruning(**options), place / out)
            decompose.run(str(place / out), DecomposeConfig(trunc=6, targets=("*.c_attn",)), place / f"{out} mpo")
            merge.run(str(place / out), place / f"{out} merged")
        for end in ("", " mpo", " merged"):
            one, two = ({f.name: f.read_bytes() for f in (place / f"{out}{end}").iterdir()} for out in ("one", "two"))
            assert one.keys() == two.keys() and "mpo.json" in one
            assert [name for name in one if one[name] != two[name]] == []
