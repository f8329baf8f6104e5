"""What a model reads: windows of a text, lines of sums, or sums drawn for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkvnorm_lens.arguments import brief

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from qkvnorm_lens.training import Split


@dataclass(frozen=True)
class Prompts:
    """Token ids for :func:`hooks.collapse_probe`, and what was read and left out, in words."""

    ids: list[list[int]]
    source: str
    left_out: str = ""


def passage() -> str:
    """The built-in passage: the first chapter of Pride and Prejudice (see ``data/README.md``)."""
    return (Path(__file__).parent / "data" / "austen.txt").read_text(encoding="utf-8")


def windows(
    model: TransformerBridge,
    text: str,
    *,
    length: int | None = None,
    limit: int = 8,
    prepend_bos: bool | None = None,
) -> Prompts:
    """Cut a text into windows of tokens; each begins as the model's prompts do (bos).

    If the text begins with a bos, the first window uses it and gets no second one; text that begins
    like the tokenizer's chat template gets none.

    Args:
        model: its tokenizer reads the text.
        text: any length.
        length: tokens of a window, bos included; default: 128, or the context where that is
            shorter. The last window may be shorter.
        limit: most windows.
        prepend_bos: True: always; False: never.

    Raises:
        ValueError: empty text, a length outside the context, or no tokenizer.
    """
    from hooks.arguments import check_booleans, check_integers, check_text
    from hooks.corpus import check_tokenizer, text_tokens

    if not callable(getattr(model, "to_tokens", None)):
        raise TypeError(f"model: wanted a TransformerBridge; got {type(model).__name__}")
    if not check_text("text", text).strip():
        raise ValueError("text: wanted some; got an empty one")
    (limit,) = check_integers(limit=(limit, 1))
    if prepend_bos is not None:
        (prepend_bos,) = check_booleans(prepend_bos=prepend_bos)
    if length is not None:
        (length,) = check_integers(length=(length, 2))
    context = int(getattr(model.cfg, "n_ctx", 0) or 0)
    length = min(128, context or 128) if length is None else length
    if length < 2 or (context and length > context):
        raise ValueError(
            f"length: wanted 2 to {context or 'any number of'} tokens, the model's context; got "
            f"{length}"
        )
    check_tokenizer(model)
    bos, ids, note = text_tokens(model, text, prepend_bos)
    step = length - len(bos)
    if step < 1:
        raise ValueError(f"length: wanted more than the {len(bos)} tokens of bos; got {length}")
    cut = [bos + ids[at : at + step] for at in range(0, len(ids), step)]
    # A lone token has no second key to lose its attention to.
    kept = [window for window in cut[:limit] if len(window) > 1]
    if not kept:
        raise ValueError("text: wanted at least 2 tokens; got 1")
    used = sum(len(window) - len(bos) for window in kept)
    left_out = ""
    if used < len(ids):
        left_out = f"{len(ids) - used} of {len(ids)} tokens of the text left out"
        if len(cut) > limit:
            left_out += f" ({len(cut)} windows in all)"
    source = f"{_many(len(kept), 'window')} of at most {length} tokens"
    return Prompts(kept, f"{source}; {note}" if note else source, left_out)


def conversations(model: TransformerBridge, messages: Any, *, limit: int) -> Prompts:
    """Chat messages (``role`` and ``content``), as the tokenizer's template writes them.

    Args:
        model: its tokenizer has the template.
        messages: one conversation, or a list of them.
        limit: most conversations.

    Raises:
        ValueError: no messages, or no template.
    """
    from hooks.model import chat_ids, is_chat

    several = [messages] if is_chat(messages) else messages
    if not isinstance(several, list) or not several or not all(map(is_chat, several)):
        raise ValueError(
            "messages: wanted a list of messages with role and content, or a list of such lists; "
            f"got {brief(messages)}"
        )
    ids = [chat_ids(model, one).tolist() for one in several[:limit]]
    left = len(several) - len(ids)
    left_out = f"{left} of {len(several)} conversations left out" if left else ""
    return Prompts(ids, _many(len(ids), "conversation"), left_out)


def lines(model: TransformerBridge, text: str, *, limit: int) -> Prompts:
    """One sum per line, such as ``[12+N3=9``, one token per character.

    Raises:
        ValueError: no line, a character that is not in the vocabulary, a sum that does not begin
            with ``[`` or is longer than the context.
    """
    from hooks.arguments import check_integers, check_text
    from qkvnorm_lens.training import VOCAB

    if not hasattr(getattr(model, "cfg", None), "n_ctx"):
        raise TypeError(f"model: wanted a TransformerBridge; got {type(model).__name__}")
    (limit,) = check_integers(limit=(limit, 1))
    text = check_text("text", text)
    rows = [line.strip() for line in text.splitlines() if line.strip()]
    if not rows:
        raise ValueError("text: wanted a sum on each line, such as [12+N3=9; got no line")
    for number, row in enumerate(rows, 1):
        strange = sorted(set(row) - set(VOCAB[:-1]))
        if strange or not row.startswith("[") or len(row) > model.cfg.n_ctx:
            raise ValueError(
                f"text: line {number}: wanted a sum such as [12+N3=9 of at most "
                f"{model.cfg.n_ctx} characters, of {VOCAB[:-1]}; got {brief(row)}"
            )
    left_out = f"{len(rows) - limit} of {len(rows)} lines left out" if len(rows) > limit else ""
    ids = [[VOCAB.index(c) for c in row] for row in rows[:limit]]
    return Prompts(ids, _many(len(ids), "sum"), left_out)


def sums(split: str | Split, n: int, *, seed: int) -> Prompts:
    """Draw sums for an addition model, with their answers (teacher forcing).

    Raises:
        ValueError: an unknown split, or n < 1.
    """
    from hooks.arguments import check_integers
    from qkvnorm_lens.training import PAD, draw, get_split

    (n,) = check_integers(n=(n, 1))
    chosen = get_split(split)
    rows = draw(chosen, n, seed=seed).tokens.tolist()
    ids = [[token for token in row if token != PAD] for row in rows]
    return Prompts(
        ids,
        f"{_many(n, 'sum')} of {_some(chosen.counts)} integers of {_some(chosen.digits)} digits, "
        f"drawn with seed {seed}",
    )


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _some(values: Sequence[int]) -> str:
    first = ", ".join(map(str, values[:-1]))
    return f"{first} or {values[-1]}" if first else str(values[-1])
