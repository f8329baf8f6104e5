"""Kernels are used where they give on a device what torch gives there."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from hooks.kernels.engines import fastest, triton_check as check, triton_pass as work, triton_table

HERE, THERE = torch.device("cpu"), torch.device("cuda", 0)


def test_the_kernels_agree_here() -> None:
    assert check.agrees(HERE, n_key=12)


@pytest.mark.parametrize("kernel", ["rates", "strict_rates", "nearest"])
def test_kernels_that_give_other_numbers_are_seen(
    monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    right = getattr(work, kernel)

    def wrong(*args: Any) -> Any:
        found = right(*args)
        if kernel == "nearest":
            return found._replace(top=found.top + 1e-4)
        return torch.where(found > 0.01, found + 1e-4, found)

    monkeypatch.setattr(work, kernel, wrong)
    assert not check.agrees.__wrapped__(HERE, n_key=12)


@pytest.mark.parametrize("lost", [0, 1])
def test_entries_may_come_in_any_order_but_none_may_lack(
    monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """As on a device, where programs append when they like, into a table that holds few."""
    finish = triton_table.RowListing.finish

    def turned(self: Any, wanted: int) -> Any:
        n = int(self._used)
        self._held = type(self._held)(*(torch.cat([x[:n].flip(0), x[n:]]) for x in self._held))
        found, *rest = finish(self, wanted)
        return type(found)(*(x[lost:] for x in found)), *rest

    monkeypatch.setattr(triton_table.RowListing, "finish", turned)
    assert check.agrees.__wrapped__(HERE, n_key=12, keep=10) == (not lost)


def test_the_engine_that_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastest(HERE) == fastest(torch.device("mps")) == "torch"
    monkeypatch.setattr(check, "agrees", lambda _: True)
    assert fastest(THERE) == "triton"
    monkeypatch.setattr(check, "agrees", lambda _: False)
    with pytest.warns(RuntimeWarning, match="on cuda:0 what torch does; got other numbers"):
        assert fastest(THERE) == "torch"

    def fails(_: Any) -> bool:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(check, "agrees", fails)
    with pytest.warns(RuntimeWarning, match="got RuntimeError: no compiler; torch reduces"):
        assert fastest(THERE) == "torch"
    monkeypatch.setitem(sys.modules, "hooks.kernels.engines.triton_check", None)
    assert fastest(THERE) == "torch"  # Triton is not installed
