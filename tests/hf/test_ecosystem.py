"""A loaded MPO model is a transformers model like any other: trained, compiled, offloaded, copied."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from families import VOCABULARY, logits, make

from mpocli.config.decompose import DecomposeConfig
from mpocli.methods.decompose import run as decompose
from mpocli.nn import MPOModule

TRUNCATED = DecomposeConfig(trunc=6, when_larger="decompose")


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    make("bert-classifier", tmp_path / "dense")
    decompose.run(str(tmp_path / "dense"), TRUNCATED, tmp_path / "mpo")
    return tmp_path / "mpo"


def load(directory: Path, **options: object) -> transformers.PreTrainedModel:
    return transformers.AutoModelForSequenceClassification.from_pretrained(directory, **options).eval()


class Sentences(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, VOCABULARY, (12,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 3}


def test_trainer_trains_saves_and_resumes_the_cores(classifier: Path, tmp_path: Path) -> None:
    model = load(classifier)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        learning_rate=1e-3,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Sentences())
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    cores = {name for name in before if ".core_" in name}
    assert cores and cores <= moved
    saved = load(tmp_path / "run" / "checkpoint-4")
    assert torch.equal(logits(saved), logits(model.eval()))
    # Half the steps, then the rest from the saved state: the same weights as in one go.
    again = transformers.Trainer(model=load(classifier), args=arguments, train_dataset=Sentences())
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for (name, a), (_, b) in zip(model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_frozen_central_cores_stay_and_auxiliary_ones_move(classifier: Path) -> None:
    model = load(classifier)
    modules = [module for module in model.modules() if isinstance(module, MPOModule)]
    for module in modules:
        module.set_update("auxiliary")
    before = [core.detach().clone() for module in modules for core in module.cores]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = torch.utils.data.default_collate([Sentences()[k] for k in range(8)])
    model(**batch).loss.backward()
    optimizer.step()
    after = [(k == module.central, core) for module in modules for k, core in enumerate(module.cores)]
    changed = [(central, not torch.equal(a, b)) for a, (central, b) in zip(before, after, strict=True)]
    assert not any(moved for central, moved in changed if central)
    assert sum(moved for central, moved in changed if not central) > 0.9 * sum(not central for central, _ in changed)


def test_gradient_checkpointing_gives_the_same_gradients(classifier: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load(classifier).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        batch = torch.utils.data.default_collate([Sentences()[k] for k in range(4)])
        model(**batch).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_compiled_logits_are_equal(classifier: Path) -> None:
    model = load(classifier)
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.allclose(compiled(ids)[0], model(ids)[0], atol=1e-5)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("placement", ["cpu", "auto"])
def test_device_map_loads_the_same_bits(classifier: Path, placement: str) -> None:
    assert torch.equal(logits(load(classifier, device_map=placement)), logits(load(classifier)))


def test_disk_offload_computes_the_same_bits(classifier: Path, tmp_path: Path) -> None:
    places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "disk", "classifier": "cpu"}
    offloaded = load(classifier, device_map=places, offload_folder=str(tmp_path / "offload"))
    assert torch.equal(logits(offloaded), logits(load(classifier)))


def test_deepcopy_and_dtype_casts_keep_working(classifier: Path) -> None:
    model = load(classifier)
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone), logits(model))
    double = copy.deepcopy(model).double()
    assert float((logits(double) - logits(model)).abs().max()) < 1e-4
    clone.get_submodule("bert.pooler.dense").core_0.data.zero_()
    assert not torch.equal(logits(clone), logits(model))


def test_loading_in_another_dtype_casts_the_cores(classifier: Path) -> None:
    model = load(classifier, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert bool(torch.isfinite(logits(model)).all())


def test_num_parameters_and_memory_really_shrink(classifier: Path) -> None:
    mpo, dense = load(classifier), load(classifier.parent / "dense")
    assert mpo.num_parameters() < 0.75 * dense.num_parameters()
    assert mpo.get_memory_footprint() < 0.75 * dense.get_memory_footprint()
    sizes = [sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (classifier, classifier.parent / "dense")]
    assert sizes[0] < sizes[1]
