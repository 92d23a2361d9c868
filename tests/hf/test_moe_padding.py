"""Padding counts nowhere in experts: whichever side it is on, whoever calls the model, whatever the model pads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from families import FAMILIES
from models import BERT, VOCABULARY, prepared
from torch import Tensor

import mpocli  # noqa: F401  (registers the loader)
from mpocli.config.expand_moe import ExpandConfig
from mpocli.config.routing import RoutingConfig
from mpocli.errors import InputError
from mpocli.hf.routing import routers
from mpocli.methods.expand_moe import run as expand_moe
from mpocli.methods.expand_moe.run import ExpandReport
from mpocli.nn import RouterOptions
from mpocli.nn.router import Statistics

SIDES = {
    "d_model": 48,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
}
FUNNEL = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "n_head": 4,
    "d_head": 12,
    "d_inner": 96,
    "block_sizes": [1, 1],
    "num_decoder_layers": 1,
}
BARE = {
    "longformer": lambda: tf.LongformerForMaskedLM(
        tf.LongformerConfig(**{**BERT, "max_position_embeddings": 64}, attention_window=8)
    ),
    "led": lambda: tf.LEDForConditionalGeneration(
        tf.LEDConfig(
            vocab_size=VOCABULARY,
            **{k: v for k, v in SIDES.items() if k != "max_position_embeddings"},
            attention_window=8,
            max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64,
        )
    ),
    "bigbird-pegasus": lambda: tf.BigBirdPegasusForConditionalGeneration(
        tf.BigBirdPegasusConfig(vocab_size=VOCABULARY, **SIDES, block_size=1, num_random_blocks=1)
    ),
    "reformer": lambda: tf.ReformerForMaskedLM(
        tf.ReformerConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            num_attention_heads=4,
            attention_head_size=12,
            feed_forward_size=96,
            attn_layers=["local"],
            axial_pos_shape=(8, 8),
            axial_pos_embds_dim=(16, 32),
            max_position_embeddings=64,
            local_attn_chunk_length=4,
            is_decoder=False,
        )
    ),
    "xlnet": lambda: tf.XLNetLMHeadModel(
        tf.XLNetConfig(vocab_size=VOCABULARY, d_model=48, n_layer=1, n_head=4, d_inner=96)
    ),
    "fsmt": lambda: tf.FSMTForConditionalGeneration(
        tf.FSMTConfig(src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY, langs=["en", "de"], **SIDES)
    ),
    "funnel": lambda: tf.FunnelForMaskedLM(tf.FunnelConfig(**FUNNEL)),
    "funnel-with-padding": lambda: tf.FunnelForMaskedLM(tf.FunnelConfig(**FUNNEL, pad_token_id=0)),
    "prophetnet": lambda: tf.ProphetNetForConditionalGeneration(
        tf.ProphetNetConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            num_encoder_layers=1,
            num_decoder_layers=1,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
        )
    ),
    "clip": lambda: tf.CLIPModel(
        tf.CLIPConfig(
            text_config={**BERT, "num_hidden_layers": 1, "eos_token_id": 2},
            vision_config={**BERT, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4},
            projection_dim=16,
        )
    ),
    "chunked": lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT, chunk_size_feed_forward=4)),
    "t5-classifier": lambda: tf.T5ForSequenceClassification(
        tf.T5Config(
            vocab_size=VOCABULARY, d_model=48, d_kv=12, d_ff=80, num_layers=1, num_heads=4, decoder_start_token_id=0
        )
    ),
    **FAMILIES,
}


def expanded(
    family: str, work: Path, *, noise: float = 0.1, **routing: object
) -> tuple[tf.PreTrainedModel, tf.PreTrainedModel, ExpandReport]:
    """The dense model, experts of it with no dropout, and the report."""
    dense = prepared(BARE[family], work / "dense", torch.float32)
    config = ExpandConfig(experts=3, noise=noise, routing=RoutingConfig(RouterOptions(**routing)))
    report = expand_moe.run(str(work / "dense"), config, work / "moe")
    rates = {name: 0.0 for name in dense.config.to_dict() if name.endswith(("dropout", "dropout_rate"))}
    model = type(dense).from_pretrained(work / "moe", **rates).eval()
    for router in routers(model).values():
        router.statistics = Statistics()
    return dense, model, report


def tokens(model: tf.PreTrainedModel) -> dict[str, int]:
    return {name: router.statistics.report()["tokens"] for name, router in routers(model).items()}


def padded(ids: Tensor, count: int, fill: int) -> Tensor:
    return torch.cat([ids, torch.full((len(ids), count), fill)], 1)


def texts(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("given", ["labels", "ids", "both"])
def test_a_step_is_that_without_padding_on_either_side(family: str, given: str, tmp_path: Path) -> None:
    """Loss, gradients of routers, statistics, and what finds a place at its expert."""
    _, model, _ = expanded(family, tmp_path, kind="topk", top_k=2, balance_loss=1.0, z_loss=1.0, capacity_factor=1.0)
    model.train()
    pad, start = model.config.pad_token_id, model.config.decoder_start_token_id
    source, target = texts(1, 6), texts(1, 5, seed=1)
    read = torch.cat([torch.tensor([[start]]), target[:, :-1]], 1)

    def step(added: int) -> tuple[float, dict[str, Tensor], dict[str, int]]:
        model.zero_grad()
        for router in routers(model).values():
            router.statistics = Statistics()
        ids = padded(source, added, pad)
        inputs = {"input_ids": ids, "attention_mask": padded(torch.ones_like(source), added, 0)}
        if given != "ids":
            inputs["labels"] = padded(target, added, -100)
        if given != "labels":
            inputs["decoder_input_ids"] = padded(read, added, pad)
        output = model(**inputs)
        loss = output.logits[:, : target.shape[1]].logsumexp(-1).mean() if given == "ids" else output.loss
        loss.backward()
        return float(loss.detach()), {n: r.weight.grad.clone() for n, r in routers(model).items()}, tokens(model)

    loss, gradients, counted = step(0)
    padded_loss, padded_gradients, padded_counted = step(9)
    assert padded_loss == pytest.approx(loss, rel=1e-5)
    assert padded_counted == counted and set(counted.values()) == {5, 6}
    for name, gradient in gradients.items():
        assert (padded_gradients[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max()


def test_a_decoder_that_reads_the_input_itself_counts_its_tokens(tmp_path: Path) -> None:
    _, model, _ = expanded("t5-classifier", tmp_path)
    ids = texts(2, 6)
    ids[:, 5] = model.config.eos_token_id
    ids[ids == 1] = 7
    ids[:, 5] = 1
    # What it reads is the text shifted by its start: one more place than there are tokens, where there is room.
    model(padded(ids, 4, 0), attention_mask=padded(torch.ones_like(ids), 4, 0))
    assert set(tokens(model).values()) == {2 * 6, 2 * 7}


def test_in_a_cached_generation_texts_that_have_ended_are_padding(tmp_path: Path) -> None:
    _, model, _ = expanded("t5", tmp_path)
    one = model(input_ids=texts(2, 4), decoder_input_ids=torch.zeros(2, 1, dtype=torch.long), use_cache=True)
    counted = {name: count for name, count in tokens(model).items() if name.startswith("decoder")}
    assert set(counted.values()) == {2}  # the start, which is T5's padding id
    model(
        encoder_outputs=(one.encoder_last_hidden_state,),
        decoder_input_ids=torch.tensor([[5], [0]]),
        past_key_values=one.past_key_values,
    )
    assert {count for name, count in tokens(model).items() if name.startswith("decoder")} == {3}


@pytest.mark.parametrize("family", ["longformer", "led", "bigbird-pegasus", "reformer", "xlnet", "fsmt"])
@pytest.mark.parametrize(("rows", "length"), [(3, 13), (13, 13)])
def test_models_with_inputs_of_their_own_shape_run_and_count_no_padding(
    family: str, rows: int, length: int, tmp_path: Path
) -> None:
    """They pad them by themselves, or have the length before the batch."""
    dense, model, report = expanded(family, tmp_path, noise=0.0)
    assert not report.kept
    ids, mask = texts(rows, length), torch.ones(rows, length, dtype=torch.long)
    mask[1, 9:] = 0
    ids[mask == 0] = dense.config.pad_token_id or 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if dense.config.is_encoder_decoder:
        inputs["labels"] = ids.masked_fill(mask == 0, -100)
    expected = dense(**inputs).logits
    assert (model(**inputs).logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert set(tokens(model).values()) == {rows * length - 4}
    # Whose tokens they are: with other padding in the same number, another share goes to each expert.
    chosen = {name: router.statistics.choices for name, router in routers(model).items()}
    alone = {name: torch.zeros_like(count) for name, count in chosen.items()}
    for row in range(rows):
        for router in routers(model).values():
            router.statistics = Statistics()
        model(**{name: value[row : row + 1] for name, value in inputs.items()})
        for name, router in routers(model).items():
            alone[name] += router.statistics.choices
    assert all(torch.equal(chosen[name], alone[name]) for name in chosen)


@pytest.mark.parametrize(
    ("family", "kept"),
    [
        ("funnel", "encoder.blocks.1"),
        ("funnel-with-padding", "encoder.blocks.1"),  # whose code looks for its number in a text without a mask
        ("prophetnet", "decoder.layers.0"),
    ],
)
def test_networks_whose_inputs_are_not_the_tokens_stay_as_they_are(family: str, kept: str, tmp_path: Path) -> None:
    dense, model, report = expanded(family, tmp_path, noise=0.0)
    assert report.kept and all(kept in entry.name for entry in report.kept)
    assert "not one for each token" in report.kept[0].reason
    ids = texts(2, 13)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if dense.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    # As it is loaded: transformers empties the row of a Funnel's padding then.
    expected = type(dense).from_pretrained(tmp_path / "dense").eval()(**inputs).logits
    assert (model(**inputs).logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert set(tokens(model).values()) == {26}


def test_a_model_of_texts_and_images_that_has_a_number_for_a_weight_runs(tmp_path: Path) -> None:
    dense, model, report = expanded("clip", tmp_path, noise=0.0)
    assert dense.logit_scale.shape == () and report.networks == 2
    ids, mask = texts(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 8, 8)}
    expected = dense(**inputs).logits_per_text.detach()
    assert (model(**inputs).logits_per_text - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_networks_that_get_pieces_of_a_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="chunk_size_feed_forward 4"):
        expanded("chunked", tmp_path)
    assert not (tmp_path / "moe").exists()
