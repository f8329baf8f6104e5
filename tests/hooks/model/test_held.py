"""What a user's hooks and modules hold is part of the model, but what their own passes change."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers.models.t5 import modeling_t5

from hooks import UnsupportedModelError, collapse_probe
from hooks.model.identity import fingerprint
from tests.support import builders
from tests.support.models import tiny_llama, tokens

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:transformer_lens", "ignore::FutureWarning"
)

IDS = tokens(2, 17, seed=5)
ON_Q: dict[str, Any] = {"sigmas": [0.4], "draws": 0, "on": "q", "sparse": 0.5}


def inner(model: Any) -> Any:
    return model.original_model


class Strong:
    """A hook with a strength, and what its passes write down."""

    def __init__(self, a: float = 0.0) -> None:
        self.a, self.n, self.held = a, 0, {"strength": a}
        self.log: dict[str, int] = {}
        self.last: Tensor | None = None

    def bias(self, scores: Tensor, hook: Any) -> Tensor:
        self.n += 1
        self.last = scores.detach().clone()
        self.log[f"call {self.n}"] = self.n
        at = torch.arange(scores.shape[-1])
        return scores - self.a * (at - at[:, None]).abs().to(scores)

    def column(self, z: Tensor, hook: Any) -> Tensor:
        self.n += 1
        if not self.held["strength"]:
            return z
        z = z.clone()
        z[:, 4] = 0
        return z


def test_a_hook_that_counts_is_checked_again_when_another_of_its_parts_changes() -> None:
    """No bias at strength 0 is no verdict on strength 2."""
    model, fresh = tiny_llama(), tiny_llama()
    hook, right = Strong(), Strong(2.0)
    model.add_hook("blocks.0.attn.hook_attn_scores", hook.bias)
    first = collapse_probe(model, IDS, **ON_Q)
    again = collapse_probe(model, IDS, first_prompt=len(IDS), **ON_Q)
    assert len(first.merge(again).tokens) == 2 * len(IDS)
    hook.a = 2.0
    later = collapse_probe(model, IDS, first_prompt=len(IDS), **ON_Q)
    fresh.add_hook("blocks.0.attn.hook_attn_scores", right.bias)
    wanted = collapse_probe(fresh, IDS, **ON_Q)
    np.testing.assert_array_equal(later.rows, wanted.rows)
    np.testing.assert_array_equal(later.loose, wanted.loose)
    assert wanted.loose[:, 0].sum() > 0 == first.loose[:, 0].sum()
    with pytest.raises(ValueError, match="got hooks"):
        first.merge(later)


def test_padding_is_checked_again_too() -> None:
    model, hook = tiny_llama(), Strong()
    model.add_hook("blocks.0.attn.hook_z", hook.column)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    collapse_probe(model, IDS, attention_mask=mask, **ON_Q)
    hook.held["strength"] = 1.0
    with pytest.raises(UnsupportedModelError, match="left padding"):
        collapse_probe(model, IDS, attention_mask=mask, **ON_Q)


def test_methods_of_two_objects_that_count_are_two_hooks() -> None:
    model, found = tiny_llama(), []
    for a in (1.0, 1.5, 1.0):
        with model.hooks(fwd_hooks=[("blocks.0.attn.hook_attn_scores", Strong(a).bias)]):
            found.append(collapse_probe(model, IDS, first_prompt=len(found) * 2, **ON_Q))
    for later in found[1:2]:
        with pytest.raises(ValueError, match="got hooks"):
            found[0].merge(later)


class Wrapped(nn.Module):
    """A layer of the user's around one of the model's."""

    def __init__(self, inner: nn.Module, by: Any, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.inner, self.by, self.read = inner, by, read

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out * self.read(self.by)

    @property
    def weight(self) -> Any:
        return self.inner.weight


@dataclass
class Setting:
    alpha: float


def call(value: Any) -> Any:
    return value()


def scaled(alpha: float) -> float:
    return alpha


class Caller:
    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def __call__(self) -> float:
        return self.alpha

    def run(self) -> float:
        return self.alpha


HELD: dict[str, tuple[Callable[[float], Any], Callable[[Any], Any]]] = {
    "dataclass": (Setting, lambda x: x.alpha),
    "namespace": (lambda a: SimpleNamespace(alpha=a), lambda x: x.alpha),
    "list of tensors": (lambda a: [torch.tensor(a)], lambda x: x[0]),
    "dict of tensors": (lambda a: {"a": torch.tensor(a)}, lambda x: x["a"]),
    "nested": (lambda a: {"a": [Setting(a)]}, lambda x: x["a"][0].alpha),
    "partial": (lambda a: partial(scaled, alpha=a), call),
    "callable": (Caller, call),
    "bound method": (lambda a: Caller(a).run, call),
    "distribution": (lambda a: torch.distributions.Normal(a, 1.0), lambda x: x.mean),
    "array": (np.array, float),
}


@pytest.mark.parametrize("kind", HELD)
def test_all_that_a_module_of_the_users_holds_is_the_model(kind: str) -> None:
    make, read = HELD[kind]
    model = tiny_llama()
    layer = inner(model).model.layers[0]
    place = getattr(layer, "_original_component", layer).mlp
    place = getattr(place, "_original_component", place)
    wrapped = Wrapped(place.down_proj, make(1.0), read)
    place.down_proj = wrapped
    found = []
    for a in (1.0, 2.0, 1.0):
        wrapped.by = make(a)
        found.append(fingerprint(model)["modules"])
        first, model_now = model(IDS), fingerprint(model)["modules"]
        assert model_now == found[-1]
    assert found[0] == found[2] != found[1]
    del first


def test_a_verdict_on_a_wrapper_is_no_verdict_on_its_other_setting() -> None:
    """A relative bias that a wrapper takes away, and gives back: fault C by another way."""

    def built(scale: float) -> tuple[Any, list[Wrapped]]:
        hf = builders.build_hf("T5ForConditionalGeneration", decoder_start_token_id=1)
        wraps = []
        for stack in (hf.encoder, hf.decoder):
            attention = stack.block[0].layer[0].SelfAttention
            held = {"scale": torch.tensor(scale)}
            bias = Wrapped(attention.relative_attention_bias, held, lambda x: x["scale"])
            attention.relative_attention_bias = bias
            wraps.append(bias)
        name = "T5ForConditionalGeneration"
        return build_bridge_from_module(hf, name, hf_config=hf.config).eval(), wraps

    model, wraps = built(0.0)
    none = collapse_probe(model, IDS, **ON_Q)
    for bias in wraps:
        bias.by["scale"] = torch.tensor(1.0)
    later = collapse_probe(model, IDS, **ON_Q)
    wanted = collapse_probe(built(1.0)[0], IDS, **ON_Q)
    np.testing.assert_array_equal(later.rows, wanted.rows)
    np.testing.assert_array_equal(later.loose, wanted.loose)
    assert wanted.loose[:, 0].sum() > 0 == none.loose[:, 0].sum()


def _on_class(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    before = modeling_t5.T5Attention.compute_bias
    monkeypatch.setattr(
        modeling_t5.T5Attention, "compute_bias", lambda s, *a, **k: before(s, *a, **k) * 0
    )


def _on_instances(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    for module in inner(model).modules():
        if isinstance(module, modeling_t5.T5Attention):
            before = module.compute_bias
            monkeypatch.setattr(
                module, "compute_bias", lambda *a, _b=before, **k: _b(*a, **k) * 0, raising=False
            )


@pytest.mark.parametrize("replace", [_on_class, _on_instances])
def test_a_librarys_method_replaced_is_another_model(replace: Any) -> None:
    model = builders.build("T5ForConditionalGeneration", decoder_start_token_id=1).model
    with pytest.MonkeyPatch.context() as monkeypatch:
        replace(monkeypatch, model)
        none = collapse_probe(model, IDS, **ON_Q)
        other = fingerprint(model)["modules"]
    later = collapse_probe(model, IDS, **ON_Q)
    assert fingerprint(model)["modules"] != other
    fresh = builders.build("T5ForConditionalGeneration", decoder_start_token_id=1).model
    np.testing.assert_array_equal(later.loose, collapse_probe(fresh, IDS, **ON_Q).loose)
    assert later.loose[:, 0].sum() > 0 == none.loose[:, 0].sum()


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("transformers.models.llama.modeling_llama", "apply_rotary_pos_emb"),
        ("transformers.models.llama.modeling_llama", "repeat_kv"),
        ("torch.nn.functional", "scaled_dot_product_attention"),
        ("torch.nn.functional", "silu"),
    ],
)
def test_a_librarys_function_replaced_is_another_model(place: str, name: str) -> None:
    """As libraries of faster kernels do it."""
    model = tiny_llama()
    before = fingerprint(model)["modules"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys.modules[place], name, lambda *given, **named: given)
        assert fingerprint(model)["modules"] != before
    assert fingerprint(model)["modules"] == before
