"""What users may type and read of every option: names, default, metavar, panel and help are what they were.

`python tests/cli/test_option_lists.py` writes the list anew, after a change that is meant.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpocli.cli import group

LIST = Path(__file__).with_name("option_lists.json")
ANEW = "where that is meant: run python tests/cli/test_option_lists.py"


def described(command: str) -> dict[str, Any]:
    """Every parameter of a command in the order of its help page."""
    found = {}
    for parameter in group.command(command).params:
        default = getattr(parameter, "default", None)
        facts = {
            "default": default if default is None or isinstance(default, bool | int | float) else str(default),
            "metavar": parameter.metavar,
            "panel": getattr(parameter, "rich_help_panel", None),
            "flag": getattr(parameter, "is_flag", False),
            "multiple": getattr(parameter, "multiple", False),
            "required": parameter.required,
            "help": getattr(parameter, "help", None),
        }
        found[", ".join(parameter.opts)] = {name: fact for name, fact in facts.items() if fact not in (None, False)}
    return found


def panels(found: dict[str, Any]) -> dict[str | None, list[str]]:
    """The names in the order in which a help page shows them."""
    made: dict[str | None, list[str]] = {None: []}
    for name, facts in found.items():
        made.setdefault(facts.get("panel"), []).append(name)
    return made


@pytest.mark.parametrize("command", group.COMMANDS)
def test_options_have_the_names_defaults_panels_and_help_of_the_list(command: str) -> None:
    listed, found = json.loads(LIST.read_text()).get(command, {}), described(command)
    assert found == listed, ANEW
    assert list(panels(found).items()) == list(panels(listed).items()), ANEW


def test_the_list_has_every_command_and_most_of_their_options() -> None:
    listed = json.loads(LIST.read_text())
    assert list(listed) == list(group.COMMANDS), ANEW
    assert sum(len(options) for options in listed.values()) > 250
    assert listed["finetune"]["--lr"] == {
        "default": 1e-4,
        "metavar": "X",
        "panel": "How to train",
        "help": "Peak learning rate.",
    }


if __name__ == "__main__":
    commands = ",\n".join(
        f'"{command}": {{\n'
        + ",\n".join(f" {json.dumps(name)}: {json.dumps(facts)}" for name, facts in described(command).items())
        + "\n}"
        for command in group.COMMANDS
    )
    LIST.write_text(f"{{\n{commands}\n}}\n")
