"""`make nightly` names what broke."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tests.support.newest import as_markdown, differing, failures, pinned

TESTS = """
import pytest

def test_well(): pass

def test_badly(): assert 1 == 2, "one is not two"

@pytest.mark.skip
def test_not(): pass

@pytest.fixture
def broken(): raise OSError("no such thing")

def test_before(broken): pass
"""


def test_failures_are_named_by_file(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS, encoding="utf-8")
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_some.py"]
    done = subprocess.run([*command, f"--junitxml={junit}"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 1
    ran, failed = failures(junit)
    assert ran == 3
    (cases,) = failed.values()
    assert {name: "two" in text or "thing" in text for name, text in cases} == {
        "test_badly": True,
        "test_before": True,
    }
    text = as_markdown([("numpy", "1.0", "2.0")], ran, failed)
    assert "3 tests ran, 2 failed" in text
    assert "| numpy | 1.0 | 2.0 |" in text
    assert "`test_badly`: " in text


def test_other_versions_than_the_pinned_ones_are_listed() -> None:
    here = version("numpy")
    assert differing({"numpy": here, "no-such-package": "1.0"}) == []
    assert differing({"numpy": "0.1"}) == [("numpy", "0.1", here)]
    assert {"numpy", "transformers", "pytest"} <= pinned().keys()
