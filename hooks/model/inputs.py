"""A model's inputs: token ids, an encoder's and a decoder's, or images and sound."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooks.errors import UnsupportedModelError
from hooks.model import state
from hooks.model.ambient import model_pass
from hooks.model.given import arguments_of
from hooks.model.protocol import HookedModel
from hooks.model.standing import names, raised_by, raised_in, resting, users
from hooks.model.state import model_dtype
from hooks.model.weights import execution_device

_LENGTHS = (5, 7, 11, 13, 17, 3, 4, 2)  # few tokens only where the context has no room for more


_with_cache: weakref.WeakSet[Any] = weakref.WeakSet()

# Inputs that may accompany any tokens.
_OF_TOKENS = {"attention_mask", "decoder_input_ids", "decoder_attention_mask"}


class NoRoom(UnsupportedModelError):
    """The context is too short for a prompt whose length is not a number of heads."""


def check_model(model: Any) -> None:
    """Refuse what is not a model.

    Raises:
        TypeError: it lacks ``cfg``, ``hook_dict``, ``hooks`` or ``run_with_hooks``.
    """
    if not isinstance(model, HookedModel):
        raise TypeError(
            "model: wanted a TransformerBridge (TransformerBridge.boot_transformers(name)) or a "
            f"HookedTransformer; got {type(model).__name__}"
        )


@dataclass(frozen=True)
class ModelInput:
    """A batch as a model takes it: the first argument of its call, and named ones beside it.

    ``joined`` names those whose first axis is not that of the prompts (image patches); a batch with
    any holds one prompt.
    """

    first: Tensor
    named: Mapping[str, Any] = field(default_factory=dict)
    joined: frozenset[str] = frozenset()

    @property
    def batch(self) -> int:
        """Number of prompts."""
        return int(self.first.shape[0])

    def run(self, model: HookedModel) -> Any:
        """One forward pass, and what it returns.

        Nothing is written to a cache, except where positions are given: without a cache and a mask
        transformers takes restarting positions for packed prompts, and separates them.

        Raises:
            ValueError: a hook of the user's can't take this batch.
        """
        device = input_device(model)
        named = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in self.named.items()}
        options = {} if "position_ids" in named else without_cache(model)
        try:
            with model_pass():
                return model(self.first.to(device), **{**options, **named})
        except state.Finished:
            raise
        except Exception as error:
            where = raised_by(model, error) or self._broken_by(model, error, {**options, **named})
            if not where:
                self._refuse(error)
                raise
            raise ValueError(
                f"hooks: wanted hooks that take a pass of {self.batch} prompts of "
                f"{self.first.shape[1]} positions; got {type(error).__name__} from yours on "
                f"{where}: {error}"
            ) from error

    def _refuse(self, error: Exception) -> None:
        """Name the inputs beside the tokens, where the model's own code raised on them."""
        named = sorted({*self.named} - _OF_TOKENS)
        raised = isinstance(error, (IndexError, TypeError, ValueError, RuntimeError))
        if isinstance(error, torch.OutOfMemoryError) or not raised or raised_in(error, "hooks"):
            return
        if named or getattr(self.named.get("attention_mask"), "ndim", 2) == 4:
            raise ValueError(
                f"inputs: wanted {', '.join(named) or 'attention_mask'} that the model's forward "
                f"pass takes; got {type(error).__name__}: {error}"
            ) from error

    def _broken_by(self, model: HookedModel, error: Exception, options: Mapping[str, Any]) -> str:
        """Where the user's hooks are, if the pass succeeds without them.

        A hook's result may break the model much later; our own hooks say what they refuse.
        """
        standing = users(model)
        if not standing or raised_in(error, "hooks"):
            return ""
        try:
            with resting(standing), model_pass():
                model(self.first.to(input_device(model)), **options)
        except state.Finished:
            pass
        except Exception:
            return ""
        return names(standing)

    def rows(self, index: Sequence[int]) -> ModelInput:
        """Some of the prompts, in this order; a prompt may be asked for several times."""
        at = torch.as_tensor(index)
        named = dict(self.named)
        for name, value in self.named.items():
            if name in self.joined:
                named[name] = value.repeat(len(at), *[1] * (value.ndim - 1))
            elif isinstance(value, Tensor):
                named[name] = value[at]
        return ModelInput(self.first[at], named, self.joined)


def short_input(model: HookedModel, batch: int, avoid: set[int], attempt: int = 0) -> ModelInput:
    """A few random tokens, the same in each row; their number is not in ``avoid``, the head counts.

    Another ``attempt`` is another prompt, longer where the context allows. Models of images and
    sound get a random picture or wave form.

    Raises:
        UnsupportedModelError: the context is too short for a check, or the model does not say how
            large its images are.
    """
    generator = torch.Generator().manual_seed(1 + attempt)
    signal = _signal(model, generator)
    if signal is not None:
        return ModelInput(_copies(signal, batch).to(state.model_dtype(model)))
    n_ctx = int(getattr(model.cfg, "n_ctx", 0) or 10**9)
    lengths = [p for p in _LENGTHS if p not in avoid and p <= n_ctx]
    lengths = [p for p in lengths if p >= _LENGTHS[0]] or lengths
    if not lengths:
        raise NoRoom(
            "a short prompt to check with",
            wanted="room for 2 tokens or more, of which no layer has as many heads",
            got=f"a context of {n_ctx}; numbers of heads {sorted(avoid)}",
        )
    length = lengths[min(attempt, len(lengths) - 1)]
    row = torch.randint(0, int(model.cfg.d_vocab), (1, length), generator=generator)
    if not has_decoder(model):
        return ModelInput(_copies(row, batch))
    # Another length, so that the axes of cross-attention can be distinguished.
    other = next((p for p in lengths if p != length), length)
    ids = torch.randint(0, int(model.cfg.d_vocab), (1, other), generator=generator)
    return ModelInput(_copies(row, batch), {"decoder_input_ids": _copies(ids, batch)})


def has_decoder(model: Any) -> bool:
    """Whether the model has an encoder and a decoder, each with a sequence of its own."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


def _copies(row: Tensor, batch: int) -> Tensor:
    """One prompt ``[1, ...]`` as a batch."""
    return row.expand(batch, *row.shape[1:])


def _signal(model: HookedModel, generator: torch.Generator) -> Tensor | None:
    """A random image or wave form for models that take one; None for models of tokens."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    if getattr(model.cfg, "is_visual_model", False):
        side, channels = (getattr(config, n, None) for n in ("image_size", "num_channels"))
        if not isinstance(side, int) or not isinstance(channels, int):
            raise UnsupportedModelError(
                "an image to check with",
                wanted="image_size and num_channels in the configuration",
                got=f"{side!r} and {channels!r}",
            )
        return torch.randn(1, channels, side, side, generator=generator, dtype=torch.float32)
    if getattr(model.cfg, "is_audio_model", False):
        frames, bands = (getattr(config, n, None) for n in ("max_length", "num_mel_bins"))
        if isinstance(frames, int) and isinstance(bands, int):
            spectrogram = (1, frames, bands)
            return torch.randn(spectrogram, generator=generator, dtype=torch.float32)
        strides = getattr(config, "conv_stride", None) or (320,)
        frame = int(torch.tensor(list(strides)).prod())
        return torch.randn(1, 20 * frame, generator=generator, dtype=torch.float32)
    return None


def without_cache(model: HookedModel) -> dict[str, Any]:
    """Options that keep a model from copying every key and value to a cache that nobody reads."""
    takes = "use_cache" in arguments_of(model) and model not in _with_cache
    return {"use_cache": False} if takes else {}


def learn_cache(model: HookedModel, example: Callable[[], ModelInput]) -> None:
    """Note a model in half precision whose pass raises an error without a cache, and not with one.

    A bridge of OLMo has float32 queries and keys there, beside bfloat16 values; a cache of
    transformers 5.23 gives them one dtype.
    """
    if model_dtype(model) not in (torch.bfloat16, torch.float16) or not without_cache(model):
        return
    with torch.no_grad(), resting(users(model)):
        if not _runs(model, example):
            _with_cache.add(model)
            if not _runs(model, example):
                _with_cache.discard(model)


def _runs(model: HookedModel, example: Callable[[], ModelInput]) -> bool:
    try:
        example().run(model)
    except Exception:  # the check's own first pass says what it is
        return False
    return True


def input_device(model: HookedModel) -> torch.device:
    """Device on which the model takes its tokens."""
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    if first is not None:
        brought = execution_device(model) if first.is_meta else None  # type: ignore[arg-type]
        return brought or torch.device(first.device)
    return torch.device(getattr(model.cfg, "device", None) or "cpu")


def real_spans(attention_mask: Int[Tensor, "batch pos"]) -> list[tuple[int, int]]:
    """First and one-past-last real position of each row.

    Raises:
        ValueError: a row without a real token, or with padding between real tokens.
    """
    spans = []
    for row, real in enumerate(attention_mask.bool().cpu()):
        where = real.nonzero().flatten()
        if not len(where):
            raise ValueError(f"attention_mask: wanted a real token in every row; got none in {row}")
        first, end = int(where[0]), int(where[-1]) + 1
        if end - first != len(where):
            raise ValueError(
                f"attention_mask: wanted padding only before or after the real tokens; got a gap "
                f"in row {row}"
            )
        spans.append((first, end))
    return spans
