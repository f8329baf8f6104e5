"""Texts to windows of tokens, and windows to blocks, the same whoever reads them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from hooks.model import added, knows_words, text_ids

BLOCK_TOKENS: Final = 8192
BLOCK_PROMPTS: Final = 64
"""What a block holds, or as many batches as are needed for one: little is lost with it."""
CHARACTERS: Final = 4
"""Characters of a group of documents, for each token of a block."""
_PACKED: Final = 4  # times as many, so that pieces of many lengths fill the windows
_NUMBERS: Final = 1 << 12  # for the noise: a group's windows are numbered from a multiple of it


@dataclass
class Window:
    """Tokens that are measured together: one piece of a document, or several packed into one.

    Attributes:
        ids: the tokens.
        starts: where each piece begins.
    """

    ids: list[int]
    starts: list[int] = field(default_factory=lambda: [0])

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, piece: list[int]) -> None:
        """Pack another piece behind what is there."""
        self.starts.append(len(self.ids))
        self.ids = self.ids + piece


@dataclass(frozen=True)
class Block:
    """Windows that are measured together.

    Attributes:
        group, index: the group of documents that they are of, and which of its blocks this is.
        number: under which the first window's noise is drawn, and the others' follow.
        windows: what is measured.
    """

    group: int
    index: int
    number: int
    windows: list[Window]

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return sum(map(len, self.windows))


class Cut:
    """A shard's blocks of a corpus, until it ends or ``most`` tokens were read.

    Documents that follow each other, of some 32 thousand characters, are a group, and every n-th
    group is a shard's own. All documents are read, for a digest that tells two corpora apart; but
    only its own are cut, each into windows of ``context`` tokens that begin as the model's prompts
    do. With ``pack`` these are pieces, and a window holds as many as fit into ``context`` tokens.
    Where ``most`` ends the corpus, the tokens of the others are counted, too.
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
        pack: bool = False,
        shard: tuple[int, int] = (1, 1),
    ) -> None:
        check_tokenizer(model)
        self.model, self.texts, self.prepend_bos = model, texts, prepend_bos
        self.context, self.most, self.pack, self.shard = context, most, pack, shard
        self.block_tokens = max(BLOCK_TOKENS, batch_size * context)
        self.block_prompts = max(BLOCK_PROMPTS, batch_size)
        self.groups = self.documents = self.empty = self.single = self.seen = 0
        self._digest = hashlib.sha256()

    def state(self) -> dict[str, Any]:
        """How far the corpus was read, and what was left out of it."""
        names = ("groups", "documents", "empty", "single", "seen")
        return {name: getattr(self, name) for name in names} | {"digest": self._digest.hexdigest()}

    def blocks(
        self, begin: Callable[[list[Window]], Mapping[str, Any]] = lambda windows: {}
    ) -> Iterator[Block]:
        """The shard's own blocks.

        Args:
            begin: called with the windows of the corpus's first block, whoever's they are; returns
                the state that an earlier process left, with the number of ``blocks`` that it
                counted of its last group. Those are not cut again.

        Raises:
            ValueError: other documents than were read then.
        """
        done: Mapping[str, Any] | None = None
        last = -1  # group that an earlier process came to
        for group, texts in enumerate(self._groups()):
            self._read(texts)
            if done is None:
                windows = next(self._cut(texts, count=False), None)
                if windows is None:
                    continue
                done = begin(windows)
                last = done.get("groups", 0) - 1
                if done.get("complete"):
                    return
            if group == last and self._digest.hexdigest() != done["digest"]:
                raise OtherDocuments
            if group < last:
                continue
            counted = 0
            if group == last:
                self.single, self.seen, counted = (done[n] for n in ("single", "seen", "blocks"))
            yield from self._of(group, texts, counted)
            if self._ended:
                return
        if self.groups <= last:
            raise OtherDocuments

    @property
    def _ended(self) -> bool:
        return self.most is not None and self.seen >= self.most

    def _of(self, group: int, texts: list[str], counted: int) -> Iterator[Block]:
        """Blocks of one group after those that are ``counted``, if it is this shard's own."""
        mine = group % self.shard[1] == self.shard[0] - 1
        if not mine and self.most is None:
            return
        single, seen = self.single, self.seen
        number = (group * _NUMBERS) % (1 << 32)
        for index, windows in enumerate(self._cut(texts, count=mine)):
            if index >= counted:
                windows = self._within(windows)
                if mine:
                    yield Block(group, index, number, windows)
                if self._ended:
                    return
            elif index + 1 == counted:
                self.single, self.seen = single, seen
            number += len(windows)

    def _within(self, windows: list[Window]) -> list[Window]:
        """Windows up to the one that ends the corpus, counted."""
        if self.most is None:
            return windows
        for at, window in enumerate(windows, 1):
            self.seen += len(window)
            if self._ended:
                return windows[:at]
        return windows

    def _groups(self) -> Iterator[list[str]]:
        """Documents that follow each other, as many as make some blocks."""
        texts: list[str] = []
        size = 0
        for text in self.texts:
            texts.append(text)
            size += len(text) + 1
            if size >= (_PACKED if self.pack else 1) * CHARACTERS * self.block_tokens:
                yield texts
                texts, size = [], 0
        if texts:
            yield texts

    def _read(self, texts: list[str]) -> None:
        self.groups += 1
        for text in texts:
            self.documents += 1
            self.empty += not text.strip()
            whole = text.encode("utf-8", "surrogatepass")
            self._digest.update(len(whole).to_bytes(8, "little") + whole)

    def _cut(self, texts: list[str], *, count: bool) -> Iterator[list[Window]]:
        """The windows of a block, block by block; ``count`` those that are left out."""
        some: list[Window] = []
        size = 0
        pieces = self._pieces(texts, count=count)
        for window in self._packed(pieces) if self.pack else map(Window, pieces):
            some.append(window)
            size += len(window)
            if size >= self.block_tokens or len(some) >= self.block_prompts:
                yield some
                some, size = [], 0
        if some:
            yield some

    def _packed(self, pieces: Iterable[list[int]]) -> list[Window]:
        """Windows of whole pieces, the longest first, each where it is the first to fit."""
        windows: list[Window] = []
        room: list[Window] = []
        for piece in sorted(pieces, key=len, reverse=True):
            fits = (w for w in room if len(w) + len(piece) <= self.context)
            window = next(fits, None)
            if window is None:
                windows.append(Window(piece))
                room.append(windows[-1])
                continue
            window.add(piece)
            room = [w for w in room if len(w) + 2 <= self.context]
        return windows

    def _pieces(self, texts: list[str], *, count: bool) -> Iterator[list[int]]:
        for text in texts:
            if not text.strip():
                continue
            bos, ids, _ = text_tokens(self.model, text, self.prepend_bos)
            step = self.context - len(bos)
            if step < 1:
                raise ValueError(
                    f"context: wanted more than the {len(bos)} tokens before a text; got "
                    f"{self.context}"
                )
            for at in range(0, len(ids), step):
                piece = bos + ids[at : at + step]
                if len(piece) > 1:
                    yield piece
                else:  # a lone token has no second key to lose its attention to
                    self.single += count


class OtherDocuments(Exception):
    """A corpus is not the one that an earlier process read."""


def tokenizer_digest(model: Any) -> str:
    """Of what the tokenizer does with a text, where it can be read; of its words, where not."""
    tokenizer = model.tokenizer
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        known = json.loads(fast.to_str())
        known |= {"truncation": None, "padding": None}  # of the last call
    else:
        known = {"words": tokenizer.get_vocab(), "special": tokenizer.all_special_tokens}
    known["kind"] = type(tokenizer).__name__
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def check_tokenizer(model: Any) -> None:
    """Refuse a model without a tokenizer that knows words.

    Raises:
        ValueError: it has none.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or not knows_words(tokenizer):
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
        found, note, bare = text_ids(model, text, prepend_bos)
    finally:
        log.setLevel(level)
    ids = found.tolist()
    around = added(ids, bare, tokenizer.eos_token_id)
    n_bos = len(around[0]) if around else 0  # a BOS of the text's own is part of it
    return ids[:n_bos], ids[n_bos:], note
