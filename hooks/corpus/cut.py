"""Texts to windows of tokens, and windows to blocks, the same whoever reads them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from hooks.model import added, text_ids

BLOCK_TOKENS: Final = 8192
BLOCK_PROMPTS: Final = 64
"""What a block holds, or as many batches as are needed for one: little is lost with it."""


@dataclass(frozen=True)
class Block:
    """Windows that are measured together: their place in the corpus, the first one's number."""

    index: int
    first: int
    rows: list[list[int]]

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return sum(map(len, self.rows))


class Cut:
    """Blocks of a corpus, until it ends or ``most`` tokens were read.

    Each text is cut into windows of ``context`` tokens, each of which begins as the model's prompts
    do. A digest of all ids tells two corpora apart.
    """

    def __init__(
        self,
        model: Any,
        texts: Iterable[str],
        *,
        context: int,
        batch_size: int,
        most: int | None,
        prepend_bos: bool | None,
    ) -> None:
        check_tokenizer(model)
        self.model, self.texts, self.prepend_bos = model, texts, prepend_bos
        self.context, self.most = context, most
        self.block_tokens = max(BLOCK_TOKENS, batch_size * context)
        self.block_prompts = max(BLOCK_PROMPTS, batch_size)
        self.documents = self.tokens = self.empty = self.single = 0
        self._digest = hashlib.sha256()

    @property
    def digest(self) -> str:
        """Of the ids of all blocks so far."""
        return self._digest.hexdigest()

    def state(self) -> dict[str, Any]:
        """How far the corpus was read, and what was left out of it."""
        names = ("tokens", "documents", "empty", "single", "digest")
        return {name: getattr(self, name) for name in names} | {"complete": False}

    def __iter__(self) -> Iterator[Block]:
        rows: list[list[int]] = []
        index = first = size = 0
        for row in self._windows():
            rows.append(row)
            size += len(row)
            self.tokens += len(row)
            end = self.most is not None and self.tokens >= self.most
            if size >= self.block_tokens or len(rows) >= self.block_prompts or end:
                yield self._block(index, first, rows)
                index, first, rows, size = index + 1, first + len(rows), [], 0
            if end:
                return
        if rows:
            yield self._block(index, first, rows)

    def _block(self, index: int, first: int, rows: list[list[int]]) -> Block:
        for row in rows:
            self._digest.update(np.asarray([len(row), *row], np.int64).tobytes())
        return Block(index, first, rows)

    def _windows(self) -> Iterator[list[int]]:
        for text in self.texts:
            self.documents += 1
            if not text.strip():
                self.empty += 1
                continue
            bos, ids, _ = text_tokens(self.model, text, self.prepend_bos)
            step = self.context - len(bos)
            for at in range(0, len(ids), step):
                row = bos + ids[at : at + step]
                if len(row) > 1:
                    yield row
                else:  # a lone token has no second key to lose its attention to
                    self.single += 1


def check_tokenizer(model: Any) -> None:
    """Refuse a model without a tokenizer that knows words.

    Raises:
        ValueError: it has none.
    """
    tokenizer = getattr(model, "tokenizer", None)
    # A directory without tokenizer files gives a tokenizer that knows special tokens only.
    if tokenizer is None or not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError(
            "text: wanted a model with its tokenizer; got one without a vocabulary "
            "(tokenizer.save_pretrained writes one beside the weights; in Python "
            "hooks.collapse_probe takes token ids)"
        )


def text_tokens(
    model: Any, text: str, prepend_bos: bool | None
) -> tuple[list[int], list[int], str]:
    """(bos or nothing, the text's own ids, notes), however long the text is."""
    tokenizer = model.tokenizer
    log = logging.getLogger("transformers.tokenization_utils_base")
    level = log.level
    log.setLevel(logging.ERROR)  # it would warn of a text longer than the context
    try:
        found, note = text_ids(model, text, prepend_bos)
        bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    finally:
        log.setLevel(level)
    ids = found.tolist()
    around = added(ids, bare, tokenizer.eos_token_id)
    n_bos = len(around[0]) if around else 0  # a BOS of the text's own is part of it
    return ids[:n_bos], ids[n_bos:], note
