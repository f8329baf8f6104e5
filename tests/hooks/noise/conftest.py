"""Models that tests of noise run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import models


@pytest.fixture(scope="module", params=models.TINY)
def model(request: pytest.FixtureRequest) -> Any:
    return models.TINY[request.param]()
