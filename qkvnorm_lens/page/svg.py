"""Pictures of a report as inline SVG: colours come from the page, which can be dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup

from qkvnorm_lens.plots import HeadCells
from qkvnorm_lens.plots.charts import Axis, Chart, Line, Number, ticks_between

if TYPE_CHECKING:
    from collections.abc import Callable

# Viridis at ten equal steps (CC0, van der Walt and Smith).
_VIRIDIS = (
    "440154", "482878", "3e4989", "31688e", "26828e",
    "1f9e89", "35b779", "6ece58", "b5de2b", "fde725",
)  # fmt: skip
_DASH = {"--": "6 4", ":": "1.5 3.5", "-.": "6 3 1.5 3"}
_CLASSES = {
    "#0072B2": "blue", "#D55E00": "orange", "#009E73": "green", "#777777": "grey",
    "#CC79A7": "pink",
}  # fmt: skip
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 50


class _Box(NamedTuple):
    """A picture's size."""

    width: int
    height: int

    @property
    def right(self) -> int:
        """Where the axes end."""
        return self.width - _RIGHT

    @property
    def foot(self) -> int:
        """Where they stand."""
        return self.height - _BOTTOM


_BOXES = {"broad": _Box(720, 420), "narrow": _Box(360, 330)}


def element(name: str, content: Any = "", /, **attributes: Any) -> Markup:
    """One element; values are escaped, ``_`` in a name is a hyphen."""
    said = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), said, content)


def _round(x: Number) -> str:
    return f"{x:.2f}".rstrip("0").rstrip(".")


def colour(share: float) -> str:
    """Viridis at a share of the way."""
    at = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    low = min(int(at), len(_VIRIDIS) - 2)
    pair = [[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in _VIRIDIS[low : low + 2]]
    mixed = [round(a + (b - a) * (at - low)) for a, b in zip(*pair, strict=True)]
    return "#" + "".join(f"{value:02x}" for value in mixed)


def curve(chart: Chart, name: str) -> Markup:
    """A chart with log axes that have ends, as a figure with a legend.

    Twice, wide and narrow: the page's style shows the one that fits the window.

    Args:
        chart: lines, levels and marks are drawn.
        name: a description of the picture for those who can't see it.
    """
    both = (_picture(chart, name, box, shape) for shape, box in _BOXES.items())
    return Markup("").join(both) + _legend(chart.lines)


def _picture(chart: Chart, name: str, box: _Box, shape: str) -> Markup:
    across, up = _scale(chart, "x", box), _scale(chart, "y", box)
    clip_name = f"clip-{shape}-" + "".join(c for c in name if c.isalnum())
    parts = [*_grid(chart, across, up, box)]
    for height, _ in chart.levels:
        y = _round(up(height))
        parts.append(element("line", x1=_LEFT, x2=box.right, y1=y, y2=y, class_="level"))
    clipped = [part for line in chart.lines for part in _line(line, across, up, chart)]
    parts.append(element("g", Markup("").join(clipped), clip_path=f"url(#{clip_name})"))
    for mark in chart.marks:
        parts += _mark(mark.x, mark.y, mark.text, across, up)
    if chart.note:
        middle = {"x": box.width / 2, "y": box.height / 2}
        parts.append(element("text", chart.note, **middle, class_="note"))
    inside = element("rect", x=_LEFT, y=_TOP, width=box.right - _LEFT, height=box.foot - _TOP)
    clip = element("defs", element("clipPath", inside, id=clip_name))
    about = {"role": "img", "aria_label": name, "class_": f"curve {shape}"}
    content = clip + Markup("").join(parts)
    return element("svg", content, viewBox=f"0 0 {box.width} {box.height}", **about)


def _ends(axis: Axis) -> tuple[float, float]:
    assert axis.low is not None
    assert axis.high is not None
    return float(axis.low), float(axis.high)


def _scale(chart: Chart, which: str, box: _Box) -> Callable[[Number], float]:
    axis = chart.x if which == "x" else chart.y
    low, high = _ends(axis)
    begin, end = (_LEFT, box.right) if which == "x" else (box.foot, _TOP)

    def place(value: Number) -> float:
        """From a value to a pixel; far below the axis where there is no logarithm."""
        if axis.scale == "linear":
            share = (value - low) / (high - low)
        elif value > 0:
            share = math.log(value / low) / math.log(high / low)
        else:
            share = -1.0
        return begin + share * (end - begin)

    return place


def _ticks(axis: Axis) -> list[float]:
    low, high = _ends(axis)
    return ticks_between(low, high) if axis.scale == "log" else list(np.linspace(low, high, 6))


def _grid(
    chart: Chart, across: Callable[[Number], float], up: Callable[[Number], float], box: _Box
) -> Iterable[Markup]:
    foot = box.foot
    for value in _ticks(chart.x):
        x = _round(across(value))
        yield element("line", x1=x, x2=x, y1=_TOP, y2=foot, class_="grid")
        yield element("text", f"{value:g}", x=x, y=foot + 17, class_="tick mid")
    for value in _ticks(chart.y):
        y = _round(up(value))
        yield element("line", x1=_LEFT, x2=box.right, y1=y, y2=y, class_="grid")
        yield element("text", f"{value:g}", x=_LEFT - 8, y=float(y) + 4, class_="tick end")
    middle = (_LEFT + box.right) / 2
    yield element("text", chart.x.label, x=middle, y=box.height - 8, class_="axis mid")
    turn = f"translate(15 {(_TOP + foot) / 2}) rotate(-90)"
    yield element("text", chart.y.label, transform=turn, class_="axis mid")


def _line(
    line: Line, across: Callable[[Number], float], up: Callable[[Number], float], chart: Chart
) -> Iterable[Markup]:
    look = _CLASSES.get(line.colour.upper(), "")
    own = {} if look else {"style": f"--c: {line.colour}"}
    seen = [(float(x), float(y)) for x, y in zip(line.x, line.y, strict=True) if x > 0 and y > 0]
    floor = float(chart.y.low or 0.0)
    if line.dash != "none" and len(seen) > 1:
        path = "M" + "L".join(f"{_round(across(x))} {_round(up(y))}" for x, y in seen)
        dashes = {"stroke_dasharray": _DASH[line.dash]} if line.dash in _DASH else {}
        yield element("path", d=path, class_=f"line {look}", **dashes, **own)
    if line.error is not None:
        for x, y, error in zip(line.x, line.y, np.nan_to_num(line.error), strict=True):
            if x > 0 and y > 0 and error > 0:
                ends = [_round(up(max(y + side * error, floor / 10))) for side in (-1, 1)]
                at, bar = _round(across(float(x))), f"bar {look}"
                yield element("line", x1=at, x2=at, y1=ends[0], y2=ends[1], class_=bar, **own)
    if line.marker:
        for x, y in seen:
            if y < floor:
                continue
            said = element("title", f"{line.label}: {y:.3g}% at σ = {x:.3g}%")
            place = {"cx": _round(across(x)), "cy": _round(up(y)), "r": 3.6}
            yield element("circle", said, **place, class_=f"dot {look}", **own)


def _mark(
    x: Number,
    y: Number,
    text: str,
    across: Callable[[Number], float],
    up: Callable[[Number], float],
) -> Iterable[Markup]:
    at, height = across(x), up(y)
    points = " ".join(
        f"{_round(at + dx)},{_round(height + dy)}" for dx, dy in ((0, -6), (6, 0), (0, 6), (-6, 0))
    )
    said = element("title", f"{text}: {y:g}% at σ = {x:g}%")
    yield element("polygon", said, points=points, class_="mark")


def _legend(lines: Sequence[Line]) -> Markup:
    items = []
    for line in lines:
        look = _CLASSES.get(line.colour.upper(), "")
        inside = Markup("")
        if line.dash != "none":
            dashes = {"stroke_dasharray": _DASH[line.dash]} if line.dash in _DASH else {}
            inside += element("line", x1=0, x2=26, y1=6, y2=6, class_=f"line {look}", **dashes)
        if line.marker:
            inside += element("circle", cx=13, cy=6, r=3.6, class_=f"dot {look}")
        picture = element("svg", inside, viewBox="0 0 26 12", class_="key", aria_hidden="true")
        items.append(element("li", picture + line.label))
    return element("ul", Markup("").join(items), class_="legend")


def head_map(cells: HeadCells, min_rows: int) -> Markup:
    """Layers by heads, with a number in each cell and its meaning in a tooltip."""
    n_layers, n_heads = cells.sigma.shape
    wide = min(44.0, 880 / n_heads)
    high = min(26.0, max(14.0, 620 / n_layers))
    low_end, high_end = (math.log10(x) for x in cells.ends)
    left, top = 44.0, 6.0
    parts = []
    for (layer, head), value in np.ndenumerate(cells.sigma):
        y = top + (n_layers - 1 - layer) * high  # the first layer at the bottom
        x, few = left + head * wide, bool(cells.few[layer, head])
        parts.append(_cell(cells, layer, head, value, (x, y, wide, high), (low_end, high_end), few))
    step = 1 + (n_heads - 1) // 24
    foot = top + n_layers * high
    parts += [
        element("text", str(h), x=_round(left + (h + 0.5) * wide), y=foot + 15, class_="tick mid")
        for h in range(0, n_heads, step)
    ]
    for i in range(0, n_layers, 1 + (n_layers - 1) // 32):
        y = _round(top + (n_layers - i - 0.5) * high + 4)
        parts.append(element("text", cells.layers[i], x=left - 6, y=y, class_="tick end"))
    middle = left + n_heads * wide / 2
    parts.append(element("text", "head", x=_round(middle), y=foot + 32, class_="axis mid"))
    turn = f"translate(11 {_round(top + n_layers * high / 2)}) rotate(-90)"
    parts.append(element("text", "layer", transform=turn, class_="axis mid"))
    width, height = left + n_heads * wide + 6, foot + 40
    size = {"viewBox": f"0 0 {_round(width)} {_round(height)}"}
    # No number smaller than 8 pixels: a window without room for them scrolls.
    size["style"] = f"max-width: {_round(1.25 * width)}px; min-width: {_round(0.77 * width)}px"
    about = {"role": "img", "aria_label": "map of layers by heads", "class_": "map"}
    picture = element("svg", Markup("").join(parts), **size, **about)
    return element("div", picture, class_="wide") + _map_key(cells, min_rows)


def _cell(
    cells: HeadCells,
    layer: int,
    head: int,
    value: float,
    box: tuple[float, float, float, float],
    ends: tuple[float, float],
    few: bool,
) -> Markup:
    x, y, wide, high = box
    rows = int(cells.counts[layer, head])
    where = f"layer {cells.layers[layer]}, head {head}: "
    place = {"x": _round(x + 0.5), "y": _round(y + 0.5)}
    place |= {"width": _round(wide - 1), "height": _round(high - 1)}
    if math.isnan(value):
        return element("rect", element("title", where + "no sparse rows"), class_="none", **place)
    if math.isinf(value):
        said = f"{where}never; {rows:,} sparse rows"
        return element("rect", element("title", said), class_="never", **place)
    share = (math.log10(max(value, 1e-9)) - ends[0]) / (ends[1] - ends[0])
    fill = colour(share)
    said = f"{where}σ = {value:.3g}%; {rows:,} sparse rows"
    rect = element("rect", element("title", said), fill=fill, **place)
    if wide < 22:
        return rect
    text = f"{value:.2g}" if value < 9.95 else f"{value:.0f}"
    text = f"({text})" if few else text
    light = sum(int(fill[i : i + 2], 16) for i in (1, 3, 5)) < 380
    middle = {"x": _round(x + wide / 2), "y": _round(y + high / 2 + 3.5)}
    return rect + element("text", text, **middle, class_="num", fill="#fff" if light else "#000")


def _map_key(cells: HeadCells, min_rows: int) -> Markup:
    low, high = cells.ends
    ramp = ", ".join(f"#{c}" for c in _VIRIDIS)
    bar = element("span", "", class_="ramp", style=f"background: linear-gradient(90deg, {ramp})")
    items = [element("li", Markup("{} {} {}").format(f"σ = {low:.2g}%", bar, f"{high:.2g}%"))]
    if np.isinf(cells.sigma).any():
        items.append(element("li", element("span", "", class_="box never") + "never"))
    if np.isnan(cells.sigma).any():
        items.append(element("li", element("span", "", class_="box none") + "no sparse rows"))
    finite = np.isfinite(cells.sigma)
    if (cells.few & finite).any():
        items.append(element("li", f"( ) fewer than {min_rows} sparse rows"))
    return element("ul", Markup("").join(items), class_="legend")
