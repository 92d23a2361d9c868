"""Reading rows: formats, labels, subsets, and every kind of file that cannot be used."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpocli.config.tasks import task_named
from mpocli.errors import InputError, UsageError
from mpocli.train.data.examples import Examples, read_examples, references, split_off, take
from mpocli.train.data.text import read_text

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
RTE, SST2, STSB = task_named("rte"), task_named("sst2"), task_named("stsb")
GENERIC = task_named("classification")

Write = Callable[[str, str | bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return _write


def fails(source: str, *parts: str, task: str = "sst2", **options: Any) -> InputError:
    """The one-line `InputError` that reading gives, checked for what it has to name."""
    with pytest.raises(InputError) as caught:
        read_examples(source, task_named(task), **options)
    error = caught.value
    assert error.exit_code == 3
    assert "\n" not in str(error)
    for part in (source, *parts):
        assert part in error.message
    assert error.hint
    return error


# --- formats ------------------------------------------------------------------------------------------------------


def test_tsv_takes_quotes_as_letters(write: Write) -> None:
    source = write("a.tsv", 'sentence\tlabel\n"half a quote\t1\nan inch: 5"\t0\n"whole"\t1\n')
    examples = read_examples(source, SST2)
    assert examples.texts == ('"half a quote', 'an inch: 5"', '"whole"')
    assert examples.labels == (1, 0, 1)
    assert examples.lines == (2, 3, 4)
    assert examples.label_names == ("negative", "positive")


def test_csv_takes_quotes_as_quotes_and_lines_count_the_file(write: Write) -> None:
    source = write("a.csv", 'label,sentence\n1,"one, and\na half"\n\n0,two\n')
    examples = read_examples(source, SST2)
    assert examples.texts == ("one, and\na half", "two")
    assert examples.lines == (2, 5)


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_do_no_harm(write: Write) -> None:
    source = write("a.tsv", b"\xef\xbb\xbfsentence\tlabel\r\n\r\none\t1\r\ntwo\t0\r\n\r\n")
    examples = read_examples(source, SST2)
    assert (examples.texts, examples.labels, examples.lines) == (("one", "two"), (1, 0), (3, 4))


def test_a_unicode_line_separator_does_not_end_a_row(write: Write) -> None:
    source = write("a.tsv", "sentence\tlabel\none\u2028half\x0cmore\t1\n")
    assert read_examples(source, SST2).texts == ("one\u2028half\x0cmore",)


def test_cola_is_read_without_a_header_and_with_one(write: Write) -> None:
    cola = task_named("cola")
    bare = read_examples(write("a.tsv", "gj04\t1\t\tFine.\ngj04\t0\t*\tNot fine.\n"), cola)
    assert (bare.texts, bare.labels, bare.lines) == (("Fine.", "Not fine."), (1, 0), (1, 2))
    headed = read_examples(write("b.tsv", "sentence\tlabel\nFine.\t1\n"), cola)
    assert (headed.texts, headed.labels, headed.lines) == (("Fine.",), (1,), (2,))


def test_mrpc_goes_by_glues_columns_and_by_the_hubs(write: Write) -> None:
    mrpc = task_named("mrpc")
    glue = write("a.tsv", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tone\teins\n")
    hub = write("b.csv", "sentence1,sentence2,label,idx\none,eins,1,0\n")
    for source in (glue, hub):
        examples = read_examples(source, mrpc)
        assert (examples.texts, examples.pairs, examples.labels) == (("one",), ("eins",), (1,))


def test_boolq_json_lines_have_truth_values(write: Write) -> None:
    rows = [{"question": "q", "passage": "p", "answer": True}, {"question": "r", "passage": "s", "answer": False}]
    source = write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    examples = read_examples(source, task_named("boolq"))
    assert (examples.texts, examples.pairs, examples.labels) == (("q", "r"), ("p", "s"), (1, 0))


def test_parquet_is_read_and_a_class_list_in_it_names_the_integers(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    from pyarrow import parquet

    features = datasets.Features({"t": datasets.Value("string"), "y": datasets.ClassLabel(names=["3", "1", "2"])})
    table = pyarrow.table({"t": ["a", "b", "c"], "y": [1, 0, 2]}, schema=features.arrow_schema)
    parquet.write_table(table, tmp_path / "a.parquet")
    examples = read_examples(str(tmp_path / "a.parquet"), GENERIC, text_columns=["t"], label_column="y")
    assert examples.label_names == ("3", "1", "2")
    assert (examples.texts, examples.labels, examples.lines) == (("a", "b", "c"), (1, 0, 2), (1, 2, 3))


def test_txt_has_one_text_a_line_and_no_labels(write: Write) -> None:
    source = write("a.txt", "one\n\ntwo\n")
    examples = read_examples(source, GENERIC, needs_labels=False)
    assert (examples.texts, examples.labels, examples.lines) == (("one", "two"), None, (1, 3))
    fails(source, "no column label", "text", task="sst2", text_columns=["text"])


def test_a_hub_name_with_configuration_and_split_reaches_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        features = {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
        return datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [1, 0]}, datasets.Features(features))

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source, split in (
        ("nyu-mll/glue:sst2", "validation"),
        ("nyu-mll/glue:sst2:test", "validation"),
        ("sst2", None),
    ):
        assert read_examples(source, SST2, split=split).labels == (1, 0)
    assert asked == [
        ("nyu-mll/glue", "sst2", "validation"),
        ("nyu-mll/glue", "sst2", "test"),
        ("sst2", None, "train"),
    ]


def test_hub_labels_of_minus_one_are_refused_unless_no_labels_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    data = datasets.Dataset.from_dict({"sentence": ["a"], "label": [-1]}, datasets.Features(features))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    fails("nyu-mll/glue:sst2:test", "row 1", "'-1'")
    assert read_examples("nyu-mll/glue:sst2:test", SST2, needs_labels=False).labels is None


def test_a_hub_name_that_cannot_be_had_names_both_possibilities() -> None:
    fails("nobody/nothing-here:sst2", "no such file", "no data set that the hub gives")


# --- labels -------------------------------------------------------------------------------------------------------


def test_names_and_integers_mean_the_same_class(write: Write) -> None:
    header = "sentence1\tsentence2\tlabel\n"
    names = write("a.tsv", f"{header}a\tb\tnot_entailment\na\tb\tentailment\n")
    integers = write("b.tsv", f"{header}a\tb\t1\na\tb\t0\n")
    assert read_examples(names, RTE).labels == read_examples(integers, RTE).labels == (1, 0)


def test_a_models_class_order_is_followed_by_name_and_by_integer(write: Write) -> None:
    source = write("a.tsv", "sentence1\tsentence2\tgold_label\na\tb\tentailment\na\tb\t0\na\tb\tcontradiction\n")
    mnli = task_named("mnli")
    assert read_examples(source, mnli).labels == (0, 0, 2)
    other = read_examples(source, mnli, label_names=["CONTRADICTION", "NEUTRAL", "ENTAILMENT"])
    assert other.labels == (2, 2, 0)
    assert other.label_names == ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
    nameless = read_examples(source, mnli, label_names=["LABEL_0", "LABEL_1", "LABEL_2"])
    assert nameless.labels == (0, 0, 2)


def test_classes_of_an_unknown_task_are_its_sorted_distinct_labels(write: Write) -> None:
    options: dict[str, Any] = {"text_columns": ["t"], "label_column": "y"}
    words = read_examples(write("a.csv", "t,y\na,spam\nb,ham\nc,spam\n"), GENERIC, **options)
    assert (words.labels, words.label_names) == ((1, 0, 1), ("ham", "spam"))
    numbers = read_examples(write("b.csv", "t,y\na,10\nb,2\nc,1\n"), GENERIC, **options)
    assert (numbers.labels, numbers.label_names) == ((2, 1, 0), ("1", "2", "10"))


def test_classes_of_the_training_set_hold_for_the_evaluation_set(write: Write) -> None:
    options: dict[str, Any] = {"text_columns": ["t"], "label_column": "y", "label_names": ("1", "2", "10")}
    assert read_examples(write("a.csv", "t,y\na,10\nb,1.0\n"), GENERIC, **options).labels == (2, 0)
    fails(write("b.csv", "t,y\na,0\n"), "line 2", "'0'", "1, 2, 10", task="classification", **options)


def test_a_label_that_is_not_among_the_tasks_is_named_with_its_line(write: Write) -> None:
    error = fails(
        write("a.tsv", "sentence1\tsentence2\tlabel\na\tb\tentailment\na\tb\tmaybe\n"), "line 3", "'maybe'", task="rte"
    )
    assert "entailment, not_entailment" in error.message


@pytest.mark.parametrize("label", ["2", "-1", "0.5", "nan"])
def test_an_integer_out_of_range_is_named_with_its_line(write: Write, label: str) -> None:
    fails(write("a.tsv", f"sentence\tlabel\na\t1\nb\t{label}\n"), "line 3", f"'{label}'", "negative, positive")


def test_the_largest_integer_in_range_is_taken(write: Write) -> None:
    assert read_examples(write("a.tsv", "sentence\tlabel\na\t1\nb\t0\nc\t1.0\n"), SST2).labels == (1, 0, 1)


@pytest.mark.parametrize("label", ["null", '""', '" "'])
def test_a_missing_label_is_named_and_never_a_class(write: Write, label: str) -> None:
    source = write("a.jsonl", f'{{"t": "a", "y": "ham"}}\n{{"t": "b", "y": {label}}}\n')
    fails(source, "line 2", "no label", task="classification", text_columns=["t"], label_column="y")


def test_scores_are_no_classes_and_one_class_is_too_few(write: Write) -> None:
    options: dict[str, Any] = {"task": "classification", "text_columns": ["t"], "label_column": "y"}
    assert "regression" in fails(write("a.csv", "t,y\na,3.8\nb,1\n"), "'3.8'", **options).hint
    fails(write("b.csv", "t,y\na,1\nb,1\n"), "1 class", "2 rows", **options)


@pytest.mark.parametrize("score", ["high", "nan", "inf", ""])
def test_a_score_that_is_no_finite_number_is_named_with_its_line(write: Write, score: str) -> None:
    source = write("a.tsv", f"sentence1\tsentence2\tscore\na\tb\t5.000\na\tb\t{score}\n")
    fails(source, "line 3", f"'{score}'", task="stsb")


def test_a_score_outside_the_tasks_scale_is_named_with_its_line(write: Write) -> None:
    fails(write("a.tsv", "sentence1\tsentence2\tscore\na\tb\t0\na\tb\t5.1\n"), "line 3", "5.1", "0 to 5", task="stsb")
    assert read_examples(write("b.tsv", "sentence1\tsentence2\tscore\na\tb\t5\n"), STSB).labels == (5.0,)


# --- files that cannot be used ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["absent.tsv", "absent/deep/path", "./absent"])
def test_an_absent_file_is_no_hub_name(name: str) -> None:
    with pytest.raises(InputError, match="no such file") as caught:
        read_examples(name, SST2)
    assert "hub" not in str(caught.value)


def test_a_directory_and_an_unknown_format_are_refused(tmp_path: Path, write: Write) -> None:
    fails(str(tmp_path), "a directory")
    assert ".parquet" in fails(write("a.xlsx", "x"), ".xlsx").hint


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.txt"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(write: Write, name: str, content: str) -> None:
    with pytest.raises(InputError, match=r"empty|no rows"):
        read_examples(write(name, content), SST2, needs_labels=False, text_columns=["text"])


def test_a_file_with_a_header_alone_is_refused(write: Write) -> None:
    fails(write("a.tsv", "sentence\tlabel\n"), "no rows")


def test_a_missing_column_names_those_present(write: Write) -> None:
    source = write("a.tsv", "text\tclass\na\t1\n")
    assert "‹text_column›" in fails(source, "no column sentence", "text, class").hint
    error = fails(source, "no column label", "text, class", text_columns=["text"])
    assert "‹label_column›" in error.hint
    assert read_examples(source, SST2, text_columns=["text"], label_column="class").labels == (1,)


def test_a_generic_task_without_columns_is_a_usage_error_that_names_them(write: Write) -> None:
    source = write("a.csv", "t,y\na,1\n")
    with pytest.raises(UsageError, match=r"‹text_column›.*t, y"):
        read_examples(source, GENERIC)
    with pytest.raises(UsageError, match=r"‹label_column›.*t, y"):
        read_examples(source, GENERIC, text_columns=["t"])
    with pytest.raises(UsageError, match="at most two"):
        read_examples(source, GENERIC, text_columns=["t", "t", "t"])


@pytest.mark.parametrize(("row", "found"), [("a\tb\t1", "3"), ("a", "1")])
def test_a_ragged_row_is_named_with_its_line_and_both_numbers(write: Write, row: str, found: str) -> None:
    fails(write("a.tsv", f"sentence\tlabel\nfine\t1\n{row}\n"), "line 3", f"has {found} ", "2 were expected")


def test_a_ragged_csv_row_and_an_open_quote_are_named_with_their_line(write: Write) -> None:
    fails(write("a.csv", "sentence,label\nfine,1\na,b,1\n"), "line 3", "has 3 comma", "2 were expected")
    fails(write("b.csv", 'sentence,label\nfine,1\n"open,1\nmore,0\n'), "line 3", "not csv")


def test_torn_rows_of_qqp_are_left_out_and_counted(write: Write) -> None:
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    source = write("a.tsv", f"{header}0\t1\t2\ta\tb\t1\n1\t3\t4\ttorn\n apart\tb\t0\n2\t5\t6\tc\td\t0\n")
    examples = read_examples(source, task_named("qqp"))
    assert (examples.texts, examples.labels, examples.lines) == (("a", "c"), (1, 0), (2, 5))
    assert examples.skipped == 2


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.txt"])
def test_text_that_is_not_utf8_is_named_with_its_line(write: Write, name: str) -> None:
    fails(write(name, b"text\nfine\ncaf\xe9 au lait\n"), "line 3", "0xe9", text_columns=["text"], needs_labels=False)


def test_broken_json_lines_are_named_with_their_line(write: Write) -> None:
    fails(write("a.jsonl", '{"sentence": "a", "label": 1}\n{"sentence"\n'), "line 2", "not JSON")
    fails(write("b.jsonl", '{"sentence": "a", "label": 1}\n["b", 0]\n'), "line 2", "list")
    fails(write("c.jsonl", '{"sentence": "a", "label": 1}\n{"text": "b"}\n'), "line 2", "no sentence", "text")


def test_a_text_that_is_none_is_named_with_its_line(write: Write) -> None:
    fails(write("a.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": null, "label": 0}\n'), "line 2", "null")


def test_a_file_that_only_claims_to_be_parquet_is_refused(write: Write) -> None:
    fails(write("a.parquet", "sentence"), "not readable as parquet")


# --- parts --------------------------------------------------------------------------------------------------------


def many(rows: int, distinct: int | None = None) -> Examples:
    numbers = range(rows)
    return Examples(
        texts=tuple(f"t{n % (distinct or rows)}" for n in numbers),
        pairs=None,
        labels=tuple(f"r{n}" for n in numbers),
        lines=tuple(n + 2 for n in numbers),
        source="many",
    )


def test_limit_is_a_seeded_subset_in_file_order(write: Write) -> None:
    source = write("a.tsv", "sentence\tlabel\n" + "".join(f"t{n}\t{n % 2}\n" for n in range(200)))
    part = read_examples(source, SST2, limit=20, seed=3)
    assert part == read_examples(source, SST2, limit=20, seed=3)
    assert part != read_examples(source, SST2, limit=20, seed=4)
    assert len(set(part.lines)) == 20
    assert list(part.lines) == sorted(part.lines)
    assert max(part.lines) > 21  # not the first ones
    assert all(text == f"t{line - 2}" for text, line in zip(part.texts, part.lines, strict=True))
    assert part.labels == tuple((line - 2) % 2 for line in part.lines)


def test_a_limit_above_the_rows_keeps_all_and_one_below_1_is_a_usage_error(write: Write) -> None:
    source = write("a.tsv", "sentence\tlabel\na\t1\nb\t0\n")
    assert read_examples(source, SST2, limit=3) == read_examples(source, SST2)
    with pytest.raises(UsageError, match="‹limit› 0"):
        read_examples(source, SST2, limit=0)


def test_split_off_divides_the_rows_by_its_seed_alone() -> None:
    examples = many(100)
    rest, held = split_off(examples, 0.1, seed=1)
    assert (len(rest), len(held)) == (90, 10)
    assert sorted(rest.lines + held.lines) == list(examples.lines)
    assert list(held.lines) == sorted(held.lines)
    assert (rest, held) == split_off(examples, 0.1, seed=1)
    assert held != split_off(examples, 0.1, seed=2)[1]


def test_split_off_keeps_equal_inputs_on_one_side() -> None:
    rest, held = split_off(many(100, distinct=12), 0.3)
    assert not set(rest.texts) & set(held.texts)
    assert 30 <= len(held) <= 38


def test_split_off_gives_at_least_one_row_to_each_side_or_says_that_it_cannot() -> None:
    assert [len(part) for part in split_off(many(2), 0.01)] == [1, 1]
    assert [len(part) for part in split_off(many(2), 0.99)] == [1, 1]
    with pytest.raises(InputError, match="1 distinct input in 5 rows"):
        split_off(many(5, distinct=1))


def test_references_of_one_source_are_one_sample() -> None:
    sources, targets = references(many(5, distinct=2))
    assert sources == ["t0", "t1"]
    assert targets == [["r0", "r2", "r4"], ["r1", "r3"]]


def test_take_keeps_rows_whole() -> None:
    part = take(many(5), [3, 1])
    assert (part.texts, part.labels, part.lines) == (("t3", "t1"), ("r3", "r1"), (5, 3))


# --- text of a language model -------------------------------------------------------------------------------------


def test_a_text_file_is_read_as_it_stands_but_for_windows_line_ends(write: Write) -> None:
    assert read_text(write("a.txt", b"\xef\xbb\xbf = A = \r\n\r\n b \r\n")) == " = A = \n\n b \n"


def test_rows_of_text_are_joined_by_newlines_and_their_own_last_one_is_not_doubled(write: Write) -> None:
    rows = [{"text": " = A = \n"}, {"text": ""}, {"text": "b"}]
    source = write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert read_text(source) == " = A = \n\nb\n"
    other = write("b.jsonl", '{"story": "a"}\n')
    assert read_text(other, text_column="story") == "a\n"
    with pytest.raises(InputError, match="no column text; it has: story"):
        read_text(other)


def test_a_blank_absent_or_undecodable_text_is_refused(write: Write) -> None:
    with pytest.raises(InputError, match="no text"):
        read_text(write("a.txt", " \n\n"))
    with pytest.raises(InputError, match="no such file"):
        read_text("absent.txt")
    with pytest.raises(InputError, match="line 2 is not UTF-8"):
        read_text(write("b.txt", b"a\n\xff\n"))


# --- the real files -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="the GLUE and E2E files are not beside this repository")
@pytest.mark.parametrize(
    ("file", "task", "rows"),
    [
        ("sst2/train.tsv", "sst2", 67_349),
        ("cola/train.tsv", "cola", 8_551),
        ("stsb/train.tsv", "stsb", 5_749),
        ("rte/train.tsv", "rte", 2_490),
        ("e2e/trainset.csv", "e2e", 42_061),
    ],
)
def test_the_real_files_have_their_published_number_of_rows(file: str, task: str, rows: int) -> None:
    examples = read_examples(str(SHARED / file), task_named(task))
    assert len(examples) == rows
    assert examples.skipped == 0
    assert len(set(examples.lines)) == rows
    if task == "stsb":
        assert examples.labels is not None
        assert math.isclose(sum(map(float, examples.labels)) / rows, 2.701, abs_tol=5e-4)


# --- what no file of ours could hold, and what is no class ---------------------------------------------------------


def test_half_of_a_character_is_named_by_its_line_where_it_is_read_and_passed_where_it_is_not(write: Write) -> None:
    lines = ['{"sentence": "a", "label": 1, "by": "\\ud83d"}', '{"sentence": "b\\ud83d", "label": 0, "by": ""}']
    fails(write("a.jsonl", "\n".join(lines)), "line 2", "\\ud83d")
    fails(write("b.jsonl", '{"sentence": "a", "label": "x\\ude00"}'), "line 1", "\\ude00")
    good = '{"sentence": "b\\ud83d\\ude00", "label": 0}'
    assert read_examples(write("c.jsonl", f"{lines[0]}\n{good}"), SST2).texts == ("a", "b\U0001f600")


@pytest.mark.parametrize(
    ("label", "words"),
    [("[0, 1]", ("[0, 1]", "is a list")), ('{"a": 1}', ("is an object",)), ("[]", ("is a list",))],
)
def test_a_label_that_is_many_or_none_is_no_class(label: str, words: tuple[str, ...], write: Write) -> None:
    source = write("a.jsonl", f'{{"text": "a", "label": 0}}\n{{"text": "b", "label": {label}}}')
    fails(source, "line 2", *words, task="classification", text_columns=["text"], label_column="label")


def test_json_lines_that_no_program_should_read_are_refused(write: Write) -> None:
    for value in ("[" * 5000 + "]" * 5000, "9" * 5000, "1e999"):
        fails(write("a.jsonl", f'{{"sentence": "a", "label": {value}}}'), "line 1")


def test_a_column_is_found_beside_stray_spaces_and_shown_with_them_where_it_is_not(write: Write) -> None:
    source = write("a.csv", "sentence , label\na,1\nb,0\n")
    assert read_examples(source, SST2).labels == (1, 0)
    fails(source, "'sentence '", "' label'", task="rte")
    twice = write("b.csv", "sentence ,label, sentence\na,1,b\n")
    fails(twice, "no column sentence", "'sentence '")


def test_classes_of_a_head_without_names_take_those_of_the_rows_only_where_it_is_trained(write: Write) -> None:
    options: dict[str, Any] = {"text_columns": ["text"], "label_column": "label"}
    options["label_names"] = ("LABEL_0", "LABEL_1")
    named = write("a.csv", "text,label\nx,b\ny,a\n")
    found = read_examples(named, GENERIC, renames=True, **options)
    assert (found.label_names, found.labels) == (("a", "b"), (1, 0))
    fails(named, "a, b", "LABEL_0, LABEL_1", "which is which", task="classification", **options)
    more = write("b.csv", "text,label\nx,b\ny,a\nz,c\n")
    fails(more, "3 classes", "has 2", task="classification", renames=True, **options)
    numbered = write("c.csv", "text,label\nx,1\ny,0\n")
    assert read_examples(numbered, GENERIC, renames=True, **options).label_names == ("LABEL_0", "LABEL_1")


def test_what_cannot_be_read_is_told_by_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    fails(str(tmp_path / "pipe.csv"), "is a pipe")
    (tmp_path / "a.csv").write_text("sentence,label\na,1\n")

    def refuse(path: object, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    fails(str(tmp_path / "a.csv"), "Permission denied")
