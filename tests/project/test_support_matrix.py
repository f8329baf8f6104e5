"""Every architecture that TransformerLens has registered: made again, and held to the table."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.oracles import recompute
from tests.support import builders, matrix
from tests.support.watching import RENAMED

STORED = matrix.stored()


def test_every_registered_name_is_in_the_table() -> None:
    listed = {name for names in builders.groups().values() for name in names}
    assert listed == set(builders.NAMES)
    assert set(STORED) == set(matrix.kinds()), "python -m tests.support.matrix --write"


def test_the_page_shows_the_table() -> None:
    rows = list(STORED.values())
    page = (matrix.DOCS / "support.md").read_text(encoding="utf-8")
    assert page == matrix.as_markdown(rows)
    assert json.loads(matrix.as_json(rows)) == json.loads(
        (matrix.DOCS / "support.json").read_text(encoding="utf-8")
    )
    for name in builders.NAMES:
        assert name in page


def test_nine_tenths_of_the_adapters_with_attention_are_verified() -> None:
    numbers = matrix.adapters(list(STORED.values()))
    assert numbers["tried"] >= 0.8 * numbers["adapters"]
    assert numbers["verified"] >= 0.9 * numbers["attention"]


@pytest.mark.matrix
@pytest.mark.filterwarnings("default")  # of a hundred families' own code
@pytest.mark.parametrize(("name", "heads"), STORED)  # all kinds: the first test
def test_the_row_is_what_it_was(name: str, heads: str) -> None:
    """Built, checked, and its arg max shifts recomputed on the Hugging Face model in float64."""
    row, before = matrix.judge(name, heads), STORED[name, heads]
    if RENAMED and name in matrix.STOPPED_BY_5_24:
        assert row.verdict == "refused"
        assert "a forward pass of the model: wanted one that runs" in row.why
        return
    if RENAMED and (name, heads) in matrix.NO_BF16_ON_5_24:
        before = replace(before, inputs=before.inputs.replace("bf16", "no bf16"))
    facts = ("verdict", "layers", "scores", "noise", "why", "inputs")
    assert {f: getattr(row, f) for f in facts} == {f: getattr(before, f) for f in facts}
    if row.verdict in ("verified", "limited"):
        assert row.moved >= recompute.LEAST_MOVES
        assert row.rows > row.moved / recompute.DRAWS
