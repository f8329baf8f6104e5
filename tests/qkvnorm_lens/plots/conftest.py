"""Reports to draw; figures leave nothing global behind."""

from __future__ import annotations

import matplotlib as mpl
import pytest
from matplotlib import pyplot

from tests.support.figures import small_report


@pytest.fixture(scope="module")
def exact() -> object:
    return small_report("exact")


@pytest.fixture(scope="module")
def sampled() -> object:
    return small_report("sample")


@pytest.fixture(scope="module")
def nothing_sparse() -> object:
    return small_report("exact", qk_scale=0.01)


@pytest.fixture(autouse=True)
def _nothing_global():  # type: ignore[no-untyped-def]
    """No figure of pyplot's, no setting changed."""
    before, open_ = dict(mpl.rcParams), pyplot.get_fignums()
    yield
    assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == open_
