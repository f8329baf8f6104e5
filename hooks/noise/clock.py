"""Which prompts and positions the running pass holds, and what its cache has of earlier ones.

A cache is recognised among the arguments of the model's call by what it is, not by the argument's
name: transformers renamed it in 5.24.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks.arguments import check_integers, read_array
from hooks.errors import UnsupportedModelError
from hooks.model import HookedModel, Role, has_decoder, is_checking, on_cpu, real_spans
from hooks.sites import LayerSites, Site, Stream

_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
_CALL = nn.Module._call_impl.__code__
_DEPTH = 4  # of a cache's own structure: cache, layers, layer, tensors
_ADVICE = "pass use_past_kv_cache=False (use_cache=False to a Hugging Face model)"


# -- caches -----------------------------------------------------------------------------------


def is_cache(value: Any) -> bool:
    """Whether an object says how many positions it holds, as every cache of transformers 5 does."""
    return callable(getattr(value, "get_seq_length", None))


def find_cache(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model's call, or None.

    Raises:
        ValueError: two caches, or something that seems to be one but does not say how many
            positions it holds (such as a tuple of keys and values).
    """
    named = [*(("", value) for value in args), *kwargs.items()]
    found: list[Any] = []
    for name, value in named:
        if is_cache(value):
            if not any(value is other for other in found):
                found.append(value)
        elif _kept_vectors(value) or (_named_as_cache(name) and not _plain(value)):
            raise ValueError(
                "noise on a cached step: wanted a cache that says how many positions it holds "
                f"(get_seq_length); got {type(value).__name__}{f' as {name}' if name else ''}"
            )
    if len(found) > 1:
        raise ValueError(
            f"noise on a cached step: wanted one cache; got {len(found)}: "
            f"{', '.join(type(cache).__name__ for cache in found)}"
        )
    return found[0] if found else None


def _named_as_cache(name: str) -> bool:
    return "past" in name or "cache" in name


def _plain(value: Any) -> bool:
    """A switch, a number or positions, as ``use_cache`` and ``cache_position`` are."""
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def _kept_vectors(value: Any) -> bool:
    """Keys and values of each layer in tuples, as caches were before they were objects."""
    return (
        isinstance(value, tuple | list)
        and len(value) > 0
        and all(isinstance(layer, tuple | list) and len(layer) >= 2 for layer in value)
        and all(isinstance(x, Tensor) and x.ndim >= 3 for layer in value for x in layer[:2])
    )


def cache_in_output(output: Any) -> tuple[str, Any]:
    """The name and the cache that a model returned; ("", None) without one."""
    named: Iterable[tuple[str, Any]]
    if isinstance(output, Mapping):
        named = output.items()
    elif isinstance(output, tuple | list):
        named = (("", value) for value in output)
    else:
        named = getattr(output, "__dict__", {}).items()
    return next(((name, value) for name, value in named if is_cache(value)), ("", None))


def running_call(module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments of this thread's running call of ``module``, read from the stack.

    For hooks returned as a list: they may leave nothing on the model, and no hook point sees the
    model's arguments.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals.get("self") is module:
            return frame.f_locals["args"], frame.f_locals["kwargs"]
        frame = frame.f_back
    return None


def _marks(thing: Any, depth: int = _DEPTH) -> Iterator[tuple[int, int]]:
    """Where each tensor of a cache is in memory, and how often it was written to.

    Reordered, repeated or selected rows are elsewhere; a cropped cache is not.
    """
    if isinstance(thing, Tensor):
        if thing.ndim > 0:  # how many there are is a number
            version = 0 if thing.is_inference() else thing._version
            yield thing.untyped_storage().data_ptr(), version
    elif depth and not isinstance(thing, nn.Module | type | str):
        parts: Iterable[Any] = ()
        if isinstance(thing, Mapping):
            parts = thing.values()
        elif isinstance(thing, list | tuple):
            parts = thing
        elif hasattr(thing, "__dict__"):
            parts = vars(thing).values()
        for part in parts:
            yield from _marks(part, depth - 1)


@dataclass(frozen=True)
class CachedSteps:
    """Why no cached step is trusted, or none of several tokens; "" where all are."""

    wrong: str = ""
    several_wrong: str = ""

    def refuse(self, cached: int, new: int | None) -> None:
        """Raise where a step with ``new`` tokens after ``cached`` ones would be wrong."""
        if self.wrong:
            raise UnsupportedModelError(
                "generate with a cache",
                wanted="cached steps that give what the whole pass gives",
                got=f"{self.wrong}; {_ADVICE}",
            )
        if self.several_wrong and cached and new != 1:
            raise UnsupportedModelError(
                "a cached step of several tokens",
                wanted="what the whole pass gives",
                got=f"{self.several_wrong}; pass one new token at a time, or {_ADVICE}",
            )


@runtime_checkable
class Factors(Protocol):
    """The interface of what draws factors: NormNoise."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """Which vectors they multiply."""

    def factors(
        self,
        *,
        layer: int,
        role: Role,
        n_heads: int,
        prompts: Sequence[int],
        n_pos: int,
        start: Sequence[int] | int = 0,
    ) -> Float[Tensor, "prompt pos head"]:
        """See :meth:`hooks.NormNoise.factors`."""

    def in_heads(
        self, factors: Float[Tensor, "batch pos head"], sites: LayerSites, role: Role
    ) -> Float[Tensor, "batch pos head"]:
        """These factors, and 1 in heads that have no noise."""


# -- the clock --------------------------------------------------------------------------------


class _Pass(threading.local):
    """The pass that runs in this thread."""

    cached = 0
    new: int | None = None
    known = False  # whether it was told what the cache holds


class Clock:
    """Which prompts and positions the running forward pass holds."""

    def __init__(self, first_prompt: int, masks: Mapping[Stream, Tensor]) -> None:
        (self.first_prompt,) = check_integers(first_prompt=(first_prompt, 0))
        self.now = _Pass()
        self.follows = False  # whether it is told what the cache holds
        self.guarded = False  # whether a pattern will show that there is a cache
        self.blind = False  # takes every pass for a whole one: the reference of a check
        self.module: nn.Module | None = None  # whose call would show a cache
        self.steps: CachedSteps | None = None  # what was found of cached steps on this model
        self.advice = "Use NormNoise.applied(model) around generate"
        self.padded = any(not bool(mask.all()) for mask in masks.values())
        self.width = {stream: int(mask.shape[1]) for stream, mask in masks.items()}
        self.padding = {
            stream: [first for first, _ in real_spans(mask)] for stream, mask in masks.items()
        }
        self._made_in = threading.get_ident()
        self._left: weakref.WeakKeyDictionary[Any, list[tuple[int, int]]] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def cached(self) -> int:
        """Positions held by the cache of this thread's running pass."""
        return 0 if self.blind else self.now.cached

    def prompts(self, batch: int) -> range:
        """Indices of the prompts of this batch."""
        for padding in self.padding.values():
            if len(padding) != batch:
                raise ValueError(
                    f"attention_mask: wanted one row for each of {batch} prompts; got "
                    f"{len(padding)}"
                )
        return range(self.first_prompt, self.first_prompt + batch)

    @on_cpu()
    def drawn(
        self, noise: Factors, sites: LayerSites, role: Role, site: Site, shape: tuple[int, ...]
    ) -> Float[Tensor, "batch pos head"]:
        """Factors of one site; ``shape`` is (batch, positions, index of the first of them)."""
        batch, n_pos, first = shape
        padding = self.padding.get(sites.sequence(role), [0] * batch)
        factors = noise.factors(
            layer=sites.layer,
            role=role,
            n_heads=site.n_heads,
            prompts=self.prompts(batch),
            n_pos=n_pos,
            start=[first - before for before in padding],
        )
        return noise.in_heads(factors, sites, role)

    def first_key(self, n_query: int, n_key: int) -> int:
        """Position of the first key of a row of scores.

        A sliding window keeps the last ones; a static cache has room after them.
        """
        return max(0, self.cached + n_query - n_key)

    def check_width(self, n_pos: int, stream: Stream) -> None:
        """Refuse a mask whose length is not its sequence's."""
        width = self.width.get(stream, n_pos)
        if self.now.cached == 0 and n_pos != width:
            raise ValueError(
                f"attention_mask: wanted an entry for each of {n_pos} positions; got {width}"
            )

    def check_new(self, n_pos: int, name: str) -> None:
        """Refuse a hook that also carries cached vectors: they would be scaled again."""
        if self.follows:
            if self.now.new is not None and n_pos != self.now.new:
                raise ValueError(
                    f"noise on a cached step: wanted the {self.now.new} new positions at {name}; "
                    f"got {n_pos}"
                )
            return
        refuse_cache(self.module, "noise on a cached step", self.advice)
        if not self.guarded and n_pos == 1:
            raise ValueError(
                f"noise on one position at {name}, as in a cached step: wanted a whole sequence. "
                f"{self.advice}"
            )

    def guard(self, matrix: Tensor, hook: Any) -> None:
        """Refuse a cached step whose position is not known: its factors would be wrong."""
        if not self.follows:
            refuse_cache(self.module, "noise on a cached step", self.advice)
        n_query, n_key = matrix.shape[-2:]
        if n_key != n_query + self.now.cached and not self.now.known:
            raise ValueError(
                f"noise on a cached step: wanted {self.now.cached} cached positions; got "
                f"{n_key - n_query}. {self.advice}"
            )

    # -- under a context ------------------------------------------------------------------------

    @contextmanager
    def following(self, module: nn.Module) -> Iterator[None]:
        """Inside, the cache of each call of ``module`` is read."""
        with ExitStack() as stack:
            before = module.register_forward_pre_hook(self.read_cache, with_kwargs=True)
            stack.callback(before.remove)
            after = module.register_forward_hook(self.leave_cache, with_kwargs=True)
            stack.callback(after.remove)
            self.follows = True
            yield

    def read_cache(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a pass: read what the cache holds."""
        if not self._acts():
            return
        cache = find_cache(args, kwargs)
        now = self.now
        now.known = cache is not None
        now.cached = 0 if cache is None else int(cache.get_seq_length())
        tokens = next((kwargs[name] for name in _TOKENS if kwargs.get(name) is not None), None)
        if tokens is None and args:
            tokens = args[0]
        now.new = int(tokens.shape[1]) if isinstance(tokens, Tensor) and tokens.ndim > 1 else None
        if cache is not None and self.steps is not None:
            self.steps.refuse(now.cached, now.new)
            self._refuse_moved(cache)

    def leave_cache(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """After a pass: note where the cache's vectors are."""
        if not self._acts():
            return
        cache = cache_in_output(output)[1]
        if cache is None and self.now.known:
            cache = find_cache(args, kwargs)
        if cache is not None and cache.__hash__ is not None:
            self._left[cache] = list(_marks(cache))

    def _acts(self) -> bool:
        """Whether it acts: a check's own clock acts in its thread; others rest in a check."""
        if self.steps is None:
            return threading.get_ident() == self._made_in
        return not is_checking()

    def _refuse_moved(self, cache: Any) -> None:
        """A factor belongs to a row: cached vectors of a moved row have another prompt's."""
        left = self._left.get(cache) if cache.__hash__ is not None else None
        if left is not None and self.now.cached and left != list(_marks(cache)):
            raise ValueError(
                "noise on a cached step: wanted the cache as the last pass left it; got one whose "
                "rows were reordered, selected or written to, as a beam search does: a factor goes "
                "by the row of the batch. Pass use_cache=False"
            )


def refuse_cache(module: nn.Module | None, what: str, advice: str) -> None:
    """Raise where the running call of ``module`` was given a cache, even an empty one.

    Its length is useless once a layer has added to it, and always where it is lost.
    """
    call = None if module is None else running_call(module)
    if call is None:
        return
    for value in (*call[0], *call[1].values()):
        if is_cache(value) or _kept_vectors(value):
            raise ValueError(
                f"{what}: wanted a pass without a cache; got {type(value).__name__}. {advice}"
            )


def read_masks(
    model: HookedModel, mask: Tensor | None, decoder_mask: Tensor | None
) -> dict[Stream, Tensor]:
    """Attention masks by the sequence to which they belong."""
    if decoder_mask is not None and not has_decoder(model):
        raise ValueError(
            "decoder_attention_mask: wanted an encoder-decoder model; got "
            f"{type(model).__name__} without a decoder of its own"
        )
    of_mask: Stream = "source" if has_decoder(model) else "target"
    given: tuple[tuple[Stream, str, Any], ...] = (
        ("target", "decoder_attention_mask", decoder_mask),
        (of_mask, "attention_mask", mask),
    )
    return {s: _read_mask(name, each) for s, name, each in given if each is not None}


def _read_mask(name: str, mask: Any) -> Tensor:
    """A mask ``[batch, pos]`` as a tensor."""
    wanted = "1 for real tokens and 0 for padding, of shape [batch, pos]"
    array = read_array(name, mask, "biuf", wanted)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name}: wanted {wanted}; got shape {list(array.shape)}")
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name}: wanted {wanted}; got other numbers")
    return torch.as_tensor(array)
