"""Decomposing needs the memory of its largest matrix, however many there are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

from cli.processes import Server
from cli.shell import WEIGHTS
from mpocli.io.checkpoint import CheckpointReader

VOCABULARY, HIDDEN, INTERMEDIATE = 16384, 256, 1024
LARGEST = 8 * VOCABULARY * HIDDEN  # bytes of the token table in float64
LAYER = 4 * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * INTERMEDIATE)  # bytes of a layer's matrices as stored, in float32

# Prints the peak in bytes after the imports, after decomposing, and after holding all tensors as read and in float64.
_PROBE = """
import os, re
from pathlib import Path
import torch
from transformers import T5EncoderModel
from mpocli.io.checkpoint import CheckpointReader
from mpocli.methods.decompose import run as decompose
from mpocli.config.decompose import DecomposeConfig

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

model, out = Path("{layers}"), Path("{layers}-mpo")
peaks = [peak()]
decompose.run(str(model), DecomposeConfig(trunc=16), out)
peaks.append(peak())
reader = CheckpointReader(model)
held = [(tensor, tensor.double()) for tensor in map(reader.read, reader)]
peaks.append(peak())
print(*peaks, flush=True)
os._exit(0)
"""


def _save(directory: Path, layers: int) -> None:
    """A T5 encoder's files, without building the model. Its table is the last tensor in the file, so that whatever
    the layers before it have left in memory adds to the peak."""
    config = tf.T5Config(
        vocab_size=VOCABULARY, d_model=HIDDEN, d_ff=INTERMEDIATE, d_kv=HIDDEN // 4, num_heads=4, num_layers=layers
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in tf.T5EncoderModel(config).state_dict().items()}
    del shapes["encoder.embed_tokens.weight"]  # tied
    generator = torch.Generator().manual_seed(layers)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    config.architectures = ["T5EncoderModel"]
    config.save_pretrained(directory)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    assert list(CheckpointReader(directory))[-1] == "shared.weight"


@pytest.fixture(scope="module")
def peaks(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[int, int]]:
    """Layers → peak bytes of decomposing, and of holding the model, beyond the peak of the imports."""
    home = tmp_path_factory.mktemp("memory")
    found = {}
    for layers in (2, 12):
        _save(home / f"{layers}", layers)
        ended = server.run(cwd=home, log=home / "log", before=_PROBE.format(layers=layers))
        assert ended.code == 0, ended.err
        answer = ended.out
        imports, decomposing, holding = map(int, answer.split())
        found[layers] = decomposing - imports, holding - imports
        manifest = json.loads((home / f"{layers}-mpo" / "mpo.json").read_text())
        assert len(manifest["modules"]) == 2 + 6 * layers  # the token table and what is tied to it
    return found


pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says its peak memory there")


@pytest.mark.parametrize("layers", [2, 12])
def test_peak_memory_is_at_most_four_times_the_largest_matrix_in_float64(
    layers: int, peaks: dict[int, tuple[int, int]]
) -> None:
    decomposing, _ = peaks[layers]
    assert decomposing <= 4 * LARGEST, f"{decomposing / LARGEST:.2f} times"


def test_peak_memory_does_not_grow_with_the_number_of_layers(peaks: dict[int, tuple[int, int]]) -> None:
    """Ten layers more, even only as stored and not in float64, would show."""
    assert peaks[12][0] - peaks[2][0] <= 10 * LAYER / 3


def test_a_process_that_holds_the_whole_model_is_over_both_limits(peaks: dict[int, tuple[int, int]]) -> None:
    """The measurement can fail."""
    assert peaks[12][1] > 4 * LARGEST
    assert peaks[12][1] - peaks[2][1] > 10 * LAYER / 3
