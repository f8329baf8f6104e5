"""What a run of `benchmarks.corpus` says: speed, memory, and whether its numbers are right."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks._side_by_side import Row

WANTED_MIB, WANTED_SPEED = 150, 0.9
_AFTER = 60.0  # processor seconds in which a process loads, checks the model and gets its arrays
_WINDOWS, _ROWS = 48, 40  # that are measured again


def samples(out: Path) -> list[Row]:
    """What was seen of each process, in order."""
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def passes(out: Path) -> list[tuple[int, float, float]]:
    """Tokens, processor time and peak memory of each plain pass."""
    found = []
    for path in sorted(out.glob("plain-*.log")):
        for line in path.read_text().splitlines():
            if line.startswith("[") and line.endswith("]"):
                found.append(tuple(json.loads(line)))
    return found


def speeds(out: Path) -> Row:
    """Tokens a second of processor time, of shards and of plain passes.

    A shard's are those between the first and the last state that it saved in a session.
    """
    tokens = seconds = 0.0
    states: dict[tuple[str, int], list[Row]] = {}
    for seen in samples(out):
        if "tokens" in seen:
            mine = states.setdefault((seen["name"], seen["session"]), [])
            if not mine or mine[-1]["tokens"] != seen["tokens"]:
                mine.append(seen)
    for mine in states.values():
        saved = mine[1:]  # the first is what an earlier session left
        if len(saved) > 1:
            tokens += saved[-1]["tokens"] - saved[0]["tokens"]
            seconds += saved[-1]["cpu"] - saved[0]["cpu"]
    if not seconds:
        raise SystemExit("speed: wanted a run long enough for three saved states; got fewer")
    plain = passes(out)
    of_plain = sum(n for n, _, _ in plain) / sum(took for _, took, _ in plain)
    return {
        "tokens between states": int(tokens),
        "probe, tokens per CPU second": tokens / seconds,
        "plain passes, tokens per CPU second": of_plain,
        "probe / plain": tokens / seconds / of_plain,
    }


def memory(out: Path, ended: float) -> Row:
    """Peaks, and whether a process grew after its first minutes of work."""
    shards = [seen for seen in samples(out) if "tokens" in seen]
    processes: dict[tuple[str, int], list[Row]] = {}
    for seen in shards:
        processes.setdefault((seen["name"], seen["session"]), []).append(seen)
    early, late, grown = [], [], []
    for mine in processes.values():
        if mine[-1]["cpu"] > 8 * _AFTER:
            seen = [s for s in mine if 2 * _AFTER <= s["cpu"] < 4 * _AFTER]
            early += [s["rss"] for s in seen]
            late += [s["rss"] for s in mine if s["cpu"] >= mine[-1]["cpu"] / 2]
            grown.append(mine[-1]["peak"] - seen[-1]["peak"])
    plain = max(peak for _, _, peak in passes(out))
    peak = max(seen["peak"] for seen in shards)
    return {
        "probe, peak MiB": peak,
        "plain pass with logits, peak MiB": plain,
        "plain pass to the last attention, peak MiB": ended,
        "over the plain pass, MiB": peak - plain,
        "over the pass to the last attention, MiB": peak - ended,
        "median in the third and fourth minute, MiB": median(early) if early else None,
        "median in the second half, MiB": median(late) if late else None,
        "growth of the peak after four minutes, MiB": max(grown, default=None),
    }


def checked(model: Any, folder: Path, out: Path, context: int, batch: int, of: int) -> Row:
    """The parts' numbers against other computations.

    Raises:
        SystemExit: they do not agree.
    """
    import hooks
    from hooks.corpus.part import read_part

    parts = [(i, read_part(path)) for i, path in _parts(out, of)]
    rng = random.Random(0)
    z, rows, examined, single = [], 0, 0, 0
    for shard, report in parts:
        counts = report.examined[..., 0] + report.single_key[..., 0]
        read = report.n_tokens
        if not (counts == read).all():
            raise SystemExit(f"shard {shard}: {read} tokens have other numbers of rows")
        examined, single = examined + read, single + len(report.tokens)
        chosen = {*rng.sample(range(len(report.tokens)), min(_WINDOWS, len(report.tokens)))}
        table = report.table
        nearest = np.argsort(table.half_width, kind="stable")[:_ROWS]
        needed = chosen | {int(p) for p in table.prompt[nearest]}
        windows = _windows(model, folder, context, batch, (shard, of), needed)
        again = hooks.collapse_probe(
            model,
            [windows[p] for p in sorted(chosen)],
            sigmas=report.settings.sigmas,
            strict=False,
            batch_size=batch,
            progress=False,
        )
        mine, other = (r.to_frame("model") for r in (report, again))
        # Of so few windows the sample's own error is no guide: where the rate is 1e-7 it is zero.
        error = mine["se_prompts"] * np.sqrt(len(report.tokens) / len(chosen))
        z.append(float((abs(mine["loose"] - other["loose"]) / error).max()))
        rows += _same_rows(model, table, nearest, windows)
    if max(z) > 4:
        raise SystemExit(f"rates of windows drawn again are {max(z):.1f} standard errors off")
    return {
        "tokens": examined,
        "windows": single,
        "windows drawn and probed alone, each shard": _WINDOWS,
        "their rates' largest distance, standard errors": max(z),
        "most fragile rows found again in plain passes": rows,
    }


def _parts(out: Path, of: int) -> list[tuple[int, Path]]:
    paths = [(i, out / f"part-{i:05}-of-{of:05}.safetensors") for i in range(1, of + 1)]
    return [(i, path) for i, path in paths if path.exists()]


def _windows(
    model: Any, folder: Path, context: int, batch: int, shard: tuple[int, int], wanted: set[int]
) -> dict[int, list[int]]:
    """Ids of these windows of a shard."""
    from hooks.corpus.cut import Cut
    from hooks.corpus.read import Documents

    cut = Cut(
        model,
        Documents(folder, None, None),
        context=context,
        batch_size=batch,
        most=None,
        prepend_bos=None,
        shard=shard,
    )
    found: dict[int, list[int]] = {}
    at = 0
    for block in cut.blocks():
        for window in block.windows:
            if at in wanted:
                found[at] = window.ids
            at += 1
        if at > max(wanted):
            break
    return found


def _same_rows(
    model: Any, table: Any, nearest: Sequence[int], windows: Mapping[int, list[int]]
) -> int:
    """Whether plain passes show the rows: sparse, their token, and the critical half-width.

    min_t (s_* - s_t) / (|s_*| + |s_t|): the scores have no bias in this model.
    """
    import torch

    for row in nearest:
        layer, head = int(table.layer[row]), int(table.head[row])
        names = [f"blocks.{layer}.attn.hook_{name}" for name in ("attn_scores", "pattern")]
        with torch.no_grad():
            ids = torch.tensor([windows[int(table.prompt[row])]])
            _, cache = model.run_with_cache(ids, names_filter=names)
        query, key = int(table.query[row]), int(table.key[row])
        scores, pattern = (cache[name][0, head, query, : query + 1].double() for name in names)
        star = scores[key]
        widths = (star - scores) / (star.abs() + scores.abs())
        width = float(widths[torch.arange(query + 1) != key].min())
        near = abs(width - float(table.half_width[row])) <= 1e-3 * width
        if int(pattern.argmax()) != key or float(pattern.max()) < 0.949 or not near:
            raise SystemExit(f"row {row} of the table is not what a plain pass shows")
    return len(nearest)


def figure(out: Path, ended: float, path: Path) -> None:
    """Resident memory over processor time, in the longest session, above plain passes' peaks."""
    from qkvnorm_lens.plots import charts, save

    every = samples(out)
    session = max({s["session"] for s in every}, key=lambda n: _work(every, n))
    mine = [s for s in every if s["session"] == session]
    lines = []
    for i, name in enumerate(sorted({s["name"] for s in mine if "tokens" in s})):
        seen = [s for s in mine if s["name"] == name]
        x, y = (np.array([s[column] for s in seen]) for column in ("cpu", "rss"))
        lines.append(charts.Line(x / 60, y, f"probe, {name}", charts.RUNS[i]))
    ends = np.array([0, max(float(line.x.max()) for line in lines)])
    peaks = [max(peak for _, _, peak in passes(out)), ended]
    labels = ("plain passes with logits, peak", "plain passes to the last attention, peak")
    for peak, label, dash in zip(peaks, labels, ("--", ":"), strict=True):
        lines.append(charts.Line(ends, np.full(2, peak), label, "0.35", dash))
    chart = charts.Chart(
        x=charts.Axis("processor time of the process (minutes)", low=0),
        y=charts.Axis("resident memory (MiB)", low=0),
        lines=lines,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save(charts.draw([chart], None, "matplotlib", (6.4, 3.4)), path)


def _work(every: Sequence[Row], session: int) -> float:
    return max(s["cpu"] for s in every if s["session"] == session and "tokens" in s)
