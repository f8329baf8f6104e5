"""Progress in a log."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import hooks
from hooks.kernels import compiled, is_ready, scan
from hooks.model import counting, progress
from tests.support import models


def test_lines_of_a_run_that_goes_on_tell_its_own_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done before it began counts as done, not as fast."""
    clock = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with counting(1000, "corpus", "token", True) as bar:
        bar.initial = 400
        bar.update(400)
        clock[0] = 20.0
        bar.set_postfix_str("1% at sigma = 20%")
        bar.update(200)
        assert capsys.readouterr().err == (
            "corpus: 600 of 1000 tokens, 00:20, 00:40 left, 10 a second, 1% at sigma = 20%\n"
        )
        clock[0] = 60.0
        bar.update(400)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "corpus: 1000 of 1000 tokens, 01:00, 10 a second, 1% at sigma = 20%"
    )


@pytest.mark.parametrize("ready", [False, True])
def test_a_probe_says_that_it_compiles_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ready: bool
) -> None:
    model = models.tiny_llama()
    monkeypatch.setattr("hooks.kernels.is_ready", lambda function: ready)
    hooks.collapse_probe(model, models.tokens(), progress=True)
    said = capsys.readouterr().err.count("compiling for this processor, once")
    assert said == (0 if ready else 1)
    hooks.collapse_probe(model, models.tokens(), engine="torch", progress=True)
    hooks.collapse_probe(model, models.tokens(), progress=False)
    hooks.collapse_probe(model, models.tokens())  # a log that was not asked for
    assert "compiling" not in capsys.readouterr().err


def test_what_ran_is_ready_and_so_is_what_lies_on_disk() -> None:
    hooks.collapse_probe(models.tiny_llama(), models.tokens(), progress=False)
    assert is_ready(scan)
    assert not is_ready(compiled(lambda x: x + 1))
