"""The other measures against a forward pass of the same prompts, and against what each must do.

    python -m benchmarks.measures [--cases smollm2 addition gpt2] [--repeats 3] [--json FILE]

Each measure and what it can't do without (its floor: passes, decompositions) run in one process,
turn and turn about; ratios are taken within a repeat. The reports of the timed runs are checked:
interference against whole passes of some layers, the others against NumPy on `run_with_cache` or
against passes by hand.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._side_by_side import (
    CASES,
    CLOCKS,
    THREADS,
    Case,
    Row,
    interleaved,
    machine,
    print_table,
    ratio_row,
    spread,
    write_json,
)

SHAPES = {"smollm2": (8, 128), "addition": (128, 21), "gpt2": (8, 128)}
ONE_PASS = ("interference", "rank_profile", "spectral_gap", "spread")
MEASURES = (*ONE_PASS, "symmetry_gap")  # its floor is 44 passes: of a small model
FORWARD, FLOOR = "bridge, forward with logits", "the floor of "
MOST_PASSES, MOST_OF_FLOOR = 3.0, 2.0
FIRST_PASSES = 6.0


class Measured:
    """A model on some prompts: what is timed, what it gave, and whether that is right."""

    def __init__(self, case: Case, names: list[str], clock: str) -> None:
        import hooks

        self.case, self.names = case, names
        self.sites = hooks.attention_sites(case.bridge)
        self.reports: dict[str, Any] = {}
        self.first: dict[str, float] = {}
        for name in names:
            began = CLOCKS[clock]()
            self.run(name)
            self.first[name] = CLOCKS[clock]() - began
        self.cache = self._cached()

    def run(self, name: str) -> None:
        import hooks

        options = {} if name == "symmetry_gap" else {"batch_size": len(self.case.tokens)}
        call = getattr(hooks, name)
        self.reports[name] = call(self.case.bridge, self.case.tokens, progress=False, **options)

    def _cached(self) -> Any:
        import torch

        names = [s.pattern for s in self.sites] + [f"{s.block}.hook_in" for s in self.sites]
        with torch.no_grad():
            return self.case.bridge.run_with_cache(self.case.tokens, names_filter=names)[1]

    # -- what a measure can't do without -----------------------------------------------------

    def floor(self, name: str) -> None:
        if name != "symmetry_gap":
            self.case.bridge(self.case.tokens)
        if name in ("rank_profile", "spectral_gap", "symmetry_gap"):
            getattr(self, f"_{name}")()

    def _rank_profile(self) -> None:
        """Both spectra of each prompt's tokens at each site, from one QR."""
        import torch

        x = self.cache[f"{self.sites.layers[-1].block}.hook_in"].double()
        for _ in self.reports["rank_profile"].settings.sites:
            for one in x:
                root = torch.linalg.qr(one.mT if len(one) <= one.shape[1] else one, mode="r").R
                torch.linalg.svdvals(root)
                torch.linalg.svdvals(root[:, 1:])

    def _spectral_gap(self) -> None:
        import torch

        for sites in self.sites:
            for _ in ("A", "A - U"):
                torch.linalg.svdvals(self.cache[sites.pattern].double())

    def _symmetry_gap(self) -> None:
        """A pass for each permutation, for the prompt itself and for both tries of rounding."""
        settings = self.reports["symmetry_gap"].settings
        rows = self.case.tokens.repeat_interleave(settings.permutations + 3, 0)
        for _ in settings.variants:
            for some in rows.split(16):
                self.case.bridge(some)

    # -- whether it is right -----------------------------------------------------------------

    def check(self) -> Row:
        """How far each timed report is from another computation; what is too far raises."""
        found = {name: float(getattr(self, f"_check_{name}")()) for name in self.names}
        for name, off in found.items():
            if not off < 1e-3:
                raise SystemExit(f"{name}: off by {off:.2g} from another computation")
        return {f"{name}: apart by": off for name, off in found.items()}

    def _check_interference(self) -> float:
        """Share of the moved rows of two layers that whole passes count otherwise."""
        import hooks

        report, bridge = self.reports["interference"], self.case.bridge
        some = [0, len(self.sites) // 2]
        handles = [bridge.blocks[i].register_forward_hook(lambda *given: None) for i in some]
        n, tokens = len(self.case.tokens), self.case.tokens
        honest = hooks.interference(bridge, tokens, layers=some, batch_size=n, progress=False)
        for handle in handles:
            handle.remove()
        apart = np.abs(report.loose[:, :, some] - honest.loose).sum()
        return float(apart / max(1, honest.loose.sum()))

    def _check_rank_profile(self) -> float:
        report, middle = self.reports["rank_profile"], self.sites.layers[len(self.sites) // 2]
        at = next(
            i
            for i, site in enumerate(report.settings.sites)
            if (site.layer, site.site) == (middle.layer, "in")
        )
        x = self.cache[f"{middle.block}.hook_in"].double().numpy()
        s = np.linalg.svd(x, compute_uv=False)
        wanted = (s**2).sum(1) / s[:, 0] ** 2
        got = report.numbers[:, at, 0, 2]  # the stable rank of all tokens
        return float(np.abs(got / wanted - 1).max())

    def _check_spectral_gap(self) -> float:
        report, middle = self.reports["spectral_gap"], len(self.sites) // 2
        pattern = self.cache[self.sites.layers[middle].pattern].double().numpy()
        wanted = np.linalg.svd(pattern, compute_uv=False)[..., : report.settings.k]
        return float(np.abs(report.singular[middle] - wanted).max())

    def _check_spread(self) -> float:
        report, middle = self.reports["spread"], len(self.sites) // 2
        x = self.cache[f"{self.sites.layers[middle].block}.hook_in"].double().numpy()
        wanted = np.linalg.norm(x, axis=-1).ravel()
        return float(np.abs(report.norms[middle][0] / wanted - 1).max())

    def _check_symmetry_gap(self) -> float:
        """The first prompt's total variation under its first permutation, by two passes."""
        import torch

        report, ids = self.reports["symmetry_gap"], self.case.tokens[0]
        order = torch.from_numpy(report.orders[0][0])
        with torch.no_grad():
            p, q = (
                self.case.bridge(x[None])[0, -1].double().softmax(-1) for x in (ids, ids[order])
            )
        return abs(float(0.5 * (p - q).abs().sum()) - float(report.tv[0, 0, 0]))


def run_case(name: str, names: list[str], repeats: int, clock: str) -> Row:
    """One case: table, checks, targets."""
    case = CASES[name](*SHAPES[name])
    measured = Measured(case, names, clock)
    lines: dict[str, Callable[[], object]] = {FORWARD: lambda: case.bridge(case.tokens)}
    for each in names:
        lines[each] = lambda each=each: measured.run(each)
        lines[FLOOR + each] = lambda each=each: measured.floor(each)
    seconds = interleaved(lines, repeats, clock)
    forward = spread(seconds[FORWARD])[0]
    table = [ratio_row(what, values, seconds[FORWARD]) for what, values in seconds.items()]
    targets = []
    for row in table:
        each = row["what"]
        if each not in names:
            continue
        row["first call, ratio"] = measured.first[each] / forward
        of_floor = [a / b for a, b in zip(seconds[each], seconds[FLOOR + each], strict=True)]
        row["times its floor"] = spread(of_floor)[0]
        wanted = [("times its floor", MOST_OF_FLOOR, row["times its floor"])]
        if each == "interference":
            wanted = [
                ("forward passes", MOST_PASSES, row["ratio"]),
                ("forward passes, first call", FIRST_PASSES, row["first call, ratio"]),
            ]
        if each in ("interference", "spread") and name == "addition":
            wanted = []  # Python's overhead rules there
        targets += [
            {
                "target": f"{case.name}: {each}, {what}",
                "wanted": f"<= {most:g}",
                "got": got,
                "met": "yes" if got <= most else "no",
            }
            for what, most, got in wanted
        ]
    checks = measured.check()
    shape = f"{len(case.tokens)} x {case.tokens.shape[1]} tokens"
    print(f"\n{case.name}, {shape}; {repeats} repeats, {clock} clock")
    for rows in (table, targets, [{"check": k, "value": v} for k, v in checks.items()]):
        print_table(rows)
    return {"model": case.name, "shape": shape, "clock": clock, "table": table, "checks": checks,
            "targets": targets}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--measures", nargs="*", choices=MEASURES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    cases = []
    for name in options.cases:
        names = options.measures or (MEASURES if name == "addition" else ONE_PASS)
        cases.append(run_case(name, list(names), options.repeats, options.clock))
    results: dict[str, Any] = {f"{c['model']}, {c['shape']}": c["table"] for c in cases}
    results["targets"] = [row for c in cases for row in c["targets"]]
    results["about"] = {**machine(), "took s": math.ceil(time.perf_counter() - began)}
    results["checks"] = {c["model"]: c["checks"] for c in cases}
    write_json(options.json, results)


if __name__ == "__main__":
    main()
