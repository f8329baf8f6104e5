"""What one forward pass of a model shows about its attentions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.errors import UnsupportedModelError
from hooks.model import ROLES, Anchor, AttentionTap, HookedModel, ModelInput, Role, Taken, hooked

CANDIDATES: dict[Role, tuple[str, ...]] = {
    role: tuple(
        name.format(role)
        for name in ("hook_{}", "{}.hook_out", "{}_norm.hook_out", "hook_{}_normed", "hook_rot_{}")
    )
    for role in ROLES
}
_IN_A_STACK = re.compile(r"^(?P<stack>\w*blocks)\.(?P<block>\d+)(?:\.(?P<module>\w+))?$")

_EDGE = re.compile(r"^(?P<module>\w*blocks\.\d+(?:\.\w+)?)\.hook_(?P<side>in|out)$")


@dataclass(frozen=True)
class Module:
    """One attention module of a stack of blocks: ``{stack}.{block}.{name}``, or the block."""

    prefix: str
    stack: str
    block: int
    name: str


@dataclass(frozen=True)
class Firing:
    """What a hook point carried, once."""

    name: str
    tensor: Tensor | None  # None: something else than a tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a tensor; empty for other things."""
        return () if self.tensor is None else tuple(self.tensor.shape)


@dataclass(frozen=True)
class Multiplied:
    """What the products showed about one attention and its place in the pass."""

    at: int  # how many hook points had fired
    shape: tuple[int, ...]  # of its scores
    anchor: Anchor


class SeenPass:
    """What one forward pass showed.

    Attributes:
        firings: what the hook points of q, k, v, z, scores and patterns carried.
        taken: each attention's softmax before its z, by module.
        products: what each attention's products showed, by module.
        windows: shape of a softmax that was not over a sequence, by module.
        twice: modules that computed several.
        attentions: how many there were, including those outside every block.
    """

    def __init__(self, model: HookedModel, prefixes: Iterable[str], given: ModelInput) -> None:
        self.firings: list[Firing] = []
        self.taken: dict[str, Taken] = {}
        self.products: dict[str, Multiplied] = {}
        self.windows: dict[str, tuple[int, ...]] = {}
        self.attentions = 0
        self.twice: set[str] = set()
        self._inside: list[tuple[str, int]] = []  # modules that run, and products before them
        self._batch = given.batch
        decoded = given.named.get("decoder_input_ids", given.first)
        self._lengths = {given.first.shape[-1], decoded.shape[-1]}
        self._tap = AttentionTap(self._on_attention, self._on_softmax)
        hooks = [
            (name, self._at_edge(match["module"], match["side"]))
            for name in model.hook_dict
            if (match := _EDGE.match(name)) is not None
        ]
        hooks += [(name, self._recorder(name)) for name in self._points(model, prefixes)]
        with torch.no_grad(), self._tap, hooked(model, hooks):
            _first_pass(model, given)

    def begins(self, prefixes: Iterable[str]) -> dict[str, float]:
        """Where in the pass each attention that ran begins, by its module."""
        first: dict[str, float] = {}
        for prefix in prefixes:
            at = next((i for i, f in enumerate(self.firings) if is_of(prefix, f)), None)
            if at is not None:
                first[prefix] = float(at)
        for prefix, product in self.products.items():
            if not is_known(prefix, list(first)):
                first.setdefault(prefix, product.at - 0.5)  # before the hook that fires next
        return first

    @staticmethod
    def _points(model: HookedModel, prefixes: Iterable[str]) -> list[str]:
        """One name for each hook point that may carry something: aliases would fire twice."""
        names = ["hook_attn_scores", "hook_pattern", "hook_z"]
        names += [name for candidates in CANDIDATES.values() for name in candidates]
        hook_dict = model.hook_dict
        by_point: dict[int, str] = {}
        for prefix in prefixes:
            for name in names:
                point = hook_dict.get(f"{prefix}.{name}")
                if point is not None:
                    by_point.setdefault(id(point), f"{prefix}.{name}")
        return list(by_point.values())

    def _recorder(self, name: str) -> Any:
        prefix = name.rsplit(".", 1)[0]

        def record(tensor: Any, hook: Any) -> None:
            kept = tensor.clone() if isinstance(tensor, Tensor) else None
            self.firings.append(Firing(name, kept))
            if name == f"{prefix}.hook_z":
                latest = self._tap.take(self._batch)
                if latest is not None:
                    self.taken[prefix] = latest

        return record

    def _at_edge(self, module: str, side: str) -> Any:
        def enter(tensor: Any, hook: Any) -> None:
            self._inside.append((module, len(self._tap.products)))

        def leave(tensor: Any, hook: Any) -> None:
            while any(name == module for name, _ in self._inside):
                self._inside.pop()

        return enter if side == "in" else leave

    def _on_softmax(self, shape: tuple[int, ...]) -> None:
        self.attentions += 1
        if self._inside and shape[-2] not in self._lengths:
            self.windows.setdefault(self._inside[-1][0], shape)

    def _on_attention(self, taken: Taken) -> None:
        """Notes an attention of the innermost running module; two in one can't be distinguished."""
        self.attentions += 1
        if not self._inside or taken.q is None or taken.k is None:
            return
        module, start = self._inside[-1]
        if module in self.products or module in self.twice:
            self.twice.add(module)
            self.products.pop(module, None)
            return
        batch, n_heads, n_query, d_head = taken.q.shape
        if batch != self._batch:
            return
        before = self._tap.products[start:]
        mine = [(*s[:3], s[-1]) == (batch, n_heads, n_query, d_head) for s in before]
        if taken.fused is None:  # the last product is that of pattern and values
            last = max(i for i, s in enumerate(before) if s[:4] == taken.shape)
            mine = mine[: last + 1]
        product = 0 if taken.fused is not None else sum(mine)
        anchor = Anchor(f"{module}.hook_in", product, d_head, sharing(taken.k))
        self.products[module] = Multiplied(len(self.firings), taken.shape, anchor)


def _first_pass(model: HookedModel, given: ModelInput) -> None:
    """A pass of the model as it is; our hooks only read."""
    try:
        given.run(model)
    except (RuntimeError, IndexError, AttributeError, TypeError) as error:
        said = str(error).strip().splitlines() or [""]
        raise UnsupportedModelError(
            "a forward pass of the model",
            wanted="one that runs on a few tokens",
            got=f"{type(error).__name__}: {said[0]}",
        ) from error


def module_of(prefix: str) -> Module | None:
    """The module with this prefix; None where it is in no stack of blocks."""
    match = _IN_A_STACK.match(prefix)
    return match and Module(prefix, match["stack"], int(match["block"]), match["module"] or "")


def is_of(prefix: str, firing: Firing) -> bool:
    """Whether the hook point that fired belongs to this module."""
    return firing.name.startswith(f"{prefix}.")


def is_known(prefix: str, modules: Iterable[str]) -> bool:
    """Whether this module, or one inside it, has hooks of an attention."""
    return any(f"{name}.".startswith(f"{prefix}.") for name in modules)


def sharing(keys: Float[Tensor, "batch head key d_head"]) -> tuple[int, ...]:
    """Key/value head of each query head, found by comparing what they read, in their order."""
    leaders: list[int] = []
    out = []
    for head in range(keys.shape[1]):
        same = [i for i, h in enumerate(leaders) if torch.equal(keys[:, h], keys[:, head])]
        if not same:
            leaders.append(head)
        out.append(same[0] if same else len(leaders) - 1)
    return tuple(out)
