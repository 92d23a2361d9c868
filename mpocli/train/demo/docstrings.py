"""The text that the demo models learn from: paragraphs of prose in the standard library's docstrings."""

from __future__ import annotations

import ast
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable
from pathlib import Path

from mpocli.errors import InputError
from mpocli.progress import StageProgress


def read_docstrings(report: StageProgress) -> list[list[str]]:
    """The paragraphs of prose in each docstring of the standard library, none of them twice.

    Nothing is imported: the sources are parsed. Raises `InputError` if there are too few of them to learn from.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = list(source_files(root))
    documents: list[list[str]] = []
    seen: set[str] = set()
    for done, file in enumerate(files):
        report("reading docstrings", done, len(files))
        for docstring in docstrings_of(file):
            paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", docstring))
            fresh = list(dict.fromkeys(text for text in paragraphs if is_prose(text) and text not in seen))
            seen.update(fresh)
            if fresh:
                documents.append(fresh)
    report("reading docstrings", len(files), len(files))
    if len(seen) < 1000:
        raise InputError(
            f"{root}: only {len(seen)} paragraphs of docstrings in {len(files)} source files, of 1000 needed",
            hint="use a Python whose standard library comes as .py files",
        )
    return documents


def source_files(root: Path) -> Iterable[Path]:
    """The library's own source files in a fixed order, without tests, examples and what was installed into it."""
    skipped = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
    for parent, directories, names in os.walk(root):
        directories[:] = sorted(set(directories) - skipped)
        yield from (Path(parent, name) for name in sorted(names) if name.endswith(".py"))


def docstrings_of(file: Path) -> Iterable[str]:
    """The docstrings of a source file's module, classes and functions; none where it cannot be parsed."""
    try:
        with warnings.catch_warnings(action="ignore"):  # old sources have invalid escapes
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def is_prose(text: str) -> bool:
    """Whether a paragraph is English sentences, rather than a table, a signature or a doctest."""
    letters = sum(c.isalpha() or c in " ,." for c in text)
    return len(text) >= 20 and text.isascii() and text[0].isupper() and text[-1] in ".:" and letters > 0.93 * len(text)
