"""The package is built in floors: imports point down, and the light ones stay light."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from mpocli.cli.settings import as_options

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "printable": 0,
    "errors": 0,
    "lazy": 0,
    "progress": 0,
    "mpo": 1,
    "sparse": 2,
    "quant": 2,
    "config": 3,
    "nn": 4,
    "io": 4,
    "hf": 5,
    "train": 6,
    "methods": 7,
    "cli": 8,
}
# Rooms of a floor: a file imports from its own room and from those below, so that no verb imports another one.
ROOMS = {
    "methods": {
        **dict.fromkeys(
            ("device", "inputs", "memory", "rewrite", "rounding", "selection", "site_choice", "skipped"), 0
        ),
        "data": 1,
        **dict.fromkeys(("planner", "training"), 2),
        **dict.fromkeys(("decompose", "demo", "evaluate", "expand_moe", "finetune", "inspect", "merge"), 3),
        **dict.fromkeys(("quantize", "sparsify", "squeeze"), 3),
    },
    "train": {
        **dict.fromkeys(("importance", "models"), 0),
        "data": 1,
        "evaluate": 2,
        **dict.fromkeys(("demo", "loop", "sparse"), 3),
    },
}
# Packages from outside that only some floors may touch; anything else is free for all but `mpo`, `quant` and `sparse`.
RESERVED = {
    "transformers": {"hf", "train"},
    "huggingface_hub": {"hf", "train"},
    "accelerate": {"hf", "train"},
    "typer": {"cli"},
    "rich": {"cli"},
    "click": set(),
}


def test_readmes_map_has_a_line_for_every_room_and_every_file_that_is_in_none() -> None:
    block = (ROOT / "README.md").read_text().partition("## Inside")[2].split("```")[1]
    listed = [line.split()[0] for line in block.strip().splitlines()]
    files = [file.relative_to(ROOT) for file in (ROOT / "mpocli").rglob("*.py")]
    floors_with_rooms = {Path("mpocli"), *(Path("mpocli", floor) for floor in ROOMS)}
    rooms = {f"{file.parent}/" for file in files if file.parent not in floors_with_rooms}
    alone = {str(file) for file in files if file.parent in floors_with_rooms} - {
        f"mpocli/{floor}/__init__.py" for floor in ROOMS
    }
    assert sorted(listed) == sorted(rooms | alone), "README.md: a line in the map of Inside for each of them"


@dataclass(frozen=True)
class Import:
    module: str  # absolute, `from a import b` gives a.b
    line: int


def imports(source: str, file: str) -> Iterator[Import]:
    """Every import of a module of the package, absolute, those inside functions and TYPE_CHECKING too.

    `file` is its path inside `mpocli/`, which relative imports start from.
    """
    package = ["mpocli", *Path(file).parent.parts]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield from (Import(f"{origin}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (
                Import(str(name.value), node.lineno) for name in node.args[:1] if isinstance(name, ast.Constant)
            )


def _room(path: str) -> str:
    """The room of a file or module inside its floor: the first part of its path."""
    return path.partition("/")[0].removesuffix(".py")


def violations(source: str, file: str) -> list[str]:
    """What a file imports and must not. `file` is its path inside `mpocli/`."""
    package = file.partition("/")[0].removesuffix(".py")
    if package.startswith("__"):  # __init__ and __main__ stand outside the house
        return []
    found = []
    for imported in imports(source, file):
        top, _, rest = imported.module.partition(".")
        other = rest.partition(".")[0]
        where = f"{file}:{imported.line} imports {imported.module}"
        if top == "mpocli" and other == package:
            room, opened = _room(file.partition("/")[2]), _room(rest.partition(".")[2].replace(".", "/"))
            levels = ROOMS.get(package, {})
            if room != opened and levels and levels.get(opened, 99) >= levels.get(room, -1):
                found.append(f"{where}, a room that is not below")
            commands = "mpocli.cli.commands"
            if file.startswith("cli/commands/") and imported.module.startswith(f"{commands}."):
                found.append(f"{where}: what two commands have in common is a file in mpocli/cli/")
        elif top == "mpocli":
            if other not in (package, "__version__") and FLOORS.get(other, 99) >= FLOORS[package]:
                found.append(f"{where}, which is not below")
        elif package in ("mpo", "quant", "sparse") and top != "torch" and top not in sys.stdlib_module_names:
            found.append(f"{where}: torch and the standard library only")
        elif package not in RESERVED.get(top, {package}):
            found.append(f"{where}, kept for {RESERVED[top] or 'nobody'}")
    return found


def test_imports_point_down_and_reserved_packages_stay_on_their_floors() -> None:
    files = sorted((ROOT / "mpocli").rglob("*.py"))
    assert len(files) > 30
    names = {str(file.relative_to(ROOT / "mpocli")): file for file in files}
    assert {name.partition("/")[0].removesuffix(".py") for name in names} <= {*FLOORS, "__init__", "__main__"}
    for floor, rooms in ROOMS.items():
        there = {_room(name.partition("/")[2]) for name in names if name.startswith(f"{floor}/")}
        assert there == {*rooms, "__init__"}, f"give each room a level in ROOMS[{floor!r}], above those it imports"
    assert [fault for name, file in names.items() for fault in violations(file.read_text(), name)] == []


MOST_LINES = 300
# Of a function, its docstring counted, on the floors that users' commands are told on.
MOST_OF_A_FUNCTION = {"methods": 60, "cli": 60}


def too_long(source: str, file: str) -> list[str]:
    """The file, by its path inside `mpocli/`, if it has too many lines, and those of its functions that do."""
    found = [file] if len(source.splitlines()) > MOST_LINES else []
    most = MOST_OF_A_FUNCTION.get(file.partition("/")[0])
    for node in ast.walk(ast.parse(source)):
        if most and isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= most:
            found.append(f"{file}:{node.lineno} {node.name}")
    return found


def test_no_file_and_no_function_of_a_command_is_too_long_to_be_read_at_once() -> None:
    files = sorted((ROOT / "mpocli").rglob("*.py"))
    assert [name for f in files for name in too_long(f.read_text(), str(f.relative_to(ROOT / "mpocli")))] == []
    long = "def f():\n" + "    pass\n" * 59
    assert too_long(long, "cli/a.py") == [] and too_long(long + "    pass\n", "cli/a.py") == ["cli/a.py:1 f"]
    assert too_long("x = 1\n" * 301, "nn/a.py") == ["nn/a.py"]


# What users of the command line type is known to the floors that hold options, and to those above.
NAMELESS_FLOORS = ("mpo", "quant", "sparse", "nn", "io", "hf", "train")


def texts(source: str) -> Iterator[str]:
    """Every string literal, docstrings and the literal parts of f-strings too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_no_message_below_the_commands_names_an_option() -> None:
    option = re.compile(r"(?<![\w-])--[a-z]")
    assert option.search("lower --lr") and not option.search("a--b ---c")
    named = [
        f"{file.relative_to(ROOT)}: {text!r}"
        for floor in NAMELESS_FLOORS
        for file in sorted((ROOT / "mpocli" / floor).rglob("*.py"))
        for text in texts(file.read_text())
        if option.search(text)
    ]
    assert named == []


def test_every_setting_that_a_message_speaks_of_is_an_option_of_some_command() -> None:
    commands = json.loads((ROOT / "tests/cli/option_lists.json").read_text())
    options = {name.partition(",")[0] for listed in commands.values() for name in listed}
    spoken = {
        as_options(f"‹{name}›")
        for floor in NAMELESS_FLOORS
        for file in (ROOT / "mpocli" / floor).rglob("*.py")
        for text in texts(file.read_text())
        for name in re.findall(r"‹(\w+)›", text)
    }
    assert len(spoken) > 20
    assert spoken <= options


def circle(sources: dict[str, str]) -> list[str]:
    """Files that import one another in a ring, by their paths inside `mpocli/`; none of them: an empty list.

    Imports inside functions and for types alone count: who reads the one file has to read the other.
    """

    def file_of(module: str) -> str:
        parts = module.split(".")[1:]
        while parts:
            for name in ("/".join(parts) + ".py", "/".join([*parts, "__init__.py"])):
                if name in sources:
                    return name
            parts.pop()
        return "__init__.py"

    arrows = {
        file: {file_of(found.module) for found in imports(text, file) if found.module.startswith("mpocli.")} - {file}
        for file, text in sources.items()
    }
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_files_import_one_another_in_a_circle() -> None:
    files = {str(file.relative_to(ROOT / "mpocli")): file.read_text() for file in (ROOT / "mpocli").rglob("*.py")}
    assert circle(files) == []
    closed = files | {"mpo/shape.py": files["mpo/shape.py"] + "\n\ndef late():\n    from mpocli.mpo import chain\n"}
    assert {"mpo/shape.py", "mpo/chain.py"} <= set(circle(closed))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("mpo/a.py", "import numpy"),
        ("mpo/a.py", "from safetensors import safe_open"),
        ("mpo/a.py", "from mpocli.io.mpo_spec import MPOSpec"),
        ("mpo/a.py", "from ..hf import plugin"),
        ("mpo/a.py", "from mpocli import MPOLinear"),
        ("errors.py", "from mpocli.mpo import MPO"),
        ("nn/a.py", "from transformers import PreTrainedModel"),
        ("nn/a.py", "import mpocli.io.manifest"),
        ("io/a.py", "import transformers.utils as utils"),
        ("io/a.py", "import importlib\nimportlib.import_module('transformers')"),
        ("io/a.py", "def f():\n    from mpocli.nn import MPOLinear"),
        ("hf/a.py", "from mpocli.methods import merge"),
        ("hf/a.py", "import rich"),
        ("train/a.py", "from mpocli.methods.merge import run"),
        ("methods/a.py", "from transformers import AutoModel"),
        ("methods/a.py", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
        ("methods/a.py", "from mpocli.cli import console"),
        ("methods/a.py", "import typer"),
        ("methods/merge.py", "from mpocli.methods.decompose.run import run"),
        ("methods/squeeze/run.py", "from mpocli.methods.finetune import run"),
        ("methods/sparsify/run.py", "def f():\n    from ..squeeze.run import run"),
        ("methods/data/task.py", "from mpocli.methods.training.student import load_student"),
        ("methods/rewrite.py", "import mpocli.methods.data.task"),
        ("train/data/encode.py", "from mpocli.train.evaluate.predict import Run"),
        ("train/models.py", "from mpocli.train.loop import trainer"),
        ("cli/commands/plan.py", "from mpocli.cli.commands import decompose"),
        ("cli/commands/plan.py", "def f():\n    from .decompose import command"),
        ("cli/a.py", "import click"),
        ("cli/a.py", "def f():\n    from click.testing import CliRunner"),
        ("cli/a.py", "def f():\n    from transformers.utils import logging"),
    ],
)
def test_an_import_that_points_up_or_trespasses_is_noticed(file: str, source: str) -> None:
    assert len(violations(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("mpo/a.py", "import math\nimport torch\nfrom torch import nn\nfrom mpocli.errors import InputError"),
        ("mpo/a.py", "from .shape import SiteShape"),
        ("nn/a.py", "from mpocli.mpo import MPO"),
        ("hf/a.py", "import transformers\nfrom mpocli.io.mpo_spec import MPOSpec\nfrom mpocli import __version__"),
        ("methods/a.py", "from mpocli.hf.survey import survey\nfrom mpocli.train import data"),
        ("methods/merge.py", "from mpocli.methods.rewrite import Rewriting"),
        ("methods/sparsify/run.py", "from mpocli.methods.sparsify.plan import plan\nfrom ..training import run"),
        ("cli/commands/a.py", "import typer\ndef f():\n    from mpocli.hf import quiet"),
    ],
)
def test_an_import_that_points_down_is_not_an_offence(file: str, source: str) -> None:
    assert violations(source, file) == []


def _modules_after(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after running `code`."""
    report = "import sys\nprint('\\nmodules', *sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


_HEAVY = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub"}


def test_import_mpocli_loads_neither_torch_nor_transformers_nor_the_command_line() -> None:
    loaded = _modules_after("import mpocli; dir(mpocli); mpocli.__version__")
    assert "mpocli" in loaded
    assert not loaded & {*_HEAVY, "typer", "rich"}


def test_what_reads_metadata_loads_no_torch() -> None:
    metadata = "mpocli.io.read_manifest", "mpocli.io.signpost", "mpocli.io.stored", "mpocli.mpo.shape"
    loaded = _modules_after(f"import {', '.join(metadata)}")
    assert "safetensors" in loaded and not loaded & {"torch", "transformers"}


_RUN = """
from mpocli.cli.app import main
from mpocli.cli.group import COMMANDS
def run(*arguments):
    try:
        main(list(arguments))
    except SystemExit as stop:
        assert not stop.code, stop.code
"""


def test_no_help_page_loads_torch_or_transformers() -> None:
    loaded = _modules_after(
        f"{_RUN}\nrun('--help')\nrun('--version')\n"
        "assert 'decompose' in COMMANDS\nfor verb in COMMANDS:\n    run(verb, '--help')"
    )
    assert "mpocli" in loaded and "typer" in loaded
    assert not loaded & _HEAVY


def test_a_public_name_does_load_torch() -> None:
    """The two checks above can fail."""
    assert "torch" in _modules_after("import mpocli; mpocli.MPO")


# --- the repository ---------------------------------------------------------------------------------------------


def _tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name]


def test_the_top_level_holds_the_project_and_dotfiles_only() -> None:
    allowed = {"pyproject.toml", "mpocli", "tests", "recipes", "README.md", "LICENSE"}
    top = {name.partition("/")[0] for name in _tracked()}
    assert {name for name in top if not name.startswith(".")} <= allowed
    assert {"pyproject.toml", "mpocli", "README.md", "LICENSE"} <= top


# Home, scratch and work folders of one machine; package indexes. The classes keep this line from matching itself.
_PRIVATE = re.compile(
    rb"(?:^|[^A-Za-z0-9_.~\]])/(?:root|tmp|home|work|opt|mnt|Users)/[A-Za-z]"
    rb"|index[-]url|pythonhosted[.]org|/simple[/]|(?:localhost|127[.]0[.]0[.]1):\d"
)


def test_no_tracked_file_names_a_machine_path_or_a_package_index() -> None:
    offences = []
    for name in _tracked():
        if (ROOT / name).is_file():
            for number, line in enumerate((ROOT / name).read_bytes().splitlines(), 1):
                if _PRIVATE.search(line):
                    offences.append(f"{name}:{number}: {line[:120]!r}")
    assert offences == []


@pytest.mark.parametrize(
    "line", ["cd /{}/x", "open('/{}/a.txt')", "--index-{}", "http://127.0.0.1:{}/", "https://mirror/{}/torch"]
)
def test_a_machine_path_or_package_index_would_be_noticed(line: str) -> None:
    word = {"--index-{}": "url", "http://127.0.0.1:{}/": "8080", "https://mirror/{}/torch": "simple"}.get(line, "root")
    assert _PRIVATE.search(line.format(word).encode())
    assert not _PRIVATE.search(b"https://www.apache.org/licenses/ and path/to/home/x and tests/io/test.py")
