"""A transformers cache in which each layer's keys and values have formats of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from hooks.measures.cache.formats import ROLES, CacheFormat, CacheRole, Full, check_fits


class MixedLayer(DynamicLayer):
    """One layer: what its stores give back, to the bit; they take no less memory."""

    is_croppable = False

    def __init__(self, keys: CacheFormat, values: CacheFormat) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.formats: dict[CacheRole, CacheFormat] = {"k": keys, "v": values}
        self.cumulative_length = 0
        self._start()

    def _start(self) -> None:
        self._stores = {role: form.store(role) for role, form in self.formats.items()}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The first update: dtype and device."""
        super().lazy_initialization(key_states, value_states)
        for role, x in zip(ROLES, (key_states, value_states), strict=True):
            check_fits(self.formats[role], role, x)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[batch, head, pos, d_head]``; all of them, as this pass reads.

        Raises:
            ValueError: the format can't store so many; names it.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        keys = self._stores["k"].append(key_states)
        return keys, self._stores["v"].append(value_states)

    def get_seq_length(self) -> int:
        """Tokens written."""
        return self.cumulative_length

    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values as the next pass reads them."""
        return self._stores["k"].read(), self._stores["v"].read()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._start()

    def _unable(self, what: str) -> None:
        raise NotImplementedError(
            f"MixedCache: wanted one row of tokens per prompt that only grows; got {what}"
        )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refused: groups of a format may hold several rows."""
        self._unable("beams to reorder")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused, as beams are."""
        self._unable("rows to repeat")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused, as beams are."""
        self._unable("rows to select")

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was quantised together can't be taken apart."""
        self._unable("tokens to remove")


class MixedCache(Cache):
    """A cache for transformers' ``generate(past_key_values=)``: formats by layer, K and V apart.

    Its layers give back what the formats store, to the bit, and hold it in the model's dtype: they
    show what a recipe does to the text, and save no memory.

    Args:
        formats: each layer's formats of keys and of values, by block index; other layers are in
            full precision. Layers with a window are kept whole.
    """

    def __init__(self, formats: Mapping[int, tuple[CacheFormat, CacheFormat]]) -> None:
        plain = (Full(), Full())
        count = 1 + max(formats, default=-1)
        super().__init__(layers=[MixedLayer(*formats.get(i, plain)) for i in range(count)])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`MixedLayer.update`; layers behind the last named one are added."""
        while len(self.layers) <= layer_idx:
            self.layers.append(MixedLayer(Full(), Full()))
        out: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return out
