"""One tiny random model of each of many transformers families: a class, its config's few odd numbers, an input.

`FAMILIES` is the table. A config's usual numbers (`SMALL`) are filled in wherever its class has a parameter of that
name, so that most rows need nothing more. Nothing here imports mpocli.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import beside  # noqa: F401
import torch
import transformers as tf
from cli.tasks import tokenizer
from models import VOCABULARY, prepared
from torch import Tensor

WIDTH, HEADS, KV_HEADS, HEAD, LAYERS, INNER, EXPERTS, POSITIONS = 32, 4, 2, 8, 2, 48, 4, 64
IMAGE, PATCH, LENGTH = 16, 8, 16

SMALL: dict[str, Any] = (
    dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "hidden_dim", "embedding_size"), WIDTH)
    | dict.fromkeys(("word_embed_proj_dim", "text_embed_dim", "attention_hidden_size", "projection_dim"), WIDTH)
    | dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers"), LAYERS)
    | dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers"), LAYERS)
    | dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), HEADS)
    | dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS)
    | dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS)
    | {"num_key_value_heads": KV_HEADS}
    | dict.fromkeys(("head_dim", "d_kv", "attention_head_size", "qk_nope_head_dim", "v_head_dim"), HEAD)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "d_inner", "dff", "ffn_hidden_size"), INNER)
    | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), INNER)
    | dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), INNER)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS)
    | dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k"), 2)
    | dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16)
    | {"qk_rope_head_dim": HEAD, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    | dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), POSITIONS)
    | {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 5, "image_size": IMAGE}
    | {"decoder_start_token_id": 0, "patch_size": PATCH, "type_vocab_size": 2, "sliding_window": 8}
)


Inputs = dict[str, Tensor]
Feed = Callable[[Any, torch.Generator], Inputs]


@dataclass(frozen=True)
class Row:
    """A model class by name, what its config has beside `SMALL`, and what the model is run on."""

    cls: str
    odd: dict[str, Any]
    feed: Feed
    text: bool

    @property
    def model_class(self) -> Any:
        return getattr(tf, self.cls)


def config(cls: Any, **odd: Any) -> Any:
    """A config of that class, or of the one of that name: `SMALL`, where it has such a number, and what is given."""
    cls = getattr(tf, cls) if isinstance(cls, str) else cls
    known = inspect.signature(cls.__init__).parameters
    return cls(**{key: value for key, value in SMALL.items() if key in known} | odd)


def small(cls: str, **odd: Any) -> dict[str, Any]:
    """The same as part of another config."""
    made: dict[str, Any] = config(cls, **odd).to_dict()
    return made


# --- what a model is run on ---------------------------------------------------------------------------------------


def _ids(rows: int, length: int, draw: torch.Generator) -> Tensor:
    return torch.randint(6, VOCABULARY, (rows, length), generator=draw)


def text(model: Any, draw: torch.Generator) -> Inputs:
    """Three rows, one of them padded where the model takes a mask; a decoder's half of them where there is one."""
    ids = _ids(3, LENGTH, draw)
    ids[:, 10] = SMALL["eos_token_id"]  # where some classifiers look
    inputs = {"input_ids": ids}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        mask = torch.ones_like(ids)
        mask[1, 11:] = 0
        inputs = {"input_ids": ids * mask, "attention_mask": mask}
    if model.config.is_encoder_decoder and not type(model).__name__.endswith("Classification"):
        inputs["decoder_input_ids"] = ids[:, :9]
    return inputs


def image(model: Any, draw: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(2, 3, IMAGE, IMAGE, generator=draw)}


def image_and_text(model: Any, draw: torch.Generator) -> Inputs:
    return text(model, draw) | {"pixel_values": torch.randn(3, 3, IMAGE, IMAGE, generator=draw)}


def image_in_text(model: Any, draw: torch.Generator) -> Inputs:
    """Each row begins with as many image tokens as its image becomes."""
    inputs = image_and_text(model, draw)
    inputs["input_ids"][:, : (IMAGE // PATCH) ** 2] = model.config.image_token_id
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).long()
    return inputs


def sound(model: Any, draw: torch.Generator) -> Inputs:
    mask = torch.ones(2, 800, dtype=torch.long)
    mask[1, 600:] = 0
    return {"input_values": torch.randn(2, 800, generator=draw) * mask, "attention_mask": mask}


def spectrogram(model: Any, draw: torch.Generator) -> Inputs:
    bins = model.config.num_mel_bins
    features = torch.randn(2, bins, 2 * model.config.max_source_positions, generator=draw)
    return {"input_features": features, "decoder_input_ids": _ids(2, 9, draw)}


def _row(cls: str, feed: Feed = text, **odd: Any) -> Row:
    return Row(cls, odd, feed, feed in (text, image_and_text, image_in_text))


# --- the table ----------------------------------------------------------------------------------------------------

_SPEECH: dict[str, Any] = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}
_T5: dict[str, Any] = {"decoder_start_token_id": 0}
_DEEPSEEK: dict[str, Any] = {"first_k_dense_replace": 1, "num_key_value_heads": HEADS}
_HYBRID: dict[str, Any] = {"mamba_d_state": 8, "mamba_expand": 2, "mamba_d_conv": 4}

DECODERS: dict[str, Row] = {
    "afmoe": _row("AfmoeForCausalLM"),
    "apertus": _row("ApertusForCausalLM"),
    "arcee": _row("ArceeForCausalLM"),
    "biogpt": _row("BioGptForCausalLM"),
    "bitnet": _row("BitNetForCausalLM"),
    "bloom": _row("BloomForCausalLM"),
    "codegen": _row("CodeGenForCausalLM", rotary_dim=4),
    "cohere": _row("CohereForCausalLM"),
    "cohere2": _row("Cohere2ForCausalLM"),
    "ctrl": _row("CTRLLMHeadModel"),
    "dbrx": _row(
        "DbrxForCausalLM",
        attn_config={"kv_n_heads": KV_HEADS, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": INNER, "moe_num_experts": EXPERTS, "moe_top_k": 2, "hidden_size": WIDTH},
    ),
    "deepseek-v2": _row("DeepseekV2ForCausalLM", **_DEEPSEEK),
    "deepseek-v3": _row("DeepseekV3ForCausalLM", **_DEEPSEEK),
    "ernie4.5": _row("Ernie4_5ForCausalLM"),
    "exaone4": _row("Exaone4ForCausalLM"),
    "falcon": _row("FalconForCausalLM"),
    "gemma": _row("GemmaForCausalLM"),
    "gemma2": _row("Gemma2ForCausalLM"),
    "gemma3": _row("Gemma3ForCausalLM"),
    "glm": _row("GlmForCausalLM"),
    "glm4": _row("Glm4ForCausalLM"),
    "glm4-moe": _row("Glm4MoeForCausalLM", first_k_dense_replace=1),
    "gpt2": _row("GPT2LMHeadModel"),
    "gpt-bigcode": _row("GPTBigCodeForCausalLM"),
    "gpt-neo": _row("GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]], window_size=8),
    "gpt-neox": _row("GPTNeoXForCausalLM"),
    "gpt-oss": _row("GptOssForCausalLM"),
    "gptj": _row("GPTJForCausalLM", rotary_dim=4),
    "granite": _row("GraniteForCausalLM"),
    "granite-moe-shared": _row("GraniteMoeSharedForCausalLM"),
    "granite-moe": _row("GraniteMoeForCausalLM"),
    "helium": _row("HeliumForCausalLM"),
    "jetmoe": _row("JetMoeForCausalLM", kv_channels=HEAD),
    "lfm2": _row("Lfm2ForCausalLM", layer_types=["conv", "full_attention"]),
    "llama": _row("LlamaForCausalLM"),
    "llama4-text": _row("Llama4ForCausalLM", intermediate_size_mlp=INNER),
    "minimax": _row("MiniMaxForCausalLM", block_size=8),
    "mistral": _row("MistralForCausalLM"),
    "mixtral": _row("MixtralForCausalLM"),
    "mpt": _row("MptForCausalLM"),
    "nemotron": _row("NemotronForCausalLM"),
    "olmo": _row("OlmoForCausalLM"),
    "olmo2": _row("Olmo2ForCausalLM"),
    "olmo3": _row("Olmo3ForCausalLM"),
    "olmoe": _row("OlmoeForCausalLM"),
    "openai-gpt": _row("OpenAIGPTLMHeadModel"),
    "opt": _row("OPTForCausalLM"),
    "persimmon": _row("PersimmonForCausalLM"),
    "phi": _row("PhiForCausalLM"),
    "phi3": _row("Phi3ForCausalLM"),
    "phimoe": _row("PhimoeForCausalLM"),
    "qwen2": _row("Qwen2ForCausalLM"),
    "qwen2-moe": _row("Qwen2MoeForCausalLM", decoder_sparse_step=1),
    "qwen3": _row("Qwen3ForCausalLM"),
    "qwen3-moe": _row("Qwen3MoeForCausalLM"),
    "seed-oss": _row("SeedOssForCausalLM"),
    "smollm3": _row("SmolLM3ForCausalLM"),
    "stablelm": _row("StableLmForCausalLM"),
    "starcoder2": _row("Starcoder2ForCausalLM"),
    "xglm": _row("XGLMForCausalLM"),
    "xlnet": _row("XLNetLMHeadModel"),
}
RECURRENT: dict[str, Row] = {
    "bamba": _row("BambaForCausalLM", attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, **_HYBRID),
    "falcon-mamba": _row("FalconMambaForCausalLM", state_size=8),
    "jamba": _row("JambaForCausalLM", attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, **_HYBRID),
    "mamba": _row("MambaForCausalLM", state_size=8),
    "mamba2": _row("Mamba2ForCausalLM", num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8),
    "recurrent-gemma": _row("RecurrentGemmaForCausalLM", block_types=["recurrent", "attention"], lru_width=WIDTH),
    "rwkv": _row("RwkvForCausalLM", context_length=POSITIONS),
}
ENCODERS: dict[str, Row] = {
    "albert": _row("AlbertForMaskedLM", embedding_size=16),
    "bert": _row("BertForMaskedLM"),
    "big-bird": _row("BigBirdForMaskedLM", attention_type="original_full"),
    "camembert": _row("CamembertForMaskedLM"),
    "canine": _row(
        "CanineModel",
        max_position_embeddings=128,
        num_hash_buckets=VOCABULARY,
        local_transformer_stride=32,
        num_hash_functions=4,
    ),
    "convbert": _row("ConvBertForMaskedLM"),
    "data2vec-text": _row("Data2VecTextForMaskedLM"),
    "deberta": _row("DebertaForMaskedLM", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": _row("DebertaV2ForMaskedLM", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "distilbert": _row("DistilBertForMaskedLM", hidden_dim=INNER),
    "electra": _row("ElectraForMaskedLM", embedding_size=16),
    "ernie": _row("ErnieForMaskedLM"),
    "esm": _row("EsmForMaskedLM", mask_token_id=4),
    "flaubert": _row("FlaubertWithLMHeadModel"),
    "fnet": _row("FNetForMaskedLM"),
    # Without a padding's number: transformers empties that row whenever it loads a Funnel, and the first normalisation
    # (ε 1e-9) makes much of a row that is zeros but for the rounding of its cores.
    "funnel": _row("FunnelForMaskedLM", block_sizes=[1, 1], pad_token_id=None),
    "ibert": _row("IBertForMaskedLM"),
    "longformer": _row("LongformerForMaskedLM", attention_window=8),
    "luke": _row("LukeForMaskedLM", entity_vocab_size=20, entity_emb_size=16),
    "megatron-bert": _row("MegatronBertForMaskedLM"),
    "mobilebert": _row("MobileBertForMaskedLM", intra_bottleneck_size=16, embedding_size=16),
    "modernbert": _row("ModernBertForMaskedLM"),
    "mpnet": _row("MPNetForMaskedLM"),
    "nystromformer": _row("NystromformerForMaskedLM", num_landmarks=LENGTH, segment_means_seq_len=LENGTH),
    "reformer": _row(
        "ReformerForMaskedLM",
        attn_layers=["local", "lsh"],
        axial_pos_shape=[8, 8],
        axial_pos_embds_dim=[16, 16],
        feed_forward_size=INNER,
        local_attn_chunk_length=8,
        lsh_attn_chunk_length=8,
        num_buckets=2,
        hash_seed=0,
    ),
    "rembert": _row("RemBertForMaskedLM", input_embedding_size=16, output_embedding_size=24),
    "roberta": _row("RobertaForMaskedLM"),
    "roformer": _row("RoFormerForMaskedLM"),
    "squeezebert": _row("SqueezeBertForMaskedLM"),
    "xlm": _row("XLMWithLMHeadModel"),
    "xlm-roberta": _row("XLMRobertaForMaskedLM"),
    "xmod": _row("XmodForMaskedLM", languages=["en_XX"], default_language="en_XX"),
    "yoso": _row("YosoForMaskedLM"),
}
ENCODER_DECODERS: dict[str, Row] = {
    "bart": _row("BartForConditionalGeneration"),
    "bigbird-pegasus": _row("BigBirdPegasusForConditionalGeneration", attention_type="original_full"),
    "blenderbot": _row("BlenderbotForConditionalGeneration"),
    "fsmt": _row("FSMTForConditionalGeneration", src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY),
    "led": _row(
        "LEDForConditionalGeneration",
        attention_window=8,
        max_encoder_position_embeddings=POSITIONS,
        max_decoder_position_embeddings=POSITIONS,
    ),
    "longt5": _row("LongT5ForConditionalGeneration", local_radius=8, **_T5),
    "m2m-100": _row("M2M100ForConditionalGeneration"),
    "marian": _row("MarianMTModel"),
    "mbart": _row("MBartForConditionalGeneration"),
    "mt5": _row("MT5ForConditionalGeneration", **_T5),
    "nllb-moe": _row("NllbMoeForConditionalGeneration", encoder_sparse_step=2, decoder_sparse_step=2),
    "pegasus": _row("PegasusForConditionalGeneration"),
    "plbart": _row("PLBartForConditionalGeneration"),
    "prophetnet": _row("ProphetNetForConditionalGeneration"),
    "switch": _row("SwitchTransformersForConditionalGeneration", **_T5),
    "t5": _row("T5ForConditionalGeneration", **_T5),
    "umt5": _row("UMT5ForConditionalGeneration", **_T5),
}
OTHERS: dict[str, Row] = {
    "blip": _row(
        "BlipForConditionalGeneration",
        image_and_text,
        text_config=small("BlipTextConfig", encoder_hidden_size=WIDTH),
        vision_config=small("BlipVisionConfig"),
        image_text_hidden_size=16,
    ),
    "clip": _row(
        "CLIPModel", image_and_text, text_config=small("CLIPTextConfig"), vision_config=small("CLIPVisionConfig")
    ),
    "deit": _row("DeiTForImageClassification", image),
    "gemma3-multimodal": _row(
        "Gemma3ForConditionalGeneration",
        image_in_text,
        text_config=small("Gemma3TextConfig"),
        vision_config=small("SiglipVisionConfig"),
        mm_tokens_per_image=4,
        image_token_index=3,
        boi_token_index=4,
        eoi_token_index=1,
    ),
    "hubert": _row("HubertForCTC", sound, **_SPEECH),
    "llava": _row(
        "LlavaForConditionalGeneration",
        image_in_text,
        text_config=small("LlamaConfig"),
        vision_config=small("CLIPVisionConfig"),
        image_token_index=3,
    ),
    "paligemma": _row(
        "PaliGemmaForConditionalGeneration",
        image_in_text,
        text_config=small("GemmaConfig"),
        vision_config=small("SiglipVisionConfig"),
        image_token_index=3,
    ),
    "siglip": _row(
        "SiglipModel",
        image_and_text,
        text_config=small("SiglipTextConfig", max_position_embeddings=LENGTH),
        vision_config=small("SiglipVisionConfig"),
    ),
    "vit": _row("ViTForImageClassification", image),
    "wav2vec2": _row("Wav2Vec2ForCTC", sound, **_SPEECH),
    "whisper": _row(
        "WhisperForConditionalGeneration",
        spectrogram,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        begin_suppress_tokens=None,
    ),
}
CLASSIFIERS: dict[str, Row] = {
    "bart-classifier": _row("BartForSequenceClassification"),
    "bert-classifier": _row("BertForSequenceClassification"),
    "deberta-v2-classifier": _row("DebertaV2ForSequenceClassification", relative_attention=True),
    "gpt2-classifier": _row("GPT2ForSequenceClassification"),
    "llama-classifier": _row("LlamaForSequenceClassification"),
    "modernbert-classifier": _row("ModernBertForSequenceClassification"),
    "roberta-classifier": _row("RobertaForSequenceClassification"),
    "t5-classifier": _row("T5ForSequenceClassification", **_T5),
}
FAMILIES = DECODERS | RECURRENT | ENCODERS | ENCODER_DECODERS | OTHERS | CLASSIFIERS


def save(row: Row, directory: Path) -> None:
    """A row's model, random from a fixed seed, as any user would save it, and a tokenizer where it reads text."""
    made = config(row.model_class.config_class, **row.odd)
    prepared(lambda: row.model_class(made), directory, torch.float32)
    if row.text:
        kind = "t5" if made.is_encoder_decoder else "bert" if row.cls.endswith("MaskedLM") else "gpt2"
        tokenizer(kind).save_pretrained(directory)


@torch.no_grad()
def outputs(row: Row, model: Any) -> list[Tensor]:
    """Everything that a model puts out on its row's input, tensor by tensor; the same for the same weights."""
    torch.manual_seed(0)  # of hashes and masks that some draw even in evaluation
    inputs = row.feed(model, torch.Generator().manual_seed(7))
    found = model(**inputs, return_dict=True)
    return [value for value in found.values() if isinstance(value, Tensor) and value.is_floating_point()]
