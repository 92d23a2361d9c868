"""Models to run the command line on, made once; tests copy what they change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import transformers as tf

from cli import tasks
from cli.processes import Server
from cli.shell import Cli, Outcome
from mpocli.cli.app import main
from mpocli.config.decompose import DecomposeConfig
from mpocli.methods.decompose import run as decompose


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """`mpocli` in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = stop.value.code
        assert code is None or isinstance(code, int)
        return Outcome(code or 0, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def bert(home: Path) -> Path:
    """A classifier with a tokenizer's files beside the weights."""
    models.bert_classifier(home / "bert")
    (home / "bert" / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    (home / "bert" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return home / "bert"


@pytest.fixture(scope="session")
def masked_lm(home: Path) -> Path:
    models.bert_masked_lm(home / "masked-lm")
    return home / "masked-lm"


@pytest.fixture(scope="session")
def gpt2(home: Path) -> Path:
    models.gpt2(home / "gpt2")
    return home / "gpt2"


@pytest.fixture(scope="session")
def t5(home: Path) -> Path:
    models.t5(home / "t5")
    return home / "t5"


@pytest.fixture(scope="session")
def llama(home: Path) -> Path:
    models.llama(home / "llama")
    return home / "llama"


@pytest.fixture(scope="session")
def bert_mpo(bert: Path, home: Path) -> Path:
    """`bert` at bond dimension 8."""
    decompose.run(str(bert), DecomposeConfig(trunc=8), home / "bert-mpo")
    return home / "bert-mpo"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def dense(bert: Path, tmp_path: Path) -> Path:
    """A copy of `bert` to spoil."""
    return Path(shutil.copytree(bert, tmp_path / "dense"))


@pytest.fixture
def mpo(bert_mpo: Path, tmp_path: Path) -> Path:
    """A copy of `bert_mpo` to spoil."""
    return Path(shutil.copytree(bert_mpo, tmp_path / "mpo"))


# --- for `finetune` and `eval`: models with tokenizers, and files of their tasks ----------------------------------


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`body` (a BERT without a head), `mpo` (the same, decomposed), `gpt2`, `masked`, `t5`, and files for each task."""
    made = tmp_path_factory.mktemp("lab")
    tasks.save("bert", made / "body", initializer_range=0.1)
    tasks.save("gpt2", made / "gpt2")
    tasks.save("bert", made / "masked", cls=tf.BertForMaskedLM)
    tasks.save("t5", made / "t5")
    decompose.run(str(made / "body"), DecomposeConfig(), made / "mpo")
    for split, seed in (("train", 1), ("dev", 2)):
        tasks.sentiment(made / f"{split}.tsv", 96 if seed == 1 else 40, seed)
        tasks.similarity(made / f"sts-{split}.tsv", 96 if seed == 1 else 40, seed)
        tasks.prose(made / f"{split}.txt", 80 if seed == 1 else 30, seed)
        tasks.restaurants(made / f"e2e-{split}.csv", 48 if seed == 1 else 10, seed)
    return made


@pytest.fixture(scope="session")
def server(lab: Path) -> Iterator[Server]:
    """`mpocli` in processes of its own. It has imported what training takes, which would be most of a run."""
    lazy = "accelerate.data_loader", "sklearn.metrics", "scipy.stats", "torch.distributed.tensor"
    lazy += "torch.distributed.launcher.api", "transformers.models.gpt2.modeling_gpt2"
    with Server(lab / "body", *lazy) as running:
        yield running


@pytest.fixture(scope="session")
def trainer(server: Server) -> Server:
    """`server`, in the files that train."""
    return server
