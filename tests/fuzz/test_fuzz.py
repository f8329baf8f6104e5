"""Inputs x modes x calls, as people combine them, against the model's own numbers.

`tests/fuzz/` says what is combined (`cases.py`) and what is compared (`judge.py`), and
`tests/oracles/forward.py`, in plain Hugging Face, what is right. ``python -m tests.fuzz --n 500
--seed 7`` tries others and says what fails, each kind with as few options as it needs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.fuzz import cases, judge, zoo
from tests.fuzz.cases import Case
from tests.oracles import forward as oracle, probability as reference
from tests.support.marks import slowly
from tests.support.paths import ROOT
from tests.support.watching import shape_checks_off

CHUNKS, EACH = 4, 500

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True, scope="module")
def unchecked() -> Iterator[None]:
    """Shape checks take most of a small call's time."""
    with shape_checks_off():
        yield


def fuzz(*options: str) -> None:
    """In a process of its own: a third of the time here would go into checks of shapes."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("n", [10, *slowly(24)])
def test_a_few_combinations(n: int) -> None:
    fuzz("--few", "--n", str(n))


@pytest.mark.long
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_many_combinations(chunk: int) -> None:
    fuzz("--n", str(EACH), "--seed", str(chunk))


# -- what the fuzzer itself must do -----------------------------------------------------------


@pytest.mark.parametrize("call", cases.CALLS)
def test_a_bridge_of_other_weights_is_noticed(call: str) -> None:
    """The oracle's copy stays as it was: whatever is measured, it must be seen."""
    case = Case(family="gpt2", call=call, seed=1)
    model = zoo.build("gpt2")
    assert judge.judge(case, model=model) == "right"
    for weight in ("ln_1.weight", "wte.weight"):
        found = [
            p
            for name, p in model.bridge.original_model.named_parameters()
            if name.replace("_original_component.", "").endswith(weight)
        ]
        found[0].data.mul_(1.3)
    with pytest.raises(judge.Wrong):
        judge.judge(case, model=model)


@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_oracle_is_what_the_bridge_computes(family: str, side: str) -> None:
    """The user's own call of the bridge, of a padded batch: logits at the real positions."""
    case = Case(family=family, call="applied", lengths=(9, 7), side=side, mask="int", sigma=0.0)
    assert judge.judge(case) == "right"


def test_enough_rows_are_sparse() -> None:
    for family in zoo.FAMILIES:
        truth = judge.truth(Case(family=family, lengths=(12, 12), seed=3))
        rows = [truth.rows(i, p) for i in range(len(truth.clean.attentions)) for p in range(2)]
        share = sum(r.sparse()[0].sum() for r in rows) / sum(r.visible.any(-1).sum() for r in rows)
        assert 0.05 < share < 0.45, family


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("on", ["qk", "k", "q"])
def test_the_oracle_integrates_right(biased: bool, on: str) -> None:
    """Against nested adaptive quadrature."""
    rng = np.random.default_rng(5)
    for sigma in (0.1, 0.4):
        s_star, s = rng.uniform(4, 9), rng.uniform(-6, 6, 5)
        beta = rng.uniform(0.0, 2.0, 5) if biased else None
        which: dict[str, Any] = {"on_q": "q" in on, "on_k": "k" in on}
        if not biased and on == "q":
            wanted = 0.0
        else:
            wanted = reference.collapse_probability(s_star, s, sigma, "uniform", beta, **which)
        row = None if beta is None else beta[None]
        got = oracle.collapse(np.array([s_star]), s[None], row, sigma, **which)
        assert abs(got[0] - wanted) < (2e-3 if on == "q" else 2e-5)


def test_a_case_reads_as_code() -> None:
    case = Case(family="t5", form="dict", decoder="padded", sigma=0.1)
    assert eval(repr(case)) == case
    assert repr(Case()) == "Case()"


def test_grad_and_dtype_are_left_alone() -> None:
    assert judge.judge(Case(mode="float64 by default")) == "right"
    assert torch.get_default_dtype() == torch.float32
