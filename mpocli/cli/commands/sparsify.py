"""`mpocli sparsify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mpocli.cli import options
from mpocli.cli import task_options as task_
from mpocli.cli import train_options as train_
from mpocli.cli.options import at_least, check_finite, one_of, parse_bytes, parse_layers, share_of
from mpocli.errors import InputError, UsageError
from mpocli.modes import ALWAYS, Condition, excludes, needs

if TYPE_CHECKING:
    from mpocli.methods.calibration_data import Calibration
    from mpocli.methods.sparsify import SparsifyReport
    from mpocli.nn.masked import Scoring
    from mpocli.sparse import Pattern

WHAT = "What to prune"
PST = "PST: what is learnt"
WHEN = "How sparsity rises in training"
LOOK = "wanda, sparsegpt: what to look at"
TASKED = needs("--task")
TRAINED = needs("--train", why="nothing is trained")
MEASURED = needs("--eval", "--test", why="nothing is measured")
TRAINED_OR_MEASURED = needs("--train", "--eval", "--test", why="nothing is trained or measured")
CALIBRATED = needs("--calibrate", why="there is nothing to look at")
LEARNT = needs("--method pst", why="it learns no such thing")
SCORED = needs("--method pst", "--method movement", why="it has no scores")
_GROUPED = Condition("--pattern", test=lambda pattern: pattern != "unstructured")


def command(
    model: options.Model,
    sparsity: Annotated[
        float | None,
        typer.Option(
            "--sparsity",
            "-s",
            parser=share_of("--sparsity"),
            metavar="X",
            help="Zeros / entries. Default: 0.9, or N:M's.",
            rich_help_panel=WHAT,
        ),
        ALWAYS,
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="HOW",
            help="pst, movement (both trained), magnitude (trained or not), wanda, sparsegpt.",
            rich_help_panel=WHAT,
        ),
        ALWAYS,
    ] = "pst",
    pattern: Annotated[
        str,
        typer.Option("--pattern", metavar="WHAT", help="unstructured, 2:4, 4:8 or any N:M.", rich_help_panel=WHAT),
        ALWAYS,
    ] = "unstructured",
    scope: Annotated[
        str,
        typer.Option("--scope", metavar="WHAT", help="A threshold for each matrix, or global.", rich_help_panel=WHAT),
        excludes("--method wanda", "--method sparsegpt", _GROUPED, of=("global",), why="it compares inside rows"),
    ] = "matrix",
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers", metavar="ROLE,…", help="Of which roles. Default: attention,ffn.", rich_help_panel=WHAT
        ),
        ALWAYS,
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="GLOB", help="Modules by name. Repeatable.", rich_help_panel=WHAT),
        ALWAYS,
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", metavar="GLOB", help="Modules to leave out. Repeatable.", rich_help_panel=WHAT),
        ALWAYS,
    ] = None,
    out: options.Out = None,
    storage: Annotated[
        str, typer.Option("--storage", metavar="HOW", help="bitmask, or dense: zeros that any loader reads."), ALWAYS
    ] = "bitmask",
    task: Annotated[task_.TaskName, needs("--train", "--eval", "--test", "--calibrate")] = None,
    train: Annotated[
        task_.Train,
        TASKED,
        excludes(
            "--method wanda",
            "--method sparsegpt",
            why="it needs no training",
            hint="leave --train out; mpocli finetune keeps the zeros afterwards",
        ),
    ] = None,
    evaluate: Annotated[task_.Eval, TASKED] = None,
    test: Annotated[task_.Test, TASKED] = None,
    text_column: Annotated[task_.TextColumn, TASKED] = None,
    label_column: Annotated[task_.LabelColumn, TASKED] = None,
    limit: Annotated[task_.Limit, TRAINED] = None,
    max_length: Annotated[
        task_.MaxLength, needs("--train", "--eval", "--test", task_.ROWS_OF_TASK, why="windows take --seq-len")
    ] = 128,
    tokenizer: Annotated[task_.Tokenizer, TASKED] = None,
    calibrate: Annotated[
        str | None,
        typer.Option("--calibrate", metavar="DATA", help="Text; with --task rows of that task.", rich_help_panel=LOOK),
        needs("--method wanda", "--method sparsegpt", why="it looks at no activations"),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", help="Windows or rows of it.", rich_help_panel=LOOK), CALIBRATED
    ] = 128,
    seq_len: Annotated[
        int,
        typer.Option("--seq-len", metavar="N", help="Tokens per window.", rich_help_panel=LOOK),
        CALIBRATED,
        excludes(task_.ROWS_OF_TASK, why="rows are cut by --max-length"),
    ] = 256,
    initial_sparsity: Annotated[
        float,
        typer.Option(
            "--initial-sparsity",
            parser=share_of("--initial-sparsity"),
            metavar="X",
            help="At the first step.",
            rich_help_panel=WHEN,
        ),
        TRAINED,
    ] = 0.0,
    initial_warmup: Annotated[
        float,
        typer.Option(
            "--initial-warmup",
            parser=share_of("--initial-warmup"),
            metavar="X",
            help="Share of steps before.",
            rich_help_panel=WHEN,
        ),
        TRAINED,
    ] = 0.1,
    final_warmup: Annotated[
        float,
        typer.Option(
            "--final-warmup",
            parser=share_of("--final-warmup"),
            metavar="X",
            help="Share of steps after.",
            rich_help_panel=WHEN,
        ),
        TRAINED,
    ] = 0.3,
    weight_rank: Annotated[
        int,
        typer.Option("--weight-rank", metavar="N", help="Of the update U V; 0: W itself.", rich_help_panel=PST),
        LEARNT,
        TRAINED,
    ] = 8,
    weight_beta: Annotated[
        float, typer.Option("--weight-beta", metavar="X", help="Scale of U V.", rich_help_panel=PST), LEARNT, TRAINED
    ] = 1.0,
    mask_rank: Annotated[
        int,
        typer.Option("--mask-rank", metavar="N", help="Of the score A B; 0: none.", rich_help_panel=PST),
        LEARNT,
        TRAINED,
    ] = 8,
    mask_alpha1: Annotated[
        float, typer.Option("--mask-alpha1", metavar="X", help="Scale of A B.", rich_help_panel=PST), LEARNT, TRAINED
    ] = 1.0,
    mask_alpha2: Annotated[
        float,
        typer.Option("--mask-alpha2", metavar="X", help="Scale of R + C; 0: none.", rich_help_panel=PST),
        LEARNT,
        TRAINED,
    ] = 1.0,
    detach_magnitude: Annotated[
        bool, typer.Option("--detach-magnitude", help="No gradient through |W|.", rich_help_panel=PST), LEARNT, TRAINED
    ] = False,
    faithful: Annotated[
        bool,
        typer.Option("--faithful", help="Freeze the head, as the published code.", rich_help_panel=PST),
        LEARNT,
        TRAINED,
    ] = False,
    lr: Annotated[train_.Lr, TRAINED] = 1e-4,
    score_lr: Annotated[
        float | None,
        typer.Option("--score-lr", metavar="X", help="Of the scores. Default: --lr.", rich_help_panel=train_.HOW),
        TRAINED,
        SCORED,
    ] = None,
    epochs: Annotated[train_.Epochs, TRAINED] = 3.0,
    steps: Annotated[train_.StepCount, TRAINED] = None,
    batch_size: Annotated[train_.BatchSize, TRAINED] = 32,
    accumulation: Annotated[train_.Accumulation, TRAINED] = 1,
    warmup: Annotated[train_.Warmup, TRAINED] = 0.06,
    weight_decay: Annotated[train_.WeightDecay, TRAINED] = 0.0,
    clip: Annotated[train_.Clip, TRAINED] = 1.0,
    random_batches: Annotated[train_.RandomBatches, TRAINED] = False,
    gradient_checkpointing: Annotated[train_.GradientCheckpointing, TRAINED] = False,
    teacher: Annotated[train_.Teacher, TRAINED] = None,
    distill_weight: train_.DistillWeight = 0.5,
    temperature: train_.Temperature = 2.0,
    distill_hidden: train_.DistillHidden = False,
    precision: Annotated[task_.Precision, TRAINED_OR_MEASURED] = "auto",
    device: task_.Device = "auto",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of masks, samples, order and dropout."), ALWAYS] = 0,
    eval_batch_size: Annotated[task_.EvalBatch, MEASURED] = 64,
    max_new_tokens: Annotated[task_.NewTokens, MEASURED] = 96,
    log_steps: Annotated[train_.LogSteps, TRAINED] = 50,
    save_steps: Annotated[train_.SaveSteps, TRAINED] = None,
    report_to: Annotated[train_.ReportTo, TRAINED] = None,
    max_shard_size: options.ShardSize = "5GB",
    resume: Annotated[train_.Resume, TRAINED] = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Set most weights to zero, by training or at once, and store the others.

    Of an MPO checkpoint the central cores are pruned. Files hold one bit for every
    weight and the values that are left; mpocli merge makes them dense again.

    [bold]Examples[/bold]

      mpocli sparsify bert-sst2 --task sst2 --train train.tsv --eval dev.tsv

      mpocli sparsify gpt2 --method magnitude --sparsity 0.5

      mpocli sparsify gpt2 --method sparsegpt --sparsity 0.5 --calibrate wiki.txt
    """
    from mpocli.methods.sparsify_config import METHODS

    one_of("--method", method, METHODS)
    one_of("--scope", scope, ("matrix", "global"))
    one_of("--storage", storage, ("bitmask", "dense"))
    check_finite("--sparsity", sparsity)
    found = _pattern(pattern)
    roles = parse_layers(layers)
    train_.check_length(epochs, steps, save_steps)
    train_.check_distillation(distill_weight, temperature)
    train_.check_positive("--score-lr", score_lr)
    calibration = _calibration(calibrate, samples, seq_len)
    scoring = _scoring(
        method, weight_rank, weight_beta, mask_rank, mask_alpha1, mask_alpha2, detach_magnitude=detach_magnitude
    )
    data = None
    if task is not None:
        data = task_.data_options(
            task,
            train=train,
            evaluate=evaluate,
            test=test,
            text_column=text_column,
            label_column=label_column,
            limit=limit,
            max_length=max_length,
            eval_batch_size=eval_batch_size,
            max_new_tokens=max_new_tokens,
            tokenizer=tokenizer,
            precision=task_.precision_of(precision, device),
        )
    optimisation = train_.optimisation(
        update=None,
        lr=lr,
        mpo_lr=None,
        weight_decay=weight_decay,
        warmup=warmup,
        clip=clip,
        batch_size=batch_size,
        accumulation=accumulation,
        precision=precision,
        device=device,
        gradient_checkpointing=gradient_checkpointing,
        random_batches=random_batches,
        log_steps=log_steps,
        save_steps=save_steps,
        report_to=report_to,
        seed=seed,
    )

    from mpocli.cli import render
    from mpocli.hf import quiet
    from mpocli.methods import sparsify
    from mpocli.methods.sparsify_config import SparsifyConfig, check_options

    config = SparsifyConfig(
        sparsity=sparsity if sparsity is not None else found.sparsity or 0.9,
        method=method,  # type: ignore[arg-type]
        pattern=found,
        scope=scope,  # type: ignore[arg-type]
        layers=roles,
        targets=tuple(target or ()),
        ignore=tuple(ignore or ()),
        storage=storage,  # type: ignore[arg-type]
        data=data,
        calibration=calibration,
        optimisation=optimisation,
        scoring=scoring,
        score_lr=score_lr,
        epochs=epochs,
        steps=steps,
        initial_sparsity=initial_sparsity,
        initial_warmup=initial_warmup,
        final_warmup=final_warmup,
        faithful=faithful,
        teacher=teacher,
        distill_weight=distill_weight,
        temperature=temperature,
        distill_hidden=distill_hidden,
        max_shard_bytes=parse_bytes(max_shard_size, "--max-shard-size"),
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    check_options(config)
    from mpocli.methods.training.directory import training_directory

    destination = out or options.default_out(model, "sparse")
    if not resume:
        options.check_out_before_download(model, destination, overwrite=overwrite)
    bar = render.training_bar if config.trains else render.progress_bar
    try:
        with quiet.transformers(), bar("sparsify") as progress:
            report = sparsify.run(
                model, config, destination, overwrite=overwrite, resume=resume, progress=progress, warn=render.warn
            )
    except KeyboardInterrupt:
        kept = training_directory(destination)
        if kept.is_dir():
            render.err.print(f"checkpoints are kept in {kept}: go on with --resume")
        raise
    if not report.is_writer:
        return
    render.report("sparsify", report, lambda: _show(report), json=json)


def _pattern(text: str) -> Pattern:
    from mpocli.sparse import Pattern

    try:
        return Pattern.parse(text)
    except InputError as error:
        raise UsageError(f"--pattern {text!r} is not known", hint=error.hint) from error


def _calibration(source: str | None, samples: int, seq_len: int) -> Calibration | None:
    from mpocli.methods.calibration_data import Calibration

    at_least("--samples", samples, 1)
    at_least("--seq-len", seq_len, 2)
    return None if source is None else Calibration(source, samples, seq_len)


def _scoring(
    method: str,
    rank: int,
    beta: float,
    score_rank: int,
    alpha1: float,
    alpha2: float,
    *,
    detach_magnitude: bool,
) -> Scoring:
    from dataclasses import replace

    from mpocli.nn.masked import Scoring

    for option, number in (("--weight-rank", rank), ("--mask-rank", score_rank)):
        at_least(option, number, 0)
    for option, scale in (("--weight-beta", beta), ("--mask-alpha1", alpha1), ("--mask-alpha2", alpha2)):
        check_finite(option, scale)
    scoring = Scoring.of(method)
    if method != "pst":
        return scoring
    return replace(
        scoring,
        rank=rank,
        beta=beta,
        score_rank=score_rank,
        alpha1=alpha1,
        alpha2=alpha2,
        structured=alpha2 != 0,
        attached=not detach_magnitude,
    )


def _show(report: SparsifyReport) -> None:
    """What became sparse by role, the files, what was trained, and the metrics."""
    from mpocli.cli import render

    table = render.table("role", "pruned", "entries", "left", "sparsity", "dense", "stored")
    for role, tensors in render.by_role(report.tensors):
        entries, zeros = (sum(getattr(tensor, name) for tensor in tensors) for name in ("entries", "zeros"))
        table.add_row(
            role or "other",
            str(len(tensors)),
            f"{entries:,}",
            f"{entries - zeros:,}",
            f"{zeros / entries:.1%}",
            render.size(sum(tensor.dense_bytes for tensor in tensors)),
            render.size(sum(tensor.bytes for tensor in tensors)),
        )
    before, after = report.totals_before, report.totals
    table.add_section()
    left = f"{after.params - report.model_zeros:,}"
    sizes = render.size(before.bytes), render.size(after.bytes)
    table.add_row(
        "model", "", f"{after.params:,}", left, f"{report.model_zeros / after.params:.1%}", *sizes, style="bold"
    )
    render.show(table)
    for line in render.notes(report.kept):
        render.out.print(line, style="dim")
    cores = [tensor for tensor in report.tensors if "core_" in tensor.name.rpartition(".")[2]]
    if cores:
        others = len(report.tensors) - len(cores)
        line = f"the central cores of {len(cores)} MPOs" + (f" and {others} dense matrices" if others else "")
        render.out.print(f"pruned: {line}", style="dim")
    columns = [("before", report.metrics_before), ("after", report.metrics), ("test", report.test_metrics)]
    columns = [(title, found) for title, found in columns if found]
    if columns:
        metrics = render.table("metric", *(title for title, _ in columns))
        for name in columns[-1][1]:
            metrics.add_row(name, *(render.metric(found[name]) for _, found in columns))
        render.show(metrics)
    if report.trainable_by_kind:
        parts = ", ".join(f"{count:,} {kind}" for kind, count in report.trainable_by_kind.items())
        render.out.print(
            render.spans(
                "trained ",
                (f"{report.trainable_params:,}", "bold"),
                f" parameters for {report.steps:,} steps: {parts}",
            )
        )
        if report.method == "pst":
            share = report.trainable_params / report.dense_and_scores
            render.out.print(
                f"{share:.1%} of what movement pruning trains: the model, and a score for every pruned weight"
            )
    for line in report.warnings:
        render.err.print(line, style="yellow")
    for split, cut in (report.truncated or {}).items():
        if cut:
            render.err.print(f"{split}: {cut:,} examples were cut to --max-length", style="yellow")
    if report.resumed_from:
        render.err.print(f"resumed from step {report.resumed_from:,}")
    render.err.print(f"written to {report.out} in {report.seconds:.0f} s")
    line = f"load it with: import mpocli, transformers; transformers.{report.architecture}"
    render.err.print(f"{line}.from_pretrained({report.out!r})", style="dim")
