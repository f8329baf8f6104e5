"""No test of traps wants gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield
