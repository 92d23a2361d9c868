"""How far two checkpoints agree on the same data."""

from __future__ import annotations

import torch

from mpocli.errors import InputError
from mpocli.methods.data.task import TaskData
from mpocli.methods.evaluate.measurement import Measurement
from mpocli.nn.logits import kl
from mpocli.progress import Progress
from mpocli.train.evaluate.predict import Run, window_logits
from mpocli.train.models import vocabulary_of


def check_comparable(a: TaskData, b: TaskData, model: str, baseline: str) -> None:
    if a.family != b.family:
        raise InputError(f"{model} does the task as {a.family}, {baseline} as {b.family}", hint="compare equal kinds")
    if a.label_names != b.label_names:
        raise InputError(
            f"{model} has {len(a.label_names)} labels, {baseline} {len(b.label_names)} or others",
            hint="compare checkpoints of one task",
        )


def agreement(own: Measurement, other: Measurement, progress: Progress | None) -> dict[str, float]:
    data = own.data
    if data.task.kind == "lm":
        return _token_agreement(own, other, progress)
    if data.task.kind == "text2text":
        pairs = [pair for a, b in zip(own.runs, other.runs, strict=True) for pair in zip(a.texts, b.texts, strict=True)]
        return {"equal_texts": sum(a == b for a, b in pairs) / len(pairs)}
    ours = torch.cat([run.scores for run in own.runs if run.scores is not None]).double()
    theirs = torch.cat([run.scores for run in other.runs if run.scores is not None]).double()
    if data.task.kind == "regression":
        from mpocli.train.evaluate.metrics import compute

        correlation = compute(data.task, ours.tolist(), theirs.tolist())
        return {"pearson": correlation["pearson"], "mean_abs_difference": float((ours - theirs).abs().mean())}
    equal = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    return {"labels": float(equal), "kl_nats": float(kl(theirs, ours).mean())}


def _token_agreement(own: Measurement, other: Measurement, progress: Progress | None) -> dict[str, float]:
    """Both models once more, side by side: logits over a vocabulary are too large to keep.

    Without a divergence where one of them has more logits than the tokenizer has tokens, and the other has not.
    """
    equal = total = 0
    divergence = 0.0
    ours, theirs = own.load(), other.load()
    sizes = {vocabulary_of(model.config) for model in (ours, theirs)}
    for found, counterpart in zip(own.data.eval, other.data.eval, strict=True):
        windows, others = found.windows, counterpart.windows
        if windows is None or others is None or windows.ids != others.ids:
            return {}  # another tokenizer: nothing to compare token by token

        def tell(done: int, count: int) -> None:
            if progress:
                progress(done, count, "comparing")

        said = [
            window_logits(
                model,
                measured.data.vocabulary,
                windows,
                measured.data.family,
                Run(),
                batch_size=own.options.eval_batch_size,
                precision=own.options.precision,
                width=max(sizes),
                progress=tell if measured is own else None,
            )
            for model, measured in ((ours, own), (theirs, other))
        ]
        for (a, targets), (b, _) in zip(*said, strict=True):
            equal += int((a.argmax(-1) == b.argmax(-1)).sum())
            total += len(targets)
            if len(sizes) == 1:
                divergence += float(kl(b, a).double().sum())
    told = {"tokens": equal, "kl_nats": divergence} if len(sizes) == 1 else {"tokens": equal}
    return {name: value / total for name, value in told.items()}
