"""What every test of experiments does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qkvnorm_lens.experiments.core.base import latest


@pytest.fixture(autouse=True, scope="module")
def _forgotten() -> Iterator[None]:
    """The model that was loaded last is in nobody's way."""
    yield
    latest.clear()
