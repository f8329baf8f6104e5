"""Parts of HTML pages: text that is safe to show, data that is safe to embed."""

from qkvnorm_lens.plots.html.look import style
from qkvnorm_lens.plots.html.offline import LOADER, library
from qkvnorm_lens.plots.html.rows import (
    ShownRow,
    circuits,
    fragile_ends,
    fragile_prompt,
    fragile_scale,
    shown_rows,
    strip,
    with_gaps,
)
from qkvnorm_lens.plots.html.safe import island, policy, script, token, visible

__all__ = [
    "LOADER", "ShownRow", "circuits", "fragile_ends", "fragile_prompt", "fragile_scale", "island",
    "library", "policy", "script", "shown_rows", "strip", "style", "token", "visible", "with_gaps",
]  # fmt: skip
