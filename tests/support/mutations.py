"""Damage: files as a bad disk, a cut transfer, another program or a curious hand leaves them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors.numpy import load, save

Words = dict[str, str]
Arrays = dict[str, np.ndarray]

# -- any file: bits and bytes -----------------------------------------------------------------


def bit_flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def bytes_taken(data: bytes, rng: random.Random) -> bytes:
    at, n = rng.randrange(len(data)), rng.choice([1, 2, 8, 64, 512])
    return data[:at] + data[at + n :]


def bytes_added(data: bytes, rng: random.Random) -> bytes:
    at, n = rng.choice([0, 8, rng.randrange(len(data)), len(data)]), rng.choice([1, 8, 100])
    return data[:at] + rng.randbytes(n) + data[at:]


def block_overwritten(data: bytes, rng: random.Random) -> bytes:
    at, n = rng.randrange(len(data)), rng.choice([1, 4, 8, 512])
    fill = rng.choice([bytes(n), b"\xff" * n, rng.randbytes(n)])
    return (data[:at] + fill + data[at + n :])[: len(data)]


def blocks_swapped(data: bytes, rng: random.Random) -> bytes:
    n = min(64, len(data) // 4)
    a, b = sorted(rng.sample(range(len(data) // n), 2))
    first, later = data[a * n : (a + 1) * n], data[b * n : (b + 1) * n]
    return data[: a * n] + later + data[(a + 1) * n : b * n] + first + data[(b + 1) * n :]


BYTES = [bit_flipped, cut, bytes_taken, bytes_added, block_overwritten, blocks_swapped]

# -- safetensors: a header of any length, and headers that tell lies ---------------------------


def header_flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(8 + int.from_bytes(data[:8], "little"))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def header_length(data: bytes, rng: random.Random) -> bytes:
    length = rng.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1, len(data), rng.randrange(len(data))])
    return length.to_bytes(8, "little") + data[8:]


def header_lies(data: bytes, rng: random.Random) -> bytes:
    """Shapes, dtypes and offsets of the header alone, the bytes as they were."""
    n = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + n])
    name = rng.choice([k for k in head if k != "__metadata__"])
    kind = rng.choice(["shape", "dtype", "data_offsets", "gone", "nested", "words", "twice"])
    numbers: Any = [-1, 0, 1, 2**31, 2**63, 10**30, 10**400, 1.5, "3", None]
    if kind in ("shape", "data_offsets"):
        values = head[name][kind]
        if values and rng.random() < 0.7:
            values[rng.randrange(len(values))] = rng.choice(numbers)
        else:
            head[name][kind] = rng.choice([[], {}, None, [2**40, 2**40], [0, 2**62], values * 40])
    elif kind == "dtype":
        head[name][kind] = rng.choice(["F16", "I64", "F32", "BF16", "F128", "", None, 7, ["F32"]])
    elif kind == "gone":
        del head[name][rng.choice(list(head[name]))]
    elif kind == "nested":
        text = json.dumps(head)[:-1] + ',"x":' + "[" * 100_000 + "]" * 100_000 + "}"
        return len(text).to_bytes(8, "little") + text.encode() + data[8 + n :]
    elif kind == "words":
        head["__metadata__"] = rng.choice([None, [], {"format": 3}, "text"])
    text = json.dumps(head)
    if kind == "twice":
        text = text[:-1] + f', "{name}": {json.dumps(head[name])}}}'
    return len(text).to_bytes(8, "little") + text.encode() + data[8 + n :]


# -- safetensors: other contents under a header that is true of them ----------------------------


def read(data: bytes) -> tuple[Words, Arrays]:
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]).get("__metadata__", {}), dict(load(data))


def array_gone(words: Words, arrays: Arrays, rng: random.Random) -> None:
    del arrays[rng.choice(sorted(arrays))]


def array_more(words: Words, arrays: Arrays, rng: random.Random) -> None:
    name = rng.choice(sorted(arrays))
    arrays[rng.choice([f"{name}.9", "extra", f"{name} ", name.upper()])] = arrays[name].copy()


def array_renamed(words: Words, arrays: Arrays, rng: random.Random) -> None:
    name = rng.choice(sorted(arrays))
    arrays[rng.choice([f"{name}x", name[1:] or "y", name.upper()])] = arrays.pop(name)


def arrays_swapped(words: Words, arrays: Arrays, rng: random.Random) -> None:
    one, other = rng.sample(sorted(arrays), 2)
    arrays[one], arrays[other] = arrays[other], arrays[one]


def array_cut(words: Words, arrays: Arrays, rng: random.Random) -> None:
    name = rng.choice([n for n in sorted(arrays) if arrays[n].ndim])
    axis = rng.randrange(arrays[name].ndim)
    arrays[name] = np.ascontiguousarray(
        np.take(arrays[name], range(arrays[name].shape[axis] - 1 or 0), axis)
    )


def array_reshaped(words: Words, arrays: Arrays, rng: random.Random) -> None:
    name = rng.choice(sorted(arrays))
    x = arrays[name]
    arrays[name] = rng.choice([x.reshape(-1), x[None], x[..., None], np.ascontiguousarray(x.T)])


def array_retyped(words: Words, arrays: Arrays, rng: random.Random) -> None:
    name = rng.choice(sorted(arrays))
    with np.errstate(all="ignore"):
        kind = rng.choice([np.float16, np.float32, np.float64, np.int8, np.int32, np.int64, bool])
        arrays[name] = arrays[name].astype(kind)


def array_reread(words: Words, arrays: Arrays, rng: random.Random) -> None:
    name = rng.choice([n for n in sorted(arrays) if arrays[n].dtype.itemsize > 1])
    x = arrays[name]
    kinds = {8: [np.float64, np.int64, np.uint64], 4: [np.float32, np.int32, np.uint32]}
    arrays[name] = x.view(rng.choice(kinds[x.dtype.itemsize]))


def number_changed(words: Words, arrays: Arrays, rng: random.Random) -> None:
    name = rng.choice([n for n in sorted(arrays) if arrays[n].size])
    x = arrays[name].copy()
    at = rng.randrange(x.size)
    if x.dtype.kind == "f":
        x.flat[at] = rng.choice([np.nan, np.inf, -np.inf, 3e38, -3e38, -1, 0, 1e-40, 7])
    elif x.dtype.kind == "b":
        x.flat[at] ^= True
    else:
        info = np.iinfo(x.dtype)
        x.flat[at] = rng.choice([info.min, info.max, -1, 0, 1, 10**6, int(x.flat[at]) + 1])
    arrays[name] = x


def all_numbers_changed(words: Words, arrays: Arrays, rng: random.Random) -> None:
    name = rng.choice([n for n in sorted(arrays) if arrays[n].dtype.kind in "fi"])
    x = arrays[name]
    with np.errstate(all="ignore"):
        arrays[name] = rng.choice(
            [-x, x * 0, x * 2, (x + 1).astype(x.dtype), x[::-1].copy() if x.ndim else x]
        )


def word_gone(words: Words, arrays: Arrays, rng: random.Random) -> None:
    del words[rng.choice(sorted(words))]


def word_renamed(words: Words, arrays: Arrays, rng: random.Random) -> None:
    name = rng.choice(sorted(words))
    words[rng.choice([f"{name}x", name.upper(), ""])] = words.pop(name)


def word_more(words: Words, arrays: Arrays, rng: random.Random) -> None:
    words[rng.choice(["extra", "settings2", "digest "])] = rng.choice(["1", "{}", "not json"])


def word_changed(words: Words, arrays: Arrays, rng: random.Random) -> None:
    name = rng.choice(sorted(words))
    junk = ["", "null", "[]", "{}", "1", '"x"', "not json", "[" * 50_000, "NaN", "1e999", "\\ud800"]
    words[name] = rng.choice([*junk, words[name] + "x", words[name][:-1], "9" * 5000])


def value_changed(words: Words, arrays: Arrays, rng: random.Random) -> None:
    """One value somewhere within the settings, facts or texts."""
    names = [n for n in sorted(words) if not words[n].startswith(("qkvnorm-lens", "sha256:", "pt"))]
    if not names:
        word_changed(words, arrays, rng)
        return
    name = rng.choice(names)
    root = {"": json.loads(words[name])}
    holder, key = root, ""
    while isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.85:
        holder = holder[key]
        key = rng.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
    kind = rng.choice(["gone", "other", "other", "twice"])
    if kind == "gone" and holder is not root:
        del holder[key]
    elif kind == "twice" and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = rng.choice(_OTHERS)
    words[name] = json.dumps(root[""])


_OTHERS: list[Any] = [
    None, True, -1, 0, 1, 2, 3, 10**9, 2**63, 10**30, -0.5, 0.0, 0.3, 1e300, float("nan"),
    float("inf"), "", "k", "qk", "qq", "sample", "exact", "mask removed", "é\ud800", [], [0], {},
    [[1]], {"a": 1}, "x" * 1000,
]  # fmt: skip

CONTENTS: list[Callable[[Words, Arrays, random.Random], None]] = [
    array_gone, array_more, array_renamed, arrays_swapped, array_cut, array_reshaped,
    array_retyped, array_reread, number_changed, number_changed, all_numbers_changed, word_gone,
    word_renamed, word_more, word_changed, value_changed, value_changed,
]  # fmt: skip


def of_contents(data: bytes, rng: random.Random) -> bytes:
    words, arrays = read(data)
    rng.choice(CONTENTS)(words, arrays, rng)
    whole = {n: np.ascontiguousarray(a).reshape(a.shape) for n, a in arrays.items()}
    return bytes(save(whole, metadata=words or None))


SAFETENSORS = [*BYTES, header_flipped, header_length, header_lies, *[of_contents] * 12]


def damaged(data: bytes, seed: int, kinds: Any = SAFETENSORS) -> tuple[str, bytes]:
    """One mutation of a file, and its name."""
    rng = random.Random(seed)
    kind = kinds[seed % len(kinds)]
    return f"{kind.__name__}, seed {seed}", kind(data, rng)
