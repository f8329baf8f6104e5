"""Models as their authors wrote them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaForCausalLM

from tests.support.models import (
    tiny_hf,
    tiny_llama_config,
)


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_hf(LlamaForCausalLM, tiny_llama_config())
