"""Parameter counts of the published models, from configurations and files whose data are a hole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from mpocli.config.decompose import DecomposeConfig
from mpocli.io.tensor_spec import TensorSpec
from mpocli.io.writer import plan_shards
from mpocli.methods.decompose import run as decompose
from mpocli.mpo import SiteShape


def hollow(directory: Path, model_class: type, config: transformers.PretrainedConfig) -> Path:
    """A checkpoint with every tensor's header and no data: a sparse file takes no room on the disk."""
    with torch.device("meta"):
        model = model_class(config)
    config.architectures = [model_class.__name__]
    config.save_pretrained(directory)
    specs = [TensorSpec(name, p.dtype, tuple(p.shape)) for name, p in model.named_parameters()]
    (shard,) = plan_shards(specs, 10**12)
    with (directory / shard.name).open("wb") as stream:
        stream.write(shard.header)
        stream.truncate(shard.nbytes)
    return directory


def counts(directory: Path, **options: object) -> decompose.DecomposeReport:
    config = DecomposeConfig(**options)  # type: ignore[arg-type]
    return decompose.run(str(directory), config, directory / "never", dry_run=True)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hollow(tmp_path_factory.mktemp("bert"), transformers.BertModel, transformers.BertConfig())


@pytest.fixture(scope="module")
def albert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.AlbertConfig(
        hidden_size=768, num_attention_heads=12, intermediate_size=3072, vocab_size=30000
    )
    return hollow(tmp_path_factory.mktemp("albert"), transformers.AlbertModel, config)


def test_bert_base_at_cap_256_has_73_44_million_of_109_48(bert: Path) -> None:
    report = counts(bert, trunc=256)
    assert report.totals.dense_params == 109_482_240
    assert round(report.totals.params / 1e6, 2) == 73.44
    actions = {role: {m.action for m in report.modules if m.role == role} for role in ("embedding", "ffn")}
    assert actions == {"embedding": {"mpo"}, "ffn": {"mpo"}}
    kept = [m for m in report.modules if m.role in ("attention", "pooler")]
    assert len(kept) == 12 * 4 + 1
    # 768x768 at full bond: 589,824 in the central core and 74,016 beside it, 12.5 % more
    assert {m.reason for m in kept} == {"an MPO would be larger (663,840 > 589,824 parameters)"}


def test_default_five_site_shapes_are_the_papers(bert: Path) -> None:
    report = counts(bert)
    shapes = {m.shape: str(SiteShape(m.out_dims, m.in_dims)) for m in report.modules if m.action == "mpo"}
    assert shapes == {
        (30522, 768): "6,8,10,8,8x4,4,4,4,3",
        (3072, 768): "4,4,8,6,4x3,4,4,4,4",
        (768, 3072): "3,4,4,4,4x4,4,8,6,4",
        (768, 768): "3,4,4,4,4x4,4,4,4,3",
    }
    bonds = {m.shape: m.bond_dims for m in report.modules}
    assert bonds[3072, 768] == (1, 12, 192, 384, 16, 1)
    assert bonds[30522, 768] == (1, 24, 768, 768, 24, 1)


@pytest.mark.parametrize(
    ("shapes", "total", "outside_central"),
    [
        ((), 12.694, 1.186),
        (
            (
                ("*attention*", SiteShape.parse("4,4,4,4,3x4,4,4,4,3")),
                ("*pooler", SiteShape.parse("4,4,4,4,3x4,4,4,4,3")),
            ),
            12.757,
            1.249,
        ),
    ],
    ids=["balanced", "its own"],
)
def test_albert_base_counts(albert: Path, shapes: tuple, total: float, outside_central: float) -> None:
    report = counts(albert, shapes=shapes)
    central = sum(
        SiteShape(m.out_dims, m.in_dims).core_sizes(m.bond_dims)[2] for m in report.modules if m.action == "mpo"
    )
    assert round(report.totals.params / 1e6, 3) == total
    assert round((report.totals.params - central) / 1e6, 3) == outside_central
