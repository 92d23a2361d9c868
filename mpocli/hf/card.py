"""README.md of an output directory, the model card: what it is, how large, how to load it as what class."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpocli.io.manifest import Manifest
from mpocli.io.readable import is_file
from mpocli.io.schema import MANIFEST
from mpocli.printable import printable

# What the hub and YAML read as one plain word: a model's id, a licence's.
_WORD = re.compile(r"[A-Za-z][\w.+-]*(/[\w.+-]+)?", re.ASCII)
_NOT_PLAIN = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
_LICENSE = ("license", "license_name", "license_link")


def license_of(card: Path) -> dict[str, list[str]]:
    """What the source's model card says of its licence in the front matter, key by key: the weights stay under it."""
    from huggingface_hub.repocard import metadata_load

    if not is_file(card):  # a pipe would be waited for
        return {}
    try:
        front = metadata_load(card) or {}
    except Exception:  # one whose front matter is anything but what the hub expects
        return {}
    found = {key: front[key] if isinstance(front.get(key), list) else [front.get(key)] for key in _LICENSE}
    texts = {key: [value for value in values if value and isinstance(value, str)] for key, values in found.items()}
    return {key: values for key, values in texts.items() if values}


def model_card(
    manifest: Manifest, license: Mapping[str, list[str]] | None = None, class_name: str = "AutoModel"
) -> str:
    """The text of the card. Names and options out of foreign manifests are quoted: they add neither keys nor markup."""
    base = str(manifest.base_model.get("name") or "unknown")
    totals = manifest.totals
    hub_id = manifest.base_model.get("revision") is not None and _WORD.fullmatch(base)
    front = ["---", "library_name: transformers"]
    sparse = any(encoding.holds_zeros for encoding in manifest.encodings.values())
    bits = sorted({encoding.code_bits for encoding in manifest.encodings.values() if encoding.code_bits})
    tags = [*(["mpo", "tensor-network"] if manifest.modules else []), *(["sparse"] if sparse else [])]
    tags += ["quantized", *(f"{number}-bit" for number in bits)] if bits else []
    front += ["tags:", *(f"- {tag}" for tag in (*tags, "mpocli"))] if tags else []
    front += [f"base_model: {_scalar(base)}"] if hub_id else []
    for key, values in (license or {}).items():
        one = len(values) == 1
        front += [f"{key}: {_scalar(values[0])}"] if one else [f"{key}:", *(f"- {_scalar(value)}" for value in values)]
    class_name = class_name if class_name.isidentifier() else "AutoModel"
    what = f", as {_form(manifest)}" if manifest.modules else ", sparse" if sparse else ""
    what += f", in {' and '.join(map(str, bits))} bits" if bits else ""
    lines = [*front, "---", "", f"# {base if _is_plain(base) else _code(base)}{what}", ""]
    if totals is not None:
        lines += [
            "| | this checkpoint | dense |",
            "|---|---:|---:|",
            f"| parameters | {totals.params:,} | {totals.dense_params:,} |",
            f"| bytes of weights | {totals.bytes:,} | {totals.dense_bytes:,} |",
            "",
            "Bytes are those of the weight files; dense, of the parameters in the same dtype.",
            "",
        ]
    said = []
    if manifest.modules:
        said.append(f"{len(manifest.modules)} modules hold their weight as a chain of small tensors.")
    for account, count in Counter(encoding.account for encoding in manifest.encodings.values()).items():
        said.append(f"{count} tensors are stored as {account}.")
    if said:
        lines += [
            f"{' '.join(said)} {MANIFEST} has every shape. Load it with",
            "",
            "```python",
            "import mpocli  # registers the loader; pip install mpocli",
            f"from transformers import {class_name}",
            "",
            f'model = {class_name}.from_pretrained("path/to/this/directory")',
            "```",
            "",
            "Never pass `ignore_mismatched_sizes=True` without `import mpocli`: it would return random layers.",
            "",
        ]
    else:
        lines += ["An ordinary transformers checkpoint.", ""]
    if manifest.history:
        lines += ["Made by", ""]
        lines += [_made_by(entry["command"], entry["options"]) for entry in manifest.history]
        lines += [""]
    return "\n".join(lines)


def left_behind(lines: Sequence[str]) -> str:
    """What the source's directory has and this one has not, for the end of the card; nothing where that is nothing."""
    if not lines:
        return ""
    return "\n".join(["", "Left behind in the source's directory", "", *(f"- {_code(line)}" for line in lines), ""])


def _form(manifest: Manifest) -> str:
    """What the modules are: truncated SVDs where every shape is (O, 1)x(1, I)."""
    sites = [module.spec.sites for module in manifest.modules]
    svd = all(shape.out_dims[1:] == (1,) and shape.in_dims[:-1] == (1,) for shape in sites)
    return "truncated SVDs (two-site matrix product operators)" if svd else "matrix product operators"


def _made_by(command: str, options: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in options.items() if value not in (None, [], {}, False, ())}
    spelled = ", ".join(f"{key}={value}" for key, value in shown.items())
    return f"- {_code(f'mpocli {command}')}" + (f" with {_code(spelled)}" if spelled else "")


def _is_plain(text: str) -> bool:
    """Whether it means itself in YAML and in Markdown, which makes a link of `www.`."""
    return bool(_WORD.fullmatch(text)) and text.lower() not in _NOT_PLAIN and not text.lower().startswith("www.")


def _scalar(text: str) -> str:
    """A string in YAML, which reads JSON's."""
    return text if _is_plain(text) else json.dumps(printable(text), ensure_ascii=False)


def _code(text: str) -> str:
    """Markdown that shows a text as it is: in a fence of more backticks than it has in a row."""
    text = printable(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"
