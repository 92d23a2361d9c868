"""`mpocli finetune`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mpocli.cli import options
from mpocli.cli import task_options as task_
from mpocli.cli import train_options as train_
from mpocli.cli.options import at_least, check_sites, one_of, parse_layers, parse_shapes, share_of
from mpocli.errors import UsageError
from mpocli.modes import ALWAYS, OF_EXPERTS, OF_SHARED, excludes, needs

if TYPE_CHECKING:
    from mpocli.methods.finetune import FinetuneReport
    from mpocli.methods.overparam import OverparamReport

EXPERTS = "Of a mixture of experts: other than its checkpoint says"
OVER = "Over-parameterisation (OPF): train more, deploy the same"
EXPANDED = needs("--overparam static", "--overparam dynamic", "--overparam svd")
EXPANDED_OR_RAISED = needs("--overparam")
MEASURED = needs("--eval", "--test", "--select best", why="nothing is measured")


def command(
    model: options.Model,
    task: task_.TaskName = None,
    train: task_.Train = None,
    evaluate: task_.Eval = None,
    test: task_.Test = None,
    out: options.Out = None,
    text_column: task_.TextColumn = None,
    label_column: task_.LabelColumn = None,
    limit: task_.Limit = None,
    max_length: task_.MaxLength = 128,
    tokenizer: task_.Tokenizer = None,
    update: Annotated[
        train_.Update,
        excludes(
            "--overparam static",
            "--overparam dynamic",
            "--overparam svd",
            of=("auxiliary", "central"),
            why="all cores are trained",
        ),
    ] = None,
    lr: train_.Lr = 1e-4,
    mpo_lr: train_.MpoLr = None,
    epochs: train_.Epochs = 3.0,
    steps: train_.StepCount = None,
    batch_size: train_.BatchSize = 32,
    accumulation: train_.Accumulation = 1,
    warmup: train_.Warmup = 0.06,
    weight_decay: train_.WeightDecay = 0.0,
    clip: train_.Clip = 1.0,
    random_batches: train_.RandomBatches = False,
    gradient_checkpointing: train_.GradientCheckpointing = False,
    recompute_weights: train_.RecomputeWeights = False,
    precision: task_.Precision = "auto",
    device: task_.Device = "auto",
    select: Annotated[
        str,
        typer.Option("--select", metavar="WHICH", help="last, or best on a held-out tenth of --train, once an epoch."),
        excludes(
            "--overparam static", "--overparam dynamic", "--overparam svd", of=("best",), why="shapes change in between"
        ),
    ] = "last",
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="Of head, order and dropout."), excludes("--seeds")
    ] = 0,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="N,N,…", help="A run for each, in sub-directories."), ALWAYS
    ] = None,
    teacher: train_.Teacher = None,
    distill_weight: train_.DistillWeight = 0.5,
    temperature: train_.Temperature = 2.0,
    distill_hidden: train_.DistillHidden = False,
    overparam: Annotated[
        str | None,
        typer.Option(
            "--overparam",
            metavar="HOW",
            help="static, dynamic or svd: matrices of a dense MODEL train as lossless MPOs and are folded back. "
            "none: they stay dense, and train at --mpo-lr.",
            rich_help_panel=OVER,
        ),
        needs("--mpo-lr", of=("none",), why="nothing would differ from plain fine-tuning"),
    ] = None,
    layers: Annotated[
        str,
        typer.Option("--layers", metavar="ROLE,…", help="Of which roles.", rich_help_panel=OVER),
        EXPANDED_OR_RAISED,
    ] = "attention,ffn",
    top_n: Annotated[
        int,
        typer.Option("--top-n", metavar="N", help="Matrices of each kind; svd takes all.", rich_help_panel=OVER),
        needs("--overparam static", "--overparam dynamic"),
    ] = 4,
    splits: Annotated[
        int | None,
        typer.Option("--splits", metavar="N", help="dynamic: in so many portions. Default: 2.", rich_help_panel=OVER),
        needs("--overparam dynamic"),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            "--every",
            metavar="STEPS",
            help="dynamic: one portion after so many. Default: the last half way.",
            rich_help_panel=OVER,
        ),
        needs("--overparam dynamic"),
    ] = None,
    sites: Annotated[
        int,
        typer.Option("--sites", metavar="N", help="First and last split it, 1×1 between.", rich_help_panel=OVER),
        needs("--overparam static", "--overparam dynamic"),
    ] = 5,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="GLOB=ROWSxCOLUMNS", help="Other sites. Repeatable.", rich_help_panel=OVER),
        EXPANDED,
    ] = None,
    score_from: Annotated[
        str | None,
        typer.Option(
            "--score-from", metavar="MODEL", help="static: fine-tuned on this task, to be scored.", rich_help_panel=OVER
        ),
        needs("--overparam static"),
    ] = None,
    score_steps: Annotated[
        int | None,
        typer.Option(
            "--score-steps",
            metavar="N",
            help="static: else train a copy for so many of the steps. Default: a quarter.",
            rich_help_panel=OVER,
        ),
        needs("--overparam static"),
        excludes("--score-from", why="no copy is trained"),
    ] = None,
    score_batches: Annotated[
        int,
        typer.Option("--score-batches", metavar="N", help="static: to take losses on.", rich_help_panel=OVER),
        needs("--overparam static"),
    ] = 8,
    mask_prob: Annotated[
        float | None,
        typer.Option(
            "--mask-prob",
            parser=share_of("--mask-prob"),
            metavar="P",
            help="Discard a shared core's update.",
            rich_help_panel=EXPERTS,
        ),
        OF_SHARED,
    ] = None,
    balance_loss: Annotated[
        float | None,
        typer.Option("--balance-loss", metavar="X", help="Times Switch's.", rich_help_panel=EXPERTS),
        OF_EXPERTS,
    ] = None,
    z_loss: Annotated[
        float | None,
        typer.Option("--z-loss", metavar="X", help="Times the router's.", rich_help_panel=EXPERTS),
        OF_EXPERTS,
    ] = None,
    capacity_factor: Annotated[
        float | None,
        typer.Option("--capacity-factor", metavar="F", help="Drop what exceeds it.", rich_help_panel=EXPERTS),
        OF_EXPERTS,
    ] = None,
    eval_batch_size: Annotated[task_.EvalBatch, MEASURED] = 64,
    max_new_tokens: Annotated[task_.NewTokens, MEASURED] = 96,
    log_steps: train_.LogSteps = 50,
    save_steps: train_.SaveSteps = None,
    report_to: train_.ReportTo = None,
    resume: train_.Resume = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Fine-tune a model on a task: of an MPO checkpoint, its auxiliary cores alone.

    The central cores, most of the parameters, stay as they are; what is not
    decomposed (biases, norms, the head) is trained too. Ordinary checkpoints
    are fine-tuned whole.

    [bold]Examples[/bold]

      mpocli finetune bert-mpo --task sst2 --train train.tsv --lr 3e-4

      mpocli finetune gpt2-mpo --task lm --train train.txt --max-length 512

      accelerate launch -m mpocli finetune bert-mpo --task sst2 \\
      --train train.tsv
    """
    one_of("--select", select, ("last", "best"))
    train_.check_length(epochs, steps, save_steps)
    train_.check_distillation(distill_weight, temperature)
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
    one_of("--overparam", overparam, ("static", "dynamic", "svd", "none"))
    counts = (("--top-n", top_n), ("--splits", splits), ("--every", every), ("--score-batches", score_batches))
    for option, number in (*counts, ("--score-steps", score_steps)):
        at_least(option, number, 1)
    check_sites(sites)
    splits = min(2, top_n) if splits is None else splits
    if splits > top_n:
        raise UsageError(f"--splits {splits}: more portions than --top-n {top_n}", hint="choose --splits 1 to --top-n")
    for option, factor in (("--balance-loss", balance_loss), ("--z-loss", z_loss)):
        at_least(option, factor, 0)
    train_.check_positive("--capacity-factor", capacity_factor)
    if mask_prob is not None:
        train_.check_share("--mask-prob", mask_prob)
    roles = parse_layers(layers) or ()
    chosen_seeds = _seeds(seeds)
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

    from mpocli.cli import render
    from mpocli.hf import quiet
    from mpocli.methods import finetune, finetune_seeds
    from mpocli.methods.overparam import Overparam
    from mpocli.methods.training.routing import RoutingChanges

    config = finetune.FinetuneConfig(
        data=data,
        optimisation=optimisation,
        update=update,
        epochs=epochs,
        steps=steps,
        select=select,
        teacher=teacher,
        distill_weight=distill_weight,
        temperature=temperature,
        distill_hidden=distill_hidden,
        recompute_weights=recompute_weights,
        overparam=None
        if overparam in (None, "none")
        else Overparam(
            overparam,  # type: ignore[arg-type]
            top_n=top_n,
            splits=splits,
            every=every,
            sites=sites,
            shapes=parse_shapes(shape or []),
            layers=roles,
            score_from=score_from,
            score_steps=score_steps,
            score_batches=score_batches,
        ),
        raise_layers=roles if overparam == "none" else (),
        routing=RoutingChanges(mask_prob, balance_loss, z_loss, capacity_factor),
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    from mpocli.methods.training.directory import training_directory

    destination = out or options.default_out(model, "finetuned")
    try:
        with quiet.transformers(), render.training_bar("finetune") as progress:
            how = {"overwrite": overwrite, "resume": resume, "progress": progress, "warn": render.warn}
            if chosen_seeds:
                reports = finetune_seeds.run_seeds(model, config, destination, chosen_seeds, **how)  # type: ignore[arg-type]
            else:
                reports = (finetune.run(model, config, destination, **how),)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        kept = training_directory(destination)
        if kept.is_dir():
            render.err.print(f"checkpoints are kept in {kept}: go on with --resume")
        raise
    if not reports[0].is_writer:
        return
    found = finetune_seeds.summary(str(destination), chosen_seeds, reports) if chosen_seeds else reports[0]
    render.report("finetune", found, lambda: _show(reports, chosen_seeds, str(destination)), json=json)


def _seeds(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"--seeds {text!r} cannot be read", hint="write it as 1,2,3") from None


def _show(reports: Sequence[FinetuneReport], seeds: tuple[int, ...], out: str) -> None:
    """Metrics before and after, what was trained, and where the result is."""
    from mpocli.cli import render

    first = reports[0]
    table = render.table("metric", "before", "after", *(("test",) if first.test_metrics else ()))
    for name in first.metrics:
        before = [report.metrics_before[name] for report in reports if name in report.metrics_before]
        after = [report.metrics[name] for report in reports]
        tested = [report.test_metrics[name] for report in reports if name in report.test_metrics]
        row = [_spread(before), _spread(after), *((_spread(tested),) if first.test_metrics else ())]
        table.add_row(name, *row)
    if first.metrics:
        render.show(table)
    parts = [f"{count:,} {role}" for role, count in first.trainable_by_role.items() if count]
    size = first.overparam.training_params if first.overparam else first.totals.params
    share = first.trainable_params / size
    losses = [report.loss for report in reports if report.loss is not None]
    ended = f", loss {_spread(losses)} at the end" if losses else ""
    render.out.print(
        render.spans(
            "trained ",
            (f"{first.trainable_params:,}", "bold"),
            f" of {size:,} parameters ({share:.1%}: {', '.join(parts)}) for {first.steps:,} steps{ended}",
        )
    )
    if first.overparam is not None:
        _show_expanded(first.overparam)
    for line in _router_lines(first):
        render.out.print(line)
    if first.selected_step != first.steps:
        render.out.print(f"kept the weights of step {first.selected_step:,}, the best on held-out training data")
    for split, cut in first.truncated.items():
        if cut:
            render.err.print(f"{split}: {cut:,} examples were cut to --max-length", style="yellow")
    if first.resumed_from:
        render.err.print(f"resumed from step {first.resumed_from:,}")
    where = f"{out}/seed-{{{','.join(map(str, seeds))}}}" if seeds else first.out
    render.err.print(f"written to {where} in {sum(report.seconds for report in reports):.0f} s")


def _router_lines(report: FinetuneReport) -> list[str]:
    """How evenly routers spread their tokens, over all layers."""
    found = [router for router in report.routers.values() if router]
    if not found:
        return []
    loads = [share for router in found for share in router["load"]]
    entropy = statistics.mean(router["entropy_nats"] for router in found)
    dropped = statistics.mean(router["dropped"] for router in found)
    even = 1 / len(found[0]["load"])
    return [
        f"{len(found)} routers: load of an expert {min(loads):.3f} to {max(loads):.3f} ({even:.3f} is even), entropy "
        f"{entropy:.2f} nats, dropped {dropped:.1%}"
    ]


def _show_expanded(report: OverparamReport) -> None:
    """The matrices that were MPOs, by group, and what is left of that."""
    from mpocli.cli import render

    table = render.table("over-parameterised", "after step", "score", "bonds", "parameters", "dense")
    for found in sorted(report.expanded, key=lambda found: (found.step, found.group)):
        table.add_row(
            render.shortened(found.module, 52),
            f"{found.step:,}",
            "" if found.score is None else f"{found.score:.3g}",
            ",".join(dict.fromkeys(map(str, found.bond_dims[1:-1]))),
            f"{found.params:,}",
            f"{found.dense_params:,}",
        )
    render.show(table)
    if report.score_steps:
        render.out.print(f"{report.score_steps:,} of the steps trained a copy for the scores")
    render.out.print(
        f"{report.training_params:,} parameters in training, {report.deployed_params:,} deployed; folding moved the "
        f"logits by {report.fold_difference:.1e} (largest {report.largest_logit:.1f})"
    )


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean
