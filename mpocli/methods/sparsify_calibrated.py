"""One-shot pruning that looks at activations: Wanda and SparseGPT, block by block through a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mpocli.errors import InputError, UsageError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.calibration import Inputs, sequential
from mpocli.hf.skeleton import build_skeleton
from mpocli.methods.sparsify_config import Calibration, SparsifyConfig
from mpocli.methods.sparsify_plan import Target
from mpocli.methods.task_data import positions, prepare
from mpocli.mpo.linalg import check_finite
from mpocli.nn import MPOModule
from mpocli.sparse import rowwise_mask
from mpocli.sparse.one_shot import core_gram, sparsegpt, wanda_scores
from mpocli.train.data import read_text
from mpocli.train.encode import collate, lm_windows, pad_id
from mpocli.train.models import family_of, load_tokenizer
from mpocli.train.tasks import task_named

Progress = Callable[[int, int, str], None]
Batches = list[dict[str, Tensor]]
_BATCH = 8


def prune_by_activations(
    checkpoint: Checkpoint,
    config: SparsifyConfig,
    targets: Sequence[Target],
    device: torch.device,
    *,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> dict[str, Tensor]:
    """The pruned tensors by name, as their modules store them, in float32.

    Blocks are pruned in the order of execution, each from the outputs of those that were pruned before it. Raises
    `InputError` for text or a model that cannot be used.
    """
    assert config.calibration is not None
    batches = calibration_batches(checkpoint, config)
    rows = sum(len(batch["input_ids"]) for batch in batches)
    if rows < config.calibration.samples:
        warn(f"--samples {config.calibration.samples}: {config.calibration.source} gives {rows}")
    for target in targets:  # a broken weight is told as such, and not by what it makes of activations
        check_finite(checkpoint.reader.read(target.key), target.key)
    cls: Any = type(build_skeleton(checkpoint.config, trust_remote_code=checkpoint.trust_remote_code))
    model = cls.from_pretrained(checkpoint.source.directory, dtype=torch.float32).to(device).eval()
    # What a decoder reads are the labels, shifted; others would only be turned into a loss.
    unread = () if checkpoint.config.is_encoder_decoder else ("labels",)
    batches = [{key: value.to(device) for key, value in batch.items() if key not in unread} for batch in batches]
    by_module = {target.module: target for target in targets}
    pruned: dict[str, Tensor] = {}
    short: tuple[int, str] | None = None

    def visit(name: str, module: nn.Module, inputs: Inputs) -> None:
        nonlocal short
        target = by_module[name]
        parameter = getattr(module, target.leaf)
        gram, norms = inputs.gram, inputs.squared_norms
        if isinstance(module, MPOModule):
            assert gram is not None
            right = [core.detach() for core in module.cores[module.central + 1 :]]
            gram = core_gram(right, gram, module.sites.in_dims, module.central)
            norms = gram.diagonal()
        inputs_of = len(inputs.squared_norms)
        if inputs.tokens < inputs_of and (short is None or inputs_of > short[0]):
            short = inputs_of, f"{name}: {inputs.tokens} calibration tokens for {inputs_of} inputs"
        matrix = target.matrix(parameter.detach())
        with torch.no_grad():
            made = target.stored(_pruned(matrix, norms, gram, config))
            parameter.copy_(made)
        pruned[target.name] = made.cpu()
        if progress:
            progress(len(pruned), len(targets), target.name)

    gram = config.method == "sparsegpt" or any(target.layout == "core" for target in targets)
    sequential(model, batches, list(by_module), visit, gram=gram)
    if short is not None:
        warn(f"{short[1]}: raise --samples or --seq-len")
    return pruned


def _pruned(matrix: Tensor, norms: Tensor, gram: Tensor | None, config: SparsifyConfig) -> Tensor:
    if config.method == "sparsegpt":
        assert gram is not None
        return sparsegpt(matrix, gram, config.sparsity, config.pattern)
    scores = wanda_scores(matrix, norms)
    in_rows = config.pattern.group is None
    mask = rowwise_mask(scores, config.sparsity) if in_rows else config.pattern.mask(scores, 0)
    return torch.where(mask, matrix, matrix.new_zeros(()))


def calibration_batches(checkpoint: Checkpoint, config: SparsifyConfig) -> Batches:
    """`samples` windows of the text drawn by the seed, or with a task so many of its examples, with padding masks."""
    chosen, seed = config.calibration, config.optimisation.seed
    assert chosen is not None
    if config.data is not None and config.data.task != "lm":
        data = prepare(checkpoint, replace(config.data, train=chosen.source, eval=(), test=None), needs_train=True)
        batches = data.sample(_BATCH, -(-chosen.samples // _BATCH), seed, torch.device("cpu"))
        room = chosen.samples - _BATCH * (len(batches) - 1)
        return [*batches[:-1], {key: value[:room] for key, value in batches[-1].items()}]
    return _text_batches(checkpoint, chosen, config, seed)


def _text_batches(checkpoint: Checkpoint, chosen: Calibration, config: SparsifyConfig, seed: int) -> Batches:
    tokenizer_name = config.data.tokenizer if config.data else None
    tokenizer = load_tokenizer(
        checkpoint.source.directory, tokenizer_name, trust_remote_code=checkpoint.trust_remote_code
    )
    column = config.data.text_columns[0] if config.data and config.data.text_columns else None
    text = read_text(chosen.source, text_column=column)
    model_config = checkpoint.config
    is_seq2seq = bool(model_config.is_encoder_decoder)
    most = positions(model_config)
    if most is not None and chosen.seq_len > most * (1 + is_seq2seq):
        raise UsageError(
            f"--seq-len {chosen.seq_len}: the model has {most} positions"
            + (" for each half of a window" if is_seq2seq else ""),
            hint=f"at most {most * (1 + is_seq2seq)}",
        )
    masked = is_seq2seq or family_of(task_named("lm"), model_config) == "masked"
    windows = [ids for ids in lm_windows(text, tokenizer, chosen.seq_len, masked=masked).ids if len(ids) > 1]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [windows[index] for index in order[: chosen.samples]]
    if not rows:
        raise InputError(f"--calibrate {chosen.source}: no window of text in it", hint="name a longer text")
    features = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    if is_seq2seq:  # one half is read, the other written
        halves = [(row[: len(row) // 2], row[len(row) // 2 :]) for row in rows]
        features = [{"input_ids": a, "attention_mask": [1] * len(a), "labels": b} for a, b in halves]
    batches = [features[first : first + _BATCH] for first in range(0, len(features), _BATCH)]
    return [collate(batch, pad_id(tokenizer)) for batch in batches]
