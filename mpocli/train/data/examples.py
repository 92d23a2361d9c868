"""Texts and labels from local files or a hub data set, every row checked against its task."""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any

from mpocli.config.tasks import Task
from mpocli.errors import InputError, UsageError
from mpocli.io.json_file import parse_json
from mpocli.io.readable import is_there, why_unreadable

_LINES = (".tsv", ".csv", ".jsonl", ".json", ".txt")
FORMATS = (*_LINES, ".parquet")

Labels = tuple[int, ...] | tuple[float, ...] | tuple[str, ...]


@dataclass(frozen=True)
class Examples:
    """The rows of one source, in its order.

    `labels` are class indices into `label_names`, scores, or target texts, as the task is; None where none were
    asked for. `lines` count from 1: physical lines of a text file (of a record's first line where it has several),
    rows elsewhere. `skipped` counts the rows left out as broken, where the task says so.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: Labels | None
    lines: tuple[int, ...]
    source: str
    label_names: tuple[str, ...] = ()
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.texts)


def read_examples(
    source: str,
    task: Task,
    *,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    split: str | None = None,
    needs_labels: bool = True,
    label_names: Sequence[str] = (),
    renames: bool = False,
) -> Examples:
    """Read and check every row of `source`, then keep `limit` of them: a seeded random subset, in file order.

    `source` is a file (.tsv with quoting off as in GLUE, .csv, .jsonl, .parquet, .txt with one text a line) or a hub
    data set: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT; `split` (default train) is for a hub name that gives none.
    `limit` counts rows: a source with several references may lose some of them.
    `label_names` are the classes of the model or of the training set; without them they are the task's, or the sorted
    distinct labels. A label may be a class's name or its integer. With `renames` the classes of a model that has no
    names for them (LABEL_0, LABEL_1) take those of the rows. With `needs_labels=False` labels are never looked at.

    Raises `UsageError` for options that cannot be meant, and `InputError` (one line: source, line, the numbers)
    for a source that is absent, empty, undecodable or ragged, a column that is missing, and a label that is not
    among the task's or not a finite number.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: at least one row is needed")
    table = _open(source, task, text_columns, split)
    columns, label = _columns(table, task, text_columns, label_column, needs_labels)

    wanted = [*columns, label] if label else columns
    lines: list[int] = []
    rows: list[tuple[Any, ...]] = []
    for line, row in table.pick(wanted):
        lines.append(line)
        rows.append(row)
    if not rows:
        raise InputError(f"{source}: no rows", hint="the file is empty, or has nothing but a header")

    where = _Where(source, table.unit, lines)
    fields = list(zip(*rows, strict=True))
    texts = [_texts(values, name, where) for values, name in zip(fields, columns, strict=False)]
    labels: Labels | None = None
    names: tuple[str, ...] = ()
    if label and task.kind == "classification":
        labels, names = _classes(
            fields[-1], where, task.labels, table.classes.get(label, ()), tuple(label_names), renames
        )
    elif label and task.kind == "regression":
        labels = _scores(fields[-1], where, task.score_range)
    elif label:
        labels = _texts(fields[-1], label, where)

    pairs = texts[1] if len(texts) == 2 else None
    examples = Examples(texts[0], pairs, labels, tuple(lines), source, names, len(table.skipped))
    if limit is None or limit >= len(examples):
        return examples
    return take(examples, sorted(random.Random(seed).sample(range(len(examples)), limit)))


def read_text(source: str, *, text_column: str | None = None, split: str | None = None) -> str:
    """The text of a language-modelling source: a .txt file as it stands (CRLF as LF), else the rows of the column
    `text` joined by newlines (a row's own last newline counts as that newline, as hub copies of wikitext have it).

    Raises `InputError` for a source that is absent, undecodable or blank, or has no such column.
    """
    if _is_file(source) and Path(source).suffix.lower() == ".txt":
        path = Path(source)
        data = _existing(path).read_bytes()
        try:
            text = data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, data.count(b"\n", 0, error.start) + 1, error) from error
    else:
        column = text_column or "text"
        table = _open(source, None, (), split)
        _require(table, (column,), "--text-column")
        lines, rows = [], []
        for line, row in table.pick([column]):
            lines.append(line)
            rows.append(row[0])
        texts = _texts(rows, column, _Where(source, table.unit, lines))
        text = "".join(f"{row.removesuffix(chr(10))}\n" for row in texts)
    if not text.strip():
        raise InputError(f"{source}: no text in it", hint="name a file with text")
    return text


def take(examples: Examples, indices: Sequence[int]) -> Examples:
    """The rows at `indices`, in that order."""
    labels: Any = None if examples.labels is None else tuple(examples.labels[i] for i in indices)
    return replace(
        examples,
        texts=tuple(examples.texts[i] for i in indices),
        pairs=None if examples.pairs is None else tuple(examples.pairs[i] for i in indices),
        labels=labels,
        lines=tuple(examples.lines[i] for i in indices),
    )


def split_off(examples: Examples, fraction: float = 0.1, seed: int = 0) -> tuple[Examples, Examples]:
    """`(rest, held_out)`: a seeded share of the rows, rounded and at least one, both parts in file order.

    Rows with the same input go to one side, so that nothing is selected on what was trained on; the held-out part
    may be larger by one such group. Raises `InputError` where there are fewer than two distinct inputs.
    """
    assert 0 < fraction < 1, fraction
    groups: dict[tuple[str, str], list[int]] = {}
    for index, key in enumerate(zip(examples.texts, examples.pairs or examples.texts, strict=True)):
        groups.setdefault(key, []).append(index)
    if len(groups) < 2:
        raise InputError(
            f"{examples.source}: {len(groups)} distinct input in {len(examples)} rows, 2 are needed to hold some out",
            hint="give more rows, or an evaluation set of its own",
        )
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    target = max(1, round(fraction * len(examples)))
    held: list[int] = []
    for group in order[:-1]:  # the last group stays, so that the rest is never empty
        held += group
        if len(held) >= target:
            break
    inside = set(held)
    rest = [index for index in range(len(examples)) if index not in inside]
    return take(examples, rest), take(examples, sorted(held))


def references(examples: Examples) -> tuple[list[str], list[list[str]]]:
    """Distinct sources in order of appearance and the targets of each, as multi-reference BLEU counts samples."""
    assert examples.labels is not None
    found: dict[str, list[str]] = {}
    for text, target in zip(examples.texts, examples.labels, strict=True):
        found.setdefault(text, []).append(str(target))
    return list(found), list(found.values())


# --- columns and values -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """A source opened: the columns it has, and an iterator over (line, values of some columns)."""

    source: str
    names: tuple[str, ...]
    pick: Callable[[Sequence[str]], Iterator[tuple[int, tuple[Any, ...]]]]
    unit: str = "line"
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)  # lines left out, known once the rows are read


@dataclass(frozen=True)
class _Where:
    """Turns the index of a value into the place a user can open."""

    source: str
    unit: str
    lines: Sequence[int]

    def __call__(self, index: int) -> str:
        return f"{self.source}: {self.unit} {self.lines[index]}"


def _columns(
    table: _Table, task: Task, text_columns: Sequence[str], label_column: str | None, needs_labels: bool
) -> tuple[list[str], str | None]:
    """The text columns and the label column (None where it is not needed) among those of the table."""
    if len(text_columns) > 2:
        raise UsageError(f"--text-column: {len(text_columns)} given, at most two make one input")
    fields = tuple((name,) for name in text_columns) or task.texts
    if not fields:
        if len(table.names) > 1 or needs_labels:
            raise UsageError(
                f"--task {task.name} needs --text-column; {table.source} has: {_listed(table.names)}",
                hint="name one column, or two for pairs",
            )
        fields = (table.names,)  # one column: no doubt about which
    columns = [_require(table, names, "--text-column") for names in fields]
    if not needs_labels or task.kind == "lm":
        return columns, None
    label = (label_column,) if label_column else task.label
    if not label:
        raise UsageError(
            f"--task {task.name} needs --label-column; {table.source} has: {_listed(table.names)}",
            hint="name the column of the labels",
        )
    return columns, _require(table, label, "--label-column")


def _require(table: _Table, names: Sequence[str], option: str) -> str:
    for name in names:
        if name in table.names:
            return name
    for name in names:  # as in "text , label"
        near = [own for own in table.names if own.strip() == name.strip()]
        if len(near) == 1:
            return near[0]
    raise InputError(
        f"{table.source}: no column {' or '.join(names)}; it has: {_listed(table.names)}",
        hint=f"name it with {option}, or the --task whose columns these are; the first line has to be a header",
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(_short(name) if name == name.strip() and name else repr(name) for name in names[:20])
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def _texts(values: Sequence[Any], column: str, where: _Where) -> tuple[str, ...]:
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise InputError(
                f"{where(index)}: column {column} holds {_short(json.dumps(value, default=str))}, not a text",
                hint="name another column, or remove the row",
            )
        _check_text(value, where(index))
    return tuple(values)


def _check_text(text: str, place: str) -> None:
    """`InputError` for half of a surrogate pair (JSON can spell it), which no tokenizer takes and no file holds."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: half of a character (\\u{ord(text[error.start]):04x} without its other half)",
            hint="write the whole character, or remove the row",
        ) from error


def _scores(values: Sequence[Any], where: _Where, bounds: tuple[float, float] | None) -> tuple[float, ...]:
    scores = []
    low, high = bounds or (-math.inf, math.inf)
    for index, value in enumerate(values):
        number = _number(value)
        if number is None or not math.isfinite(number):
            raise InputError(f"{where(index)}: score {_short(value)!r} is not a finite number", hint="correct the row")
        if not low <= number <= high:
            raise InputError(
                f"{where(index)}: score {number:g} is outside {low:g} to {high:g}",
                hint="is this a test set without labels, or another scale? --task regression takes any",
            )
        scores.append(number)
    return tuple(scores)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _classes(
    values: Sequence[Any],
    where: _Where,
    canonical: tuple[str, ...],
    column: tuple[str, ...],
    given: tuple[str, ...],
    renames: bool,
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Class indices and class names.

    A class goes by its name or by its integer, which counts in the column's own list (hub data sets carry one) or in
    the task's. It is then found by name among the names to be used, which may stand in another order (`given`, a
    model's); only where the two lists have no name in common (LABEL_0, LABEL_1) by its place.
    """
    for index, value in enumerate(values):
        if value is None or not str(value).strip():
            raise InputError(f"{where(index)}: no label", hint="correct or remove the row")
        if not isinstance(value, str | int | float | Decimal):  # a list of labels, an object, a date
            kind = {"list": "a list", "dict": "an object"}.get(type(value).__name__, f"a {type(value).__name__}")
            raise InputError(
                f"{where(index)}: label {_short(value)} is {kind}, and a class is one name or number",
                hint="give each row one label, or choose another --label-column",
            )
        _check_text(str(value), where(index))
    texts = [str(value).strip() for value in values]
    if column:  # its values are integers; those outside the list (-1: unlabelled) stay, and are refused below
        own = {str(number): name for number, name in enumerate(column)}
        texts = [own.get(text, text) for text in texts]
    if given and not canonical and all(_NAMELESS.fullmatch(name) for name in given):
        given = _named(texts, where, column, given, renames)
    names = given or canonical or column or _inferred(texts, where)
    known: dict[str, int] = {}
    for index, text in enumerate(texts):
        if text not in known:
            position = _class_index(text, names, column or canonical)
            if position is None:
                raise InputError(
                    f"{where(index)}: label {_short(text)!r} is not one of the {len(names)}: {_listed(names)}",
                    hint="correct the row, or choose another --label-column; test sets often come without labels",
                )
            known[text] = position
    return tuple([known[text] for text in texts]), names


_NAMELESS = re.compile(r"LABEL_\d+")


def _named(
    texts: Sequence[str], where: _Where, column: tuple[str, ...], given: tuple[str, ...], renames: bool
) -> tuple[str, ...]:
    """The names of a head that has none: as given for rows labelled by number, else the rows' own where it is
    trained on them. `InputError` where nothing says which class is which."""
    if all(_class_index(text, given, column) is not None for text in set(texts)):
        return given
    own = column or _inferred(texts, where)
    if not renames or len(own) != len(given):
        problem = "nothing says which is which" if len(own) == len(given) else "the numbers differ"
        raise InputError(
            f"{where.source}: {len(own)} classes ({_listed(own)}), and the model's head has {len(given)} without names "
            f"({_listed(given)}): {problem}",
            hint="name the head's classes in id2label of its config.json, or label the rows by number",
        )
    return own


def _class_index(text: str, names: tuple[str, ...], numbered: tuple[str, ...]) -> int | None:
    found = _by_name(text, names)
    if found is not None:
        return found
    place = _by_name(text, numbered)
    if place is None:
        number = _number(text)
        if number is None or not number.is_integer():
            return None
        place = int(number)
    if any(_number(name) is not None for name in names):  # classes that are numbers go by name alone
        return _by_name(str(place), names)
    if any(_by_name(name, names) is not None for name in numbered):
        return _by_name(numbered[place], names) if 0 <= place < len(numbered) else None
    return place if 0 <= place < len(names) else None


def _by_name(text: str, names: tuple[str, ...]) -> int | None:
    if text in names:
        return names.index(text)
    folded = [index for index, name in enumerate(names) if name.casefold() == text.casefold()]
    return folded[0] if len(folded) == 1 else None


def _inferred(values: Sequence[str], where: _Where) -> tuple[str, ...]:
    """The distinct labels in order, by number where all are numbers."""
    distinct = set(values)
    numbers = {text: _number(text) for text in distinct}
    fractions = [text for text, number in numbers.items() if number is not None and not number.is_integer()]
    if fractions:
        raise InputError(
            f"{where.source}: label {_short(min(fractions))!r} is no class but a number",
            hint="use --task regression, or choose another --label-column",
        )
    if len(distinct) < 2:
        raise InputError(
            f"{where.source}: {len(distinct)} class ({_listed(sorted(distinct))}) in {len(values)} rows, 2 are needed",
            hint="choose another --label-column",
        )
    if None not in numbers.values():
        return tuple(sorted({str(int(number)) for number in numbers.values() if number is not None}, key=int))
    return tuple(sorted(distinct))


# --- sources ------------------------------------------------------------------------------------------------------


def _open(source: str, task: Task | None, text_columns: Sequence[str], split: str | None) -> _Table:
    if not _is_file(source):
        return _hub_table(source, split)
    path = _existing(Path(source))
    suffix = path.suffix.lower()
    if suffix in (".tsv", ".csv"):
        return _delimited(path, source, task, text_columns)
    if suffix in (".jsonl", ".json"):
        return _json_lines(path, source)
    if suffix == ".parquet":
        return _parquet(path, source)
    if suffix == ".txt":
        return _Table(source, ("text",), lambda names: ((at, (line,) * len(names)) for at, line in _lines(path)))
    raise InputError(f"{source}: {suffix or 'no suffix'} is no format that is read", hint=f"use {', '.join(FORMATS)}")


def check_source(source: str) -> None:
    """`InputError` for a file that is not there; of hub data sets nothing is known yet."""
    if _is_file(source):
        _existing(Path(source))


def _is_file(source: str) -> bool:
    """Whether a file is meant: it is there, or it looks like one and not like NAME or OWNER/NAME."""
    path = Path(source)
    return (
        is_there(path)
        or path.suffix.lower() in FORMATS
        or source.startswith(("/", ".", "~"))
        or source.partition(":")[0].count("/") > 1
    )


def _existing(path: Path) -> Path:
    why = why_unreadable(path)
    if why == "is a directory":
        raise InputError(f"{path}: is a directory", hint=f"name one file in it: {', '.join(FORMATS)}")
    if why == "does not exist":
        raise InputError(f"{path}: no such file", hint="check the path")
    if why:
        raise InputError(f"{path}: {why}", hint="copy it to a file that can be read")
    return path


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> InputError:
    return InputError(
        f"{path}: line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x})",
        hint="convert the file to UTF-8 first",
    )


def _raw_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines by `\\n` alone: str.splitlines would also break texts at form feeds and Unicode separators."""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, error) from error
            yield number, line.removeprefix("\ufeff") if number == 1 else line


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, without their ends."""
    return ((number, line.rstrip("\r\n")) for number, line in _raw_lines(path) if line.strip())


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    # Strict, so that a stray quote is an error and does not swallow the rest of the file.
    reader = csv.reader((line for _, line in _raw_lines(path)), strict=True)
    start = 1
    try:
        for record in reader:
            if record:
                yield start, record
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}: line {start} is not csv ({error})", hint="close the quotes, or write it as .tsv or .jsonl"
        ) from error


def _delimited(path: Path, source: str, task: Task | None, text_columns: Sequence[str]) -> _Table:
    if path.suffix.lower() == ".tsv":
        separator = "tab"
        records: Iterator[tuple[int, list[str]]] = ((at, line.split("\t")) for at, line in _lines(path))
    else:
        separator = "comma"
        records = _csv_records(path)
    first = next(records, None)
    if first is None:
        raise InputError(f"{source}: empty", hint="name a file with rows")
    names = tuple(first[1])
    if task and len(names) == len(task.file_columns):
        expected = {name for names_ in task.texts for name in names_} | set(text_columns)
        if not expected & set(names):
            names, records = task.file_columns, chain([first], records)
    skipped: list[int] = []
    skips = task is not None and task.skips_broken_rows

    def pick(columns: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
        places = [names.index(column) for column in columns]
        for line, record in records:
            if len(record) == len(names):
                yield line, tuple([record[place] for place in places])
            elif skips:
                skipped.append(line)
            else:
                raise InputError(
                    f"{source}: line {line} has {len(record)} {separator}-separated fields, {len(names)} were expected",
                    hint=f"a {separator} or a line break stands inside a text: correct the row",
                )

    return _Table(source, names, pick, skipped=skipped)


def _json_lines(path: Path, source: str) -> _Table:
    def objects() -> Iterator[tuple[int, dict[str, Any]]]:
        for line, text in _lines(path):
            try:
                row = parse_json(text, halves=True)  # what is read of a row is looked at later, and only that
            except ValueError as error:
                reason = getattr(error, "msg", error)
                raise InputError(
                    f"{source}: line {line} is not JSON that can be read ({reason})",
                    hint="one object per line is expected",
                ) from error
            if not isinstance(row, dict):
                raise InputError(
                    f"{source}: line {line} is a JSON {type(row).__name__}, not an object",
                    hint="one object per line is expected",
                )
            yield line, row

    rows = objects()
    first = next(rows, None)
    if first is None:
        raise InputError(f"{source}: empty", hint="name a file with rows")

    def pick(columns: Sequence[str]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        for line, row in chain([first], rows):
            try:
                yield line, tuple([row[column] for column in columns])
            except KeyError as error:
                raise InputError(
                    f"{source}: line {line} has no {error.args[0]}; it has: {_listed(tuple(row))}",
                    hint="every line needs the same keys",
                ) from error

    return _Table(source, tuple(first[1]), pick)


def _parquet(path: Path, source: str) -> _Table:
    import datasets
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        features = datasets.Features.from_arrow_schema(file.schema_arrow)
    except Exception as error:  # pyarrow's and datasets' own code on a user's file: anything can come out of it
        raise InputError(f"{source}: not readable as parquet ({_short(error)})", hint="download it again") from error

    def pick(columns: Sequence[str]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        count = 0
        try:
            for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
                for row in batch.to_pylist():
                    count += 1
                    yield count, tuple([row[column] for column in columns])
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise InputError(
                f"{source}: broken after row {count} ({_short(error)})", hint="download it again"
            ) from error

    return _Table(source, tuple(file.schema_arrow.names), pick, "row", _class_lists(features))


def _hub_table(source: str, split: str | None) -> _Table:
    """NAME, NAME:CONFIG or NAME:CONFIG:SPLIT through `datasets`, from its cache where the network is off."""
    import datasets

    # A split may be a slice of one, as validation[:50%].
    name, config, own_split = [*source.split(":", 2), "", ""][:3]
    try:
        data = datasets.load_dataset(name, config or None, split=own_split or split or "train")
    except Exception as error:  # datasets' own code on a name or a cache: anything can come out of it
        reason = " ".join(str(error).split())
        raise InputError(
            f"{source}: no such file here, and no data set that the hub gives ({reason[:200]})",
            hint="check the path; or NAME:CONFIG:SPLIT and the connection, or download the data set first",
        ) from error

    def pick(columns: Sequence[str]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        return enumerate(zip(*(data[column][:] for column in columns), strict=True), 1)

    return _Table(source, tuple(data.column_names), pick, "row", _class_lists(data.features))


def _class_lists(features: Any) -> dict[str, tuple[str, ...]]:
    return {name: tuple(feature.names) for name, feature in features.items() if hasattr(feature, "names")}
