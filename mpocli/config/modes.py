"""The mode that an option belongs to, declared beside the option, and its refusal outside of it.

    top_n: Annotated[int, Option("--top-n", "Matrices of each kind."), needs("--overparam static")] = 4

A mode is a condition on other options (`needs`, `excludes`, told by `check` before any work) or on the model
(`of_model`, told by `check_model` once it is open); `ALWAYS` marks an option that is read in every mode. Markers stand
in `Annotated`, of a configuration's field or of a command's parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

from mpocli.errors import UsageError


@dataclass(frozen=True)
class Condition:
    """What another option must be: given or on (no `values`), one of `values`, or something that passes `test`.

    `example` is how a user writes it, where neither says that.

    >>> condition("--overparam static").holds({"--overparam": "static"}), condition("--teacher").holds({})
    (True, False)
    """

    option: str
    values: tuple[str, ...] = ()
    test: Callable[[Any], bool] | None = None
    example: str = ""

    def holds(self, values: Mapping[str, Any]) -> bool:
        value = values.get(self.option)
        if self.test is not None:
            return self.test(value)
        return str(value) in self.values if self.values else bool(value)

    def written(self, metavars: Mapping[str, str]) -> str:
        """How one asks for it, as `--calibrate DATA`."""
        what = self.values[0] if self.values else metavars.get(self.option, "")
        return self.example or f"{self.option} {what}".rstrip()


@dataclass(frozen=True)
class Without:
    """The condition that no option of these is given."""

    options: tuple[str, ...]

    def holds(self, values: Mapping[str, Any]) -> bool:
        return not any(values.get(option) for option in self.options)

    def written(self, _: Mapping[str, str]) -> str:
        return ""


@dataclass(frozen=True)
class Rule:
    """One condition at least must hold (`wanted`), or none may; `of` are the values of the option that it is about,
    none of them: all."""

    conditions: tuple[Condition | Without, ...]
    wanted: bool
    of: tuple[str, ...] = ()
    why: str = ""
    hint: str = ""


@dataclass(frozen=True)
class OfModel:
    """The model must have one of `traits`; `lacking` says what it has not, as "has no experts"."""

    traits: tuple[str, ...]
    lacking: str
    of: tuple[str, ...] = ()
    hint: str = ""


@dataclass(frozen=True)
class Always:
    """Read in every mode."""


Marker = Rule | OfModel | Always
ALWAYS = Always()


def condition(text: str) -> Condition:
    """`--teacher` or `--overparam static`."""
    option, _, value = text.partition(" ")
    return Condition(option, (value,) if value else ())


def needs(*conditions: str | Condition | Without, of: Iterable[str] = (), why: str = "", hint: str = "") -> Rule:
    """The option is read only where one of these holds."""
    return Rule(tuple(_parsed(conditions)), True, tuple(of), why, hint)


def excludes(*conditions: str | Condition, of: Iterable[str] = (), why: str = "", hint: str = "") -> Rule:
    """The option is read only where none of these holds."""
    return Rule(tuple(_parsed(conditions)), False, tuple(of), why, hint)


def of_model(*traits: str, lacking: str, of: Iterable[str] = (), hint: str = "") -> OfModel:
    """The option is read only of a model that has one of these traits."""
    return OfModel(traits, lacking, tuple(of), hint)


def _parsed(found: Iterable[str | Condition | Without]) -> Iterator[Condition | Without]:
    return (condition(one) if isinstance(one, str) else one for one in found)


@dataclass(frozen=True)
class Called:
    """An option of a command that was called: its name and value, whether the user gave it, and its markers."""

    name: str
    value: Any
    given: bool
    markers: tuple[Marker, ...] = ()
    metavar: str = ""


def check(options: Collection[Called]) -> None:
    """`UsageError` for the first option that was given outside its mode, in the order of declaration."""
    values = {option.name: option.value for option in options}
    metavars = {option.name: option.metavar for option in options}
    given = [option.name for option in options if option.given]
    for option in options:
        for rule in option.markers if option.given else ():
            if not isinstance(rule, Rule) or (rule.of and str(option.value) not in rule.of):
                continue
            held = [found for found in rule.conditions if found.holds(values)]
            if bool(held) == rule.wanted:
                continue
            name = f"{option.name} {option.value}" if rule.of else option.name
            if rule.wanted:
                raise UsageError(
                    *_unmet(name, option.name, rule, values, given), hint=_add(option.name, rule, metavars)
                )
            (found, *_) = held
            assert isinstance(found, Condition)
            hint = rule.hint or f"leave {option.name} or {found.option} out"
            raise UsageError(f"{name} with {_shown(found.option, values)}{_because(rule)}", hint=hint)


def _unmet(name: str, own: str, rule: Rule, values: Mapping[str, Any], given: Collection[str]) -> tuple[str]:
    """`--top-n without --overparam`, or with what it says otherwise."""
    named = list(dict.fromkeys(one for found in rule.conditions for one in _options(found) if one != own))
    other = [option for option in named if option in given]
    if other:
        return (f"{name} with {_shown(other[0], values)}{_because(rule)}",)
    set_ = [option for option in named if values.get(option)]  # by default, as --method pst
    if set_ and len(set_) == len(named):
        return (f"{name} with {_shown(set_[0], values)}{_because(rule)}",)
    return (f"{name} without {_either(named)}{_because(rule)}",)


def _options(found: Condition | Without) -> tuple[str, ...]:
    return found.options if isinstance(found, Without) else (found.option,)


def _add(own: str, rule: Rule, metavars: Mapping[str, str]) -> str:
    ways = dict.fromkeys(found.written(metavars) for found in rule.conditions)
    return rule.hint or f"add {_either([way for way in ways if way])}, or leave {own} out"


def _shown(option: str, values: Mapping[str, Any]) -> str:
    """An option and its value, as it may have been written."""
    value = values.get(option)
    if value is None or isinstance(value, bool):
        return option
    several = isinstance(value, list | tuple)
    return f"{option} {value[0] if several and value else value}"


def _because(rule: Rule) -> str:
    return f": {rule.why}" if rule.why else ""


def _either(words: Collection[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def markers_of(annotation: Any) -> tuple[Any, ...]:
    """The markers in an `Annotated[…]`."""
    metadata = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return tuple(found for found in metadata if isinstance(found, Marker))


OF_CORES = of_model("cores", lacking="has no MPOs", hint="leave it out, or run mpocli decompose first")
OF_CORES_ALONE = of_model("cores", of=("auxiliary", "central"), lacking=OF_CORES.lacking, hint=OF_CORES.hint)
OF_DENSE = of_model(
    "dense matrices",
    lacking="has nothing but MPOs among what is chosen",
    hint="leave it out, or run mpocli merge first",
)
OF_EXPERTS = of_model("experts", lacking="has no experts", hint="run mpocli expand-moe first")
OF_SHARED = of_model("shared cores", lacking="has no experts that share a core", hint="run mpocli expand-moe first")


def of_role(role: str) -> OfModel:
    """The option is about matrices of this role, and some must be among the chosen ones."""
    return of_model(
        role, lacking=f"has no {role} matrices among those that are chosen", hint="leave it out, see --layers"
    )
