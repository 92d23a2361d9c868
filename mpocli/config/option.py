"""An option, declared once: beside the field of a configuration that holds its value.

    lr: Annotated[float, Option("--lr", "Peak learning rate.", "X", HOW, check=positive), ALWAYS] = 1e-4

The command line is made of these fields (`declared`), a configuration of what users wrote (`build`), and the manifest's
account of it (`recorded`). A configuration may hold others: their options are the command's too.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from mpocli.config.bounds import one_of
from mpocli.config.modes import Marker

_OF_FIELD: Any = object()


@dataclass(frozen=True)
class Option:
    """How users write a field and read of it. A name without dashes is that of an argument.

    `check` raises `UsageError` for a value that cannot be meant; `parse` makes a value of a text, of each text of an
    option that may be given `several` times; both are told the option's name. `default` is what the command line has,
    where that is not the field's. A `share` may be written as 50%; `negated` is a flag that switches a field off.
    `reads` says that it names a file or model that is read. `recorded` is False for what says nothing about the output,
    or makes JSON of the value; of what is read, names are recorded without folders.
    """

    name: str
    help: str
    metavar: str | None = None
    panel: str | None = None
    short: str = ""
    check: Callable[[str, Any], None] | None = None
    parse: Callable[[str, str], Any] | None = None
    default: Any = _OF_FIELD
    several: bool = False
    share: bool = False
    negated: bool = False
    reads: bool = False
    recorded: bool | Callable[[Any], Any] = True

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, self.short) if self.short else (self.name,)

    @property
    def key(self) -> str:
        """Its name as Python writes one."""
        return self.name.lstrip("-").replace("-", "_")

    def value(self, given: Any, choices: tuple[str, ...] = ()) -> Any:
        """The field's value, of what the command line gives; `UsageError` for what cannot be meant."""
        if self.several:
            return tuple(self.parse(one, self.name) if self.parse else one for one in given or ())
        if given is None:
            return None
        if choices:
            one_of(self.name, given, choices)
        if self.check is not None:
            self.check(self.name, given)
        if self.parse is not None:
            return self.parse(given, self.name)
        return not given if self.negated else given

    def account(self, value: Any) -> Any:
        """What the manifest says of a value."""
        if callable(self.recorded):
            return self.recorded(value)
        if not self.reads or not value:
            return value
        return Path(value).name if isinstance(value, str) else [Path(one).name for one in value]


@dataclass(frozen=True)
class Group:
    """How a configuration's options stand in one command.

    Those of the fields `without` are no options there; `markers` are added to the others, but to the `fields` that have
    their own: markers, or what is otherwise in its `Option`.
    """

    markers: tuple[Marker, ...] = ()
    without: tuple[str, ...] = ()
    fields: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def group(*markers: Marker, without: tuple[str, ...] = (), **fields: tuple[Any, ...]) -> Group:
    return Group(markers, without, fields)


@dataclass(frozen=True)
class Declared:
    """The option of a field in one command; `kind` is the field's type without None."""

    field: str
    option: Option
    markers: tuple[Marker, ...]
    kind: Any
    default: Any

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()


@dataclass(frozen=True)
class Nested:
    """A configuration in a field of another."""

    field: str
    config: type
    group: Group


def declared(config: type, chosen: Group = Group()) -> Iterator[Declared]:
    """All options of a configuration and those in it, in the order of the fields."""
    for member in members(config, chosen):
        if isinstance(member, Nested):
            yield from declared(member.config, member.group)
        else:
            yield member


def build(config: type, given: Mapping[str, Any], chosen: Group = Group()) -> Any:
    """The configuration of what the command line gives, by the options' keys.

    A class may have `from_options`, which takes the fields as they were given and makes of them what is held: None
    where nothing asks for it.
    """
    made = {
        member.field: build(member.config, given, member.group)
        if isinstance(member, Nested)
        else member.option.value(given[member.option.key], member.choices)
        for member in members(config, chosen)
    }
    maker: Callable[..., Any] = getattr(config, "from_options", config)
    return maker(**made)


def recorded(config: Any, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The options for the manifest, by their fields: nothing of the machine, and no folders."""
    found: dict[str, Any] = {}
    for member in members(type(config), Group(without=without)):
        value = getattr(config, member.field)
        if isinstance(member, Declared):
            found |= {member.field: member.option.account(value)} if member.option.recorded else {}
        elif value is not None:
            found |= value.recorded() if hasattr(value, "recorded") else recorded(value, member.group.without)
    return found


def members(config: type, chosen: Group = Group()) -> Iterator[Declared | Nested]:
    """The fields that are options or configurations."""
    hints = get_type_hints(config, include_extras=True)
    for one in fields(config):
        if one.name in chosen.without:
            continue
        kind, metadata = parts(hints[one.name])
        is_option = any(isinstance(found, Option) for found in metadata)
        if is_option:
            more = chosen.fields.get(one.name, chosen.markers)
            yield one_declared(one.name, kind, (*metadata, *more), one.default)
        elif is_dataclass(kind):
            inner = next((found for found in metadata if isinstance(found, Group)), Group())
            yield Nested(one.name, kind, inner)  # type: ignore[arg-type]


def one_declared(name: str, kind: Any, metadata: tuple[Any, ...], default: Any) -> Declared:
    """The option of a field or parameter; what follows on its `Option` are markers, and dicts of what is otherwise."""
    option = next(found for found in metadata if isinstance(found, Option))
    for change in metadata:
        option = replace(option, **change) if isinstance(change, dict) else option
    if option.default is not _OF_FIELD:
        default = option.default
    elif option.negated:
        default = False
    elif option.several or default is MISSING:
        default = None
    markers = tuple(found for found in metadata if isinstance(found, Marker))
    return Declared(name, option, markers, kind, default)


def parts(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type without None, and what stands beside it in `Annotated`."""
    metadata: tuple[Any, ...] = ()
    if get_origin(annotation) is Annotated:
        annotation, *rest = get_args(annotation)
        metadata = tuple(rest)
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        if len(kinds) == 1:
            return kinds[0], metadata
    return annotation, metadata
