"""Files of a training run: states with a digest, and a log that is cut to the state's rows."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from hooks.reports import write_whole

_SEAL: Final = re.compile(rb"\nqkvnorm-lens state sha256:([0-9a-f]{64})\n\Z")


class RunFileError(ValueError):
    """A file of a training run that is not what was written; the message says how to go on.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
        self.message = message

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.path, self.message)


def write_state(path: Path, earlier: Path, state: dict[str, Any]) -> None:
    """Write a state with its digest, whole or not at all; the one before stays as ``earlier``.

    ``torch.load`` can read such a file: a zip archive may be followed by other data.

    Raises:
        OSError: it can't be written.
    """
    room = io.BytesIO()  # torch's own writer says of a full disk only where in the file it was
    torch.save(state, room)
    with room.getbuffer() as data:  # Python 3.13 complains of a view that an interrupt leaves
        seal = f"\nqkvnorm-lens state sha256:{hashlib.sha256(data).hexdigest()}\n".encode()
        write_whole(path, [data, seal], draft=path.with_suffix(".part"), earlier=earlier)


def read_state(path: Path, device: torch.device, fields: Sequence[str]) -> dict[str, Any]:
    """Read a state and check every byte: by its digest or, in older states, by its CRCs.

    Raises:
        RunFileError: it is not what was written.
        OSError: it can't be read.
    """
    data = path.read_bytes()
    seal = _SEAL.search(data, max(0, len(data) - 128))
    try:
        if seal:
            data = data[: seal.start()]
            found = hashlib.sha256(data).hexdigest()
            if found != seal[1].decode():
                raise ValueError(f"the digest {found[:16]}.. of other bytes than were written")
        else:
            _check_archive(data)
        state = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        lacking = [name for name in fields if name not in state]
        if lacking:
            raise ValueError(f"one without {', '.join(lacking)}")
    except Exception as error:  # zipfile and torch raise whatever they come upon
        said = " ".join(str(error).split())[:120] or type(error).__name__
        raise RunFileError(path, f"wanted the state that was saved there; got {said}") from error
    found_state: dict[str, Any] = state
    return found_state


def _check_archive(data: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"{broken} with another CRC")


# -- the log ----------------------------------------------------------------------------------


def note_log(path: Path) -> dict[str, Any]:
    """What a state records about the log with which it was saved."""
    data = path.read_bytes() if path.exists() else b""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def cut_log(path: Path, note: dict[str, Any] | None, step: int, fields: Sequence[str]) -> None:
    """Remove the rows that were written to a log after a state was saved: they are made again.

    Args:
        path: the log; nothing is done where there is none.
        note: what the state records about the log; None for older states.
        step: the state's.
        fields: the log's columns.

    Raises:
        RunFileError: the rows up to the state are not those that were written.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    if note is None:
        kept = _rows_until(path, data, step, fields)
    else:
        kept = data[: note["bytes"]]
        if hashlib.sha256(kept).hexdigest() != note["sha256"]:
            _rows_until(path, data, step, fields)  # names the line, if it can be seen
            raise _damaged(path, "rows with the numbers that were written", "others, or fewer")
    if not kept:
        path.unlink()
    elif kept != data:
        write_whole(path, kept)


def _rows_until(path: Path, data: bytes, step: int, fields: Sequence[str]) -> bytes:
    """The lines of a log up to a step, each checked; a last line may be half written."""
    lines = data.splitlines(keepends=True)
    kept, latest = b"", 0
    for number, line in enumerate(lines, 1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("half a line")
            row = next(csv.reader([line.decode("ascii")]))
            if number == 1:
                if row != list(fields):
                    raise ValueError("other columns")
            else:
                latest = _step_of(row, len(fields), latest)
        except (ValueError, StopIteration, csv.Error) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            wanted = f"line {number} of {len(fields)} fields, steps rising"
            raise _damaged(path, wanted, f"{line!r:.80} ({error})") from error
        if latest > step:
            break
        kept += line
    return kept


def _step_of(row: list[str], width: int, latest: int) -> int:
    if len(row) != width:
        raise ValueError(f"{len(row)} fields")
    for value in row[1:]:
        if value:
            float(value)
    step = int(row[0])
    if step <= latest:
        raise ValueError(f"step {step} after {latest}")
    return step


def _damaged(path: Path, wanted: str, got: str) -> RunFileError:
    how = "the weights do not depend on the log: delete it and go on without its rows"
    return RunFileError(path, f"wanted {wanted}; got {got}; {how}, or put a copy in its place")
