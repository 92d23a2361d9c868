"""`mpocli expand-moe`."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated

import typer

from mpocli.cli import options
from mpocli.cli.options import (
    at_least,
    check_finite,
    check_sites,
    one_of,
    parse_bytes,
    parse_layers,
    parse_shapes,
    share_of,
)
from mpocli.cli.train_options import check_share
from mpocli.errors import InputError, UsageError
from mpocli.modes import ALWAYS, Condition, excludes

if TYPE_CHECKING:
    from mpocli.hf.routing import RoutingConfig
    from mpocli.methods.expand_report import ExpandReport, ExpertsReport

WHAT = "What becomes experts"
ROUTER = "How tokens are routed"
TRAINING = "What training adds; finetune obeys"
SHARED = excludes("--baseline-moe", "--share none", why="there is no shared core to mask")
_CERTAIN = Condition("--mask-prob", test=lambda share: share is not None and float(share) in (0, 1))


def command(
    model: options.Model,
    experts: Annotated[
        int, typer.Option("--experts", "-n", metavar="N", help="Of every network.", rich_help_panel=WHAT), ALWAYS
    ] = 8,
    share: Annotated[
        str,
        typer.Option(
            "--share", metavar="WHAT", help="central: one core for all; none: n full MPOs.", rich_help_panel=WHAT
        ),
        excludes("--baseline-moe", why="its experts are dense"),
    ] = "central",
    baseline_moe: Annotated[
        bool, typer.Option("--baseline-moe", help="n dense experts, for comparison.", rich_help_panel=WHAT), ALWAYS
    ] = False,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="ROLE,…", help="Default: ffn.", rich_help_panel=WHAT), ALWAYS
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
    sites: Annotated[
        int | None,
        typer.Option("--sites", metavar="N", help="Cores per matrix. Default: 5.", rich_help_panel=WHAT),
        excludes("--baseline-moe", why="its experts are dense"),
    ] = None,
    trunc: Annotated[
        int | None,
        typer.Option("--trunc", metavar="N", help="Cap on the bonds. Default: lossless.", rich_help_panel=WHAT),
        excludes("--baseline-moe", why="its experts are dense"),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="GLOB=ROWSxCOLUMNS", help="Other sites. Repeatable.", rich_help_panel=WHAT),
        excludes("--baseline-moe", why="its experts are dense"),
    ] = None,
    noise: Annotated[
        float,
        typer.Option(
            "--noise",
            parser=share_of("--noise"),
            metavar="X",
            help="On auxiliary cores, × their size: another start.",
            rich_help_panel=WHAT,
        ),
        ALWAYS,
    ] = 0.0,
    router: Annotated[
        str,
        typer.Option("--router", metavar="HOW", help="switch: one expert a token; topk.", rich_help_panel=ROUTER),
        ALWAYS,
    ] = "switch",
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", metavar="K", help="Experts a token. Default: 1, topk: 2.", rich_help_panel=ROUTER),
        ALWAYS,
    ] = None,
    capacity_factor: Annotated[
        float | None,
        typer.Option(
            "--capacity-factor", metavar="F", help="Drop beyond F·K·tokens/N an expert.", rich_help_panel=ROUTER
        ),
        ALWAYS,
    ] = None,
    scale_by_prob: Annotated[
        bool, typer.Option("--scale-by-prob", help="Scale outputs by p: another start.", rich_help_panel=ROUTER), ALWAYS
    ] = False,
    jitter: Annotated[
        float,
        typer.Option(
            "--jitter",
            parser=share_of("--jitter"),
            metavar="X",
            help="Router inputs × 1 ± X in training.",
            rich_help_panel=ROUTER,
        ),
        ALWAYS,
    ] = 0.0,
    mask_prob: Annotated[
        float | None,
        typer.Option(
            "--mask-prob",
            parser=share_of("--mask-prob"),
            metavar="P",
            help="Discard a shared core's update; 1 freezes. Default: 0.5.",
            rich_help_panel=TRAINING,
        ),
        SHARED,
    ] = None,
    mask_elements: Annotated[
        bool,
        typer.Option("--mask-elements", help="Draw for every element.", rich_help_panel=TRAINING),
        SHARED,
        excludes(_CERTAIN, why="nothing is drawn"),
    ] = False,
    balance_loss: Annotated[
        float,
        typer.Option("--balance-loss", metavar="X", help="Times Switch's loss.", rich_help_panel=TRAINING),
        ALWAYS,
    ] = 0.01,
    z_loss: Annotated[
        float,
        typer.Option("--z-loss", metavar="X", help="Times the router's z-loss.", rich_help_panel=TRAINING),
        ALWAYS,
    ] = 0.0,
    out: options.Out = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of routers and noise."), ALWAYS] = 0,
    max_shard_size: options.ShardSize = "5GB",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Make experts of the feed-forward networks, which share their central cores.

    Each expert begins as the pretrained network: before training the model
    computes what it did. finetune trains it, and the balance loss with it.

    [bold]Examples[/bold]

      mpocli expand-moe gpt2 --experts 8

      mpocli expand-moe t5-base --experts 16 --router topk --top-k 2 --noise 0.01
    """
    one_of("--share", share, ("central", "none"))
    one_of("--router", router, ("switch", "topk"))
    at_least("--experts", experts, 2)
    for option, number in (("--top-k", top_k), ("--trunc", trunc)):
        at_least(option, number, 1)
    if sites is not None:
        check_sites(sites)
    if mask_prob is not None:
        check_share("--mask-prob", mask_prob)
    check_finite("--noise", noise)
    at_least("--noise", noise, 0)
    routing = _routing(
        router,
        top_k,
        capacity_factor,
        jitter,
        balance_loss,
        z_loss,
        mask_prob,
        scale_by_prob=scale_by_prob,
        mask_elements=mask_elements,
    )

    from mpocli.cli import render
    from mpocli.hf import quiet
    from mpocli.methods import expand_moe
    from mpocli.methods.expand_moe import ExpandConfig

    config = ExpandConfig(
        experts=experts,
        share=None if baseline_moe else share,  # type: ignore[arg-type]
        routing=routing,
        sites=sites,
        trunc=trunc,
        shapes=parse_shapes(shape or []),
        noise=noise,
        layers=parse_layers(layers),
        targets=tuple(target or ()),
        ignore=tuple(ignore or ()),
        seed=seed,
        max_shard_bytes=parse_bytes(max_shard_size, "--max-shard-size"),
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    destination = out or options.default_out(model, "moe")
    options.check_out_before_download(model, destination, overwrite=overwrite)
    with quiet.transformers(), render.progress_bar("expand-moe") as progress:
        report = expand_moe.run(model, config, destination, overwrite=overwrite, progress=progress)
    render.report("expand-moe", report, lambda: _show(report), json=json)


def _routing(
    router: str,
    top_k: int | None,
    capacity_factor: float | None,
    jitter: float,
    balance_loss: float,
    z_loss: float,
    mask_prob: float | None,
    *,
    scale_by_prob: bool,
    mask_elements: bool,
) -> RoutingConfig:
    """The object that the methods take; `UsageError` for values that cannot be meant."""
    from mpocli.hf.routing import DEFAULT_MASK, RoutingConfig
    from mpocli.nn import RouterOptions

    for option, value in (("--capacity-factor", capacity_factor), ("--jitter", jitter), ("--z-loss", z_loss)):
        check_finite(option, value)
    check_finite("--balance-loss", balance_loss)
    try:
        options_ = RouterOptions(
            kind=router,  # type: ignore[arg-type]
            top_k=top_k or (2 if router == "topk" else 1),
            capacity_factor=capacity_factor,
            jitter=jitter,
            scale_by_prob=scale_by_prob,
            balance_loss=balance_loss,
            z_loss=z_loss,
        )
    except InputError as error:
        message = error.message
        for field in fields(RouterOptions):
            name = "router" if field.name == "kind" else field.name.replace("_", "-")
            message = re.sub(rf"\b{field.name}\b", f"--{name}", message)
        raise UsageError(message, hint=error.hint) from error
    return RoutingConfig(options_, DEFAULT_MASK if mask_prob is None else mask_prob, mask_elements)


def _show(report: ExpandReport) -> None:
    """What the experts have in common and of their own, and the size of the model beside n dense experts."""
    from mpocli.cli import render

    table = render.table("matrices", "shape", "dense", "in common", "each expert's", "stored", "of dense", "err")
    groups: dict[tuple[object, ...], list[ExpertsReport]] = {}
    for module in report.modules:
        key = (module.place, module.shape, module.shared_params, module.own_params)
        groups.setdefault(key, []).append(module)
    for members in groups.values():
        first = members[0]
        errors = [module.relative_error for module in members if module.relative_error is not None]
        table.add_row(
            f"{len(members)} {'first' if first.place == 'in' else 'last'}",
            "x".join(map(str, first.shape)),
            f"{first.dense_params:,}",
            f"{first.shared_params:,}",
            f"{first.own_params:,}",
            f"{first.shared_params + report.experts * first.own_params:,}",
            f"{first.size_ratio:.3f}",
            render.error(max(errors) if len(errors) == len(members) else None),
        )
    render.show(table)
    totals = render.table("", "parameters", "weight files")
    totals.add_row("before", f"{report.before.params:,}", render.size(report.before.bytes))
    number = f"{report.experts} expert" + "s" * (report.experts > 1)
    totals.add_row(number, f"{report.totals.params:,}", render.size(report.totals.bytes))
    if report.share != "dense":
        totals.add_row(number.replace("expert", "dense expert"), f"{report.dense_experts_params:,}", "", style="dim")
    render.show(totals)
    networks = f"{report.networks} network" + "s" * (report.networks > 1)
    render.out.print(f"{networks}, routers with {report.router_params:,} parameters")
    for line in render.notes(report.kept):
        render.out.print(line, style="dim")
    render.err.print(f"written to {report.out} in {report.seconds:.1f} s")
