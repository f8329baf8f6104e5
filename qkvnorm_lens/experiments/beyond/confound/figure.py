"""The experiment's figure."""

from __future__ import annotations

import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.beyond.confound.measure import CELLS

SHOWN = (
    ("sparse share", core.PLAIN, "rows with a weight ≥ 0.95 (%)"),
    ("accuracy", "in distribution", "accuracy in distribution (%)"),
    ("accuracy", "extrapolation", "accuracy in extrapolation (%)"),
)


def figure(table: pd.DataFrame) -> core.Figure:
    """Cells against share of sparse rows and accuracy; dots: seeds, bars: 95% intervals."""
    fig, axes = core.panels(1, 3, width=4.4, height=3.6)
    names = core.groups(table)
    for ax, (quantity, variant, title) in zip(axes, SHOWN, strict=True):
        for x, group in enumerate(names):
            seeds = core.numbers(table, quantity, variant=variant, group=group)
            placement = table[table["group"] == group]["placement"].iloc[0]
            core.error_bar(
                ax, x, core.share(seeds), marker="o", color=core.COLOURS[placement], capsize=3
            )
            ax.plot([x + 0.15] * len(seeds), [100 * s for s in seeds], ".", color="grey")
        ax.set_xticks(range(len(names)), [CELLS.get(name, name) for name in names], fontsize=7)
        ax.set_title(title, fontsize=10)
        ax.grid(visible=True, axis="y", linewidth=0.5, alpha=0.6)
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, 0), min(high, 100))
    axes[0].set_ylim(bottom=0)
    return fig
