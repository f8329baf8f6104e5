"""The text that our language models read: how it is fetched, what is held out, its tokens."""

from qkvnorm_lens.training.texts.files import (
    BOS,
    DIGEST,
    HELD_OUT,
    TRAIN,
    held_out_text,
    held_out_tokens,
    text_tokenizer,
    train_tokens,
)

__all__ = [
    "BOS",
    "DIGEST",
    "HELD_OUT",
    "TRAIN",
    "held_out_text",
    "held_out_tokens",
    "text_tokenizer",
    "train_tokens",
]
