"""One tiny model with a tokenizer, and documents of many lengths in small blocks."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hooks import CollapseReport, probe_corpus
from hooks.corpus import cut
from tests.support import models
from tests.support.commands import characters

OPTIONS: dict[str, Any] = {"sigmas": [0.1, 0.2, 0.4], "context": 24, "progress": False}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    characters().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def model(tokenizer: Any) -> Any:
    return models.tiny_llama(tokenizer=tokenizer)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Lengths from one window to several, and documents that leave nothing."""
    whole = " ".join(models.shakespeare())
    lengths = np.random.default_rng(0).integers(1, 90, 40)
    ends = np.cumsum(lengths)
    return ["", "x", *(whole[end - n : end] for n, end in zip(lengths, ends, strict=True)), " "]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut, "BLOCK_TOKENS", 100)
    monkeypatch.setattr(cut, "CHARACTERS", 2)


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """SIGINT, which is ignored in a background job of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def whole(model: Any, texts: list[str]) -> CollapseReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut, "BLOCK_TOKENS", 100)
        patch.setattr(cut, "CHARACTERS", 2)
        return probe_corpus(model, texts, **OPTIONS)
