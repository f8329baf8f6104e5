"""Files: written whole or not at all, and checked before memory of their size is allocated.

A safetensors file describes itself in a header. `TensorFile` verifies the header: all arrays must
lie within the file, without gaps, before memory is allocated.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

DIGEST: Final = "digest"
_SIZES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_NUMPY: Final = {"BOOL": "?", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F64": "<f8"}
_NAMES: Final = {np.dtype(kind): name for name, kind in _NUMPY.items()}
_AXES: Final = 16
_LARGEST: Final = 1 << 56  # bytes or numbers: no file is longer


class Unsound(ValueError):
    """A file that does not hold what it claims; readers put the file's name before the message."""

    def __init__(self, field: str, *, wanted: str, got: str) -> None:
        super().__init__(f"{field}: wanted {wanted}; got {got}")
        self.field, self.wanted, self.got = field, wanted, got


def write_whole(
    path: str | Path,
    data: bytes | Sequence[bytes | memoryview],
    *,
    draft: Path | None = None,
    earlier: Path | None = None,
) -> Path:
    """Write a whole file, or leave what was there before; returns its path.

    Args:
        path: the file.
        data: its bytes, or parts of them.
        draft: where it is written first, in the same folder; default: a unique name.
        earlier: the name under which the old file is kept; default: it is not kept.

    Raises:
        OSError: it can't be written (a full disk); the message says what was kept.
    """
    # What a link leads to, not the link; but files that change names stay in their folder.
    target = Path(os.path.realpath(path) if draft is None else path)
    parts = [data] if isinstance(data, bytes) else data
    if target.exists() and not target.is_file():  # a device or a pipe can't be replaced
        target.write_bytes(b"".join(parts))
        return Path(path)
    draft = draft or target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with draft.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        if earlier is not None and target.exists():
            os.replace(target, earlier)
        os.replace(draft, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        if not isinstance(error, OSError):
            raise
        there = "the file of before is whole" if target.exists() else "no part of it was left"
        raise OSError(error.errno, f"{error.strerror}; not written, {there}", str(path)) from error
    return Path(path)


@dataclass(frozen=True)
class Entry:
    """An array as in a header: name, dtype (safetensors' name), shape, bytes of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header was verified."""

    stream: BinaryIO
    words: dict[str, str]
    entries: dict[str, Entry]

    @classmethod
    def open(cls, stream: BinaryIO) -> TensorFile:
        """Read the header, and check it against the file's size.

        Raises:
            Unsound: not such a file, or cut, or arrays overlap or leave gaps.
        """
        size = os.fstat(stream.fileno()).st_size
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > size - 8:
            raise Unsound(
                "header",
                wanted=f"a length within the file's {size} bytes",
                got=f"{length}" if len(first) == 8 else "no length",
            )
        head = read_json(stream.read(length), "header")
        if not isinstance(head, dict):
            raise Unsound("header", wanted="an object", got=type(head).__name__)
        words = head.pop("__metadata__", {})
        if not isinstance(words, dict) or not all(isinstance(w, str) for w in words.values()):
            raise Unsound("__metadata__", wanted="texts by name", got="something else")
        start = 8 + length
        entries = [_entry(name, said, start) for name, said in head.items()]
        at = start
        for entry in sorted(entries, key=lambda e: (e.begin, e.end)):
            if entry.begin != at:
                got = f"{entry.begin - start}"
                raise Unsound(entry.name, wanted=f"its first byte at {at - start}", got=got)
            at = entry.end
        if at != size:
            raise Unsound("arrays", wanted=f"{at - start} bytes", got=f"{size - start}")
        return cls(stream, words, {entry.name: entry for entry in entries})

    def array(self, name: str, saw: Callable[[Any], None]) -> np.ndarray:
        """Read one array; its bytes are passed to ``saw``."""
        entry = self.entries[name]
        out = np.empty(entry.shape, np.dtype(_NUMPY[entry.dtype]))
        self.stream.seek(entry.begin)
        room = out.reshape(-1).view(np.uint8).data
        if self.stream.readinto(room) != entry.end - entry.begin:  # type: ignore[attr-defined]
            raise Unsound(name, wanted=f"{entry.end - entry.begin} bytes", got="fewer")
        saw(room)
        if entry.dtype == "BOOL" and (out.view(np.uint8) > 1).any():
            raise Unsound(name, wanted="bytes 0 and 1", got="another")
        return out

    def check_digest(self, found: str) -> None:
        """Compare a digest with the one in the header."""
        if self.words.get(DIGEST) != found:
            said = repr(self.words.get(DIGEST, "none"))
            raise Unsound(DIGEST, wanted=f"{found}, that of what it holds", got=said)


def digest_of(
    words: Mapping[str, str], arrays: Mapping[str, Entry], data: Mapping[str, Any]
) -> str:
    """SHA-256 of names, dtypes, shapes, texts and bytes; the order in the file does not matter."""
    hashed = start_digest(words, arrays)
    for name in sorted(arrays):
        hashed.update(data[name])
    return f"sha256:{hashed.hexdigest()}"


def start_digest(words: Mapping[str, str], entries: Mapping[str, Entry]) -> Any:
    """A SHA-256 of what precedes the arrays' bytes, including where each of them ends."""
    kinds = [[e.name, e.dtype, list(e.shape)] for _, e in sorted(entries.items())]
    said = sorted((name, word) for name, word in words.items() if name != DIGEST)
    return hashlib.sha256(json.dumps([said, kinds]).encode() + b"\n")


def with_words(data: bytes, words: Mapping[str, str]) -> bytes:
    """A safetensors file with these texts in its header, in the same order every time."""
    n = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + n]) | {"__metadata__": dict(sorted(words.items()))}
    text = json.dumps(dict(sorted(head.items())), separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + n :]


def entries_of(arrays: Mapping[str, np.ndarray]) -> dict[str, Entry]:
    """Arrays as a header will describe them, without their offsets."""
    return {n: Entry(n, _NAMES[a.dtype], a.shape, 0, a.nbytes) for n, a in arrays.items()}


def _entry(name: str, said: Any, start: int) -> Entry:
    """One array of a header, with offsets from the beginning of the file."""
    if not isinstance(said, dict) or set(said) != {"dtype", "shape", "data_offsets"}:
        raise Unsound(name, wanted="dtype, shape and data_offsets", got=f"{said!r:.80}")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise Unsound(name, wanted=f"a dtype of {sorted(_SIZES)}", got=f"{dtype!r:.80}")
    for what, numbers in (("shape", shape), ("offsets", offsets)):
        whole = isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
        if not whole or (what == "offsets" and len(numbers) != 2):
            raise Unsound(name, wanted=f"{what} of integers >= 0", got=f"{numbers!r:.80}")
        if len(numbers) > _AXES or any(n > _LARGEST for n in numbers):
            raise Unsound(name, wanted=f"{what} that a file can have", got=f"{numbers!s:.80}")
    wanted, size = math.prod(shape) * _SIZES[dtype], offsets[1] - offsets[0]
    if size != wanted or math.prod(n for n in shape if n) > _LARGEST:
        raise Unsound(name, wanted=f"{wanted} bytes of {dtype} {shape!r:.80}", got=f"{size}")
    return Entry(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def read_json(text: str | bytes, field: str) -> Any:
    """Read JSON in which no name occurs twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name that occurs twice")
        return found

    try:
        words = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(words, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number without end
        raise Unsound(field, wanted="JSON", got=f"{error!s:.120}") from error
