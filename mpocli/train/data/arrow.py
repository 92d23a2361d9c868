"""Rows of a .parquet file or a hub data set, whose columns may bring the names of their classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mpocli.errors import InputError
from mpocli.train.data.table import Table, short


def parquet_table(path: Path, source: str) -> Table:
    """The rows of a .parquet file; `InputError` where it cannot be read, or breaks off."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        features = datasets.Features.from_arrow_schema(file.schema_arrow)
    except Exception as error:  # pyarrow's and datasets' own code on a user's file: anything can come out of it
        raise InputError(f"{source}: not readable as parquet ({short(error)})", hint="download it again") from error

    def pick(columns: Sequence[str]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        count = 0
        try:
            for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
                for row in batch.to_pylist():
                    count += 1
                    yield count, tuple([row[column] for column in columns])
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise InputError(
                f"{source}: broken after row {count} ({short(error)})", hint="download it again"
            ) from error

    return Table(source, tuple(file.schema_arrow.names), pick, "row", _class_lists(features))


def hub_table(source: str, split: str | None) -> Table:
    """The rows of NAME, NAME:CONFIG or NAME:CONFIG:SPLIT through `datasets`, from its cache where the network is off.

    `split` is for a source that names none (default train). Raises `InputError` where the hub gives no such data set.
    """
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

    return Table(source, tuple(data.column_names), pick, "row", _class_lists(data.features))


def _class_lists(features: Any) -> dict[str, tuple[str, ...]]:
    return {name: tuple(feature.names) for name, feature in features.items() if hasattr(feature, "names")}
