"""One forward pass of a bridge, watched and edited, and how far apart tensors are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.support.builders import Built
from tests.support.families import VOCAB

POS = 13
TEXT = torch.arange(3, 3 + POS)[None]


@dataclass(frozen=True)
class Seen:
    """Output of a forward pass, and what fired at the watched hooks."""

    out: Tensor
    fired: dict[str, list[Tensor]]

    def one(self, name: str) -> Tensor:
        (tensor,) = self.fired[name]
        return tensor


Edit = Callable[[Tensor], Tensor]


def run(
    built: Built,
    watch: Iterable[str] = (),
    edits: dict[str, Edit] | None = None,
    batch: int = 1,
    **kwargs: Any,
) -> Seen:
    """One forward pass; edits come before what is watched."""
    args, inputs = built.inputs(batch=batch, pos=POS)
    fired: dict[str, list[Tensor]] = {}

    def editor(edit: Edit) -> Any:
        return lambda tensor, hook: edit(tensor)

    def watcher(name: str) -> Any:
        def keep(tensor: Tensor, hook: Any) -> None:
            fired.setdefault(name, []).append(tensor.clone())

        return keep

    fwd_hooks = [(name, editor(edit)) for name, edit in (edits or {}).items()]
    fwd_hooks += [(name, watcher(name)) for name in watch]
    out = built.model.run_with_hooks(*args, **inputs, **kwargs, fwd_hooks=fwd_hooks)
    return Seen(logits(out), fired)


def logits(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    found: Tensor = next(out[name] for name in ("logits", "last_hidden_state") if name in out)
    return found


def names(built: Built, *ends: str) -> list[str]:
    return [n for n in built.model.hook_dict if n.endswith(ends)]


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def logprobs_apart(one: Tensor, other: Tensor) -> float:
    return apart(one.log_softmax(-1), other.log_softmax(-1))


def twice(tensor: Tensor) -> Tensor:
    return 2 * tensor


def first_head_times_4(tensor: Tensor) -> Tensor:
    return torch.cat([4 * tensor[:, :, :1], tensor[:, :, 1:]], dim=2)


SMALL: dict[str, Any] = {
    "d_model": 16,
    "d_head": 4,
    "n_heads": 4,
    "n_layers": 2,
    "n_ctx": 16,
    "d_vocab": VOCAB,
    "d_mlp": 16,
    "act_fn": "gelu",
    "seed": 0,
}


def in_memory_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB - 2)} | {"<unk>": VOCAB - 2, "<s>": VOCAB - 1}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)
