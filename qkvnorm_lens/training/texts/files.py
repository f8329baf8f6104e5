"""The held-out books and the tokenizer, which come with the package, and the training text."""

from __future__ import annotations

import gzip
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HERE: Final = Path(__file__).parent
HELD_OUT: Final = HERE / "held-out.txt.gz"
TOKENIZER: Final = HERE / "tokenizer.json"
TRAIN: Final = Path("runs/texts/train.txt")
COMMAND: Final = "python -m qkvnorm_lens.training.texts.make"
DIGEST: Final = "f7e14e6c1544f8568ca22af29d53726244f7b8d4fccde0f57d7fa8b7743c7d33"
BOS, UNKNOWN = "<s>", "<unk>"


def text_tokenizer() -> PreTrainedTokenizerFast:
    """512 tokens of byte pairs, made of the training text; ``<s>`` (id 0) begins a window."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(TOKENIZER),
        bos_token=BOS,
        eos_token=BOS,
        unk_token=UNKNOWN,
        pad_token=BOS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def held_out_text() -> str:
    """The books that no model of ours has read in training (``README.md`` beside lists them)."""
    return gzip.decompress(HELD_OUT.read_bytes()).decode("ascii")


@lru_cache(maxsize=1)
def held_out_tokens() -> np.ndarray:
    """The same as token ids, without ``<s>``."""
    return _encoded(held_out_text())


@lru_cache(maxsize=1)
def train_tokens(path: Path = TRAIN) -> np.ndarray:
    """The training text as token ids.

    Raises:
        FileNotFoundError: it was not fetched yet; the message names the command.
        ValueError: the file holds another text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: wanted the training text; got no such file: `{COMMAND}`")
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != DIGEST:
        raise ValueError(
            f"{path}: wanted the text of SHA-256 {DIGEST}; got {found}: `{COMMAND}` makes it again"
        )
    return _encoded(data.decode("ascii"))


def _encoded(text: str) -> np.ndarray:
    from tokenizers import Tokenizer

    books = text.split("\f")
    encoded = Tokenizer.from_file(str(TOKENIZER)).encode_batch(books, add_special_tokens=False)
    return np.concatenate([np.asarray(book.ids, dtype=np.int16) for book in encoded])
