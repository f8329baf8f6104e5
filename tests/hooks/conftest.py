"""Models and modes that tests of several rooms use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import models
from tests.support.probes import ALL
from tests.support.watching import (
    shape_checks_off,
)


@pytest.fixture
def unchecked() -> Iterator[None]:
    with shape_checks_off():
        yield


@pytest.fixture(scope="module", params=ALL)
def model(request: pytest.FixtureRequest) -> Any:
    return ALL[request.param]()


@pytest.fixture(scope="module")
def llama() -> Any:
    return models.tiny_llama()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of one word a token, with a pad token of its own."""
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocabulary = {"[PAD]": 0, "[BOS]": 1, "[UNK]": 2, **{f"w{i}": i for i in range(3, 97)}}
    inner = Tokenizer(kinds.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", bos_token="[BOS]", unk_token="[UNK]"
    ).save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return models.tiny_gpt2()


@pytest.fixture(scope="module")
def bloom() -> Any:
    return models.tiny_bloom()
