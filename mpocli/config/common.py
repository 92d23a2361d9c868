"""Options that most commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from mpocli.config import bounds, text
from mpocli.config.modes import ALWAYS
from mpocli.config.option import Option
from mpocli.config.page import DANGER

DType = Literal["float32", "bfloat16", "float16", "float64"]
# Where a verb takes all matrices but those of heads over the vocabulary.
DEFAULT_ROLES = ("embedding", "attention", "ffn", "pooler")

Model = Annotated[str, Option("model", "Model directory, or a hub model such as bert-base-uncased.", "MODEL")]
Out = Annotated[Path | None, Option("--out", "Output directory.", "DIR", short="-o"), ALWAYS]
Json = Annotated[bool, Option("--json", "Print one JSON object on stdout instead of tables."), ALWAYS]
Overwrite = Annotated[bool, Option("--overwrite", "Replace the output directory if it exists."), ALWAYS]
DryRun = Annotated[bool, Option("--dry-run", "Print exact sizes, write nothing."), ALWAYS]
Resume = Annotated[bool, Option("--resume", "Go on with an interrupted run."), ALWAYS]
StoredDType = Annotated[
    DType | None,
    Option("--dtype", "Store as float32, bfloat16, float16, float64. Default: as in the model.", "DTYPE"),
    ALWAYS,
]
ShardBytes = Annotated[
    int, Option("--max-shard-size", "Largest weight file, as 5GB.", "SIZE", parse=text.size, default="5GB"), ALWAYS
]
Device = Annotated[str, Option("--device", "cpu, cuda, cuda:0 or auto.", "DEVICE", recorded=False), ALWAYS]
Revision = Annotated[
    str | None, Option("--revision", "Branch, tag or commit of a hub model.", "REV", recorded=False), ALWAYS
]
TrustRemoteCode = Annotated[
    bool,
    Option("--trust-remote-code", "Run model code that the checkpoint brings.", panel=DANGER, recorded=False),
    ALWAYS,
]
Sites = Annotated[int, Option("--sites", "Cores per matrix.", "N", check=bounds.sites)]
Roles = Annotated[tuple[str, ...] | None, Option("--layers", "Of which roles.", "ROLE,…", parse=text.roles)]
Targets = Annotated[tuple[str, ...], Option("--target", "Modules by name. Repeatable.", "GLOB", several=True), ALWAYS]
Ignored = Annotated[
    tuple[str, ...], Option("--ignore", "Modules to leave out. Repeatable.", "GLOB", several=True), ALWAYS
]
SiteShapes = Annotated[
    text.Shapes,
    Option(
        "--shape",
        "Other sites. Repeatable.",
        "GLOB=ROWSxCOLUMNS",
        several=True,
        parse=text.shape,
        recorded=text.written,
    ),
]
