"""`mpocli expand-moe`: what it writes and refuses, and every other command on it but training (`test_moe_training`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from strangers import run_stranger

from cli.moe import apart, expert_layers, load, routing, weights
from cli.shell import WEIGHTS, Cli, refused, succeeded, tree
from mpocli.config.expand_moe import ExpandConfig
from mpocli.io.signpost import SIGNPOST
from mpocli.methods.expand_moe import run as expand_moe
from mpocli.nn import DenseExperts, MPOExperts, Router

Run = Callable[..., dict[str, Any]]
UP, DOWN = "bert.encoder.layer.{}.intermediate.dense", "bert.encoder.layer.{}.output.dense"


@pytest.fixture
def expand(cli: Cli, work: Path) -> Run:
    """Expand a model to `out` in the working directory; the report."""

    def run(source: Path, out: str, *more: object) -> dict[str, Any]:
        return succeeded(cli("expand-moe", source, "--experts", 3, "--json", "-o", out, *more)).json

    return run


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models.t5(tmp_path_factory.mktemp("gated") / "t5", feed_forward_proj="gated-gelu")
    return next(path for path in tmp_path_factory.getbasetemp().glob("gated*/t5"))


@pytest.fixture(scope="module")
def classifier(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classifier of two layers with three experts that are not equal."""
    out = tmp_path_factory.mktemp("classifier") / "moe"
    expand_moe.run(str(bert), ExpandConfig(experts=3, noise=0.1), out)
    return out


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "networks", "first"), [("bert", 2, 1), ("gpt2", 2, 1), ("t5", 4, 1), ("gated", 4, 2), ("llama", 2, 2)]
)
def test_the_report_counts_what_the_loaded_model_holds(
    model: str, networks: int, first: int, expand: Run, work: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(model)
    report = expand(source, "out")
    assert report["schema"] == "mpocli.expand-moe/1" and Path(report["out"]).resolve() == work / "out"
    assert (report["experts"], report["share"], report["networks"]) == (3, "central", networks)
    loaded, dense = load(work / "out"), load(source)
    assert report["totals"]["params"] == loaded.num_parameters()
    assert report["before"]["params"] == report["totals"]["dense_params"] == dense.num_parameters()
    assert report["totals"]["ratio"] == pytest.approx(loaded.num_parameters() / dense.num_parameters())
    assert report["totals"]["bytes"] == (work / "out" / WEIGHTS).stat().st_size
    layers = expert_layers(loaded)
    assert len(layers) == len(report["modules"]) == networks * (first + 1)
    owners = [name for name, layer in layers.items() if "router" in layer._modules]
    assert len(owners) == networks == sum(1 for m in loaded.modules() if isinstance(m, Router))
    for module in report["modules"]:
        layer = layers[module["name"]]
        assert isinstance(layer, MPOExperts)
        assert (module["action"], module["role"], module["place"]) == ("experts", "ffn", layer.place)
        assert module["shared_params"] == layer.cores[layer.central].numel()
        own = sum(core.numel() for core in layer.cores) - module["shared_params"]
        assert 3 * module["own_params"] == own
        routed = sum(p.numel() for p in layer.router.parameters()) if module["name"] in owners else 0  # type: ignore[union-attr]
        assert module["router_params"] == routed
        assert module["params"] == module["shared_params"] + own + routed
        rows, columns = module["shape"]
        assert module["dense_params"] == rows * columns == dense.get_submodule(module["name"]).weight.numel()
        assert module["dense_experts_params"] == 3 * rows * columns
        assert module["size_ratio"] == pytest.approx((module["params"] - routed) / (3 * rows * columns))
        assert 0 <= module["relative_error"] <= 1e-5
    assert report["router_params"] == sum(module["router_params"] for module in report["modules"])
    baseline = expand(source, "baseline", "--baseline-moe")
    # The report's claim of what dense experts would take, to the last parameter, routers too.
    assert report["dense_experts_params"] == baseline["totals"]["params"]
    assert baseline["totals"]["params"] == load(work / "baseline").num_parameters()
    assert apart(source, work / "out") <= 1e-5 and apart(source, work / "baseline") <= 1e-5


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (["--share", "none"], MPOExperts),
        (["--baseline-moe"], DenseExperts),
        (["--router", "topk", "--top-k", 2], MPOExperts),
        (["--router", "topk"], MPOExperts),
        (["--router", "topk", "--top-k", 3, "--share", "none"], MPOExperts),
        (["--sites", 2], MPOExperts),
    ],
    ids=["none", "dense", "topk-2", "topk", "topk-3", "two-sites"],
)
def test_every_kind_of_experts_begins_as_the_dense_model(
    options: list[object], kind: type, expand: Run, bert: Path, work: Path
) -> None:
    report = expand(bert, "out", *options)
    model = load(work / "out")
    assert report["totals"]["params"] == model.num_parameters()
    assert all(type(layer) is kind for layer in expert_layers(model).values())
    assert apart(bert, work / "out") <= 1e-5
    asked = options[options.index("--top-k") + 1] if "--top-k" in options else 2 if "topk" in options else 1
    assert report["routing"]["top_k"] == routing(work / "out")["top_k"] == asked
    assert all(m.options.top_k == asked for m in model.modules() if isinstance(m, Router))
    for module in report["modules"] if kind is not MPOExperts or "none" in options else []:
        assert module["shared_params"] == 0
    if kind is DenseExperts:
        assert all(module["own_params"] == math.prod(module["shape"]) for module in report["modules"])


@pytest.mark.parametrize(
    ("model", "task", "file"), [("gpt2", "lm", "dev.txt"), ("masked", "lm", "dev.txt"), ("t5", "e2e", "e2e-dev.csv")]
)
def test_before_training_eval_measures_what_it_does_of_the_dense_model(
    model: str, task: str, file: str, cli: Cli, expand: Run, lab: Path, work: Path
) -> None:
    expand(lab / model, "out")
    data = ["--task", task, "--eval", lab / file, "--max-length", 32, "--json"]
    data += ["--max-new-tokens", 12] if task == "e2e" else []
    dense, moe = (succeeded(cli("eval", where, *data)).json for where in (lab / model, work / "out"))
    assert dense["metrics"] and moe["metrics"] == pytest.approx(dense["metrics"], rel=1e-5, abs=1e-6)
    assert moe["samples"] == dense["samples"] and moe["totals"]["params"] > dense["totals"]["params"]


def test_a_cap_on_the_bonds_is_kept_and_its_error_reported(expand: Run, bert: Path, work: Path) -> None:
    report = expand(bert, "out", "--trunc", 4)
    dense, layers = load(bert), expert_layers(load(work / "out"))
    for module in report["modules"]:
        assert max(module["bond_dims"]) == 4
        matrix = dense.get_submodule(module["name"]).weight.detach().double()
        for expert in range(3):
            made = layers[module["name"]].weight_matrix(expert).detach().double()
            error = float((matrix - made).norm() / matrix.norm())
            assert error > 0.01 and module["relative_error"] == pytest.approx(error, rel=1e-4)


def test_shape_gives_the_named_matrices_other_sites_and_no_others(expand: Run, bert: Path, work: Path) -> None:
    plain = {m["name"]: m for m in expand(bert, "plain")["modules"]}
    rows, columns = plain[UP.format(0)]["shape"]
    asked = f"*.0.intermediate.dense={rows},1x1,{columns}"
    found = {m["name"]: m for m in expand(bert, "out", "--shape", asked)["modules"]}
    assert (found[UP.format(0)]["out_dims"], found[UP.format(0)]["in_dims"]) == ([rows, 1], [1, columns])
    for name in plain.keys() - {UP.format(0)}:
        assert found[name]["out_dims"] == plain[name]["out_dims"]
    assert apart(bert, work / "out") <= 1e-5


def test_noise_makes_the_experts_differ_and_changes_the_start(expand: Run, bert: Path, work: Path) -> None:
    report = expand(bert, "out", "--noise", 0.1)
    assert apart(bert, work / "out") > 1e-3
    quiet = expand_moe.run(str(bert), ExpandConfig(experts=3), work / "quiet")
    assert {module.relative_error is None for module in quiet.modules} == {False}
    assert {module["relative_error"] for module in report["modules"]} == {None}
    for layer in expert_layers(load(work / "out")).values():
        assert not torch.equal(layer.weight_matrix(0), layer.weight_matrix(1))
    for layer in expert_layers(load(work / "quiet")).values():
        assert torch.equal(layer.weight_matrix(0), layer.weight_matrix(1))
    noisy, plain = weights(work / "out"), weights(work / "quiet")
    assert torch.equal(noisy[f"{UP.format(0)}.core_2"], plain[f"{UP.format(0)}.core_2"])


def test_scaling_by_the_probability_changes_the_start(expand: Run, bert: Path, work: Path) -> None:
    expand(bert, "out", "--scale-by-prob")
    assert routing(work / "out")["scale_by_prob"] is True
    assert apart(bert, work / "out") > 1e-3


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        (["--target", "*.layer.1.intermediate.*", "--target", "*.layer.1.output.*"], [1]),
        (["--ignore", "*.layer.0.*"], [1]),
        (["--layers", "attention,ffn"], [0, 1]),
        (["--layers", "embedding,attention,ffn,pooler,head", "--ignore", "*.layer.1.*"], [0]),
    ],
    ids=["target", "ignore", "roles", "all-roles"],
)
def test_only_whole_networks_that_are_chosen_become_experts(
    options: list[object], layers: list[int], expand: Run, bert: Path, work: Path
) -> None:
    report = expand(bert, "out", *options)
    assert {m["name"] for m in report["modules"]} == {name.format(k) for name in (UP, DOWN) for k in layers}
    assert all(kept["reason"] and kept["role"] != "ffn" for kept in report["kept"])
    assert bool(report["kept"]) == ("--layers" in options)
    before, after = weights(bert), weights(work / "out")
    made = {f"{m['name']}.weight" for m in report["modules"]}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name not in made)
    assert apart(bert, work / "out") <= 1e-5


@pytest.mark.parametrize("share", ["central", "none"])
def test_a_decomposed_network_lends_its_cores_bit_for_bit(share: str, expand: Run, bert_mpo: Path, work: Path) -> None:
    report = expand(bert_mpo, "out", "--share", share)
    before, after = weights(bert_mpo), weights(work / "out")
    made = {module["name"] for module in report["modules"]}
    assert made == {name.format(k) for name in (UP, DOWN) for k in (0, 1)}
    assert SIGNPOST in before  # whose value seals another config.json
    for name, tensor in before.items():
        if name == SIGNPOST:
            continue
        module, _, leaf = name.rpartition(".")
        if module in made and leaf.startswith("core_"):
            stacked = share == "none" or leaf != "core_2"
            wanted = torch.stack([tensor] * 3) if stacked else tensor
            assert torch.equal(after[name], wanted), name
        else:
            assert torch.equal(after[name], tensor), name
    assert report["before"]["params"] == load(bert_mpo).num_parameters()
    assert report["totals"]["params"] == load(work / "out").num_parameters()
    assert apart(bert_mpo, work / "out") <= 1e-5


def test_the_rest_of_a_model_is_expanded_with_the_same_routing_or_not_at_all(
    cli: Cli, expand: Run, bert: Path, work: Path
) -> None:
    first = ["--target", "bert.encoder.layer.0.intermediate.dense", "--target", "bert.encoder.layer.0.output.dense"]
    some = ["--router", "topk", "--top-k", 2, "--mask-prob", 0.25]
    succeeded(cli("expand-moe", bert, "--experts", 3, *some, *first, "-o", "half"))
    before = tree(work)
    refused(cli("expand-moe", "half", "--experts", 3, "-o", "whole"), 2, "kind switch", "topk")
    refused(cli("expand-moe", "half", "--experts", 3, *some[:4], "-o", "whole"), 2, "mask_prob 0.5", "0.25")
    assert tree(work) == before
    succeeded(cli("expand-moe", "half", "--experts", 3, *some[:4], "--share", "none", "-o", "whole"))
    assert routing(work / "whole") == routing(work / "half")
    load(work / "whole")


@pytest.mark.parametrize("given", [["--trunc", 4], ["--sites", 3], ["--shape", "*.intermediate.dense=8,6x8,6"]])
def test_what_would_not_touch_a_decomposed_network_is_refused(
    given: list[object], cli: Cli, bert_mpo: Path, work: Path
) -> None:
    refused(cli("expand-moe", bert_mpo, "--experts", 3, "-o", "out", *given), 2, str(given[0]), "decomposed already")
    assert tree(work) == {}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_routers(expand: Run, bert: Path, work: Path) -> None:
    for out, seed in (("one", 3), ("two", 3), ("three", 4), ("large", 2**62)):
        expand(bert, out, "--seed", seed)
    assert tree(work / "one") == tree(work / "two")
    one, three = weights(work / "one"), weights(work / "three")
    differ = {name for name in one if not torch.equal(one[name], three[name])}
    assert differ == {f"{UP.format(k)}.router.weight" for k in (0, 1)}
    assert not torch.equal(one[f"{UP.format(0)}.router.weight"], one[f"{UP.format(1)}.router.weight"])


def test_options_of_routing_are_stored(expand: Run, bert: Path, work: Path) -> None:
    options = ["--mask-prob", 0.25, "--mask-elements", "--balance-loss", 0.5, "--z-loss", 0.125, "--jitter", 0.01]
    report = expand(bert, "out", *options, "--capacity-factor", 1.5)
    wanted = {"mask_prob": 0.25, "mask_elements": True, "balance_loss": 0.5, "z_loss": 0.125, "jitter": 0.01}
    wanted |= {"capacity_factor": 1.5, "kind": "switch", "top_k": 1, "scale_by_prob": False}
    assert report["routing"] == routing(work / "out") == wanted


def test_the_human_report_names_the_sizes(cli: Cli, bert: Path, work: Path) -> None:
    done = succeeded(cli("expand-moe", bert, "--experts", 4, "--noise", 0.1))
    assert "4 experts" in done.out and "4 dense experts" in done.out and "2 networks" in done.out
    assert [path.name for path in work.iterdir()] == ["bert-moe"]


# --- what cannot be used ----------------------------------------------------------------------------------------------

REFUSED = [
    ("top-k", ["--router", "topk", "--top-k", 4], 2, ["--top-k 4", "--experts 3"]),
    ("switch-k", ["--top-k", 2], 2, ["switch", "2"]),
    ("experts", ["--experts", 1], 2, ["--experts 1", "at least 2"]),
    ("capacity", ["--capacity-factor", 0], 2, ["--capacity-factor 0"]),
    ("capacity-nan", ["--capacity-factor", "nan"], 2, ["--capacity-factor"]),
    ("mask", ["--mask-prob", 2], 2, ["--mask-prob", "2"]),
    ("mask-negative", ["--mask-prob", -0.1], 2, ["--mask-prob"]),
    ("share", ["--share", "all"], 2, ["--share", "all", "central"]),
    ("router", ["--router", "hash"], 2, ["--router", "hash", "switch"]),
    ("noise", ["--noise", -1], 2, ["--noise"]),
    ("jitter", ["--jitter", 1], 2, ["--jitter 1"]),
    ("balance", ["--balance-loss", -1], 2, ["--balance-loss -1"]),
    ("scale", ["--router", "topk", "--scale-by-prob"], 2, ["--scale-by-prob", "--top-k 2"]),
    ("baseline", ["--baseline-moe", "--trunc", 3], 2, ["--baseline-moe", "--trunc"]),
    ("baseline-sites", ["--baseline-moe", "--sites", 3], 2, ["--baseline-moe", "--sites"]),
    ("baseline-mask", ["--baseline-moe", "--mask-prob", 0.5], 2, ["--mask-prob", "--baseline-moe"]),
    ("unshared-mask", ["--share", "none", "--mask-elements"], 2, ["--mask-elements", "--share none"]),
    ("sites", ["--sites", 0], 2, ["--sites"]),
    ("shape", ["--shape", "*.nothing=8,6x8,6"], 3, ["--shape", "*.nothing"]),
    ("shape-kept", ["--shape", "*.query=8,6x8,6"], 3, ["--shape", "*.query"]),
    ("shape-fit", ["--shape", "*.0.output.dense=2,2x2,2"], 3, ["encoder.layer.0.output.dense"]),
    ("attention", ["--layers", "attention"], 3, ["no feed-forward network", "attention"]),
    ("query-key", ["--target", "*.query", "--target", "*.key"], 3, ["no feed-forward network", "attention"]),
    ("half", ["--target", "*.intermediate.dense"], 3, ["no feed-forward network", "intermediate"]),
    ("role", ["--layers", "middle"], 2, ["middle", "ffn"]),
    ("no-ffn", ["--ignore", "*.intermediate.*", "--ignore", "*.output.*"], 3, ["no "]),
    ("absent", ["--target", "*.nowhere"], 3, ["--target", "*.nowhere"]),
]


@pytest.mark.parametrize(("options", "code", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_cannot_be_used_is_one_line_and_writes_nothing(
    options: list[object], code: int, words: list[str], cli: Cli, bert: Path, work: Path
) -> None:
    refused(cli("expand-moe", bert, "--experts", 3, "-o", "out", *options), code, *words)
    assert tree(work) == {}


def test_experts_are_not_expanded_twice(cli: Cli, classifier: Path, work: Path) -> None:
    refused(cli("expand-moe", classifier, "-o", "out"), 3, "is experts already")
    assert tree(work) == {}


# --- merged, inspected, pruned, refused -------------------------------------------------------------------------------


def test_merge_makes_dense_experts_that_compute_the_same_and_still_need_the_plug_in(
    cli: Cli, classifier: Path, bert: Path, work: Path
) -> None:
    done = succeeded(cli("merge", classifier, "-o", "dense"))
    assert "mpocli" in done.out + done.err
    assert apart(classifier, work / "dense") <= 1e-5
    model = load(work / "dense")
    layers = expert_layers(model)
    assert len(layers) == 4 and all(isinstance(layer, DenseExperts) for layer in layers.values())
    before = expert_layers(load(classifier))
    for name, layer in layers.items():
        for expert in range(3):
            difference = (layer.weight_matrix(expert) - before[name].weight_matrix(expert)).abs().max()
            assert float(difference.detach()) <= 1e-5
    assert routing(work / "dense") == routing(classifier)
    report = succeeded(cli("merge", classifier, "-o", "again", "--json")).json
    assert report["experts"] == report["merged"] == 4
    assert report["totals"]["params"] == model.num_parameters()
    refused(cli("merge", "dense", "-o", "more"), 3, "dense experts", "no stock class")


def test_without_the_import_loading_is_an_error_merged_or_not(cli: Cli, classifier: Path, work: Path) -> None:
    succeeded(cli("merge", classifier, "-o", "dense"))
    script = """
import sys
from transformers import AutoModelForSequenceClassification
for directory in sys.argv[1:]:
    try:
        AutoModelForSequenceClassification.from_pretrained(directory)
        print("loaded")
    except Exception as error:
        print("error")
"""
    ended = run_stranger(script, classifier, "dense", cwd=work)
    assert ended.out.split() == ["error", "error"], ended.err
    assert ended.err.count("import_mpocli_before_from_pretrained") >= 2


def test_inspect_shows_the_experts_and_what_they_share(cli: Cli, expand: Run, bert: Path, work: Path) -> None:
    for out, options in (("central", []), ("none", ["--share", "none"]), ("dense", ["--baseline-moe"])):
        report = expand(bert, out, *options)
        inspected = succeeded(cli("inspect", out, "--verify", "--json")).json
        assert inspected["problems"] == [] and inspected["totals"] == report["totals"]
        found = {m["name"]: m for m in inspected["modules"] if m["experts"]}
        assert list(found) == [m["name"] for m in report["modules"]]
        for module in report["modules"]:
            view = found[module["name"]]
            assert (view["action"], view["experts"]) == ("experts", 3)
            assert (view["shared_params"], view["expert_params"]) == (module["shared_params"], module["own_params"])
            assert view["params"] == module["params"]
    shown = succeeded(cli("inspect", "central", "--module", UP.format(0))).out
    module = next(m for m in inspected["modules"] if m["name"] == UP.format(0))
    assert "3 experts of" in shown and module["experts"] == 3


def test_sparsify_prunes_the_shared_core_alone(cli: Cli, classifier: Path, work: Path) -> None:
    options = ["--method", "magnitude", "--sparsity", 0.5, "--layers", "ffn", "--json"]
    report = succeeded(cli("sparsify", classifier, *options, "-o", "out")).json
    assert report["sparsity"] == pytest.approx(0.5, abs=0.01)
    before, after = expert_layers(load(classifier)), expert_layers(load(work / "out"))
    for name, layer in after.items():
        assert isinstance(layer, MPOExperts)
        for k, core in enumerate(layer.cores):
            old = before[name].cores[k]
            if k == layer.central:
                assert int((core == 0).sum()) == core.numel() // 2
                assert torch.equal(core[core != 0], old[core != 0])
            else:
                assert torch.equal(core, old)
    refused(cli("expand-moe", "out", "-o", "more"), 3, "is experts already")


def test_a_pruned_core_stays_pruned_where_it_becomes_the_shared_one(
    cli: Cli, expand: Run, bert_mpo: Path, work: Path
) -> None:
    options = ["--method", "magnitude", "--sparsity", 0.5, "--layers", "ffn", "--json"]
    succeeded(cli("sparsify", bert_mpo, *options, "-o", "sparse"))
    for share in ("central", "none"):
        expand("sparse", share, "--share", share)  # type: ignore[arg-type]
        assert apart(work / "sparse", work / share) <= 1e-5
    assert f"{UP.format(0)}.core_2" not in weights(work / "central")  # packed
    for layer in expert_layers(load(work / "central")).values():
        assert isinstance(layer, MPOExperts)
        assert int((layer.cores[layer.central] == 0).sum()) >= layer.cores[layer.central].numel() // 2


def test_decompose_passes_experts_through(cli: Cli, classifier: Path, work: Path) -> None:
    report = succeeded(cli("decompose", classifier, "-o", "out", "--json")).json
    before, after = weights(classifier), weights(work / "out")
    ours = [name for name in before if ".intermediate.dense." in name or ".output.dense.core" in name]
    assert ours and all(torch.equal(before[name], after[name]) for name in ours)
    assert routing(work / "out") == routing(classifier)
    assert report["totals"]["params"] == load(work / "out").num_parameters()
    assert apart(classifier, work / "out") <= 1e-5


def test_squeeze_refuses_experts(cli: Cli, classifier: Path, lab: Path, work: Path) -> None:
    data = ["--task", "sst2", "--train", lab / "train.tsv", "--eval", lab / "dev.tsv", "--max-length", 32]
    refused(cli("squeeze", classifier, *data, "--target-ratio", 0.9, "-o", "out"), 3, "experts")
    assert tree(work) == {}
