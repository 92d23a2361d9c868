"""Ways to spoil a model directory, its data or a command, drawn from a `random.Random`: each does one thing and says
which. What they may draw is small on purpose; a number that would only take long is not in it."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUMBERS = [0, 1, -1, 2, 3, 16, 2**31, 2**63, 10**30, -(10**18), 0.5, 1e308, math.nan, math.inf, -math.inf]
WORDS = ["", " ", "..", "../beside", "/etc/passwd", "a/b", "\ud800", "\x00", "\x1b[31m", "[/x]", "é" * 3000]
WORDS += ["float16", "int8", "mpo", "bitmask", "gpt2", "t5", "linear", "lm_head", "nan", "__class__"]
VALUES = [None, True, False, *NUMBERS, *WORDS, [], {}, [[]], [0], [-1, 2], [None], ["x"], [2.5], [10**9] * 2, {"": {}}]
DEEP = "[" * 50_000 + "]" * 50_000


def _places(data: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to each value below `data`."""
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path for key, value in children for path in [(*above, key), *_places(value, (*above, key))]]


def _at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def edit(data: Any, draw: random.Random) -> str:
    """Change one value, number, key or order somewhere below an object."""
    places = _places(data)
    if not places:
        return "nothing to edit"
    *above, key = draw.choice(places)
    parent = _at(data, tuple(above))
    how = draw.choice(["set", "set", "nudge", "delete", "double", "rename", "swap"])
    old = parent[key]
    if how == "nudge" and isinstance(old, int | float):
        parent[key] = draw.choice([old + 1, old - 1, -old, old * 2, float(old), str(old)])
    elif how == "delete":
        del parent[key]
    elif how == "double" and isinstance(parent, list):
        parent.insert(key, json.loads(json.dumps(old)))
    elif how == "rename" and isinstance(parent, dict):
        parent[draw.choice([*WORDS, f"{key}x", str(key)[1:]])] = parent.pop(key)
    elif how == "swap":
        other = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[key], parent[other] = parent[other], parent[key]
    else:
        how, parent[key] = "set", draw.choice(VALUES)
        return f"{'.'.join(map(str, (*above, key)))} = {str(parent[key])[:30]!r}"
    return f"{how} {'.'.join(map(str, (*above, key)))}"


def scramble(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Flip, cut, lengthen or replace bytes."""
    place = draw.randrange(len(content) + 1)
    changes: dict[str, Callable[[], bytes]] = {
        "flip": lambda: content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :],
        "cut": lambda: content[:place],
        "insert": lambda: (
            content[:place] + draw.choice([b'"', b"{", b"]", b",", b"1e999", b"\xff", b"\0"]) + content[place:]
        ),
        "empty": lambda: b"",
        "noise": lambda: draw.randbytes(100),
        "append": lambda: content + draw.choice([b"\0", b"}", b"x" * 5000]),
        "sixteen bits": lambda: content.decode("latin-1").encode("utf-16"),
        "byte order mark": lambda: b"\xef\xbb\xbf" + content,
        "deep": lambda: DEEP.encode(),
        "list": lambda: b"[1]",
    }
    how = draw.choice(sorted(changes))
    return changes[how](), f"{how} at {place}"


def _rewrite(path: Path, change: Callable[[Any, random.Random], str], draw: random.Random) -> str:
    data = json.loads(path.read_text())
    said = change(data, draw)
    path.write_text(json.dumps(data))
    return f"{path.name}: {said}"


# --- of a model's directory -------------------------------------------------------------------------------------------


def config(model: Path, draw: random.Random) -> str:
    """What transformers reads of `config.json`."""

    def change(data: Any, draw: random.Random) -> str:
        ours = data.pop("quantization_config", None)
        said = edit(data, draw)
        if ours is not None:
            data["quantization_config"] = ours
        return said

    return _rewrite(model / "config.json", change, draw)


def structure(model: Path, draw: random.Random) -> str:
    """What mpocli wrote into `config.json`, which stands alone where there is no manifest."""
    alone = draw.random() < 0.7
    if alone:
        (model / "mpo.json").unlink()
    said = _rewrite(model / "config.json", lambda data, draw: edit(data["quantization_config"], draw), draw)
    return said + (", no mpo.json" if alone else "")


def manifest(model: Path, draw: random.Random) -> str:
    return _rewrite(model / "mpo.json", edit, draw)


def both(model: Path, draw: random.Random) -> str:
    """One lie about one module, told twice."""
    config, manifest = (json.loads((model / name).read_text()) for name in ("config.json", "mpo.json"))
    entry = draw.choice(manifest["modules"])
    twin = config["quantization_config"]["modules"][entry["name"]]
    key = draw.choice(sorted(entry.keys() & twin.keys()))
    value = draw.choice(VALUES)
    if isinstance(entry[key], list) and draw.random() < 0.6:
        value = draw.sample(entry[key], len(entry[key]))
    entry[key] = twin[key] = value
    (model / "config.json").write_text(json.dumps(config))
    (model / "mpo.json").write_text(json.dumps(manifest))
    return f"{entry['name']}.{key} = {str(value)[:40]!r} in both"


def text(model: Path, draw: random.Random) -> str:
    """Bytes of a JSON file."""
    path = draw.choice(sorted(model.glob("*.json")))
    content, said = scramble(path.read_bytes(), draw)
    path.write_bytes(content)
    return f"{path.name}: {said}"


def tokenizer(model: Path, draw: random.Random) -> str:
    path = draw.choice(sorted(model.glob("tokenizer*.json")))
    if draw.random() < 0.5:
        return _rewrite(path, edit, draw)
    content, said = scramble(path.read_bytes(), draw)
    path.write_bytes(content)
    return f"{path.name}: {said}"


def index(model: Path, draw: random.Random) -> str:
    """The map from tensors to shards."""
    path = model / "model.safetensors.index.json"
    shards = sorted(model.glob("*.safetensors"))

    def change(data: Any, draw: random.Random) -> str:
        names = data["weight_map"]
        name, shard = draw.choice(sorted(names)), draw.choice(shards)
        how = draw.choice(["edit", "elsewhere", "other shard", "drop", "extra", "missing shard", "many"])
        if how == "elsewhere":
            names[name] = draw.choice(["../beside/model.safetensors", str(model.parent / "beside"), "config.json", "."])
        elif how == "other shard":
            names[name] = shard.name
        elif how == "drop":
            del names[name]
        elif how == "extra":
            names["x.y"] = shard.name
        elif how == "missing shard":
            shard.unlink()
        elif how == "many":
            data["weight_map"] = {f"t{number}": shard.name for number in range(5_000)}
        else:
            how = edit(data, draw)
        return f"{how} {name}"

    return _rewrite(path, change, draw)


def header(model: Path, draw: random.Random) -> str:
    """What a weight file says of its tensors."""
    path = draw.choice(sorted(model.glob("*.safetensors")))
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    found, data = content[8 : 8 + length], content[8 + length :]
    how = draw.choice(["length", "bytes", "edit", "edit", "edit", "cut", "append"])
    if how == "length":
        length = draw.choice([0, 1, length - 1, length + 1, len(content), 2**32, 2**63, 2**64 - 1])
        said = f"{how} {length}"
    elif how == "bytes":
        found, said = scramble(found, draw)
        length = len(found)
    elif how == "edit":
        names = json.loads(found)
        said = edit(names, draw)
        found = json.dumps(names).encode()
        length = len(found)
    else:
        data = data[: draw.randrange(len(data))] if how == "cut" else data + bytes(8)
        said = how
    path.write_bytes(struct.pack("<Q", length) + found + data)
    return f"{path.name}: {said}"


def weights(model: Path, draw: random.Random) -> str:
    """Numbers of one tensor. The time in the directory stays, as of a disk that forgets."""
    path = draw.choice(sorted(model.glob("*.safetensors")))
    content, times = bytearray(path.read_bytes()), path.stat()
    (length,) = struct.unpack("<Q", content[:8])
    names = json.loads(content[8 : 8 + length])
    spans = {name: entry["data_offsets"] for name, entry in names.items() if name != "__metadata__"}
    name = draw.choice(sorted(name for name, (start, end) in spans.items() if start < end))
    start, end = (8 + length + offset for offset in spans[name])
    how = draw.choice(["nan", "infinity", "huge", "flip", "ones", "noise"])
    numbers = {"nan": math.nan, "infinity": math.inf, "huge": 3e38}
    if how in numbers and end - start >= 4:
        content[start : start + 4] = struct.pack("<f", numbers[how])
    elif how == "ones":
        content[start:end] = b"\xff" * (end - start)
    elif how == "noise":
        content[start:end] = draw.randbytes(end - start)
    else:
        content[draw.randrange(start, end)] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return f"{path.name}: {how} in {name}"


class Trap:
    """Unpickled, it makes a directory: the sign that a pickle was opened."""

    def __init__(self, sign: Path) -> None:
        self._sign = sign

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self._sign),)


def files(model: Path, draw: random.Random) -> str:
    """Files that are missing, are something else, or are too many."""
    path = draw.choice(sorted(path for path in model.iterdir()))
    how = draw.choice(["missing", "directory", "pipe", "loop", "empty", "dangling", "pickle", "code", "folder", "name"])
    if how in ("missing", "directory", "pipe", "loop", "empty", "dangling"):
        path.unlink()
    if how == "directory":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how in ("loop", "dangling"):
        path.symlink_to(path.name if how == "loop" else "nowhere")
    elif how == "empty":
        path.touch()
    elif how == "pickle":
        for name in ("pytorch_model.bin", "training_args.bin"):
            (model / name).write_bytes(pickle.dumps(Trap(model.parent / "sign")))
        if draw.random() < 0.5:
            for weights in model.glob("*.safetensors*"):
                weights.unlink()
    elif how == "code":
        (model / "own.py").write_text(f"import os\nos.mkdir({str(model.parent / 'sign')!r})\n")
        auto = {"auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoModelForCausalLM": "own.Own"}}
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **auto, "model_type": draw.choice(["own", "gpt2"])}))
    elif how == "folder":
        (model / "1_Pooling").mkdir()
        (model / "1_Pooling" / "config.json").write_text("{}")
    elif how == "name":
        (model / os.fsdecode(b"odd\xff\n.json")).write_text("{}")
    return f"{how} {path.name}"


# --- of data and commands ---------------------------------------------------------------------------------------------


def data(path: Path, draw: random.Random) -> str:
    """Rows that are none, labels that are none, bytes that are no text."""
    content = path.read_bytes()
    ends = [b"one field", b"a\tb\tc\td", b"t\tnan", b"t\t9", b"t\t1e999", b'"open\t1', b"\0\t0", b"\xff\xfe\t1"]
    ends += [b'{"sentence": [1], "label": 1}', b'{"sentence": "\\ud800", "label": 1}', b"x" * 300_000 + b"\t1"]
    if draw.random() < 0.5:
        changed, said = scramble(content, draw)
    else:
        end = draw.choice(ends)
        changed, said = content + end + draw.choice([b"\n", b"", b"\r"]), f"ends with {end[:40]!r}"
    path.write_bytes(changed)
    return f"{path.name}: {said}"


OPTION_VALUES = ["", "0", "-1", "1", "2", "3", "0.5", "1.5", "-0.1", "nan", "inf", "1e400", "99999999999999999999", "x"]
OPTION_VALUES += [
    "5%",
    "101%",
    "*",
    "a,b",
    "1,2",
    "2:4",
    "4:2",
    "1KB",
    "KB",
    "float16",
    "int8",
    "é" * 3000,
    "ffn",
    "head",
]
OPTION_VALUES += ["*=2,2x2,2", "*=0,0x1,1", "meta", "cpu", "none", "lm", "sst2", "dev.txt", "model", "/dev/null", "/"]
OPTION_VALUES += [".", "..", "out", "\n", "0x10", "1_000", " 2 ", os.fsdecode(b"\xff")]


def arguments(options: list[tuple[str, bool]], draw: random.Random) -> list[str]:
    """One to three options, each given as its name and whether it takes no value."""
    chosen = [draw.choice(options) for _ in range(draw.randint(1, 3))]
    return [part for name, flag in chosen for part in ([name] if flag else [name, draw.choice(OPTION_VALUES)])]
