"""Every option of every command belongs to a mode, and is refused outside of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import pytest

from cli.shell import Cli, refused
from mpocli.cli import group
from mpocli.cli.command import options
from mpocli.config.modes import Always, Called, Condition, OfModel, Rule, Without, check, needs, of_model
from mpocli.config.of_model import check_model
from mpocli.errors import UsageError

COMMANDS: dict[str, Any] = {name: group.command(name) for name in group.COMMANDS}
# What can be written after an option; another than the default where there is one. Numbers are 1.
VALUES = {
    "--task": "sst2",
    "--eval": "dev.tsv",
    "--order": "sensitivity",
    "--overparam": "static",
    "--method": "magnitude",
    "--pattern": "2:4",
    "--scope": "global",
    "--shapes": "svd",
    "--allocation": "global",
    "--mask-prob": "1",
    "--share": "none",
    "--seeds": "1,2",
    "--select": "best",
    "--ratio": "0.5",
}


def contexts() -> Iterator[tuple[str, Any]]:
    """Every command, called with nothing but a model."""
    for name, command in COMMANDS.items():
        has_model = any(parameter.name == "model" for parameter in command.params)
        yield name, command.make_context(name, ["model"] if has_model else [])


EVERY = {name: {option.name: option for option in options(context)} for name, context in contexts()}


def flag(command: str, option: str) -> bool:
    return f"{option} " in {f"{p.opts[0]} " for p in COMMANDS[command].params if getattr(p, "is_flag", False)}


@dataclass(frozen=True)
class Words:
    """A command line's options with their values; `True` for a flag."""

    command: str
    given: dict[str, Any]

    def having(self, option: str, value: str = "") -> Words:
        found = True if flag(self.command, option) else value or VALUES.get(option, "1")
        return replace(self, given={**self.given, option: found})

    def words(self) -> list[str]:
        return [word for name, value in self.given.items() for word in ([name] if value is True else [name, value])]

    def options(self) -> list[Called]:
        return [
            replace(option, value=self._value(name, option.value), given=name in self.given)
            for name, option in EVERY[self.command].items()
        ]

    def _value(self, name: str, default: Any) -> Any:
        found = self.given.get(name, default)
        return float(found) if isinstance(default, int | float) and not isinstance(default, bool) else found

    def broken(self) -> list[tuple[str, Rule]]:
        """The rules that it breaks."""
        found = []
        for name in self.given:
            for rule in rules(self.command, name):
                one = [replace(o, markers=(rule,) if o.name == name else ()) for o in self.options()]
                try:
                    check(one)
                except UsageError:
                    found.append((name, rule))
        return found

    def mended(self, rule: Rule) -> Iterator[Words]:
        """Ways to heed a rule by another option."""
        for condition in rule.conditions if rule.wanted else ():
            if isinstance(condition, Condition):
                option, _, value = condition.example.partition(" ")
                yield self.having(option or condition.option, value or (condition.values or ("",))[0])

    def unmended(self, rule: Rule) -> Iterator[Words]:
        """Ways to break a rule that is heeded by an option's value, or by default."""
        for condition in rule.conditions:
            if isinstance(condition, Without):
                yield self.having(condition.options[0])
            elif condition.option == "--task" and condition.test:
                yield self.having("--task", "lm" if condition.test("sst2") else "sst2")
            elif condition.values or condition.option == "--finetune-steps":
                yield self.having(condition.option, "0" if condition.option == "--finetune-steps" else "")


def rules(command: str, option: str) -> list[Rule]:
    return [marker for marker in EVERY[command][option].markers if isinstance(marker, Rule)]


def inside(start: Words) -> Words | None:
    """The command line with the fewest other options on which nothing is wrong."""
    return _search(start, lambda words: not words.broken(), None)


def outside(command: str, option: str, rule: Rule) -> Iterator[Words]:
    """Command lines on which nothing but this option is wrong, whose rule is broken: one for each condition that must
    not hold."""
    start = Words(command, {}).having(option, rule.of[0] if rule.of else "")

    def alone(words: Words) -> bool:
        found = words.broken()
        return (option, rule) in found and all(
            name == option or not (other.wanted or rule.wanted) for name, other in found
        )

    starts = [start] if rule.wanted else list(start.mended(replace(rule, wanted=True)))
    for begin in starts:
        found = _search(begin, alone, (option, rule))
        assert found is not None, f"{command}: no command line breaks the rule of {option} alone: {begin.words()}"
        yield found


def _search(start: Words, done: Any, target: tuple[str, Rule] | None) -> Words | None:
    """Breadth first, four options deep."""
    level = [start]
    for _ in range(5):
        for words in level:
            if done(words):
                return words
        following = []
        for words in level:
            wrong = [one for one in words.broken() if one != target]
            following += [made for _, rule in wrong for made in words.mended(rule)]
            if target is not None and target not in words.broken():
                following += list(words.unmended(target[1]))
        level = [words for words in following if set(start.given) <= set(words.given)][:60]
    return None


@functools.cache
def cases(command: str) -> list[tuple[Words, str]]:
    """Command lines outside a mode, with the option that is to be refused."""
    found = EVERY[command]
    return [(words, o) for o in found for rule in rules(command, o) for words in outside(command, o, rule)]


def test_every_option_of_every_command_has_a_mode_or_is_declared_universal() -> None:
    assert list(EVERY) == list(group.COMMANDS)
    for command, found in EVERY.items():
        assert len(found) >= 3
        for name, option in found.items():
            assert option.markers, f"{command} {name}: what mode does it belong to?"
            for rule in rules(command, name):
                for condition in rule.conditions:
                    known = condition.options if isinstance(condition, Without) else (condition.option,)
                    assert set(known) <= set(found), f"{command} {name}: {known}"


@pytest.mark.parametrize("command", EVERY)
def test_an_option_outside_its_mode_is_refused_in_one_line_that_names_it(command: str, cli: Cli) -> None:
    """By the application, before the command looks at anything: there is no such model, and no such file."""
    for words, option in cases(command):
        model = ["nowhere"] if command != "demo" else []
        text = refused(cli(command, *model, *words.words()), 2, option)
        assert " with " in text or " without " in text, text


def test_walks_reach_every_rule_and_every_option_has_a_place_where_it_is_not_refused() -> None:
    assert sum(len(cases(command)) for command in EVERY) > 150
    for command, found in EVERY.items():
        for option in found:
            for value in {"", *(value for rule in rules(command, option) for value in rule.of)}:
                assert inside(Words(command, {}).having(option, value)) is not None, f"{command} {option} {value}"


def test_a_new_option_without_a_marker_and_a_new_command_are_found_by_the_walk() -> None:
    """The walk sees what Typer sees, and every command goes through the checker."""
    assert all(type(command).__name__ == "Command" for command in COMMANDS.values())
    assert all(
        isinstance(marker, Rule | OfModel | Always) for o in EVERY.values() for p in o.values() for marker in p.markers
    )


def test_messages_say_what_is_missing_or_in_the_way_and_what_to_do() -> None:
    def said(*found: Called) -> str:
        with pytest.raises(UsageError) as refusal:
            check(found)
        return str(refusal.value)

    def option(name: str, value: Any, *markers: Rule, given: bool = True) -> Called:
        return Called(name, value, given, markers, "N")

    static = needs("--overparam static", "--overparam dynamic", why="it takes all")
    none, svd = option("--overparam", None, given=False), option("--overparam", "svd")
    assert said(option("--top-n", 4, static), none) == (
        "--top-n without --overparam: it takes all "
        "(add --overparam static or --overparam dynamic, or leave --top-n out)"
    )
    assert said(option("--top-n", 4, static), svd).startswith("--top-n with --overparam svd: it takes all (")
    check([option("--top-n", 4, static, given=False), none])
    assert said(option("--a", 1, needs("--b")), option("--b", None, given=False)).startswith(
        "--a without --b (add --b N,"
    )


@dataclass(frozen=True)
class _Inner:
    rate: Annotated[float | None, of_model("cores", lacking="has no cores")] = None


@dataclass(frozen=True)
class _Config:
    inner: _Inner = _Inner()
    how: Annotated[str, of_model("cores", of=("central",), lacking="has no cores")] = "all"


def test_an_option_of_some_models_is_refused_once_the_model_is_known() -> None:
    check_model(_Config(), "bert", ())
    check_model(_Config(_Inner(1.0), "central"), "bert", {"cores"})
    check_model(_Config(how="auxiliary"), "bert", ())
    for config, option in ((_Config(_Inner(1.0)), "--rate"), (_Config(how="central"), "--how central")):
        with pytest.raises(UsageError, match=f"^{option}: bert has no cores"):
            check_model(config, "bert", {"experts"})


OF_DENSE: dict[str, Sequence[object]] = {
    "--mpo-lr": [1e-3],
    "--update": ["central"],
    "--recompute-weights": [],
    "--mask-prob": [0.5],
    "--balance-loss": [0.1],
    "--z-loss": [0.1],
    "--capacity-factor": [2],
}


def test_options_of_models_are_those_that_finetune_and_decompose_refuse() -> None:
    of_models = {
        (command, name)
        for command in ("finetune", "decompose", "plan")
        for name, option in EVERY[command].items()
        if any(isinstance(marker, OfModel) for marker in option.markers)
    }
    caps = {("decompose", f"--{role}-trunc") for role in ("emb", "attention", "ffn", "pooler")}
    dense = {("decompose", option) for option in ("--sites", "--shape", "--when-larger")} | {("plan", "--sites")}
    assert of_models == caps | dense | {("finetune", option) for option in OF_DENSE}


@pytest.mark.parametrize("option", OF_DENSE)
def test_finetune_refuses_of_a_dense_model_what_only_cores_or_experts_read(
    option: str, cli: Cli, lab: Any, work: Any
) -> None:
    arguments = ["--task", "sst2", "--train", lab / "train.tsv", option, *OF_DENSE[option]]
    refused(cli("finetune", lab / "body", *arguments), 2, option, "has no ")


@pytest.mark.parametrize("role", ["embedding", "attention", "pooler"])
def test_decompose_refuses_the_cap_of_a_role_that_is_not_chosen(role: str, cli: Cli, bert: Any, gpt2: Any) -> None:
    option = f"--{role.replace('embedding', 'emb')}-trunc"
    refused(cli("decompose", bert, "--layers", "ffn", option, 8, "--dry-run"), 2, option, f"no {role} matrices")
    if role == "pooler":
        refused(cli("decompose", gpt2, option, 8, "--dry-run"), 2, option)
