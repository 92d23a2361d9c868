"""Which matrices `--layers`, `--target` and `--ignore` choose, and how far each is cut."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest

from cli.shell import Cli, succeeded

_BERT = "bert.encoder.layer.{}."
_T5 = ("encoder.block.{}.layer.0.SelfAttention", "decoder.block.{}.layer.0.SelfAttention")


def _named(pattern: str, *leaves: str) -> set[str]:
    return {pattern.format(layer) + leaf for layer in (0, 1) for leaf in leaves}


# By hand, from the models' own structure: module names of each role; a tied pair under its owner.
ROLES: dict[str, dict[str, set[str]]] = {
    "bert": {
        "embedding": {"bert.embeddings.word_embeddings"},
        "attention": _named(
            _BERT, *(f"attention.self.{part}" for part in ("query", "key", "value")), "attention.output.dense"
        ),
        "ffn": _named(_BERT, "intermediate.dense", "output.dense"),
        "pooler": {"bert.pooler.dense"},
        "head": {"classifier"},
        "none": {"bert.embeddings.position_embeddings", "bert.embeddings.token_type_embeddings"},
    },
    "masked_lm": {
        "embedding": {"bert.embeddings.word_embeddings"},
        "attention": _named(
            _BERT, *(f"attention.self.{part}" for part in ("query", "key", "value")), "attention.output.dense"
        ),
        "ffn": _named(_BERT, "intermediate.dense", "output.dense"),
        "head": {"bert.embeddings.word_embeddings", "cls.predictions.transform.dense"},
        "none": {"bert.embeddings.position_embeddings", "bert.embeddings.token_type_embeddings"},
    },
    "gpt2": {
        "embedding": {"transformer.wte"},
        "attention": _named("transformer.h.{}.attn.", "c_attn", "c_proj"),
        "ffn": _named("transformer.h.{}.mlp.", "c_fc", "c_proj"),
        "head": {"transformer.wte"},
        "none": {"transformer.wpe"},
    },
    "t5": {
        "embedding": {"shared"},
        "attention": {
            *(name for stack in _T5 for name in _named(f"{stack}.", "q", "k", "v", "o")),
            *_named("decoder.block.{}.layer.1.EncDecAttention.", "q", "k", "v", "o"),
        },
        "ffn": {
            *_named("encoder.block.{}.layer.1.DenseReluDense.", "wi", "wo"),
            *_named("decoder.block.{}.layer.2.DenseReluDense.", "wi", "wo"),
        },
        "head": {"shared"},
        "none": {f"{_T5[k].format(0)}.relative_attention_bias" for k in (0, 1)},
    },
    "llama": {
        "embedding": {"model.embed_tokens"},
        "attention": _named("model.layers.{}.self_attn.", "q_proj", "k_proj", "v_proj", "o_proj"),
        "ffn": _named("model.layers.{}.mlp.", "gate_proj", "up_proj", "down_proj"),
        "head": {"lm_head"},
        "none": set(),
    },
}


@pytest.fixture
def chosen(cli: Cli, request: pytest.FixtureRequest) -> Any:
    """Names of the matrices that a dry run with these options makes MPOs of."""

    def run(model: str, *options: object) -> set[str]:
        report = succeeded(cli("decompose", request.getfixturevalue(model), *options, "--dry-run", "--json")).json
        every = {module["name"] for module in report["modules"]}
        assert every == set().union(*ROLES[model].values())
        assert {module["action"] for module in report["modules"]} <= {"mpo", "kept"}
        return {module["name"] for module in report["modules"] if module["action"] == "mpo"}

    return run


@pytest.mark.parametrize("model", ROLES)
def test_the_default_is_embedding_attention_ffn_and_pooler(model: str, chosen: Any) -> None:
    roles = ROLES[model]
    assert chosen(model) == roles["embedding"] | roles["attention"] | roles["ffn"] | roles.get("pooler", set())


@pytest.mark.parametrize(
    ("model", "role"), [(model, role) for model, roles in ROLES.items() for role in roles if role != "none"]
)
def test_layers_takes_a_role_and_chooses_exactly_its_matrices(model: str, role: str, chosen: Any) -> None:
    assert chosen(model, "--layers", role) == ROLES[model][role]


def test_layers_takes_several_roles_with_spaces(chosen: Any) -> None:
    assert chosen("bert", "--layers", "head, ffn") == ROLES["bert"]["head"] | ROLES["bert"]["ffn"]


def test_target_alone_replaces_the_default_roles(chosen: Any) -> None:
    assert chosen("bert", "--target", "classifier") == {"classifier"}
    assert chosen("bert", "--target", "*position_embeddings") == {"bert.embeddings.position_embeddings"}
    assert chosen("bert", "--target", "*") == set().union(*ROLES["bert"].values())


def test_target_and_layers_must_both_hold(chosen: Any) -> None:
    assert chosen("bert", "--layers", "attention", "--target", "*layer.1.*") == {
        name for name in ROLES["bert"]["attention"] if ".layer.1." in name
    }
    assert chosen("bert", "--layers", "ffn,head", "--target", "*output.dense", "--target", "classifier") == {
        *_named(_BERT, "output.dense"),
        "classifier",
    }


def test_ignore_subtracts_last(chosen: Any) -> None:
    query = _BERT.format(0) + "attention.self.query"
    assert chosen("bert", "--target", query, "--target", "classifier", "--ignore", "*query") == {"classifier"}
    assert chosen("bert", "--ignore", "*layer.0.*", "--ignore", "*embeddings*") == (
        {name for role in ("attention", "ffn") for name in ROLES["bert"][role] if ".layer.1." in name}
        | ROLES["bert"]["pooler"]
    )


def test_a_star_crosses_dots_and_a_glob_matches_whole_names(chosen: Any, cli: Cli, bert: Path) -> None:
    assert chosen("bert", "--target", "bert.*.key") == _named(_BERT, "attention.self.key")
    assert chosen("bert", "--target", "bert.*.layer.[0].*.key") == {_BERT.format(0) + "attention.self.key"}
    assert cli("decompose", bert, "--target", "key", "--dry-run").code == 3
    assert cli("decompose", bert, "--target", "*KEY", "--dry-run").code == 3


@pytest.mark.parametrize(
    ("model", "owner", "follower"),
    [
        ("masked_lm", "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
        ("gpt2", "transformer.wte", "lm_head"),
        ("t5", "shared", "lm_head"),
        ("t5", "shared", "decoder.embed_tokens"),
    ],
)
def test_either_half_of_a_tied_pair_stands_for_both(model: str, owner: str, follower: str, chosen: Any) -> None:
    assert chosen(model, "--target", owner) == chosen(model, "--target", follower) == {owner}
    assert owner not in chosen(model, "--ignore", follower)
    assert owner not in chosen(model, "--ignore", owner)


def test_either_half_of_a_tied_pair_may_be_given_a_shape(cli: Cli, gpt2: Path) -> None:
    shape = ["--shape", "lm_head=11,20x6,8", "--layers", "head"]
    (module,) = [
        m for m in succeeded(cli("decompose", gpt2, *shape, "--dry-run", "--json")).json["modules"] if m["bond_dims"]
    ]
    assert (module["name"], module["out_dims"], module["in_dims"]) == ("transformer.wte", [11, 20], [6, 8])


# --- how far ----------------------------------------------------------------------------------------------------


def _by_role(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for module in report["modules"]:
        groups.setdefault(str(module["role"]), []).append(module)
    return groups


def _full_bonds(module: dict[str, Any]) -> list[int]:
    """min(product of the sites on the left, on the right) at every bond."""
    sizes = [o * i for o, i in zip(module["out_dims"], module["in_dims"], strict=True)]
    return [min(prod(sizes[:k]), prod(sizes[k:])) for k in range(len(sizes) + 1)]


def test_trunc_caps_every_bond_and_the_caps_of_kinds_beat_it(cli: Cli, bert: Path) -> None:
    caps = {"embedding": 2, "attention": 6, "ffn": 9, "pooler": 12}
    options = ["--emb-trunc", 2, "--attention-trunc", 6, "--ffn-trunc", 9, "--trunc", 12, "--dry-run", "--json"]
    groups = _by_role(succeeded(cli("decompose", bert, *options)).json)
    for role, cap in caps.items():
        for module in groups[role]:
            assert module["bond_dims"] == [min(cap, full) for full in _full_bonds(module)]
            assert max(module["bond_dims"]) == cap


def test_a_kinds_cap_may_be_wider_than_trunc(cli: Cli, bert: Path) -> None:
    options = ["--pooler-trunc", 11, "--trunc", 3, "--dry-run", "--json"]
    groups = _by_role(succeeded(cli("decompose", bert, *options)).json)
    assert max(groups["pooler"][0]["bond_dims"]) == 11
    assert {max(module["bond_dims"]) for role in ("embedding", "attention", "ffn") for module in groups[role]} == {3}


def test_without_truncation_every_bond_is_full_and_nothing_is_kept(cli: Cli, bert: Path) -> None:
    groups = _by_role(succeeded(cli("decompose", bert, "--dry-run", "--json")).json)
    for role in ("embedding", "attention", "ffn", "pooler"):
        for module in groups[role]:
            assert module["bond_dims"] == _full_bonds(module)
            assert module["params"] > module["dense_params"]  # "5-15 % larger", never smaller


def test_one_kinds_cap_leaves_the_other_kinds_dense_rather_than_larger(cli: Cli, bert: Path) -> None:
    groups = _by_role(succeeded(cli("decompose", bert, "--ffn-trunc", 4, "--dry-run", "--json")).json)
    assert {module["action"] for module in groups["ffn"]} == {"mpo"}
    for role in ("embedding", "attention", "pooler"):
        assert {module["action"] for module in groups[role]} == {"kept"}


@pytest.mark.parametrize("options", [["--trunc", 20], ["--rel-tol", 0.5]])
def test_keep_leaves_exactly_those_dense_that_decompose_makes_larger(
    options: list[object], cli: Cli, bert: Path, work: Path
) -> None:
    """With and without a tolerance, dry and real: the same verdict by the same arithmetic."""
    larger = succeeded(cli("decompose", bert, *options, "--when-larger", "decompose", "--json", "-o", "all")).json
    kept = succeeded(cli("decompose", bert, *options, "--when-larger", "keep", "--json", "-o", "some")).json
    default = succeeded(cli("decompose", bert, *options, "--dry-run", "--json")).json
    grown = {m["name"] for m in larger["modules"] if m["params"] > m["dense_params"]}
    assert grown, "nothing would grow: the case is not tried"
    selected = {m["name"] for m in larger["modules"] if m["action"] == "mpo"}
    assert selected - grown, "everything would grow"
    for report in (kept, default):
        assert {m["name"] for m in report["modules"] if m["action"] == "mpo"} == selected - grown
        for module in report["modules"]:
            if module["name"] in grown:
                (size,) = [m["params"] for m in larger["modules"] if m["name"] == module["name"]]
                assert f"{size:,} > {module['dense_params']:,}" in module["reason"]
                assert module["bond_dims"] is None and module["params"] == module["dense_params"]


def test_decompose_when_larger_is_the_default_only_without_truncation(cli: Cli, bert: Path) -> None:
    wide = ["--dry-run", "--json", "--layers", "attention"]
    count = len(ROLES["bert"]["attention"])

    def made(*options: object) -> int:
        report = succeeded(cli("decompose", bert, *wide, *options)).json
        return sum(module["action"] == "mpo" for module in report["modules"])

    assert made() == count
    assert made("--trunc", 1000) == 0
    assert made("--trunc", 1000, "--when-larger", "decompose") == count
    assert made("--when-larger", "keep") == 0
