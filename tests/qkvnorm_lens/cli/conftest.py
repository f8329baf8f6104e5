"""Commands, and what they are given."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
from transformers import GPT2LMHeadModel, MambaConfig, MambaForCausalLM

import hooks
import qkvnorm_lens
from qkvnorm_lens import text, training
from qkvnorm_lens.cli import main
from qkvnorm_lens.models import loading
from qkvnorm_lens.models.shipped import load_checkpoint
from tests.support import models
from tests.support.commands import SUMS, Run, characters


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, standard output and standard error of a command."""

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def printed() -> str:
    """What `SUMS` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(SUMS) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def wanted() -> hooks.CollapseReport:
    """What Python gives for `SUMS`."""
    split = training.trained_on(loading.find("addition-pre"))
    assert split is not None
    ids = text.sums(split, 4, seed=0).ids
    model = loading.load_model("addition-pre")
    return hooks.collapse_probe(model, ids, sigmas=[0.4, 0.5], draws=2, layers=[0])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a command gives to `collapse_probe`, which then refuses to go on."""
    given: dict[str, Any] = {}

    def probe(model: Any, tokens: Any, **options: Any) -> None:
        given.update(options, tokens=tokens)
        raise ValueError("enough")

    monkeypatch.setattr(hooks, "collapse_probe", probe)
    return given


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny GPT-2 as Hugging Face saves it, context 64."""
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    models.tiny_hf(GPT2LMHeadModel, models.tiny_gpt2_config()).save_pretrained(folder)
    characters().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def mamba_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A family without attention."""
    folder = tmp_path_factory.mktemp("tiny-mamba")
    config = MambaConfig(vocab_size=models.VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    models.tiny_hf(MambaForCausalLM, config).save_pretrained(folder)
    characters().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def ours_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One of our models saved by a user: no card."""
    folder = tmp_path_factory.mktemp("ours")
    qkvnorm_lens.save_pretrained(load_checkpoint(), folder)
    return str(folder)
