"""Addition and subtraction of integers, one token per character.

    input    [453+16+17-N846=1332
    target   ***************1332]

The task of Menary et al. 2024 (arXiv 2406.17837), Section 4: ``N`` marks the next integer as
negative, ``[`` begins, ``]`` ends, ``*`` pads and masks. Loss and accuracy count the answer's
characters and ``]`` only. Rows are drawn on the fly, from an explicit seed.
"""

from __future__ import annotations

import dataclasses
import os
from numbers import Integral
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from hooks.arguments import (
    SEEDS,
    check_booleans,
    check_choice,
    check_device,
    check_integers,
    plain,
    read_list,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    from qkvnorm_lens.models import Source

VOCAB: Final = "0123456789+-=N[]*"
PLUS, MINUS, EQUALS, NEGATIVE, BEGIN, END, PAD = range(10, 17)
_MOST_ROWS: Final = 100_000_000
_BLANK: Final = -1  # a grid cell that holds no character


@dataclasses.dataclass(frozen=True)
class Split:
    """Which sums are drawn: the count of integers and the digits of each, both uniform.

    Args:
        counts: how many integers a sum may have.
        digits: how many digits an integer may have (no leading zero, so zero itself is never
            drawn).
        signed: half of the integers are negative and half of the operators minus; else all are
            positive and added.
    """

    counts: tuple[int, ...]
    digits: tuple[int, ...]
    signed: bool = True

    def __post_init__(self) -> None:
        for name, values, top in (("counts", self.counts, 64), ("digits", self.digits, 15)):
            given = read_list(name, values, f"integers from 1 to {top} in a list")
            whole = tuple(check_integers(**{name: (v, 1, top)})[0] for v in given)
            if not whole:
                raise ValueError(f"{name}: wanted integers from 1 to {top}; got none")
            object.__setattr__(self, name, whole)
        object.__setattr__(self, "signed", *check_booleans(signed=self.signed))

    @property
    def answer_digits(self) -> int:
        """Digits of the largest possible answer."""
        return len(str(max(self.counts) * (10 ** max(self.digits) - 1)))

    def to_json(self) -> dict[str, object]:
        """The fields; ``signed`` only where it is false, as older files lack it."""
        fields = dataclasses.asdict(self)
        return {k: v for k, v in fields.items() if k != "signed" or not self.signed}

    @property
    def max_length(self) -> int:
        """Characters of the longest possible input row, ``]`` not counted."""
        n, d = max(self.counts), max(self.digits)
        return 1 + n * (1 + d) + (n - 1) + 1 + 1 + self.answer_digits


SPLITS: Final[dict[str, Split]] = {
    "paper-train": Split((3, 4, 6), (2, 3)),
    "paper-interpolation": Split((5,), (2, 3)),
    "paper-extrapolation": Split((7, 8, 9), (2, 3)),
    "large-train": Split((4, 5, 7, 8), (3, 4, 5)),
    "large-interpolation": Split((6,), (3, 4, 5)),
    "large-extrapolation": Split((9, 10, 11), (3, 4, 5)),
    "small-train": Split((2, 4), (1, 2)),
    "small-interpolation": Split((3,), (1, 2)),
    "small-extrapolation": Split((5, 6), (1, 2)),
    "easy-train": Split((2, 3), (1, 2)),
    "pairs-train": Split((2,), (1, 2)),
}


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows ready for a decoder: ``targets[b, p]`` is what should follow ``tokens[b, : p + 1]``.

    Rows are padded on the right with ``*`` to the batch's longest; targets hold ``*`` where nothing
    is scored.
    """

    tokens: Int[torch.Tensor, "batch pos"]
    targets: Int[torch.Tensor, "batch pos"]

    @property
    def scored(self) -> Bool[torch.Tensor, "batch pos"]:
        """True where a prediction counts: the answer's characters and ``]``."""
        return self.targets != PAD

    def by_length(self, parts: int) -> list[Batch]:
        """These rows in several batches, short rows apart from long ones, each cropped.

        A training step over the batches does the same sums with less padding.
        """
        (parts,) = check_integers(parts=(parts, 1))
        lengths = (self.tokens != PAD).sum(1)
        split = lengths.argsort(stable=True).chunk(parts)
        width = [int(lengths[rows].max()) for rows in split]
        return [
            Batch(self.tokens[rows, :w], self.targets[rows, :w])
            for rows, w in zip(split, width, strict=True)
        ]

    def to(self, device: torch.device | str) -> Batch:
        """These rows on another device."""
        check_device("device", device)
        return Batch(self.tokens.to(device), self.targets.to(device))


def get_split(split: str | Split) -> Split:
    """The split with this name.

    Raises:
        ValueError: no such name; the message lists them.
    """
    if isinstance(split, Split):
        return split
    return SPLITS[check_choice("split", split, sorted(SPLITS))]


def draw(split: str | Split, n: int, *, seed: int | tuple[int, ...]) -> Batch:
    """Draw ``n`` sums: the same seed gives the same rows, and no global random state is touched.

    Menary et al. 2024, Section 4: count of integers, digits of each integer, sign and operators are
    all uniform and independent.

    Args:
        split: a name in ``SPLITS`` or a `Split`.
        n: rows.
        seed: one integer, or several (such as seed, process and step), for numpy's SeedSequence.
    """
    split = get_split(split)
    (n,) = check_integers(n=(n, 1, _MOST_ROWS))
    rng = np.random.default_rng(_seed(seed))
    slots, width = max(split.counts), max(split.digits)
    count = np.asarray(split.counts, dtype=np.int64)[rng.integers(len(split.counts), size=n)]
    used = np.arange(slots) < count[:, None]
    digits = np.asarray(split.digits)[rng.integers(len(split.digits), size=(n, slots))]
    low = 10 ** (digits - 1)
    size = rng.integers(low, 10 * low)
    negative, minus = rng.integers(0, 2, size=(2, n, slots), dtype=np.int8).astype(bool)
    if not split.signed:
        negative, minus = np.zeros_like(negative), np.zeros_like(minus)
    minus[:, 0] = False  # there is no operator before the first integer
    total = np.where(used, np.where(negative ^ minus, -size, size), 0).sum(1)

    grid = np.full((n, slots, 2 + width), _BLANK, dtype=np.int8)
    grid[:, 1:, 0] = np.where(minus[:, 1:], MINUS, PLUS)
    grid[:, :, 1] = np.where(negative, NEGATIVE, _BLANK)
    grid[:, :, 2:] = _digits(size, width)
    grid[~used] = _BLANK
    answer = np.concatenate(
        [
            np.where(total < 0, NEGATIVE, _BLANK)[:, None].astype(np.int8),
            _digits(np.abs(total), split.answer_digits),
            np.full((n, 1), END, np.int8),
        ],
        axis=1,
    )
    begin, equals = np.full((n, 1), BEGIN, np.int8), np.full((n, 1), EQUALS, np.int8)
    cells = np.concatenate([begin, grid.reshape(n, -1), equals, answer], axis=1)
    return _decoder_rows(cells, scored_cells=answer.shape[1])


def _seed(seed: Any) -> int | tuple[int, ...]:
    """One integer, or several."""
    if isinstance(plain(seed), Integral):
        return check_integers(seed=(seed, 0, SEEDS))[0]
    given = read_list("seed", seed, "an integer >= 0, or several in a tuple")
    if not given:
        raise ValueError("seed: wanted an integer >= 0, or several in a tuple; got none")
    return tuple(check_integers(seed=(s, 0, SEEDS))[0] for s in given)


def _digits(values: np.ndarray, width: int) -> np.ndarray:
    """Base-10 digits, most significant first, leading zeros blank (but zero is "0")."""
    powers = 10 ** np.arange(width - 1, -1, -1)
    quotient = values[..., None] // powers
    shown = (quotient > 0) | (powers == 1)
    return np.where(shown, quotient % 10, _BLANK).astype(np.int8)


def _decoder_rows(cells: np.ndarray, scored_cells: int) -> Batch:
    """Remove the blanks, crop to the longest row, and shift targets by one."""
    filled = cells != _BLANK
    where = filled.cumsum(1)
    lengths = where[:, -1]
    rows = np.full((len(cells), int(lengths.max())), PAD, dtype=np.int64)
    rows[np.nonzero(filled)[0], where[filled] - 1] = cells[filled]
    first = lengths - filled[:, -scored_cells:].sum(1)  # where the answer begins
    scored = np.arange(1, rows.shape[1]) >= first[:, None]
    targets = np.where(scored, rows[:, 1:], PAD)
    tokens = np.where(rows[:, :-1] == END, PAD, rows[:, :-1])
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Shares of correct predictions, teacher forced; ``]`` is a fifth of the scored tokens or more.

    Attributes:
        per_token: over all scored tokens (what Menary et al. 2024 report).
        per_token_without_end: the answer's characters only.
        exact: rows with every scored token right.
        exact_without_end: rows with every character of the answer right.
        rows: rows counted.
    """

    per_token: float
    per_token_without_end: float
    exact: float
    exact_without_end: float
    rows: int


class AccuracyCounter:
    """Adds up predictions over batches; `result` gives the shares."""

    def __init__(self) -> None:
        self._counts = torch.zeros(7, dtype=torch.int64)

    def update(
        self,
        logits: Float[torch.Tensor, "batch pos d_vocab"],
        targets: Int[torch.Tensor, "batch pos"],
    ) -> None:
        """Count one batch; positions whose target is ``*`` are not scored."""
        scored = targets != PAD
        right = (logits.argmax(-1) == targets) & scored
        wrong = scored & ~right
        inner = scored & (targets != END)
        counts = [
            right.sum(),
            scored.sum(),
            (right & inner).sum(),
            inner.sum(),
            (~wrong.any(-1)).sum(),
            (~(wrong & inner).any(-1)).sum(),
            torch.tensor(len(targets)),
        ]
        self._counts += torch.stack([c.cpu() for c in counts])

    def result(self) -> Accuracy:
        """The shares so far.

        Raises:
            ValueError: nothing was counted yet.
        """
        right, scored, right_in, inner, exact, exact_in, rows = self._counts.tolist()
        if not rows:
            raise ValueError("accuracy: wanted at least one scored row; got none")
        return Accuracy(right / scored, right_in / inner, exact / rows, exact_in / rows, rows)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The 17 characters as a ``PreTrainedTokenizerFast``; ``*`` pads, ``[`` begins, ``]`` ends."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({c: i for i, c in enumerate(VOCAB)}, unk_token="*")
    backend = Tokenizer(words)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="[",
        eos_token="]",
        pad_token="*",
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def adds_integers(model: TransformerBridge) -> bool:
    """Whether the model reads the 17 characters of the addition task."""
    tokenizer = getattr(model, "tokenizer", None)
    return tokenizer is not None and tokenizer.get_vocab() == {c: i for i, c in enumerate(VOCAB)}


def trained_on(source: Source) -> Split | None:
    """The kind of sums that a model was trained on, from its card; None without a card."""
    from qkvnorm_lens.models import LoadError, read_card

    if source.path is None or not os.path.isfile(source.path / "card.json"):
        return None
    path = source.path / "card.json"
    split = read_card(path).get("run", {}).get("split")
    if split is None or (isinstance(split, dict) and "text" in split):  # a language model's
        return None
    try:
        counts, digits, signed = split["counts"], split["digits"], split.get("signed", True)
        if not isinstance(signed, bool) or not all(type(n) is int for n in [*counts, *digits]):
            raise TypeError("numbers of other types")
        return Split(tuple(counts), tuple(digits), signed)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoadError(f"{path}: wanted a kind of sums in run.split; got {error}") from error


def tests_of(split: str, n_ctx: int) -> dict[str, str]:
    """Splits on which a model is measured: its own, and related ones that fit its context."""
    family = split.removesuffix("-train")
    beside = {kind: f"{family}-{kind}" for kind in ("interpolation", "extrapolation")}
    fit = {
        kind: name
        for kind, name in beside.items()
        if name in SPLITS and SPLITS[name].max_length <= n_ctx
    }
    return {"in distribution": split, **fit}
