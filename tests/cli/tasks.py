"""Tiny models with tokenizers, and task files that they can learn, for `finetune` and `eval`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>"]
GOOD = ["lovely", "bright", "superb", "warm", "witty", "charming"]
BAD = ["dull", "awful", "tedious", "cold", "clumsy", "hollow"]
FILLERS = [f"{a}{b}" for a in ("ta", "ro", "mi", "se", "ku") for b in ("la", "ne", "po", "di", "fu", "gan")]
WORDS = [*SPECIALS, *GOOD, *BAD, *FILLERS, "name", "food", "is", "a", "|", ",", "[", "]", ".", "|"]
VOCABULARY = list(dict.fromkeys(WORDS))
POSITIONS = 48
ENDING = {"bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"), "t5": ("$A </s>", "$A $B </s>")}


def tokenizer(kind: str) -> Any:
    """One token a word; BERT's template, T5's ending, or for `gpt2` neither."""
    backend = Tokenizer(tokenizer_models.WordLevel({word: k for k, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if kind in ENDING:
        special = [(token, VOCABULARY.index(token)) for token in ("[CLS]", "[SEP]", "</s>")]
        backend.post_processor = processors.TemplateProcessing(
            single=ENDING[kind][0], pair=ENDING[kind][1], special_tokens=special
        )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"} if kind == "bert" else {}
    names |= {} if kind == "bert" else {"eos_token": "</s>"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if kind == "bert" else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **names)


def save(kind: str, directory: Path, *, cls: Any = None, seed: int = 0, layers: int = 1, **config: Any) -> Path:
    """A random model of that kind with its tokenizer: the body of a BERT where no class is named."""
    size, eos = len(VOCABULARY), VOCABULARY.index("</s>")
    if kind == "bert":
        options = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        options |= {"num_hidden_layers": layers, "max_position_embeddings": POSITIONS}
        made: Any = tf.BertConfig(vocab_size=size, **{**options, **config})
        cls = cls or tf.BertModel
    elif kind == "gpt2":
        options = {"n_embd": 32, "n_head": 2, "n_layer": layers, "n_positions": POSITIONS}
        made = tf.GPT2Config(vocab_size=size, bos_token_id=eos, eos_token_id=eos, **{**options, **config})
        cls = cls or tf.GPT2LMHeadModel
    else:
        options = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": layers, "num_heads": 2}
        made = tf.T5Config(vocab_size=size, eos_token_id=eos, decoder_start_token_id=0, **{**options, **config})
        cls = cls or tf.T5ForConditionalGeneration
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cls(made).save_pretrained(directory)
    tokenizer(kind).save_pretrained(directory)
    return directory


def sentiment(path: Path, rows: int, seed: int) -> Path:
    """SST-2's columns: a sentence of three to fourteen words, one or two of which tell its label."""
    draw = random.Random(seed)
    lines = ["sentence\tlabel"]
    for row in range(rows):
        words = draw.choices(FILLERS, k=draw.randint(2, 12)) + draw.choices((BAD, GOOD)[row % 2], k=draw.randint(1, 2))
        draw.shuffle(words)
        lines.append(f"{' '.join(words)}\t{row % 2}")
    path.write_text("\n".join(lines) + "\n")
    return path


def similarity(path: Path, rows: int, seed: int) -> Path:
    """STS-B's columns: the score is five times the share of good words in the second sentence."""
    draw = random.Random(seed)
    lines = ["sentence1\tsentence2\tscore"]
    for _ in range(rows):
        good = draw.randint(0, 4)
        second = draw.choices(GOOD, k=good) + draw.choices(BAD, k=4 - good)
        lines.append(f"{' '.join(draw.choices(FILLERS, k=3))}\t{' '.join(second)}\t{good * 1.25}")
    path.write_text("\n".join(lines) + "\n")
    return path


def prose(path: Path, lines: int, seed: int) -> Path:
    """Lines of words, each of which is likely to follow the one before it."""
    draw = random.Random(seed)
    made = []
    for _ in range(lines):
        place = draw.randrange(len(FILLERS))
        words = []
        for _ in range(draw.randint(3, 9)):
            words.append(FILLERS[place])
            place = (place + draw.choice((1, 1, 1, 7))) % len(FILLERS)
        made.append(" ".join(words) + " .")
    path.write_text("\n".join(made) + "\n")
    return path


def restaurants(path: Path, rows: int, seed: int) -> Path:
    """E2E's columns: what the sentence has to say, two references for every second meaning."""
    draw = random.Random(seed)
    lines = ["mr,ref"]
    for row in range(rows):
        name, food = draw.choice(FILLERS), draw.choice(FILLERS)
        meaning = f'"name[{name}], food[{food}]"'
        lines.append(f"{meaning},{name} is a {food} .")
        if row % 2:
            lines.append(f"{meaning},{food} is {name} .")
    path.write_text("\n".join(lines) + "\n")
    return path


def logged(directory: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def signalled(step: int, *signals: str) -> str:
    """For `Server.run`'s `before`: the process signals itself as it begins to compute a step, counted in this run."""
    return f"""
import os, signal
from mpocli.train.loop.trainer import SegmentTrainer
whole, calls = SegmentTrainer.training_step, []
def training_step(self, *args, **kwargs):
    calls.append(self.state.global_step)
    for name in {signals!r} if len(calls) == {step} else ():
        os.kill(os.getpid(), getattr(signal, name))
    return whole(self, *args, **kwargs)
SegmentTrainer.training_step = training_step
"""
