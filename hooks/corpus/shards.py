"""Parts of a corpus, counted by several processes, as one report."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from hooks.arguments import brief, check_path, read_list
from hooks.corpus.part import SHARED, corpus_of, differing, left_out, read_part


def merge_corpus(folders: str | os.PathLike[str] | Iterable[Any]) -> Any:
    """The report of a whole corpus from the parts that its shards wrote, whatever was measured.

    Sums are those of one process, up to the rounding of their order (1e-12); the rows are the same.

    Args:
        folders: directories with parts (``part-00001-of-00003.safetensors``), or such files.

    Raises:
        ValueError: a shard that is missing, there twice, or not at its end; parts of other corpora,
            models or settings. The message names the shard and what differs.
        ReportFileError: a damaged file.
    """
    if isinstance(folders, (str, os.PathLike)):
        folders = [folders]
    wanted = "directories with parts of a corpus"
    found: list[Path] = []
    for given in read_list("folders", folders, wanted):
        path = check_path("folders", given)
        if not path.exists():
            raise ValueError(
                f"folders: wanted {wanted}; got {brief(str(path))}, which is not there"
            )
        found += sorted(path.glob("part-*.safetensors")) if path.is_dir() else [path]
    if not found:
        where = ", ".join(map(str, folders))
        raise ValueError(
            f"folders: wanted parts of a corpus (part-*.safetensors); got none in {where}"
        )
    return together([read_part(path) for path in found], found)


def together(reports: Sequence[Any], names: Sequence[Any]) -> Any:
    """The parts of all shards as one report; ``names`` say where each was found."""
    facts = [corpus_of(report, name) for report, name in zip(reports, names, strict=True)]
    n = facts[0]["shard"][1]
    at: dict[int, int] = {}
    for index, (fact, name) in enumerate(zip(facts, names, strict=True)):
        shard, of = fact["shard"]
        if of != n:
            raise ValueError(f"{name}: wanted a shard of {n}, as {names[0]}; got one of {of}")
        if shard in at:
            raise ValueError(
                f"shard {shard} of {n}: wanted it once; got it in {names[at[shard]]} and {name}"
            )
        at[shard] = index
        for part, (mine, other) in differing(facts[0]["what"], fact["what"]):
            raise ValueError(
                f"{name}: wanted the corpus of {names[0]}; got {part} {other!r} instead of {mine!r}"
            )
        if not fact["done"]["complete"]:
            raise ValueError(
                f"shard {shard} of {n}: wanted it whole; got {fact['done']['prompts']} prompts in "
                f"{name}: its own command goes on"
            )
        read = [{name: some["done"].get(name) for name in SHARED} for some in (facts[0], fact)]
        for part, (mine, other) in differing(*read):
            raise ValueError(
                f"{name}: wanted to have read what {names[0]} has; got {part} {other!r} instead of "
                f"{mine!r}: the data set changed"
            )
    missing = [str(i) for i in range(1, n + 1) if i not in at]
    if missing:
        raise ValueError(
            f"shards of {n}: wanted all; got none for {', '.join(missing)}: probe with "
            f"--shard {missing[0]}/{n}"
        )
    ordered = [reports[at[i]] for i in range(1, n + 1)]
    done = _summed([facts[at[i]]["done"] for i in range(1, n + 1)])
    ends = np.cumsum([0, *done["windows"]])
    placed = [
        report.placed(_places(done["windows"], ends, i, n), int(ends[-1]))
        for i, report in enumerate(ordered)
    ]
    whole: Any = reduce(lambda a, b: a.alongside(b), placed)
    given = [words for words in whole.model["given"] if words not in left_out(facts[at[1]]["done"])]
    told = {"given": [*given, *left_out(done)]}
    corpus = {**facts[0], "shard": [1, 1], "done": done}
    return replace(whole, model={**whole.model, **told, "corpus": corpus})


def _summed(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the shards of a corpus have read together."""
    n, groups = len(parts), parts[0]["groups"]
    added = {name: sum(done[name] for done in parts) for name in ("tokens", "prompts", "single")}
    windows = [parts[group % n]["windows"][group // n] for group in range(groups)]
    return {**parts[0], **added, "windows": windows}


def _places(
    windows: Sequence[int], ends: Int[np.ndarray, "edge"], shard: int, n: int
) -> Int[np.ndarray, "prompt"]:
    """Where the windows of a shard's groups, every n-th, lie among all windows."""
    mine = [np.arange(ends[g], ends[g + 1]) for g in range(shard, len(windows), n)]
    return np.concatenate([np.zeros(0, np.int64), *mine])
