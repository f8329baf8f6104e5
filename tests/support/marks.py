"""Which cases of a test are tried where."""

from __future__ import annotations

from typing import Any

import pytest


def slowly(*values: Any) -> list[Any]:
    """Values of a parameter that `make slow` alone tries."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
