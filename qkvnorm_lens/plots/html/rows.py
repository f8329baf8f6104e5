"""The kept rows of a report as data and as strips of tokens, before and after noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from markupsafe import Markup

from qkvnorm_lens.plots.html.safe import token, visible

if TYPE_CHECKING:
    from hooks import CollapseReport

_Text = TypeVar("_Text", bound=str)

MOST_TOKENS = 48
"""A view shows no more tokens than this: those that carry weight, and their neighbours."""
_LEAST_WEIGHT = 0.005
_MATRIX_TOKENS, _MATRIX_WEIGHT = 16, 0.02  # matrices are square: few tokens, or all of it is empty


@dataclass(frozen=True, eq=False)
class ShownRow:
    """One kept row with its tokens; positions are those of the keys that are shown."""

    label: str
    prompt: int
    query: int
    query_token: str
    key: int
    rival: int
    lands: int
    sigma: float
    shown_sigma: float
    sink: bool
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    clean: np.ndarray
    noisy: np.ndarray

    @property
    def moved(self) -> bool:
        """Whether there is a noisy row to show."""
        return self.lands >= 0

    def key_token(self, position: int) -> str:
        """The token at a position that is shown."""
        return self.tokens[self.positions.index(position)]

    def sentence(self) -> str:
        """What happens, on one line."""
        return self._words(str, lambda text: f"'{visible(text)}'")

    def markup(self) -> Markup:
        """What happens, as markup for a page."""
        return self._words(Markup, lambda text: Markup("'{}'").format(token(text)))

    def _words(self, kind: type[_Text], quote: Callable[[str], _Text]) -> _Text:
        query, key = quote(self.query_token), quote(self.key_token(self.key))
        said = kind("{}, row {} at {}: attends to {} at {}")
        if not self.moved:
            said = kind(said + "; none of the draws moves it")
            return kind(said.format(self.label, query, self.query, key, self.key))
        said = kind(said + ", at σ = {:.3g}% at {} at {}")
        lands, sigma = quote(self.key_token(self.lands)), 100 * self.shown_sigma
        return kind(
            said.format(self.label, query, self.query, key, self.key, sigma, lands, self.lands)
        )


def shown_rows(
    report: CollapseReport, n: int | None = None, *, content: bool = False
) -> list[ShownRow]:
    """The kept rows, most fragile first; equal ones (prompts that begin alike) once.

    Raises:
        ValueError: a negative ``n``.
    """
    if n is not None and n < 0:
        raise ValueError(f"n: wanted an integer >= 0; got {n}")
    frame, kept = report.kept_rows(), report.kept
    seen: set[tuple[Any, ...]] = set()
    rows: list[ShownRow] = []
    for i, row in enumerate(frame.to_dict("records")):
        clean, noisy = kept.weights(i)
        same = (row["label"], row["query_pos"], row["query_token"], clean.tobytes())
        if same in seen or (content and row["sink"]):
            continue
        seen.add(same)
        positions = _chosen(clean, noisy, row)
        label, prompt = str(row["label"]), int(row["prompt"])
        tokens = _key_tokens(report, label, prompt, len(clean))
        key, rival, lands = (int(row[f"{which}_pos"]) for which in ("key", "jump", "lands"))
        rows.append(
            ShownRow(
                label,
                prompt,
                int(row["query_pos"]),
                str(row["query_token"]),
                key,
                rival,
                lands,
                float(row["sigma"]),
                float(row["shown_sigma"]),
                bool(row["sink"]),
                tuple(positions),
                tuple(tokens[at] for at in positions),
                clean[positions],
                noisy[positions],
            )
        )
    return rows if n is None else rows[:n]


def _key_tokens(report: CollapseReport, label: str, prompt: int, n: int) -> list[str]:
    """The tokens of a layer's keys; positions where the input is not text."""
    return [report.key_token(label, prompt, i) for i in range(n)]


def _chosen(clean: np.ndarray, noisy: np.ndarray, row: Mapping[Any, Any]) -> list[int]:
    """Positions to show: all of a short row; of a long one where weight is, and neighbours."""
    n = len(clean)
    if n <= MOST_TOKENS:
        return list(range(n))
    musts = {int(row[c]) for c in ("key_pos", "jump_pos", "lands_pos")} | {
        min(int(row["query_pos"]), n - 1)
    }
    weight = np.nan_to_num(np.maximum(clean, noisy))
    chosen = {at for at in musts if at >= 0}
    for at in np.argsort(-weight, kind="stable"):
        near = {int(at) + step for step in (-1, 0, 1)} & set(range(n))
        if weight[at] < _LEAST_WEIGHT or len(chosen | near) > MOST_TOKENS:
            break
        chosen |= near
    for step in range(1, 4):  # some neighbours, where there is room
        more = {at + by for at in musts for by in (-step, step)} & set(range(n))
        chosen |= more if len(chosen | more) <= MOST_TOKENS else set()
    return sorted(chosen)


def strip(row: ShownRow) -> Markup:
    """Two lines of tokens, shaded by weight: before, and after noise."""
    lines = [_line(row, row.clean, "before", row.key)]
    if row.moved:
        lines.append(_line(row, row.noisy, f"σ = {100 * row.shown_sigma:.3g}%", row.lands))
    return Markup('<div class="strip">{}</div>').format(Markup("").join(lines))


def _line(row: ShownRow, weights: np.ndarray, name: str, top: int) -> Markup:
    cells, last = [], -1
    for at, text, weight in zip(row.positions, row.tokens, weights, strict=True):
        if at != last + 1:
            cells.append(Markup('<span class="gap" title="tokens left out">⋯</span>'))
        last = at
        chosen, w = " top" if at == top else "", float(weight)
        cell = Markup('<span class="tok{}" style="--w:{}" title="{}">{}</span>')
        title = f"position {at}: {100 * w:.3g}%"
        cells.append(cell.format(chosen, f"{w:.3f}", title, token(text)))
    return Markup(
        '<div class="line"><span class="when">{}</span><span class="toks">{}</span></div>'
    ).format(name, Markup("").join(cells))


@dataclass(frozen=True)
class Fragile:
    """A token as a query: the least noise that can move one of its rows, and which row that is."""

    sigma: float
    label: str
    key: int
    rival: int


def fragile_tokens(report: CollapseReport, prompt: int) -> dict[int, Fragile]:
    """By position, over all heads of the report's table; positions without such a row are absent.

    In encoder-decoders: only of the decoder's own tokens (self- and cross-attention).
    """
    table = report.table
    width = table.half_width
    found: dict[int, Fragile] = {}
    mine = np.flatnonzero((table.prompt == prompt) & np.isfinite(width))
    labels = report.model["labels"]
    for i in mine[np.argsort(-width[mine], kind="stable")]:  # the nearest is written last
        label = labels[table.layer[i]]
        if report.decoder_tokens and label[0] not in "DX":
            continue
        sigma, head = float(width[i]) / math.sqrt(3), f"{label}H{table.head[i]}"
        key, rival = int(table.key[i]), int(table.rival[i])
        found[int(table.query[i])] = Fragile(sigma, head, key, rival)
    return found


Ends = tuple[float, float]
"""The least and the greatest sigma of a colour scale."""


def fragile_ends(report: CollapseReport, prompts: Sequence[int]) -> Ends:
    """Of the tokens of these prompts that have a colour."""
    found = [f.sigma for p in prompts for f in fragile_tokens(report, p).values()]
    return (min(found), max(found)) if found else (math.nan, math.nan)


def fragile_scale(ends: Ends) -> Markup:
    """What the colours of :func:`fragile_prompt` mean; empty where no token has one."""
    if math.isnan(ends[0]):
        return Markup("")
    said = Markup(
        '<p class="scale"><span>a row can move from σ = {:.3g}%</span> <span class="ramp"></span> '
        "<span>σ = {:.3g}%</span></p>"
    )
    return said.format(*(100 * end for end in ends))


def fragile_prompt(
    report: CollapseReport, prompt: int, ends: Ends, most: int | None = None
) -> Markup:
    """A prompt's tokens, up to a limit, by the noise that can move one of their rows."""
    found = fragile_tokens(report, prompt)
    tokens = (report.decoder_tokens or report.tokens)[prompt]
    cells = []
    for at, text in enumerate(tokens[:most]):
        if at not in found:
            cells.append(Markup('<span class="ftok">{}</span>').format(token(text)))
            continue
        f = found[at]
        title = (
            f"position {at}: {f.label} can move from σ = {100 * f.sigma:.3g}% "
            f"(from position {f.key} to {f.rival})"
        )
        cell = Markup('<span class="ftok" style="--w:{}" title="{}">{}</span>')
        cells.append(cell.format(f"{shade(f.sigma, ends):.3f}", title, token(text)))
    if most is not None and len(tokens) > most:
        cells.append(Markup('<span class="gap">⋯ {} more</span>').format(len(tokens) - most))
    return Markup(
        '<div class="fprompt"><span class="when">prompt {}</span><p class="ftext">{}</p></div>'
    ).format(prompt, Markup("").join(cells))


def shade(sigma: float, ends: Ends) -> float:
    """1 at the least sigma, 0.1 at the greatest; logarithmic between."""
    low, high = (math.log(max(end, 1e-6)) for end in ends)
    share = (math.log(max(sigma, 1e-6)) - low) / max(high - low, 1e-9)
    return 1 - 0.9 * float(np.clip(share, 0, 1))


def circuits(rows: Sequence[ShownRow], report: CollapseReport) -> list[dict[str, Any]]:
    """Data of circuitsvis's ``AttentionHeads``: a view per prompt, two matrices per head.

    A matrix holds only the kept rows; the others are empty. ``▸`` marks the tokens whose rows move,
    a number in brackets is a token's position in its prompt, ``⋯`` stands for tokens left out.
    """
    views = []
    for prompt in dict.fromkeys(row.prompt for row in rows):
        mine = [row for row in rows if row.prompt == prompt and row.moved]
        # Only self-attention has one sequence of tokens for queries and keys.
        mine = [row for row in mine if row.label[0] != "X"]
        mine = [row for row in mine if row.label[0] == mine[0].label[0]] if mine else []
        if not mine:
            continue
        at = with_gaps(_of_matrix(mine))
        place = {p: i for i, p in enumerate(at) if isinstance(p, int)}
        tokens = _key_tokens(report, mine[0].label, prompt, max(place) + 1)
        moving = {row.query for row in mine}
        shown = [
            f"{'▸' if p in moving else ''}{visible(tokens[p], 16)} ({p})"
            if isinstance(p, int)
            else p
            for p in at
        ]
        names, matrices = [], []
        for label in dict.fromkeys(row.label for row in mine):
            of_head = [row for row in mine if row.label == label]
            strongest = max(row.shown_sigma for row in of_head)
            pair = np.zeros((2, len(at), len(at)))
            for row in of_head:
                for side, weights in enumerate((row.clean, row.noisy)):
                    for p, weight in zip(row.positions, weights, strict=True):
                        if p in place:
                            pair[side, place[row.query], place[p]] = weight
            names += [f"{label} before", f"{label} σ ≤ {100 * strongest:.3g}%"]
            matrices += np.round(pair, 3).tolist()
        views.append(
            {
                "prompt": prompt,
                "tokens": shown,
                "attentionHeadNames": names,
                "attention": matrices,
                "maskUpperTri": all(p <= row.query for row in mine for p in row.positions),
            }
        )
    return views


def _of_matrix(rows: Sequence[ShownRow]) -> list[int]:
    """Positions of several rows in one matrix: all of a short prompt, else where weight is."""
    everything = sorted({p for row in rows for p in (*row.positions, row.query)})
    if everything[-1] < _MATRIX_TOKENS:
        return everything
    chosen = {p for row in rows for p in (row.query, row.key, row.lands)}
    weighed = (
        (float(max(pair)), p)
        for row in rows
        for p, *pair in zip(row.positions, row.clean, row.noisy, strict=True)
    )
    for weight, p in sorted(weighed, reverse=True):
        if weight < _MATRIX_WEIGHT or len(chosen) >= _MATRIX_TOKENS:
            break
        chosen.add(p)
    return sorted(chosen)[:MOST_TOKENS]


def with_gaps(positions: Sequence[int]) -> list[int | str]:
    """Positions, and between them words for those that are left out."""
    out: list[int | str] = []
    for last, at in zip([-1, *positions], positions, strict=False):
        if at > last + 1:
            first = last + 1
            out.append(f"⋯ {first}" if first == at - 1 else f"⋯ {first} to {at - 1}")
        out.append(at)
    return out
