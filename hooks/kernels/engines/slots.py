"""Places for what a step works on, so that the host need not ask how much there is.

On a device that runs beside the host, a tensor's size must be known before its contents: what is
worked on is packed into a fixed number of places. How many would have been needed is counted there
and read once, at the end of a pass; a pass that had too few is repeated with enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional

_FIRST = 1 / 64  # share of what there is that gets a place before more is known
_MORE = 1.25  # beyond the largest share seen


class Slots:
    """How many places each kind of work gets, and how many it needed.

    Args:
        fixed: whether sizes are fixed beforehand; else they are read, which waits for the device.
    """

    def __init__(self, fixed: bool) -> None:
        self.fixed = fixed
        self._share: dict[str, float] = {}
        self._needed: dict[tuple[str, torch.device], Tensor] = {}

    def pick(
        self, name: str, wanted: Bool[Tensor, "n"]
    ) -> tuple[Int[Tensor, "place"], Bool[Tensor, "place"]]:
        """Indices of what is wanted, in order, and which of these places are taken."""
        n = len(wanted)
        if not self.fixed:
            found = wanted.nonzero()[:, 0]
            return found, torch.ones_like(found, dtype=torch.bool)
        share = self._share.setdefault(name, _FIRST)
        places = min(n, int(n * share) + 1)
        rank = wanted.cumsum(0)
        count = rank[-1:]
        needed = torch.cat([count > places, count / n]).to(torch.float32)
        key = name, wanted.device
        before = self._needed.get(key)
        self._needed[key] = needed if before is None else torch.maximum(before, needed)
        at = torch.where(wanted & (rank <= places), rank - 1, places)
        picked = at.new_full((places + 1,), -1)
        picked.scatter_(0, at, torch.arange(n, device=at.device))
        picked = picked[:places]  # the last one took what had no place
        return picked.clamp_min(0), picked >= 0

    def needed(self, device: torch.device) -> Tensor:
        """Of each kind of work on a device: whether some had no place, which share wanted one."""
        mine = [x for (_, where), x in self._needed.items() if where == device]
        return torch.cat(mine) if mine else torch.zeros(0, device=device)

    def enough(self, device: torch.device, needed: list[float]) -> bool:
        """Whether all had a place; provides for more where not. The next pass counts anew."""
        mine = [key for key in self._needed if key[1] == device]
        fits = True
        for key, lacked, share in zip(mine, needed[::2], needed[1::2], strict=True):
            if lacked:
                self._share[key[0]], fits = min(1.0, _MORE * share), False
            del self._needed[key]
        return fits


def constant(numbers: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device, sent there once and without waiting for it."""
    numbers = np.ascontiguousarray(numbers)
    return _constant(numbers.tobytes(), numbers.dtype.str, numbers.shape, dtype, device)


@lru_cache(maxsize=256)
def _constant(
    data: bytes, kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    here = torch.from_numpy(np.frombuffer(data, kind).reshape(shape).copy()).to(dtype)
    return here.to(device, non_blocking=True)


def bring(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of one device to the CPU, in one piece."""
    if tensors[0].device.type == "cpu":
        return list(tensors)
    parts = [x.contiguous().view(-1).view(torch.uint8) for x in tensors]
    padded = [functional.pad(x, (0, -len(x) % 8)) for x in parts]
    whole, out, at = torch.cat(padded).cpu(), [], 0
    for x, part, room in zip(tensors, parts, padded, strict=True):
        out.append(whole[at : at + len(part)].view(x.dtype).view(x.shape))
        at += len(room)
    return out
