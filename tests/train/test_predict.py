"""What a model is asked and told is a function of the data and a seed, not of batches, ranks or class numbering."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import tokenizers
import torch
import transformers as tf

from mpocli.config.data import DataOptions
from mpocli.config.optimisation import Optimisation
from mpocli.errors import InputError, UsageError
from mpocli.hf.artifact import Checkpoint
from mpocli.methods.data.collator import Collator
from mpocli.methods.data.scoring import evaluate
from mpocli.methods.data.task import prepare
from mpocli.train.data.collate import IGNORE, collate
from mpocli.train.data.vocabulary import Vocabulary
from mpocli.train.evaluate.predict import mask_tokens
from mpocli.train.loop.distill import Distillation
from mpocli.train.loop.report_to import check_report_to
from mpocli.train.loop.sampler import ByLength
from mpocli.train.loop.schedule import Schedule
from mpocli.train.loop.trainer import SegmentTrainer
from mpocli.train.loop.updates import set_update

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{k}" for k in range(40))]
CLASSES = ("contradiction", "neutral", "entailment")  # roberta-large-mnli's order, not GLUE's


def tokenizer() -> tf.PreTrainedTokenizerFast:
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", **names)


def classifier(directory: Path, names: tuple[str, ...], says: int) -> Path:
    """A head that always tells the same class."""
    config = tf.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        id2label=dict(enumerate(names)),
        label2id={name: k for k, name in enumerate(names)},
    )
    model = tf.BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.eye(len(names))[says])
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def accuracy(directory: Path, task: str, file: Path) -> float:
    checkpoint = Checkpoint.open(str(directory))
    options = DataOptions(task=task, eval=(str(file),), max_length=16)
    data = prepare(checkpoint, options)
    model = tf.AutoModelForSequenceClassification.from_pretrained(directory)
    return evaluate(model, data, options)["accuracy"]


# --- class numbering --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbered", [False, True])
def test_a_head_that_numbers_the_classes_otherwise_is_judged_by_their_names(tmp_path: Path, numbered: bool) -> None:
    directory = classifier(tmp_path / "model", CLASSES, says=2)
    rows = ["0" if numbered else "entailment"] * 3 + ["2" if numbered else "contradiction"]
    file = tmp_path / "dev.tsv"
    file.write_text("sentence1\tsentence2\tgold_label\n" + "".join(f"w1 w2\tw3\t{label}\n" for label in rows))
    assert accuracy(directory, "mnli", file) == 0.75


def test_a_head_without_names_has_the_task_s_order_and_a_foreign_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "dev.tsv"
    file.write_text("sentence\tlabel\nw1 w2\t1\nw3\t0\nw4\t1\n")
    assert accuracy(classifier(tmp_path / "a", ("LABEL_0", "LABEL_1"), says=1), "sst2", file) == pytest.approx(2 / 3)
    with pytest.raises(InputError, match=r"tells cat, dog; task sst2 has negative, positive"):
        accuracy(classifier(tmp_path / "b", ("cat", "dog"), says=1), "sst2", file)


# --- what is hidden from a masked model -------------------------------------------------------------------------------


def _features(count: int) -> list[dict[str, object]]:
    return [{"input_ids": [2, *range(5, 8 + k), 3], "attention_mask": [1] * (5 + k), "index": k} for k in range(count)]


def test_a_row_s_mask_is_the_same_in_every_batch() -> None:
    features = _features(12)
    together = collate(features, 0)
    labels = mask_tokens(together, Vocabulary(tokenizer()), range(100, 112))
    for k, feature in enumerate(features):
        alone = collate([feature], 0)
        own = mask_tokens(alone, Vocabulary(tokenizer()), [100 + k])[0]
        length = len(feature["input_ids"])  # type: ignore[arg-type]
        assert torch.equal(own, labels[k, :length])
        assert torch.equal(alone["input_ids"][0], together["input_ids"][k, :length])
        assert bool((labels[k, length:] == IGNORE).all())


def test_masks_hide_15_percent_at_least_one_and_never_special_tokens() -> None:
    ids = [2, *([7] * 400), 3]
    features = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for _ in range(50)]
    batch = collate(features, 0)
    labels = mask_tokens(batch, Vocabulary(tokenizer()), range(50))
    asked = labels != IGNORE
    assert 0.14 < float(asked[:, 1:-1].float().mean()) < 0.16
    assert not bool(asked[:, 0].any() or asked[:, -1].any())
    hidden = batch["input_ids"][asked]
    assert 0.78 < float((hidden == 4).float().mean()) < 0.82
    assert 0.08 < float((hidden == 7).float().mean()) < 0.13  # 10 % stay, and a random one may hit
    short = collate([{"input_ids": [2, 9, 3], "attention_mask": [1] * 3}], 0)
    assert mask_tokens(short, Vocabulary(tokenizer()), [0]).tolist() == [[IGNORE, 9, IGNORE]]


def test_training_masks_change_with_the_epoch_and_come_back_with_it() -> None:
    collator = Collator(Vocabulary(tokenizer()), True, seed=1)
    first = collator(_features(8))
    collator.epoch = 1
    second = collator(_features(8))
    collator.epoch = 0
    assert not torch.equal(first["labels"], second["labels"])
    assert torch.equal(first["labels"], collator(_features(8))["labels"])


# --- splits, limits, what is refused before the work ------------------------------------------------------------------


def test_a_hub_data_set_without_a_split_is_evaluated_on_its_validation_split(tmp_path: Path, monkeypatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"sentence": ["w1", "w2"], "label": [0, 1]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    checkpoint = Checkpoint.open(str(classifier(tmp_path / "m", ("LABEL_0", "LABEL_1"), says=1)))
    source = "nyu-mll/glue:sst2"
    prepare(checkpoint, DataOptions("sst2", source, (source,), source, max_length=16), needs_train=True)
    assert [split for _, _, split in asked] == ["train", "validation", "test"]
    asked.clear()
    prepare(checkpoint, DataOptions("sst2", eval=(f"{source}:validation[:50%]",), max_length=16))
    assert asked == [("nyu-mll/glue", "sst2", "validation[:50%]")]


def test_prompt_and_answer_must_fit_into_a_decoder_s_positions(tmp_path: Path) -> None:
    config = tf.GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=32)
    tf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "dev.csv"
    file.write_text("mr,ref\nw1,w2\n")
    with pytest.raises(UsageError, match=r"--max-length 16 and --max-new-tokens 20: the model has 32 positions"):
        prepare(Checkpoint.open(str(tmp_path)), DataOptions("e2e", eval=(str(file),), max_length=16, max_new_tokens=20))


def test_a_reporter_that_is_unknown_is_refused() -> None:
    with pytest.raises(UsageError, match="nosuch"):
        check_report_to(["nosuch"])
    check_report_to([])


# --- losses -----------------------------------------------------------------------------------------------------------


def test_a_causal_teacher_is_heard_at_the_places_that_predict_the_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 5, 7, generator=generator) for _ in range(2))
    labels = torch.tensor([[IGNORE, IGNORE, 3, 4, IGNORE]])  # predicted at places 1 and 2

    class Teacher(torch.nn.Module):
        config = SimpleNamespace(is_encoder_decoder=False)

        def forward(self, **_: object) -> SimpleNamespace:
            return SimpleNamespace(logits=teacher)

    distillation = Distillation(Teacher(), weight=1.0, temperature=1.0, next_token=True)
    loss = distillation.loss(torch.tensor(0.0), SimpleNamespace(logits=student), {"labels": labels})
    p, q = teacher[0, 1:3].softmax(-1), student[0, 1:3].softmax(-1)
    assert float(loss) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)


def test_what_a_model_froze_itself_stays_frozen() -> None:
    model = tf.BertModel(tf.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    model.embeddings.position_embeddings.weight.requires_grad_(False)
    set_update(model, "all")
    assert not model.embeddings.position_embeddings.weight.requires_grad
    assert model.pooler.dense.weight.requires_grad


def test_resuming_reads_what_saving_renamed(tmp_path: Path) -> None:
    """A mixture of experts is stored expert by expert and held fused: a plain state dict would lose them."""
    config = tf.MixtralConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    saved = tf.MixtralForCausalLM(config)
    saved.save_pretrained(tmp_path / "checkpoint-1")
    model = tf.MixtralForCausalLM(config)
    features = [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": [1, 2, 3]}]
    trainer = SegmentTrainer(
        model,
        features,
        lambda batch: collate(batch, 0),
        Optimisation(batch_size=1),
        Schedule(1, 0),
        1,
        tmp_path,
        device=torch.device("cpu"),
        next_token=True,
    )
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    for (name, a), (_, b) in zip(saved.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_sampler_hears_of_epochs_whatever_wraps_it(tmp_path: Path) -> None:
    seen = []

    class Watching(ByLength):
        def __iter__(self):
            seen.append(self.epoch)
            return super().__iter__()

    model = tf.BertForSequenceClassification(
        tf.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    features = [{"input_ids": [5 + k, 6], "attention_mask": [1, 1], "labels": k % 2} for k in range(8)]
    trainer = SegmentTrainer(
        model,
        features,
        lambda batch: collate(batch, 0),
        Optimisation(batch_size=4),
        Schedule(6, 0),
        6,
        tmp_path,
        device=torch.device("cpu"),
    )
    trainer.sampler.__class__ = Watching
    trainer.train()
    assert seen == [0, 1, 2]
