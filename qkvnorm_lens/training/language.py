"""The task of our language models: windows of old books, each behind ``<s>``.

    input   <s> t_1 t_2 ... t_n        target   t_1 t_2 ... t_n+1

Windows begin at random places of the training text, drawn from an explicit seed; the loss is
measured on books that were never trained on (``texts/README.md``).
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import nn

from hooks.arguments import check_integers, check_path
from qkvnorm_lens.training.addition import Batch
from qkvnorm_lens.training.texts import (
    DIGEST,
    TRAIN,
    held_out_text,
    held_out_tokens,
    train_tokens,
)

_BOS: Final = 0
_MOST: Final = 1 << 16


class Windows(Batch):
    """Rows of one length, of which every position is scored."""

    @property
    def scored(self) -> Bool[torch.Tensor, "batch pos"]:
        """True everywhere."""
        return torch.ones_like(self.targets, dtype=torch.bool)

    def by_length(self, parts: int) -> list[Batch]:
        """These rows in several batches."""
        pairs = zip(self.tokens.chunk(parts), self.targets.chunk(parts), strict=True)
        return [Windows(*pair) for pair in pairs]

    def to(self, device: torch.device | str) -> Windows:
        """These rows on another device."""
        return Windows(self.tokens.to(device), self.targets.to(device))


@dataclasses.dataclass(frozen=True)
class Texts:
    """The training text in windows: a task for a `Run`, in place of a `Split`.

    Args:
        length: tokens of a window, ``<s>`` included.
        path: the training text; ``python -m qkvnorm_lens.training.texts.make`` writes it.
    """

    length: int = 128
    path: Path = dataclasses.field(default=TRAIN, compare=False)

    def __post_init__(self) -> None:
        (length,) = check_integers(length=(self.length, 2, _MOST))
        object.__setattr__(self, "length", length)
        object.__setattr__(self, "path", check_path("path", self.path))

    @property
    def max_length(self) -> int:
        """Tokens of a window."""
        return self.length

    def to_json(self) -> dict[str, object]:
        """What identifies the task: the text by its digest, and the length."""
        return {"text": DIGEST, "length": self.length}

    def draw(self, n: int, *, seed: int | tuple[int, ...]) -> Windows:
        """Windows at random places; the same seed gives the same ones.

        Raises:
            FileNotFoundError: the text was not fetched yet; the message names the command.
        """
        ids = train_tokens(self.path)
        starts = np.random.default_rng(seed).integers(len(ids) - self.length + 1, size=n)
        return _windows(ids[starts[:, None] + np.arange(self.length)])


def held_out(length: int, limit: int | None = None) -> Windows:
    """The held-out books in windows, one behind the other.

    Args:
        length: tokens of a window, ``<s>`` included.
        limit: this many, evenly spread; None: all.
    """
    ids = held_out_tokens()
    every = len(ids) // length
    chosen = np.arange(every)
    if limit is not None and limit < every:
        chosen = np.linspace(0, every - 1, limit).astype(int)
    return _windows(ids[: every * length].reshape(every, length)[chosen])


def _windows(targets: np.ndarray) -> Windows:
    wanted = torch.from_numpy(targets.astype(np.int64))
    begin = torch.full((len(wanted), 1), _BOS)
    return Windows(torch.cat((begin, wanted[:, :-1]), 1), wanted)


@dataclasses.dataclass(frozen=True)
class TextScore:
    """How well held-out text is predicted.

    Attributes:
        held_out: loss in nats per token.
        bits: bits per character.
        per_token: share of tokens that were the likeliest.
        windows: windows read.
    """

    held_out: float
    bits: float
    per_token: float
    windows: int


@torch.no_grad()
def score(
    model: nn.Module,
    length: int,
    *,
    windows: int | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
) -> TextScore:
    """Loss on the held-out books; works on a bridge too.

    The model's training mode is restored.

    Args:
        model: the model.
        length: tokens of a window, ``<s>`` included.
        windows: this many, evenly spread; None: all.
        batch_size: windows at once.
        device: where the model is.
    """
    was_training = model.training
    model.eval()
    try:
        loss, right, whole = 0.0, 0, held_out(length, windows)
        for part in whole.by_length(math.ceil(len(whole.tokens) / batch_size)):
            batch = part.to(device)
            logits = model(batch.tokens).float()
            flat, wanted = logits.flatten(0, 1), batch.targets.flatten()
            loss += float(F.cross_entropy(flat, wanted, reduction="sum"))
            right += int((flat.argmax(-1) == wanted).sum())
        n = whole.targets.numel()
        return TextScore(loss / n, bits(loss / n), right / n, len(whole.tokens))
    finally:
        model.train(was_training)


def bits(loss: float) -> float:
    """Bits per character: nats per token over ln 2 and the held-out books' characters per token."""
    return loss * len(held_out_tokens()) / len(held_out_text()) / math.log(2)


def ngram_loss(
    n: int,
    train: Int[np.ndarray, " token"],
    held: Int[np.ndarray, " other"],
    d_vocab: int = 512,
) -> float:
    """Loss of an n-gram model, in nats per token: what a language model has to be better than.

    Counted on the training text, and smoothed by the next shorter one as Witten and Bell do:
    ``p(t|h) = (c(ht) + u(h) p(t|h')) / (c(h) + u(h))``, u(h) the number of tokens seen behind h.

    Args:
        n: 1 for single tokens, 2 for pairs, 3 for triples.
        train: tokens that are counted.
        held: tokens that are predicted, each from those before it.
        d_vocab: number of tokens.
    """
    (n,) = check_integers(n=(n, 1, 4))
    p = np.full(len(held), 1 / d_vocab)
    for k in range(1, min(n, len(held)) + 1):
        grams, counts = np.unique(_keys(train, k, d_vocab), return_counts=True)
        heads, first = np.unique(grams // d_vocab, return_index=True)
        seen, kinds = np.add.reduceat(counts, first), np.diff(np.append(first, len(grams)))
        wanted = _keys(held, k, d_vocab)  # from the k-th token on: earlier ones have no such past
        c = _found(grams, counts, wanted)
        total, u = (_found(heads, x, wanted // d_vocab) for x in (seen, kinds))
        shorter = p[k - 1 :]
        p[k - 1 :] = np.where(total > 0, (c + u * shorter) / np.maximum(total + u, 1), shorter)
    return float(-np.log(p).mean())


def _keys(ids: Int[np.ndarray, " token"], k: int, d_vocab: int) -> Int[np.ndarray, " gram"]:
    """Each k tokens in a row as one number."""
    wide = ids.astype(np.int64)
    out = np.zeros(len(wide) - k + 1, dtype=np.int64)
    for i in range(k):
        out = out * d_vocab + wide[i : i + len(out)]
    return out


def _found(known: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key; zero where it is not known."""
    at = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    return np.where(known[at] == wanted, values[at], 0)
