"""Commands that are quick, and tokenizers for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

QUICK = ["--sigmas", "0.4,0.5", "--draws", "2", "--layers", "0"]
SUMS = ["probe", "--prompts", "4", *QUICK]
CHARACTERS = "".join(chr(c) for c in range(32, 126)) + "\n"  # with the unknown and bos: VOCAB
PROSE = "It is a truth universally acknowledged, that a single man must be in want of a wife. "
# One thread: of several, those that wait for a busy core would spin.
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
Run = Callable[..., tuple[int, str, str]]


def characters() -> Any:
    """A tokenizer of single characters with a bos of its own, 97 tokens in all."""
    from tokenizers import Regex, Tokenizer, decoders, models as kinds, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<bos>", "<unk>", *CHARACTERS]
    words = kinds.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    backend = Tokenizer(words)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<bos>",
        unk_token="<unk>",
        pad_token="<bos>",
        clean_up_tokenization_spaces=False,
    )


def refused(answer: tuple[int, str, str], *words: str) -> None:
    code, out, err = answer
    assert code == 1
    assert out == ""
    assert err.startswith("qkvnorm-lens: error: ")
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err
