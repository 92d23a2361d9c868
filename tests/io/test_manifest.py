"""The manifest says the same after a round trip, and what it alone or the config alone says suffices."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpocli.config.routing import RoutingConfig
from mpocli.errors import InputError
from mpocli.io.manifest import Manifest
from mpocli.io.matrix_entry import MatrixEntry
from mpocli.io.module_entry import ModuleEntry
from mpocli.io.mpo_spec import MPOSpec
from mpocli.io.read_manifest import read_manifest, specs_from_config
from mpocli.io.schema import SCHEMA_VERSION, check_schema
from mpocli.io.totals import Totals

LINEAR = MPOSpec("linear", (6, 20), (2, 3), (4, 5), (1, 7, 1))
TABLE = MPOSpec("embedding", (11, 4), (2, 3, 2), (2, 2, 1), (1, 4, 2, 1), scale=2.5)
HEAD = replace(TABLE, kind="linear", tied_to="table", scale=1.0)
MANIFEST = Manifest(
    base_model={"name": "bert", "revision": None, "weights_sha256": "0" * 64},
    modules=(
        ModuleEntry("layer", "ffn", LINEAR, "float32", 0.25, (1.5,), 0),
        ModuleEntry("table", "embedding", TABLE, "bfloat16", 0.0, (0.0, 0.0), 1),
        ModuleEntry("head", "embedding", HEAD, "bfloat16", 0.0, (0.0, 0.0), 1),
    ),
    totals=Totals(100, 164, 100 / 164, 900, 656),
    history=({"command": "decompose", "options": {"trunc": 7}, "seed": 0},),
    files={"config.json": {"sha256": "1" * 64, "bytes": 2}},
)


def _config(manifest: Manifest) -> dict[str, Any]:
    return {"model_type": "bert", "quantization_config": json.loads(json.dumps(manifest.quantization_config()))}


def _saved(directory: Path, manifest: Manifest = MANIFEST) -> Path:
    (directory / "mpo.json").write_text(manifest.dumps(), encoding="utf-8")
    return directory


def test_a_manifest_survives_the_round_trip(tmp_path: Path) -> None:
    assert read_manifest(_saved(tmp_path), _config(MANIFEST)) == MANIFEST
    assert MANIFEST.dumps() == MANIFEST.dumps() and MANIFEST.dumps().endswith("}\n")


def test_the_config_alone_gives_every_structure_and_nothing_that_it_does_not_know(tmp_path: Path) -> None:
    found = read_manifest(tmp_path, {**_config(MANIFEST), "dtype": "bfloat16"})
    assert found is not None
    assert {entry.name: entry.spec for entry in found.modules} == {e.name: e.spec for e in MANIFEST.modules}
    assert {(entry.relative_error, entry.center, entry.dtype) for entry in found.modules} == {(None, None, "bfloat16")}
    assert found.totals is None and found.history == () and found.files == {}


def test_a_dense_directory_has_no_manifest(tmp_path: Path) -> None:
    assert read_manifest(tmp_path, {"model_type": "bert"}) is None
    assert read_manifest(tmp_path, {"quantization_config": {"quant_method": "gptq"}}) is None


def test_a_merged_directory_has_a_manifest_of_no_modules(tmp_path: Path) -> None:
    merged = replace(MANIFEST, modules=())
    assert read_manifest(_saved(tmp_path, merged), {"model_type": "bert"}) == merged


@pytest.mark.parametrize("key", ["shape", "out_dims", "in_dims", "bond_dims", "kind", "tied_to", "scale"])
def test_any_structural_difference_between_the_two_is_a_disagreement(key: str, tmp_path: Path) -> None:
    config = _config(MANIFEST)
    module = config["quantization_config"]["modules"]["table"]
    module[key] = {
        "shape": [12, 4],
        "out_dims": [3, 2, 2],
        "in_dims": [2, 1, 2],
        "bond_dims": [1, 3, 2, 1],
        "kind": "linear",
        "tied_to": "layer",
        "scale": 3.0,
    }[key]
    with pytest.raises(InputError, match="disagree about module table"):
        read_manifest(_saved(tmp_path), config)


def test_a_manifest_whose_config_has_lost_its_part_is_a_disagreement(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="disagree"):
        read_manifest(_saved(tmp_path), {"model_type": "bert"})


def test_schemas_up_to_ours_are_read_and_newer_ones_refused_with_both_numbers(tmp_path: Path) -> None:
    check_schema("x", SCHEMA_VERSION)
    with pytest.raises(InputError, match=rf"x: schema_version {SCHEMA_VERSION + 1}.*up to {SCHEMA_VERSION}"):
        check_schema("x", SCHEMA_VERSION + 1)
    for wrong in (0, -1, "1", 1.0, None):
        with pytest.raises(InputError, match="positive integer"):
            check_schema("x", wrong)


def test_params_are_counted_by_hand_and_a_tied_module_has_none_of_its_own() -> None:
    assert LINEAR.params == 1 * 2 * 4 * 7 + 7 * 3 * 5 * 1 and LINEAR.dense_params == 120
    assert TABLE.params == 1 * 2 * 2 * 4 + 4 * 3 * 2 * 2 + 2 * 2 * 1 * 1 and TABLE.dense_params == 44
    assert HEAD.params == HEAD.dense_params == 0
    assert LINEAR.core_shapes() == {"core_0": (1, 2, 4, 7), "core_1": (7, 3, 5, 1)}


@pytest.mark.parametrize(
    "change",
    [
        {"out_dims": [2]},
        {"out_dims": [0, 3]},
        {"bond_dims": [1, 7]},
        {"bond_dims": [2, 7, 1]},
        {"bond_dims": [1, 0, 1]},
        {"bond_dims": [1, -7, 1]},
        {"shape": [6]},
        {"shape": [60, 20]},
        {"shape": [6, 19, 3]},
        {"kind": "convolution"},
        {"scale": "big"},
        {"in_dims": None},
        {"tied_to": "nowhere"},
        {"tied_to": "layer"},
    ],
    ids=str,
)
def test_a_structure_that_cannot_be_is_refused_under_its_modules_name(change: dict[str, Any]) -> None:
    """Bond dimensions end in ones and are positive; the padded shape holds the matrix with 10 % at most to spare."""
    entry = {**LINEAR.to_dict(), **change}
    with pytest.raises(InputError, match="layer"):
        specs_from_config({"schema_version": 1, "modules": {"layer": entry}})


def test_a_structure_that_cannot_be_is_refused_in_the_manifest_too(tmp_path: Path) -> None:
    manifest = json.loads(MANIFEST.dumps())
    manifest["modules"][0]["bond_dims"] = [2, 7, 1]
    (tmp_path / "mpo.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"layer: bond dimensions \[2, 7, 1\]"):
        read_manifest(tmp_path, _config(MANIFEST))


def test_nan_never_gets_into_a_manifest() -> None:
    bad = replace(MANIFEST.modules[0], relative_error=float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        replace(MANIFEST, modules=(bad,)).dumps()


MATRICES = (
    MatrixEntry("table", "embedding", "embedding", (11, 4), "table.weight", "bfloat16", tied=("head",)),
    MatrixEntry("layer", "ffn", "linear", (6, 20), "layer.weight", "float32"),
    MatrixEntry("experts.w", None, "", (12, 8), None, "float32", "fused"),
)


def test_the_list_of_matrices_survives_the_round_trip_and_none_is_no_empty_list(tmp_path: Path) -> None:
    for matrices in (MATRICES, (), None):
        manifest = replace(MANIFEST, matrices=matrices)
        assert read_manifest(_saved(tmp_path, manifest), _config(manifest)) == manifest
    assert "matrices" not in MANIFEST.to_dict()


@pytest.mark.parametrize("key", ["name", "role", "kind", "shape", "key", "dtype", "reason", "tied"])
def test_a_list_of_matrices_that_was_changed_or_is_none_is_refused(key: str, tmp_path: Path) -> None:
    said = replace(MANIFEST, matrices=MATRICES).to_dict()
    entry = said["matrices"][1]
    for value in ([1, 2] if key == "shape" else "other", None, 5, {"x": 1}):
        if value != entry[key]:
            changed = {**said, "matrices": [said["matrices"][0], {**entry, key: value}, said["matrices"][2]]}
            (tmp_path / "mpo.json").write_text(json.dumps(changed))
            with pytest.raises(InputError, match=r"mpo\.json: "):
                read_manifest(tmp_path, _config(MANIFEST))


@pytest.mark.parametrize("part", ["modules", "encodings", "routing"])
@pytest.mark.parametrize("value", [5, 1e300, True, "x", [1], [["a", 1]]])
def test_a_part_of_the_config_that_is_no_object_is_told_so(part: str, value: object, tmp_path: Path) -> None:
    quantization = _config(MANIFEST)["quantization_config"] | {part: value}
    with pytest.raises(InputError, match=r"JSON object"):
        read_manifest(tmp_path, {"quantization_config": quantization})
    if part == "routing":
        with pytest.raises(InputError, match="no JSON object"):
            RoutingConfig.from_dict(value)  # type: ignore[arg-type]
