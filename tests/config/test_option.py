"""An option is one line beside its field: command line, configuration and manifest come of it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, Literal

import pytest

from mpocli.cli import group as commands
from mpocli.cli.command import options
from mpocli.cli.translate import translated
from mpocli.config.bounds import at_least, positive
from mpocli.config.decompose import DecomposeConfig
from mpocli.config.evaluate import EvalConfig
from mpocli.config.expand_moe import ExpandConfig
from mpocli.config.finetune import FinetuneConfig
from mpocli.config.inspect import InspectConfig
from mpocli.config.merge import MergeConfig
from mpocli.config.modes import ALWAYS, needs
from mpocli.config.option import Group, Option, build, declared, group, recorded
from mpocli.config.sparsify import SparsifyConfig
from mpocli.config.squeeze import SqueezeConfig
from mpocli.errors import UsageError

CONFIGS = (
    *(DecomposeConfig, EvalConfig, ExpandConfig, FinetuneConfig, InspectConfig, MergeConfig, SparsifyConfig),
    SqueezeConfig,
)


@dataclass(frozen=True)
class Inner:
    rate: Annotated[float, Option("--rate", "How fast.", "X", "Panel", check=positive), ALWAYS] = 1.0
    files: Annotated[tuple[str, ...], Option("--file", "Read.", "F", several=True, reads=True), ALWAYS] = ()


@dataclass(frozen=True)
class Asked:
    """Nothing where no name is given."""

    name: Annotated[str, Option("--name", "Its name."), ALWAYS]

    @classmethod
    def from_options(cls, name: str | None) -> Asked | None:
        return None if name is None else cls(name)


@dataclass(frozen=True)
class Config:
    inner: Annotated[Inner, group(needs("--how a"), rate=({"help": "Other."}, ALWAYS))] = field(default_factory=Inner)
    how: Annotated[Literal["a", "b"], Option("--how", "Which."), ALWAYS] = "a"
    fast: Annotated[bool, Option("--slow", "Slowly.", negated=True, recorded=False), ALWAYS] = True
    count: Annotated[int, Option("--count", "As text.", parse=lambda text, _: len(text), default="abc"), ALWAYS] = 3
    most: Annotated[int | None, Option("--most", "At most.", check=at_least(2), recorded=str), ALWAYS] = None
    asked: Asked | None = None
    of_the_library: int = 7


def given(config: type, **values: Any) -> dict[str, Any]:
    """What the command line has where only `values` are given."""
    return {one.option.key: one.default for one in declared(config)} | values


def test_a_configuration_is_built_of_what_the_command_line_gives() -> None:
    assert build(Config, given(Config)) == Config()
    values = given(Config, rate=2.0, file=["a", "b"], how="b", slow=True, count="12345", most=4, name="it")
    assert build(Config, values) == Config(Inner(2.0, ("a", "b")), "b", False, 5, 4, Asked("it"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0.0}, "--rate 0.0: must be above 0"),
        ({"rate": float("nan")}, "--rate nan: must be above 0"),
        ({"how": "c"}, "--how 'c' is not known (choose a, b)"),
        ({"most": 1}, "--most 1: must be at least 2"),
    ],
)
def test_a_value_outside_its_bounds_is_refused_by_the_options_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        build(Config, given(Config, **values))
    assert str(refusal.value).startswith(message)


def test_a_command_leaves_options_out_adds_markers_and_says_otherwise() -> None:
    found = {one.option.name: one for one in declared(Config)}
    assert found["--rate"].option.help == "Other." and found["--rate"].markers == (ALWAYS, ALWAYS)
    assert found["--file"].markers == (ALWAYS, needs("--how a"))
    fewer = {one.option.name for one in declared(Config, Group(without=("inner", "most")))}
    assert fewer == {"--how", "--slow", "--count", "--name"}
    values = {"how": "b", "slow": False, "count": "a", "name": None}
    assert build(Config, values, Group(without=("inner", "most"))) == Config(how="b", count=1)


def test_the_manifest_has_every_field_but_those_that_say_no_and_names_without_folders() -> None:
    config = Config(Inner(2.0, ("x/a.txt", "b")), asked=Asked("it"))
    assert recorded(config) == {
        "rate": 2.0,
        "files": ["a.txt", "b"],
        "how": "a",
        "count": 3,
        "most": "None",
        "name": "it",
    }
    assert list(recorded(Config(), ("inner", "how"))) == ["count", "most"]


def test_a_new_field_with_an_option_is_on_the_command_line() -> None:
    """With its panel, its default and its mode, and comes back in the configuration."""
    seen = []

    def command(config: Config) -> None:
        """Says nothing."""
        seen.append(config)

    call: Any = translated(command)
    assert list(call.__signature__.parameters) == ["rate", "file", "how", "slow", "count", "most", "name"]
    call(**given(Config, rate=0.5))
    assert seen == [Config(Inner(0.5))]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_without_options_the_command_line_means_what_the_library_does(config: type) -> None:
    """Beside a task, which has to be named, batches of an evaluation, and the device's precision."""
    task = {"task": "sst2"} if config in (FinetuneConfig, SqueezeConfig) else {}
    built = build(config, given(config, **task))
    if not task:
        assert _plain(built) == _plain(config())
    else:
        assert built.data.eval_batch_size == 64 and built.optimisation.precision == "auto"
        data = replace(built.data, eval_batch_size=32)
        assert replace(built, data=data, optimisation=config(data).optimisation) == config(data)


def _plain(config: Any) -> Any:
    """Without the precision, which the command line asks the device for."""
    changed = {"precision": "fp32"} if hasattr(config, "precision") else {}
    inner = {one.name: getattr(config, one.name) for one in fields(config)}
    return replace(config, **{name: _plain(one) for name, one in inner.items() if is_dataclass(one)}, **changed)


def test_no_two_options_of_a_command_have_one_name_and_every_help_ends_a_sentence() -> None:
    for name in commands.COMMANDS:
        command = commands.command(name)
        words = [word for parameter in command.params for word in parameter.opts]
        assert len(words) == len(set(words)), name
        assert all((getattr(one, "help", None) or "").endswith(".") for one in command.params), name
        assert len(options(command.make_context(name, [] if name == "demo" else ["model"]))) == len(words) - sum(
            len(one.opts) - 1 for one in command.params
        ) - (name != "demo")
