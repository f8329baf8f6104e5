"""The factors of one batched pass of a sweep: every row has its own prompt, sigma and draw.

Row by row they are those of :class:`hooks.NormNoise`; here they are made for all layers at once,
from uniform numbers that are drawn once for all sigmas (common random numbers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt32, UInt64
from torch import Tensor

from hooks._clock import Clock
from hooks.laws import get_law
from hooks.noise import _SHARED_KV_STREAM, _STREAM, _WORDS_PER_BLOCK, NormNoise
from hooks.sites import LayerSites, Role, Site

_LEAST = 2.0**-54  # what NormNoise.uniforms puts in the place of zero

# The constants of numpy's SeedSequence, whose stream is guaranteed to stay as it is.
_INIT_A, _MULT_A = 0x43B0D7E5, 0x931E8875
_INIT_B, _MULT_B = 0x8B51F9DD, 0x58F38DED
_MIX_LEFT, _MIX_RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
_HALF = np.uint32(16)
_POOL = 4


@dataclass(frozen=True)
class Grid:
    """The conditions that each prompt is run under: 0 is clean, then draw by draw, each sigma."""

    sigmas: tuple[float, ...]
    replicates: int

    def __len__(self) -> int:
        return 1 + len(self.sigmas) * self.replicates

    def draw(self, condition: int) -> int:
        """Draw of a noisy condition."""
        return (condition - 1) // len(self.sigmas)

    def sigma(self, condition: int) -> int:
        """Index of a noisy condition's sigma."""
        return (condition - 1) % len(self.sigmas)


class RowFactors(Clock):
    """What the rows of the running pass are scaled by: for each prompt, some conditions."""

    def __init__(self, noise: NormNoise, layers: Sequence[LayerSites], grid: Grid) -> None:
        super().__init__(0, {})
        self.follows = True  # the sweep runs whole sequences, be they of one token
        self.noise = noise
        self.grid = grid
        self.places = [(s, role) for s in layers for role in noise.roles]
        self._made: dict[tuple[int, Role], Tensor] = {}
        self._prompts: tuple[int, ...] = ()
        self._conditions = range(0)
        self._device = torch.device("cpu")

    def enter(self, prompts: Sequence[int], conditions: range, device: torch.device) -> None:
        """A new pass: prompts (their indices in the corpus), each under these conditions."""
        self._made.clear()
        self._prompts, self._conditions, self._device = tuple(prompts), conditions, device

    def clean_rows(self) -> slice | None:
        """The rows without noise, if the pass has any."""
        if 0 not in self._conditions:
            return None
        return slice(0, None, len(self._conditions))

    def drawn(
        self, noise: NormNoise, sites: LayerSites, role: Role, site: Site, shape: tuple[int, ...]
    ) -> Float[Tensor, "row pos head"]:
        """Factors ``[batch, pos, head]`` of one site; ``shape`` is (batch, pos, first position)."""
        batch, n_pos, _ = shape
        if batch != len(self._prompts) * len(self._conditions):
            raise RuntimeError(
                f"sweep: wanted {len(self._prompts)} x {len(self._conditions)} rows at "
                f"{site.hook}; got {batch}"
            )
        here = (sites.layer, role)
        if here not in self._made or self._made[here].shape[1] != n_pos:
            alike = [
                (s.layer, r)
                for s, r in self.places
                if s.sequence(r) == sites.sequence(role)
                and s.vector(r).dot.n_heads == site.n_heads
                and (s.layer, r) not in self._made
            ]
            self._make(alike or [here], n_pos, site.n_heads)
        return self._made[here].expand(-1, -1, site.n_heads)

    def _make(self, places: list[tuple[int, Role]], n_pos: int, n_heads: int) -> None:
        """The factors of these places, one multiplication for all of them and each sigma."""
        grid = self.grid
        noisy = [c for c in self._conditions if c > 0]
        draws = sorted({grid.draw(c) for c in noisy})
        u = torch.from_numpy(
            draw_uniforms(
                self.noise,
                places=places,
                prompts=self._prompts,
                draws=draws,
                n_pos=n_pos,
                n_heads=n_heads,
            )
        )
        shape = (len(places), len(self._prompts), len(self._conditions), *u.shape[3:])
        out = torch.ones(shape, dtype=torch.float32)
        law = get_law(self.noise.law)
        for index, sigma in enumerate(grid.sigmas):
            mine = [c for c in noisy if grid.sigma(c) == index]
            if mine:
                at = [c - self._conditions.start for c in mine]
                of = [draws.index(grid.draw(c)) for c in mine]
                out[:, :, at] = law.factor(u[:, :, of], sigma).float()
        out = out.to(self._device)
        for place, factor in zip(places, out, strict=True):
            self._made[place] = factor.flatten(0, 1)


def draw_uniforms(
    noise: NormNoise,
    *,
    places: Sequence[tuple[int, Role]],
    prompts: Sequence[int],
    draws: Sequence[int],
    n_pos: int,
    n_heads: int,
) -> Float[np.ndarray, "place prompt draw pos width"]:
    """:meth:`NormNoise.uniforms` of many places, prompts and draws, from position 0.

    ``width`` is 1 where all heads share a factor.
    """
    width = 1 if noise.shared in ("heads", "token") else n_heads
    together = noise.shared in ("kv", "token")
    streams = [
        _SHARED_KV_STREAM if together and role in ("k", "v") else _STREAM[role]
        for _, role in places
    ]
    keys = philox_keys(
        noise.seed,
        np.asarray(draws)[None, None, :],
        np.asarray([layer for layer, _ in places])[:, None, None],
        np.asarray(streams)[:, None, None],
        np.asarray(prompts)[None, :, None],
    )
    flat = keys.reshape(-1, 2)
    padded = -(-width // _WORDS_PER_BLOCK) * _WORDS_PER_BLOCK
    drawn = np.empty((len(flat), n_pos, padded))
    bits = np.random.Philox(key=0)
    generator, fresh = np.random.Generator(bits), bits.state
    for key, out in zip(flat, drawn, strict=True):
        fresh["state"]["key"] = key  # setting a state costs a tenth of a new generator
        bits.state = fresh
        generator.random(out=out)
    return np.maximum(drawn[..., :width], _LEAST).reshape(*keys.shape[:3], n_pos, width)


def philox_keys(seed: int, *words: np.ndarray) -> UInt64[np.ndarray, "*grid 2"]:
    """``SeedSequence((seed, *words)).generate_state(2, uint64)`` for arrays of words.

    Raises:
        ValueError: a word that does not fit in 32 bits.
    """
    for word in words:
        if word.size and not 0 <= word.min() <= word.max() < 2**32:
            raise ValueError(f"wanted draws, layers and prompts below 2**32; got {word.max()}")
    first = [seed & 0xFFFFFFFF]
    while seed := seed >> 32:
        first.append(seed & 0xFFFFFFFF)
    shape = np.broadcast_shapes(*(word.shape for word in words))
    entropy = [np.full(shape, x, np.uint32) for x in first]
    entropy += [np.broadcast_to(word, shape).astype(np.uint32) for word in words]
    pool = _mixed(entropy)
    out, constant = [], _INIT_B
    for word in pool:
        mixed, constant = _hashed(word, constant, _MULT_B)
        out.append(mixed.astype(np.uint64))
    high = np.uint64(32)
    return np.stack([out[0] | out[1] << high, out[2] | out[3] << high], axis=-1)


def _mixed(entropy: list[np.ndarray]) -> list[np.ndarray]:
    """The pool of a SeedSequence: each word stirred into all four of it."""
    pool, constant = [], _INIT_A
    for at in range(_POOL):
        word = entropy[at] if at < len(entropy) else np.zeros_like(entropy[0])
        mixed, constant = _hashed(word, constant, _MULT_A)
        pool.append(mixed)
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                mixed, constant = _hashed(pool[source], constant, _MULT_A)
                pool[target] = _mix(pool[target], mixed)
    for word in entropy[_POOL:]:
        for target in range(_POOL):
            mixed, constant = _hashed(word, constant, _MULT_A)
            pool[target] = _mix(pool[target], mixed)
    return pool


def _hashed(
    word: UInt32[np.ndarray, "*grid"], constant: int, factor: int
) -> tuple[UInt32[np.ndarray, "*grid"], int]:
    after = constant * factor & 0xFFFFFFFF
    mixed = (word ^ np.uint32(constant)) * np.uint32(after)
    return mixed ^ (mixed >> _HALF), after


def _mix(x: UInt32[np.ndarray, "*grid"], y: UInt32[np.ndarray, "*grid"]) -> np.ndarray:
    mixed: np.ndarray = _MIX_LEFT * x - _MIX_RIGHT * y
    stirred: np.ndarray = mixed ^ (mixed >> _HALF)
    return stirred
