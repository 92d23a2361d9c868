"""Pictures, drawn by matplotlib where it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mpocli.errors import UsageError
from mpocli.io.files import OutputFile

if TYPE_CHECKING:
    from mpocli.methods.squeeze.run import SqueezeReport

_FORMATS = (".png", ".svg", ".pdf")
_BLUE, _RED, _GREY = "#2a6f97", "#c1121f", "#8d99ae"


def check(path: Path, *, overwrite: bool) -> OutputFile:
    """The picture to be; `UsageError` or `InputError`, before any work, where it could not be drawn after it."""
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"--plot {path}: draws {', '.join(_FORMATS)}", hint=f"name it {path.stem or 'plot'}.svg")
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib", hint="pip install matplotlib")
    return OutputFile("--plot", path, overwrite=overwrite)


def squeeze(picture: OutputFile, report: SqueezeReport) -> None:
    """The task's metric against the parameters of every round, with the start and the round that was kept."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mpl.rcParams |= {"svg.hashsalt": "mpocli", "svg.fonttype": "none"}  # equal runs give equal files, text stays text
    params = [report.totals_before.params, *(record.params for record in report.rounds)]
    values = [report.metrics_before[report.metric], *(record.metrics[report.metric] for record in report.rounds)]
    millions = [count / 1e6 for count in params]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(millions, values, color=_BLUE, marker="o", markersize=4, linewidth=1.2, label="rounds", gid="rounds")
    axes.plot(
        millions[0], values[0], color=_GREY, marker="s", markersize=8, linestyle="none", label="start", gid="start"
    )
    kept = report.kept_round
    label = f"kept: round {kept}, {params[kept]:,} parameters" if kept else "kept: the start"
    axes.plot(
        *(millions[kept], values[kept]),
        color=_RED,
        marker="*",
        markersize=15,
        linestyle="none",
        label=label,
        gid="kept",
    )
    axes.axhline(report.reference, color=_GREY, linewidth=0.8, linestyle="--", label="reference", gid="reference")
    axes.invert_xaxis()  # the squeeze goes from left to right
    axes.set_xlabel("parameters (millions)")
    axes.set_ylabel(report.metric.replace("_", " "))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    metadata = {"Date": None} if picture.path.suffix.lower() == ".svg" else None
    picture.write(lambda path: figure.savefig(path, dpi=150, metadata=metadata))
