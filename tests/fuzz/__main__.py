"""Run many cases and say what fails: ``python -m tests.fuzz --n 500 --seed 3``."""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter, defaultdict
from dataclasses import fields, replace

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from jaxtyping import config as jaxtyping_config

from tests.fuzz import cases, judge
from tests.fuzz.cases import Case


def verdict(case: Case, *, fresh: bool = False) -> str:
    """ "right", "refused", or the failure in words."""
    try:
        model = judge.model_of(case, fresh=fresh)
        return judge.judge(case, model=model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def kind(said: str) -> str:
    """What a failure is, without its numbers."""
    import re

    return re.sub(r"[-\d\.\[\]\s]+", " ", said.split("; the model has")[0])[:90]


def simplest(case: Case, said: str) -> tuple[Case, str]:
    """The same failure with as many fields at their plain value as it needs."""
    if verdict(case, fresh=True).startswith(("right", "refused: ")):
        return case, f"{said} (only after other cases)"
    changed = True
    while changed:
        changed = False
        for f in fields(case):
            if getattr(case, f.name) == f.default:
                continue
            try:
                other = cases.plain(replace(case, **{f.name: f.default}))
                if other == case:
                    continue
                now = verdict(other, fresh=True)
            except Exception:
                continue
            fine = now.startswith(("right", "refused: "))
            if not fine and now.split(":")[0] == said.split(":")[0]:
                case, said, changed = other, now, True
    return case, said


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--few", action="store_true", help="of some models, which are soon built")
    parser.add_argument("--known", action="store_true", help="known faults too")
    parser.add_argument("--each", type=int, default=1, help="reductions of each kind of failure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    jaxtyping_config.update("jaxtyping_disable", True)
    counts: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    failures: dict[str, list[tuple[Case, str]]] = defaultdict(list)
    started = time.perf_counter()

    @seed(options.seed)
    @settings(
        max_examples=options.n,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases.cases(few=options.few))
    def collect(case: Case) -> None:
        if judge.known(case) and not options.known:
            counts["known"] += 1
            return
        said = verdict(case)
        fine = said.startswith(("right", "refused: "))
        counts[said.split(":")[0] if fine else "failed"] += 1
        refused[kind(said)] += said.startswith("refused")
        if not fine:
            failures[kind(said)].append((case, said))

    collect()
    took = time.perf_counter() - started
    print(dict(counts), f"{took:.0f} s, {len(failures)} kinds of failure")
    for name, count in refused.most_common():
        print(f"{count:5} {name}" if count else "")
    for name, found in sorted(failures.items(), key=lambda x: -len(x[1])):
        print(f"\n{len(found)} x {name}")
        for case, said in sorted(found, key=lambda x: len(repr(x[0])))[: options.each]:
            small, said = simplest(case, said)
            print(f"    {small!r}\n        {said[:600]}", flush=True)
    if failures or not counts["right"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
