"""NormNoise's numbers for many places, prompts and draws at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt32, UInt64

from hooks.model import Role
from hooks.noise.norm_noise import SHARED_KV_STREAM, STREAM, WORDS_PER_BLOCK, NormNoise

_LEAST = 2.0**-54  # what NormNoise.uniforms puts in the place of zero

# The constants of numpy's SeedSequence, whose stream is guaranteed to stay as it is.
_INIT_A, _MULT_A = 0x43B0D7E5, 0x931E8875
_INIT_B, _MULT_B = 0x8B51F9DD, 0x58F38DED
_MIX_LEFT, _MIX_RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
_HALF = np.uint32(16)
_POOL = 4


def draw_uniforms(
    noise: NormNoise,
    *,
    places: Sequence[tuple[int, Role]],
    prompts: Sequence[int],
    draws: Sequence[int],
    n_pos: int,
    n_heads: int,
) -> Float[np.ndarray, "place prompt draw pos width"]:
    """:meth:`NormNoise.uniforms` for many places, prompts and draws, from position 0.

    ``width`` is 1 where all heads share a factor.
    """
    keys = stream_keys(
        noise,
        roles=[role for _, role in places],
        layers=np.asarray([layer for layer, _ in places])[:, None, None],
        prompts=np.asarray(prompts)[None, :, None],
        draws=np.asarray(draws)[None, None, :],
    )
    drawn = numbers(noise, keys.reshape(-1, 2), n_pos=n_pos, n_heads=n_heads)
    return drawn.reshape(*keys.shape[:3], *drawn.shape[1:])


def stream_keys(
    noise: NormNoise,
    *,
    roles: Sequence[Role],
    layers: np.ndarray,
    prompts: np.ndarray,
    draws: np.ndarray,
) -> UInt64[np.ndarray, "role *grid 2"]:
    """Philox's key of each stream of numbers; ``layers``, ``prompts`` and ``draws`` broadcast.

    Their first axis is that of the roles, or of length one.
    """
    together = noise.shared in ("kv", "token")
    streams = np.asarray(
        [SHARED_KV_STREAM if together and role in ("k", "v") else STREAM[role] for role in roles]
    ).reshape(-1, *[1] * (prompts.ndim - 1))
    words = np.broadcast_arrays(draws, layers, streams, prompts)
    if all(word.max(initial=0) < 2**32 for word in words):
        return philox_keys(noise.seed, *words)
    out = np.empty((*words[0].shape, 2), np.uint64)  # the first prompt has a very large index
    for at in np.ndindex(words[0].shape):
        entropy = (noise.seed, *(int(word[at]) for word in words))
        out[at] = np.random.SeedSequence(entropy).generate_state(2, np.uint64)
    return out


def numbers(
    noise: NormNoise, keys: UInt64[np.ndarray, "n 2"], *, n_pos: int, n_heads: int, start: int = 0
) -> Float[np.ndarray, "n pos width"]:
    """The numbers in (0, 1) of each stream from position ``start``; ``width`` as above."""
    width = 1 if noise.shared in ("heads", "token") else n_heads
    blocks = -(-width // WORDS_PER_BLOCK)
    drawn = np.empty((len(keys), n_pos, blocks * WORDS_PER_BLOCK))
    bits = np.random.Philox(key=0, counter=start * blocks)
    generator, fresh = np.random.Generator(bits), bits.state
    for key, out in zip(keys, drawn, strict=True):
        fresh["state"]["key"] = key  # setting a state costs a tenth of a new generator
        bits.state = fresh
        generator.random(out=out)
    return np.maximum(drawn[..., :width], _LEAST)


def philox_keys(seed: int, *words: np.ndarray) -> UInt64[np.ndarray, "*grid 2"]:
    """``SeedSequence((seed, *words)).generate_state(2, uint64)`` for arrays of words."""
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
    """The pool of a SeedSequence: each word mixed into all four of the pool's."""
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
