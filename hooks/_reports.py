"""What reports share: one file on disk, and which two of them can be merged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

_UNLIKE = ("device", "given")  # facts that two parts of one measurement may differ in


def write_report(
    path: str | Path, form: str, head: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> Path:
    """Write one safetensors file, ``head`` as JSON in its header; returns its path.

    Raises:
        IsADirectoryError: it is one.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: wanted a file's name; got a directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    words = {"format": form} | {name: json.dumps(value) for name, value in head.items()}
    # ascontiguousarray gives a number an axis; take it away again.
    whole = {n: np.ascontiguousarray(a).reshape(a.shape) for n, a in arrays.items()}
    path.write_bytes(save(whole, metadata=words))  # save_file's files are closed to others
    return path


def read_report(path: str | Path, form: str, what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and arrays of what `write_report` wrote.

    Raises:
        ValueError: the file is none, or of another format.
    """
    try:
        with safe_open(path, "np") as file:
            head = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: wanted a {what}; got {error}") from error
    if head.get("format") != form:
        raise ValueError(f"{path}: wanted the format {form!r}; got {head.get('format')!r}")
    return {k: json.loads(v) for k, v in head.items() if k != "format"}, arrays


def check_follows(first: Any, later: Any) -> None:
    """Whether ``later`` goes on where ``first`` ends: settings, model and prompts.

    Raises:
        TypeError: another kind of report.
        ValueError: other settings, another model, or prompts that do not follow.
    """
    if not isinstance(later, type(first)):
        raise TypeError(f"merge: wanted another {type(first).__name__}; got {type(later).__name__}")
    if first.settings != later.settings:
        raise ValueError(
            f"merge: wanted reports of equal settings; got {first.settings} and {later.settings}"
        )
    for name, (mine, other) in _apart(first.model, later.model):
        raise ValueError(f"merge: wanted reports of one model; got {name} {mine!r} and {other!r}")
    follows = first.first_prompt + len(first.tokens)
    if later.first_prompt != follows:
        raise ValueError(
            f"merge: wanted a report that starts at prompt {follows} (first_prompt={follows}); got "
            f"one that starts at {later.first_prompt}"
        )


def _apart(
    first: Mapping[str, Any], later: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The facts in which two reports differ, those within a fact by their own names."""
    for fact in sorted({*first, *later} - {*_UNLIKE}):
        mine, other = first.get(fact), later.get(fact)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            yield from (
                (name, (mine.get(name), other.get(name)))
                for name in sorted({*mine, *other})
                if mine.get(name) != other.get(name)
            )
        elif mine != other:
            yield fact, (mine, other)


def joined_facts(first: Any, later: Any) -> dict[str, Any]:
    """Facts of a merged report: what was said of either part is said of both."""
    given = [*first.model.get("given", ()), *later.model.get("given", ())]
    return {**first.model, **({"given": list(dict.fromkeys(given))} if given else {})}


def told(model: Mapping[str, Any]) -> str:
    """What a model's layers are, and what it was given, in sentences."""
    given = "; ".join(model.get("given", ()))
    return str(model["sites"]) + (f" Given: {given}." if given else "")


def first_tokens(
    starts: Sequence[Sequence[int]],
    prompt: Int[np.ndarray, "n"],
    position: Int[np.ndarray, "n"],
) -> Bool[np.ndarray, "n"]:
    """Whether these tokens are a prompt's first, or the first of a document packed into it."""
    first: np.ndarray = position == 0
    for index, mine in enumerate(starts):
        if len(mine) > 1:
            first |= (prompt == index) & np.isin(position, mine)
    return first
