"""What TransformerLens 4.3 does that one would not expect, each in its smallest form.

`docs/transformerlens-traps.md` lists them, section by section, and so do the files here. A test
passes while the trap is there: it asserts the present behaviour, wrong as it is. When one fails on
another TransformerLens or transformers, that trap is gone or changed: correct the page, then what
`hooks` does about it.

Warnings are errors in this test suite, so where no `pytest.warns` stands, nothing was said.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.project.traps import test_loud
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "transformerlens-traps.md"


def test_the_page_names_every_test_and_no_other() -> None:
    files = [f for f in Path(__file__).parent.glob("test_*.py") if f != Path(__file__)]
    ours = {name for f in files for name in re.findall(r"^def (test_\w+)", f.read_text(), re.M)}
    assert set(re.findall(r"`(test_\w+)`", PAGE.read_text())) == ours
    assert all(f"`{what}`" in PAGE.read_text() for what, *_ in test_loud.LOUD)
