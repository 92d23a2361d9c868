"""What cannot be used is refused in one line, with the right exit code, and nothing is written."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.shell import WEIGHTS, Cli, edited, refused, rewrite, succeeded, tree
from mpocli.config.decompose import DecomposeConfig
from mpocli.methods.decompose import run as decompose

QUERY = "bert.encoder.layer.0.attention.self.query"
VERBS = ("decompose", "merge", "inspect")


@pytest.fixture
def refuses(cli: Cli, work: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs, checks the refusal, and that no file anywhere below `tmp_path` came, went or changed."""

    def run(code: int, arguments: list[object], *words: str) -> str:
        before = tree(tmp_path)
        text = refused(cli(*arguments), code, *words)
        assert tree(tmp_path) == before
        return text

    return run


# --- usage: exit 2 ----------------------------------------------------------------------------------------------

USAGE = {
    "trunc of zero": (["--trunc", "0"], "--trunc 0"),
    "negative cap": (["--emb-trunc", "-3"], "--emb-trunc -3"),
    "trunc that is no number": (["--trunc", "x"], "'--trunc'"),
    "one site": (["--sites", "1"], "--sites 1"),
    "more sites than can be searched": (["--sites", "13"], "the largest is 12"),
    "layers that are no roles": (["--layers", "nonsense"], "'nonsense'"),
    "layer numbers": (["--layers", "0,1"], "'0'"),
    "no layers at all": (["--layers", ","], "--layers"),
    "unknown dtype": (["--dtype", "float8"], "'float8'"),
    "unknown option": (["--truncc", "8"], "--truncc"),
    "unknown gauge": (["--gauge", "lorenz"], "'lorenz'"),
    "unknown word for larger": (["--when-larger", "maybe"], "'maybe'"),
    "tolerance of one": (["--rel-tol", "1"], "--rel-tol 1.0"),
    "negative tolerance": (["--rel-tol", "-0.1"], "--rel-tol -0.1"),
    "tolerance that is no number": (["--rel-tol", "nan"], "--rel-tol nan"),
    "shape without a glob": (["--shape", "4,12x4,12"], "'4,12x4,12'"),
    "shape without columns": (["--shape", "*query=4,12"], "'4,12'"),
    "shape with letters": (["--shape", "*query=4,bx4,12"], "'4,bx4,12'"),
    "shape with unequal sites": (["--shape", "*query=4,12x4,3,4"], "4,12x4,3,4"),
    "shape with a zero": (["--shape", "*query=0,48x4,12"], "0,48x4,12"),
    "device that is none": (["--device", "toaster"], "--device 'toaster'"),
    "device with a number that is none": (["--device", "cuda:x"], "--device 'cuda:x'"),
    "size that is none": (["--max-shard-size", "big"], "'big'"),
    "size of zero": (["--max-shard-size", "0GB"], "'0GB'"),
    "size in an unknown unit": (["--max-shard-size", "5iB"], "'5iB'"),
    "share that is no number": (["--ratio", "half"], "--ratio 'half'"),
    "share of a hundred": (["--ratio", "60"], "--ratio 60.0"),
    "calibration without a budget": (
        ["--calibrate", "x.txt"],
        "--calibrate without --ratio, --ratio-bytes, --max-bytes or --max-error",
    ),
    "task that the hub has no rows of": (["--ratio", "50%", "--calibrate", "e2e"], "--calibrate e2e"),
    "seed that is no number": (["--seed", "x"], "'--seed'"),
}


@pytest.mark.parametrize("case", USAGE)
def test_an_option_that_cannot_be_meant_is_a_usage_error(case: str, dense: Path, refuses: Callable[..., str]) -> None:
    options, word = USAGE[case]
    refuses(2, ["decompose", dense, *options], word)


def test_the_same_command_with_good_options_works(dense: Path, cli: Cli, work: Path) -> None:
    good = ["--trunc", 1, "--rel-tol", 0.5, "--sites", 2, "--layers", "ffn", "--dtype", "float64"]
    succeeded(cli("decompose", dense, *good, "--max-shard-size", "5GiB", "--gauge", "symmetric", "--seed", 3))
    assert (work / "dense-mpo" / "mpo.json").is_file()


@pytest.mark.parametrize("given", [("--seed", "-1"), ("--seed", str(2**63)), ("--seeds", f"1,{2**32}")], ids=" ".join)
@pytest.mark.parametrize("verb", ["decompose", "finetune", "squeeze", "sparsify", "expand-moe"])
def test_a_seed_that_no_generator_takes_is_a_usage_error(
    verb: str, given: tuple[str, str], refuses: Callable[..., str]
) -> None:
    data = ["--task", "lm", "--train", "x.txt", "--eval", "x.txt"] if verb in ("finetune", "squeeze") else []
    if given[0] == "--seed" or verb == "finetune":
        refuses(2, [verb, "nowhere", *data, *given], given[1].rpartition(",")[2])


@pytest.mark.parametrize("verb", VERBS)
def test_a_missing_argument_and_an_unknown_option_are_usage_errors(verb: str, refuses: Callable[..., str]) -> None:
    refuses(2, [verb], "MODEL")
    refuses(2, [verb, "model", "--no-such-option"], "--no-such-option")


def test_an_unknown_command_is_a_usage_error(refuses: Callable[..., str]) -> None:
    refuses(2, ["decomposse"], "decomposse")


def test_merge_and_inspect_check_their_options_too(mpo: Path, refuses: Callable[..., str]) -> None:
    refuses(2, ["merge", mpo, "--dtype", "float8"], "'float8'")
    refuses(2, ["merge", mpo, "--max-shard-size", "big"], "'big'")
    refuses(2, ["inspect", mpo, "--spectrum", "--sites", "1"], "--sites 1")
    refuses(2, ["inspect", mpo, "--spectrum", "--sites", "13"], "the largest is 12")
    refuses(2, ["inspect", mpo, "--base", mpo], "--base", "--verify")


@pytest.mark.parametrize("verb", VERBS)
def test_a_revision_of_a_local_directory_is_a_usage_error(verb: str, mpo: Path, refuses: Callable[..., str]) -> None:
    refuses(2, [verb, mpo, "--revision", "main"], "--revision", str(mpo), "local directory")


@pytest.fixture
def downloads(bert: Path, bert_mpo: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """A hub of two models, `some/bert` and `some/mpo`: (model, revision) of every download."""
    made: list[tuple[str, str | None]] = []

    def snapshot_download(model: str, *, revision: str | None, **_: object) -> str:
        made.append((model, revision))
        return str({"some/bert": bert, "some/mpo": bert_mpo}[model])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return made


@pytest.mark.parametrize("case", USAGE)
def test_a_usage_error_comes_before_any_download(
    case: str, downloads: list[tuple[str, str | None]], refuses: Callable[..., str]
) -> None:
    refuses(2, ["decompose", "some/bert", *USAGE[case][0]])
    assert downloads == []


@pytest.mark.parametrize("verb", ["decompose", "merge"])
def test_an_output_or_device_that_no_model_could_make_right_is_refused_before_any_download(
    verb: str, downloads: list[tuple[str, str | None]], work: Path, refuses: Callable[..., str]
) -> None:
    (work / "file").write_text("mine")
    (work / "mpo-merged").mkdir()
    (work / "mpo-merged" / "photo.jpg").write_text("mine")
    refuses(3, [verb, "some/mpo", "-o", "file", "--overwrite"], "file", "not a directory")
    refuses(3, [verb, "some/mpo", "-o", "mpo-merged"], "mpo-merged", "--overwrite")
    refuses(3, [verb, "some/mpo", "-o", "mpo-merged", "--overwrite"], "mpo-merged", "config.json")
    refuses(3, ["merge", "some/mpo"], "mpo-merged", "--overwrite")
    refuses(3, ["decompose", "some/bert", "--device", "cuda:99"], "'cuda:99'")
    assert downloads == []


def test_every_verb_hands_its_revision_to_the_hub(
    downloads: list[tuple[str, str | None]], cli: Cli, work: Path
) -> None:
    for verb in VERBS:
        succeeded(cli(verb, "some/mpo", "--revision", f"for-{verb}"))
    assert downloads == [("some/mpo", f"for-{verb}") for verb in VERBS]


# --- the model: exit 3 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_a_path_that_is_no_model_directory_is_refused(verb: str, tmp_path: Path, refuses: Callable[..., str]) -> None:
    refuses(3, [verb, tmp_path / "absent"], "absent", "no such directory")
    (tmp_path / "empty").mkdir()
    refuses(3, [verb, tmp_path / "empty"], "empty", "config.json")
    (tmp_path / "file").write_text("{}")
    refuses(3, [verb, tmp_path / "file"], "is a file")


@pytest.mark.parametrize("verb", VERBS)
def test_a_hub_name_without_a_network_is_refused(verb: str, refuses: Callable[..., str]) -> None:
    refuses(3, [verb, "some-organisation/no-such-model"], "some-organisation/no-such-model", "cannot be reached")


def _cut(at: Callable[[int, int], int]) -> Callable[[Path], None]:
    """Cuts the weight file after at(bytes of its header, bytes of the file) bytes."""

    def spoil(directory: Path) -> None:
        content = (directory / WEIGHTS).read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        assert 0 <= at(header, len(content)) < len(content)
        (directory / WEIGHTS).write_bytes(content[: at(header, len(content))])

    return spoil


def _weights(content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / WEIGHTS).write_bytes(content) and None


def _config(**changes: Any) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        with edited(directory / "config.json") as config:
            config.update(changes)

    return spoil


def _without(*names: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return spoil


def _index(index: object) -> Callable[[Path], None]:
    """Replaces the weight file by one shard of it and this index."""

    def spoil(directory: Path) -> None:
        (directory / WEIGHTS).rename(directory / "model-00001-of-00002.safetensors")
        (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return spoil


_TWO_SHARDS = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}

# how a dense directory is spoilt, and what the message must name
UNUSABLE: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "empty weight file": (_cut(lambda header, size: 0), (WEIGHTS, "truncated")),
    "cut inside the header's length": (_cut(lambda header, size: 5), (WEIGHTS, "truncated")),
    "cut inside the header": (_cut(lambda header, size: header // 2), (WEIGHTS, "truncated")),
    "cut after the header": (_cut(lambda header, size: header), (WEIGHTS, "truncated")),
    "cut inside the data": (_cut(lambda header, size: (header + size) // 2), (WEIGHTS, "truncated")),
    "cut before the last byte": (_cut(lambda header, size: size - 1), (WEIGHTS, "truncated")),
    "garbage for weights": (_weights(bytes(range(256)) * 64), (WEIGHTS, "corrupt")),
    "a header that is no JSON": (_weights((16).to_bytes(8, "little") + b"{'not': 'json'} " + bytes(64)), (WEIGHTS,)),
    "a web page for weights": (_weights(b"<!DOCTYPE html><html>not found</html>"), (WEIGHTS,)),
    "no weights": (_without(WEIGHTS), (WEIGHTS,)),
    "index naming a missing shard": (
        _index({"weight_map": _TWO_SHARDS}),
        ("index.json", "model-00002-of-00002.safetensors"),
    ),
    "index without a map": (_index({"metadata": {}}), ("index.json",)),
    "index with a list for a map": (_index({"weight_map": ["a"]}), ("index.json",)),
    "index with numbers for shards": (_index({"weight_map": {"a": 1}}), ("index.json",)),
    "index that is a list": (_index([1]), ("index.json",)),
    "unknown model_type": (_config(model_type="martian", architectures=["MartianModel"]), ("martian",)),
    "config without a model_type": (lambda d: (d / "config.json").write_text("{}") and None, ("config.json",)),
    "config that is a list": (lambda d: (d / "config.json").write_text("[]") and None, ("config.json", "list")),
    "config that is cut": (lambda d: (d / "config.json").write_text('{"model_') and None, ("config.json",)),
    "config of another size": (_config(hidden_size=64), ("211x48", "211x64")),
    "config of another vocabulary": (_config(vocab_size=300), ("211x48", "300x48")),
    "config with text for a number": (_config(hidden_size="wide"), ("hidden_size",)),
    "config that contradicts itself": (_config(num_attention_heads=5), ("48", "5")),
    "architecture that is no text": (_config(architectures=[7]), ("architecture",)),
    "another quantisation": (_config(quantization_config={"quant_method": "gptq", "bits": 4}), ("gptq",)),
    "quantisation that is no object": (_config(quantization_config="mpo"), ("quantization_config",)),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", UNUSABLE)
def test_an_unusable_dense_model_is_refused_by_every_verb(
    case: str, verb: str, dense: Path, refuses: Callable[..., str]
) -> None:
    spoil, words = UNUSABLE[case]
    spoil(dense)
    if verb == "merge":
        words = ()  # that there is nothing to merge may come first
    refuses(3, [verb, dense], *words)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "tensor",
    [f"{QUERY}.weight", "bert.embeddings.word_embeddings.weight", "classifier.weight", "bert.pooler.dense.bias"],
)
def test_a_weight_that_is_not_finite_is_named(
    tensor: str, value: float, dense: Path, refuses: Callable[..., str]
) -> None:
    """The first two are decomposed, a classifier and a bias are passed through."""
    rewrite(dense, lambda tensors: tensors[tensor].view(-1)[-1:].fill_(value))
    number = load_file(dense / WEIGHTS)[tensor].numel()
    refuses(3, ["decompose", dense, "--trunc", 8], tensor, f"1 of {number}")


def test_a_shape_that_does_not_fit_is_refused_with_both_numbers(dense: Path, refuses: Callable[..., str]) -> None:
    refuses(3, ["decompose", dense, "--shape", f"{QUERY}=4,10x4,12"], QUERY, "40 rows", "the matrix has 48")
    refuses(3, ["decompose", dense, "--shape", f"{QUERY}=4,12x4,16"], QUERY, "64 columns", "the matrix has 48")


def test_ten_percent_of_padding_is_the_most_that_a_shape_may_ask_for(
    dense: Path, cli: Cli, work: Path, refuses: Callable[..., str]
) -> None:
    succeeded(cli("decompose", dense, "--layers", "attention", "--shape", f"{QUERY}=4,13x4,12", "-o", "fits"))
    refuses(3, ["decompose", dense, "--shape", f"{QUERY}=4,13x3,18"], "54 columns", "the matrix has 48")


def test_a_shape_for_what_is_not_selected_is_refused(dense: Path, refuses: Callable[..., str]) -> None:
    refuses(3, ["decompose", dense, "--layers", "ffn", "--shape", "*query=4,12x4,12"], "*query", "not selected")
    refuses(3, ["decompose", dense, "--shape", "*qwery=4,12x4,12"], "*qwery", "query")


@pytest.mark.parametrize("option", ["--target", "--ignore"])
def test_a_glob_that_matches_nothing_is_refused_with_the_nearest_names(
    option: str, dense: Path, refuses: Callable[..., str]
) -> None:
    text = refuses(3, ["decompose", dense, option, "*atention*"], f"{option} '*atention*'", "nearest")
    assert "attention" in text.partition("nearest")[2]
    assert QUERY in refuses(3, ["decompose", dense, option, QUERY.replace("query", "qeury")])


def test_inspect_refuses_a_glob_under_the_name_of_its_own_option(dense: Path, refuses: Callable[..., str]) -> None:
    refuses(3, ["inspect", dense, "--module", "*atention*"], "--module '*atention*'", "nearest")


def test_a_selection_that_is_empty_is_refused_with_the_roles_there_are(
    gpt2: Path, dense: Path, refuses: Callable[..., str]
) -> None:
    refuses(3, ["decompose", gpt2, "--layers", "pooler"], "attention", "embedding", "ffn", "head")
    refuses(3, ["decompose", dense, "--layers", "ffn", "--target", "*query"], "no weight matrix")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with CUDA")
def test_cuda_where_there_is_none_is_refused(dense: Path, refuses: Callable[..., str]) -> None:
    refuses(3, ["decompose", dense, "--device", "cuda"], "'cuda'", "--device cpu")
    refuses(3, ["decompose", dense, "--device", "cuda", "--dry-run"], "'cuda'")


@pytest.mark.parametrize("device", ["cuda:99", "meta", "hpu"])
def test_a_device_that_cannot_compute_is_refused(device: str, dense: Path, refuses: Callable[..., str]) -> None:
    refuses(3, ["decompose", dense, "--device", device], repr(device))


def test_a_refusal_prints_no_blank_line(dense: Path, mpo: Path, cli: Cli, work: Path) -> None:
    for arguments in (["decompose", "absent"], ["merge", dense], ["inspect", dense, "--verify"]):
        outcome = cli(*arguments)
        assert outcome.code == 3
        assert all(outcome.err.splitlines()), (arguments, outcome.err)


# --- the output: exit 3 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["decompose", "merge"])
def test_an_output_that_cannot_be_replaced_is_refused(
    verb: str, mpo: Path, work: Path, refuses: Callable[..., str]
) -> None:
    (work / "full").mkdir()
    (work / "full" / "config.json").write_text("{}")
    refuses(3, [verb, mpo, "-o", "full"], "full", "not empty", "--overwrite")
    (work / "file").write_text("mine")
    refuses(3, [verb, mpo, "-o", "file"], "file", "not a directory")
    refuses(3, [verb, mpo, "-o", "file", "--overwrite"], "file", "not a directory")
    (work / "photos").mkdir()
    (work / "photos" / "holiday.jpg").write_bytes(b"\xff\xd8")
    refuses(3, [verb, mpo, "-o", "photos", "--overwrite"], "photos", "config.json")
    refuses(3, [verb, mpo, "-o", "file/below"], "file/below")
    (work / "circle").symlink_to("circle")
    refuses(3, [verb, mpo, "-o", "circle"], "circle", "leads back to itself")
    refuses(3, [verb, mpo, "-o", "circle/below"], "circle/below")
    refuses(3, [verb, "circle"], "circle")


@pytest.mark.parametrize("verb", ["decompose", "merge"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_an_output_that_is_the_input_or_in_it_is_refused(
    verb: str, overwrite: list[str], mpo: Path, work: Path, refuses: Callable[..., str]
) -> None:
    (work / "link").symlink_to(mpo)
    for out in (mpo, mpo / "below", mpo.parent, "link", mpo / ".." / mpo.name):
        refuses(3, [verb, mpo, "-o", out, *overwrite], "inside each other")


def test_the_default_output_obeys_the_same_rules(
    dense: Path, cli: Cli, work: Path, refuses: Callable[..., str]
) -> None:
    succeeded(cli("decompose", dense, "--trunc", 8))
    refuses(3, ["decompose", dense, "--trunc", 8], "dense-mpo", "--overwrite")
    succeeded(cli("merge", "dense-mpo"))
    refuses(3, ["merge", "dense-mpo"], "dense-mpo-merged", "--overwrite")


def test_a_dense_checkpoint_has_nothing_to_merge_or_verify(dense: Path, refuses: Callable[..., str]) -> None:
    refuses(3, ["merge", dense], "no MPOs")
    refuses(3, ["inspect", dense, "--verify"], "not an MPO")


# --- pickles ----------------------------------------------------------------------------------------------------


class _Bomb:
    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.crater,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_never_opened(name: str, dense: Path, tmp_path: Path, refuses: Callable[..., str]) -> None:
    crater = tmp_path / "crater"
    (dense / WEIGHTS).unlink()
    (dense / name).write_bytes(pickle.dumps(_Bomb(crater)))
    for verb in VERBS:
        refuses(3, [verb, dense], "pickle", name, "save_pretrained")
    assert not crater.exists()
    pickle.loads((dense / name).read_bytes())
    assert crater.exists()  # it would have


def test_a_pickle_beside_safetensors_is_neither_read_nor_copied(
    dense: Path, tmp_path: Path, work: Path, cli: Cli
) -> None:
    crater = tmp_path / "crater"
    (dense / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(crater)))
    (dense / "training_args.bin").write_bytes(pickle.dumps(_Bomb(crater)))
    succeeded(cli("decompose", dense, "--trunc", 8, "-o", "out"))
    succeeded(cli("merge", "out", "-o", "merged"))
    assert not crater.exists()
    assert not list(work.rglob("*.bin"))


# --- MPO checkpoints that contradict themselves: exit 3 ---------------------------------------------------------


def _manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        with edited(directory / "mpo.json") as manifest:
            change(manifest)

    return spoil


def _structure(change: Callable[[dict[str, Any]], object], *, alone: bool = False) -> Callable[[Path], None]:
    """Changes `quantization_config`; `alone` removes mpo.json."""

    def spoil(directory: Path) -> None:
        with edited(directory / "config.json") as config:
            change(config["quantization_config"])
        if alone:
            (directory / "mpo.json").unlink()

    return spoil


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        rewrite(directory, change)

    return spoil


def _wider(tensors: dict[str, torch.Tensor]) -> None:
    core = tensors[f"{QUERY}.core_1"]
    tensors[f"{QUERY}.core_1"] = torch.cat([core, core], dim=3)


def _first(data: dict[str, Any], **changes: Any) -> None:
    data["modules"][0].update(changes)


CONTRADICTIONS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "newer manifest": (_manifest(lambda m: m.update(schema_version=2)), ("mpo.json", "2", "1")),
    "newer config beside a manifest": (_structure(lambda q: q.update(schema_version=99)), ("config.json", "99", "1")),
    "newer config alone": (_structure(lambda q: q.update(schema_version=99), alone=True), ("config.json", "99", "1")),
    "version that is no number": (_manifest(lambda m: m.update(schema_version="1")), ("mpo.json", "'1'")),
    "manifest of another program": (_manifest(lambda m: m.update(format="gguf")), ("mpo.json", "gguf")),
    "manifest that is cut": (lambda d: (d / "mpo.json").write_text('{"form') and None, ("mpo.json",)),
    "manifest with unknown encoding": (
        _manifest(lambda m: _first(m, tensors={"core_0": {"encoding": "int8", "dtype": "int8"}})),
        ("mpo.json", "int8"),
    ),
    "core absent": (_tensors(lambda t: t.pop(f"{QUERY}.core_2")), (f"{QUERY}.core_2", "not in the files")),
    "core of another shape": (_tensors(_wider), (f"{QUERY}.core_1", "4x2x2x16", "4x2x2x8")),
    "core too many": (
        _tensors(lambda t: t.update({f"{QUERY}.core_5": torch.zeros(1, 1, 1, 1)})),
        (f"{QUERY}.core_5", "5 cores"),
    ),
    "tombstone absent": (_tensors(lambda t: t.pop(f"{QUERY}.weight")), (f"{QUERY}.weight",)),
    "manifest of other bonds": (
        _manifest(lambda m: _first(m, bond_dims=[1, 2, 2, 2, 2, 1])),
        ("mpo.json", "config.json", "disagree", "bert.embeddings.word_embeddings"),
    ),
    "module only in the config": (_manifest(lambda m: m["modules"].pop(0)), ("disagree", "word_embeddings")),
    "module only in the manifest": (
        _structure(lambda q: q["modules"].pop("bert.embeddings.word_embeddings")),
        ("disagree", "word_embeddings"),
    ),
    "module that the model lacks": (
        _structure(lambda q: q["modules"].update(nowhere=q["modules"].pop(QUERY)), alone=True),
        ("nowhere",),
    ),
    "sites that cannot be": (_structure(lambda q: q["modules"][QUERY].update(out_dims=[0]), alone=True), (QUERY,)),
    "sites of another size": (
        _structure(lambda q: q["modules"][QUERY].update(shape=[96, 48]), alone=True),
        (QUERY, "96", "48"),
    ),
    "a site of infinite size": (
        _structure(lambda q: q["modules"][QUERY].update(out_dims=[math.inf]), alone=True),
        (QUERY, "malformed"),
    ),
    "a centre at infinity": (_manifest(lambda m: _first(m, center=math.inf)), ("mpo.json", "Infinity")),
    "module that is no object": (_structure(lambda q: q["modules"].update({QUERY: 7}), alone=True), (QUERY,)),
    "modules that are a list": (_structure(lambda q: q.update(modules=[7]), alone=True), ("modules",)),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_an_mpo_checkpoint_that_contradicts_itself_is_refused_by_every_verb(
    case: str, verb: str, mpo: Path, refuses: Callable[..., str]
) -> None:
    spoil, words = CONTRADICTIONS[case]
    spoil(mpo)
    refuses(3, [verb, mpo], *words)


@pytest.mark.parametrize("verb", ["merge", "decompose"])
@pytest.mark.parametrize("tensor", [f"{QUERY}.core_1", "bert.pooler.dense.bias", "classifier.weight"])
def test_a_tensor_of_an_mpo_checkpoint_that_is_not_finite_is_named(
    tensor: str, verb: str, mpo: Path, refuses: Callable[..., str]
) -> None:
    rewrite(mpo, lambda tensors: tensors[tensor].view(-1)[:1].fill_(float("nan")))
    refuses(3, [verb, mpo], tensor)


@pytest.mark.parametrize("verb", ["merge", "decompose"])
def test_a_weight_that_the_asked_dtype_cannot_hold_is_named_and_not_written_as_infinity(
    verb: str, mpo: Path, refuses: Callable[..., str]
) -> None:
    """6e5 is finite in float32 and not in float16: exit 4, numerics."""
    rewrite(mpo, lambda tensors: tensors["classifier.bias"].fill_(6e5))
    refuses(4, [verb, mpo, "--dtype", "float16"], "classifier.bias", "float16")


def _places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value; of a list only its first element's."""
    found = [path] if path else []
    items = data.items() if isinstance(data, dict) else enumerate(data[:1]) if isinstance(data, list) else ()
    for key, value in items:
        found += _places(value, (*path, key))
    return found


@pytest.fixture(scope="session")
def small(home: Path) -> tuple[Path, Path]:
    """A dense model, and it with one matrix decomposed, so that its manifest is short."""
    models.gpt2(home / "small", n_layer=1, n_embd=8, n_positions=8)
    decompose.run(str(home / "small"), DecomposeConfig(sites=2, targets=("*c_fc",)), home / "small-mpo")
    return home / "small", home / "small-mpo"


@pytest.mark.parametrize("name", ["mpo.json", "config.json"])
def test_no_damage_to_a_json_file_is_a_bug(
    name: str, small: tuple[Path, Path], tmp_path: Path, work: Path, cli: Cli
) -> None:
    """Any value of the manifest, and of the config's part of it, exchanged for one of another kind: exit 0 or 3."""
    base, intact = small
    directory = Path(shutil.copytree(intact, tmp_path / "mpo"))
    original = json.loads((directory / name).read_text())
    original["files"] = {"config.json": {"sha256": "0", "bytes": 1}}  # one entry stands for all
    if name == "config.json":
        (directory / "mpo.json").unlink()
        part = "quantization_config"
        places = [(part,), *((part, *place) for place in _places(original[part]))]
    else:
        places = _places(original)
    assert len(places) > 10
    faults = []
    for number, place in enumerate(places):
        value = ("x", -1, {})[number % 3]
        damaged = json.loads(json.dumps(original))
        parent = damaged
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = value
        (directory / name).write_text(json.dumps(damaged))
        commands: list[list[object]] = [["inspect", directory, "--verify", "--base", base]]
        if place[0] == "history":  # a model card quotes it
            commands.append(["merge", directory, "-o", "merged", "--overwrite"])
        for command in commands:
            outcome = cli(*command)
            if outcome.code not in (0, 3) or "Traceback" in outcome.err:
                last = re.findall(r"^\w+(?:Error|Exception).*$", outcome.err, flags=re.MULTILINE)
                faults.append(f"{command[0]}, {'.'.join(map(str, place))} = {value!r}: {last[-1:]}")
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults)


def test_a_shard_that_lacks_a_tensor_of_the_index_is_refused(dense: Path, refuses: Callable[..., str]) -> None:
    tensors = load_file(dense / WEIGHTS)
    lost = f"{QUERY}.weight"
    (dense / WEIGHTS).unlink()
    shard = "model-00001-of-00001.safetensors"
    save_file({k: v for k, v in tensors.items() if k != lost}, dense / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
    (dense / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    refuses(3, ["decompose", dense, "--trunc", 8], lost)
