"""Progress in a log."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hooks.model import counting, progress


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
