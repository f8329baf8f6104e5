"""The command line: what it prints and writes is what Python gives, and errors are one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import qkvnorm_lens
from qkvnorm_lens.models import loading
from qkvnorm_lens.models.shipped import checkpoint_card, checkpoints
from tests.support.commands import Run

# -- the package ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", qkvnorm_lens.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(qkvnorm_lens, name) is not None
    assert name in dir(qkvnorm_lens)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        qkvnorm_lens.nothing  # noqa: B018


def test_help_needs_nothing_heavy() -> None:
    code = "import sys, qkvnorm_lens.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "transformer_lens", "numpy", "pandas", "matplotlib", "hooks"}
    assert not heavy & set(done.stdout.split())


# -- models ---------------------------------------------------------------------------------------


def test_models_lists_every_shipped_model(run: Run) -> None:
    code, out, err = run("models")
    assert (code, err) == (0, "")
    for name in checkpoints():
        (line,) = (line for line in out.splitlines() if line.startswith(f"{name} "))
        card = checkpoint_card(name)
        assert f"{card['parameters']:,}" in line
        for measured in card["accuracy"].values():
            assert f"{100 * measured['per_token']:.1f}%" in line
    assert json.loads(run("models", "--json")[1]) == {n: checkpoint_card(n) for n in checkpoints()}


def test_the_experiments_models_go_by_their_names(run: Run) -> None:
    from qkvnorm_lens.models.shipped import experiment_models

    named = run("models")[1]
    for name, path in experiment_models().items():
        assert f"{name.rpartition('-')[0]}-{{" in named
        assert loading.find(name) == loading.Source(name, "ours", path)
    code, out, _ = run("probe", "study-pre-1", "--prompts", "4", "--draws", "0")
    assert code == 0
    assert out.startswith("study-pre-1: 4 prompts")
