"""Reading the manifest of a model directory, held against its `config.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpocli.errors import InputError
from mpocli.io.encodings.known import encodings_from
from mpocli.io.json_file import read_json
from mpocli.io.manifest import Manifest
from mpocli.io.matrix_entry import MatrixEntry
from mpocli.io.module_entry import ModuleEntry
from mpocli.io.mpo_spec import MPOSpec
from mpocli.io.readable import is_there
from mpocli.io.schema import FORMAT, MANIFEST, QUANT_METHOD, RESTORE, SCHEMA_VERSION, check_same, check_schema
from mpocli.io.totals import Totals


def specs_from_config(data: Mapping[str, Any]) -> dict[str, MPOSpec]:
    """The decomposed modules that a `quantization_config` describes.

    Raises `InputError` for a schema that is newer than this mpocli, and for a structure that cannot be.
    """
    check_schema("config.json", data.get("schema_version", SCHEMA_VERSION))
    modules = data.get("modules") or {}
    if not isinstance(modules, Mapping):
        raise InputError("config.json: the `modules` of its quantization_config are no JSON object")
    specs = {name: MPOSpec.from_dict(name, entry) for name, entry in modules.items()}
    for name, spec in specs.items():
        check_same("config.json", f"module {name}", modules[name], spec.fields())
    for name, spec in specs.items():
        if spec.tied_to is not None and (spec.tied_to not in specs or spec.tied_to == name):
            raise InputError(
                f"module {name}: shares the cores of {spec.tied_to!r}, which is no other of the {len(specs)} modules",
                hint=RESTORE,
            )
    return specs


def read_manifest(directory: Path, config: Mapping[str, Any]) -> Manifest | None:
    """The manifest of a model directory, None where the model is not an MPO checkpoint.

    `config` is its `config.json`. Without `mpo.json` (a user's own `save_pretrained` writes none) what the
    config says is the manifest. Raises `InputError` where the two disagree.
    """
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        raise InputError(f"{directory / 'config.json'}: its quantization_config is no JSON object", hint=RESTORE)
    described = _described(config, quantization) if quantization.get("quant_method") == QUANT_METHOD else None
    path = directory / MANIFEST
    if not is_there(path):  # a pipe, a folder or a dead link in its place is told by `read_json`
        return described
    data = read_json(path, strict=True)
    manifest = _parsed(path, data)
    if described is not None or manifest.needs_plugin:
        _check_agreement(directory, manifest, described or Manifest())
    check_same(str(path), "the manifest", data, manifest.to_dict())
    return manifest


def _described(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> Manifest:
    """What `config.json` alone says, with nothing that was measured."""
    specs = specs_from_config(quantization)
    encodings = encodings_from(quantization.get("encodings") or {})
    for name, encoding in encodings.items():
        check_same("config.json", f"tensor {name}", quantization["encodings"][name], encoding.to_dict())
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    entries = tuple(ModuleEntry(name, None, spec, dtype) for name, spec in specs.items())
    routing = quantization.get("routing") or {}
    if not isinstance(routing, Mapping):
        raise InputError("config.json: the `routing` of its quantization_config is no JSON object", hint=RESTORE)
    return Manifest(modules=entries, encodings=encodings, routing=dict(routing))


def _parsed(path: Path, data: Mapping[str, Any]) -> Manifest:
    """What `mpo.json` says; `InputError` where it is not of the format, or names a module twice."""
    check_schema(MANIFEST, data.get("schema_version"))
    if data.get("format") != FORMAT:
        raise InputError(f"{path}: format {data.get('format')!r}, {FORMAT!r} was expected")
    try:
        totals = Totals.from_dict(data["totals"]) if data.get("totals") else None
        manifest = Manifest(
            base_model={str(key): value and str(value) for key, value in dict(data.get("base_model") or {}).items()},
            modules=tuple(ModuleEntry.from_dict(entry) for entry in data.get("modules") or ()),
            matrices=tuple(map(MatrixEntry.from_dict, data["matrices"])) if "matrices" in data else None,
            encodings=encodings_from(data.get("encodings") or {}),
            routing=dict(data.get("routing") or {}),
            totals=totals,
            history=tuple(
                {**entry, "command": str(entry["command"]), "options": dict(entry["options"])}
                for entry in data.get("history") or ()
            ),
            files={
                str(name): {"sha256": str(claim["sha256"]), "bytes": int(claim["bytes"])}
                for name, claim in (data.get("files") or {}).items()
            },
        )
    except InputError:
        raise
    except (TypeError, AttributeError, ValueError, KeyError, OverflowError) as error:
        raise InputError(f"{path}: malformed ({error!r})", hint=RESTORE) from error
    counts = Counter(entry.name for entry in manifest.modules)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise InputError(f"{path}: module {twice[0]} is there {counts[twice[0]]} times", hint=RESTORE)
    return manifest


def _check_agreement(directory: Path, manifest: Manifest, described: Manifest) -> None:
    """`InputError` where `mpo.json` and what `config.json` describes differ in structure."""
    stated, recorded = ({entry.name: entry.spec for entry in one.modules} for one in (described, manifest))
    for name in sorted(recorded.keys() | stated.keys()):
        if recorded.get(name) != stated.get(name):
            raise _disagreement(directory, f"module {name}")
    if manifest.routing != described.routing:
        raise _disagreement(directory, "how tokens are routed")
    for name in sorted(manifest.encodings.keys() | described.encodings.keys()):
        if manifest.encodings.get(name) != described.encodings.get(name):
            raise _disagreement(directory, f"how {name} is stored")


def _disagreement(directory: Path, about: str) -> InputError:
    return InputError(
        f"{directory}: {MANIFEST} and config.json disagree about {about}",
        hint=f"delete the one that is stale; config.json alone suffices, without {MANIFEST}",
    )
