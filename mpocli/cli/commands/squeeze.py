"""`mpocli squeeze`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpocli.cli import options
from mpocli.cli import task_options as task_
from mpocli.cli import train_options as train_
from mpocli.cli.options import at_least, check_finite, one_of, parse_bytes, share_of
from mpocli.cli.train_options import HOW
from mpocli.errors import TargetNotMetError, UsageError
from mpocli.modes import ALWAYS, Condition, excludes, needs

if TYPE_CHECKING:
    from mpocli.methods.squeeze import SqueezeReport

WHEN = "When to stop"
WHICH = "Which bond, how far"
TRAINED = needs("--finetune-steps", why="nothing is trained")
TRAINED_OR_FELT = needs("--finetune-steps", "--order sensitivity", why="no training data is read")


def command(
    model: options.Model,
    task: task_.TaskName = None,
    train: task_.Train = None,
    evaluate: task_.Eval = None,
    test: task_.Test = None,
    out: options.Out = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            metavar="X",
            help="Stop when the task's main metric is worse by more than this, as 0.01; keep the last model inside.",
            rich_help_panel=WHEN,
        ),
        ALWAYS,
    ] = None,
    target_params: Annotated[
        int | None,
        typer.Option("--target-params", metavar="N", help="Parameters of the whole model.", rich_help_panel=WHEN),
        ALWAYS,
    ] = None,
    target_ratio: Annotated[
        float | None,
        typer.Option(
            "--target-ratio",
            parser=share_of("--target-ratio"),
            metavar="X",
            help="Of the dense model's parameters.",
            rich_help_panel=WHEN,
        ),
        ALWAYS,
    ] = None,
    target_bytes: Annotated[
        str | None,
        typer.Option("--target-bytes", metavar="SIZE", help="Of weights, as 60MB.", rich_help_panel=WHEN),
        ALWAYS,
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", metavar="N", help="No more than these.", rich_help_panel=WHEN), ALWAYS
    ] = None,
    reference: Annotated[
        float | None,
        typer.Option(
            "--reference", metavar="X", help="What the drop is measured from. Default: MODEL's.", rich_help_panel=WHEN
        ),
        ALWAYS,
    ] = None,
    patience: Annotated[
        int,
        typer.Option("--patience", metavar="N", help="Rounds in a row outside --max-drop.", rich_help_panel=WHEN),
        needs(Condition("--max-drop", test=lambda drop: drop is not None, example="--max-drop X")),
    ] = 0,
    order: Annotated[
        str,
        typer.Option(
            "--order",
            metavar="HOW",
            help="error (a cut adds the least to ‖W−Ŵ‖), cumulative (the matrix has lost the least in all: the paper's "
            "rule), entropy (least of its width in use), or sensitivity (least loss).",
            rich_help_panel=WHICH,
        ),
        excludes("--direct", of=("sensitivity",), why="it ranks by spectra alone"),
    ] = "error",
    per_param: Annotated[
        bool, typer.Option("--per-param", help="Divide by the parameters saved.", rich_help_panel=WHICH), ALWAYS
    ] = False,
    step: Annotated[
        str, typer.Option("--step", metavar="N|P%", help="Of a bond's width, per round.", rich_help_panel=WHICH), ALWAYS
    ] = "5%",
    tie: Annotated[
        str,
        typer.Option("--tie", metavar="WHAT", help="matrix, or kind: all of a role together.", rich_help_panel=WHICH),
        ALWAYS,
    ] = "matrix",
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="ROLE,…", help="Only these roles.", rich_help_panel=WHICH), ALWAYS
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", metavar="GLOB", help="Modules to leave out. Repeatable.", rich_help_panel=WHICH),
        ALWAYS,
    ] = None,
    direct: Annotated[
        bool,
        typer.Option("--direct", help="For comparison: cut to the target at once, then train.", rich_help_panel=WHICH),
        needs("--target-params", "--target-ratio", "--target-bytes", why="it cuts to a target"),
    ] = False,
    finetune_steps: Annotated[
        int,
        typer.Option("--finetune-steps", metavar="N", help="After each round; 0: none.", rich_help_panel=HOW),
        ALWAYS,
    ] = 100,
    update: Annotated[train_.Update, TRAINED] = None,
    lr: Annotated[train_.Lr, TRAINED] = 1e-4,
    mpo_lr: Annotated[train_.MpoLr, TRAINED] = None,
    batch_size: Annotated[train_.BatchSize, TRAINED_OR_FELT] = 32,
    accumulation: Annotated[train_.Accumulation, TRAINED] = 1,
    warmup: Annotated[
        float,
        typer.Option(
            "--warmup",
            parser=share_of("--warmup"),
            metavar="X",
            help="Share of the first round's steps.",
            rich_help_panel=HOW,
        ),
        TRAINED,
    ] = 0.06,
    weight_decay: Annotated[train_.WeightDecay, TRAINED] = 0.0,
    clip: Annotated[train_.Clip, TRAINED] = 1.0,
    random_batches: Annotated[train_.RandomBatches, TRAINED] = False,
    gradient_checkpointing: Annotated[train_.GradientCheckpointing, TRAINED] = False,
    recompute_weights: Annotated[train_.RecomputeWeights, TRAINED] = False,
    text_column: task_.TextColumn = None,
    label_column: task_.LabelColumn = None,
    limit: Annotated[task_.Limit, TRAINED_OR_FELT] = None,
    max_length: task_.MaxLength = 128,
    tokenizer: task_.Tokenizer = None,
    eval_batch_size: Annotated[task_.EvalBatch, ALWAYS] = 64,
    max_new_tokens: task_.NewTokens = 96,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="The metric against parameters: png, svg or pdf."),
        ALWAYS,
    ] = None,
    precision: task_.Precision = "auto",
    device: task_.Device = "auto",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of order and dropout."), ALWAYS] = 0,
    log_steps: Annotated[train_.LogSteps, TRAINED] = 50,
    save_steps: Annotated[
        int | None,
        typer.Option(
            "--save-steps", metavar="N", help="Steps per checkpoint within a round. Default: 100 in long ones."
        ),
        TRAINED,
    ] = None,
    report_to: Annotated[train_.ReportTo, TRAINED] = None,
    resume: train_.Resume = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Shrink a fine-tuned MPO checkpoint bond by bond, fine-tuning in between.

    Every round cuts the bond that costs least, trains the auxiliary cores for
    --finetune-steps and evaluates; the last model inside --max-drop is kept.

    [bold]Examples[/bold]

      mpocli squeeze bert-sst2 --task sst2 --train train.tsv --eval dev.tsv \\
      --max-drop 0.01

      mpocli squeeze bert-sst2 --task sst2 --train train.tsv --eval dev.tsv \\
      --target-ratio 0.6 --tie kind --per-param --plot squeeze.svg
    """
    one_of("--order", order, ("error", "cumulative", "entropy", "sensitivity"))
    one_of("--tie", tie, ("matrix", "kind"))
    for option, value in (("--rounds", rounds), ("--target-params", target_params), ("--save-steps", save_steps)):
        at_least(option, value, 1)
    check_finite("--reference", reference)
    for option, number in (("--patience", patience), ("--finetune-steps", finetune_steps), ("--max-drop", max_drop)):
        at_least(option, number, 0)
    if target_ratio is not None and not 0 < target_ratio < float("inf"):
        raise UsageError(f"--target-ratio {target_ratio}: must be above 0", hint="choose one such as 0.6")
    roles = options.parse_layers(layers)
    limit_bytes = None if target_bytes is None else parse_bytes(target_bytes, "--target-bytes")
    if plot is not None:
        from mpocli.cli import plots

        picture = plots.check(plot, overwrite=overwrite)
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
    )
    optimisation = train_.optimisation(
        update=update,
        lr=lr,
        mpo_lr=mpo_lr,
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
    from mpocli.cli.rounds import live_rounds
    from mpocli.hf import quiet
    from mpocli.methods import squeeze
    from mpocli.methods.squeeze_choice import Step
    from mpocli.methods.squeeze_config import SqueezeConfig

    config = SqueezeConfig(
        data=data,
        optimisation=optimisation,
        max_drop=max_drop,
        reference=reference,
        target_params=target_params,
        target_ratio=target_ratio,
        target_bytes=limit_bytes,
        rounds=rounds,
        finetune_steps=finetune_steps,
        step=Step.parse(step),
        order=order,  # type: ignore[arg-type]
        per_param=per_param,
        tie=tie,
        direct=direct,
        patience=patience,
        update=update or "auxiliary",
        layers=roles,
        ignore=tuple(ignore or ()),
        recompute_weights=recompute_weights,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    from mpocli.io.apart import check_apart
    from mpocli.methods.inputs import paths_read
    from mpocli.methods.training.directory import training_directory

    destination = out or options.default_out(model, "squeezed")
    if plot is not None:
        beside = {"--out": destination, "the training directory": training_directory(destination)}
        check_apart({**beside, "--plot": plot}, paths_read(Path(model), config))
    try:
        with quiet.transformers(), live_rounds() as watch:
            report = squeeze.run(model, config, destination, overwrite=overwrite, resume=resume, watch=watch)
    except KeyboardInterrupt:
        kept = training_directory(destination)
        if kept.is_dir():
            render.err.print(f"the last round is kept in {kept}: go on with --resume")
        raise
    if not report.is_writer:
        return
    render.report("squeeze", report, lambda: _show(report), json=json)
    if plot is not None:
        plots.squeeze(picture, report)
        render.err.print(f"drawn in {plot}")
    if report.target_met is False:
        raise TargetNotMetError(
            f"{report.totals.params:,} parameters, the target is {report.target_params:,}: stopped by {_why(report)}",
            hint="allow a larger --max-drop, more --rounds, or a larger --step",
        )


def _why(report: SqueezeReport) -> str:
    return {
        "target": "the target",
        "max-drop": "--max-drop",
        "rounds": "--rounds",
        "exhausted": "bonds that are all 1",
        "not-finite": "a round whose training left the finite numbers (lower --lr)",
    }[report.stopped]


def _show(report: SqueezeReport) -> None:
    """Every round, what was kept, and what it amounts to."""
    from mpocli.cli import render
    from mpocli.cli.rounds import final_table

    if report.rounds:
        render.show(final_table(report.rounds, report.metric, kept=report.kept_round))
    table = render.table("", "before", "after", *(("test",) if report.test_metrics else ()))
    for name in report.metrics:
        tested = (f"{report.test_metrics[name]:.4f}",) if report.test_metrics else ()
        table.add_row(name, f"{report.metrics_before[name]:.4f}", f"{report.metrics[name]:.4f}", *tested)
    before, after = report.totals_before, report.totals
    table.add_row("parameters", render.count(before.params), render.count(after.params))
    table.add_row("ratio", f"{before.ratio:.3f}", f"{after.ratio:.3f}")
    table.add_row("weight files", render.size(before.bytes), render.size(after.bytes))
    render.show(table)
    if report.rounds and report.kept_round == 0:
        render.err.print("no round was inside --max-drop: nothing was squeezed", style="yellow")
    elif report.rounds:
        render.out.print(f"kept round {report.kept_round} of {len(report.rounds)}, stopped by {_why(report)}")
    if report.resumed_from:
        render.err.print(f"resumed after round {report.resumed_from}")
    render.err.print(f"written to {report.out} in {report.seconds:.0f} s")
