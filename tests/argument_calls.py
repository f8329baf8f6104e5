"""The public calls that `test_arguments` tries, with arguments that are right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hooks
from hooks.laws import LAWS
from tests import models
from tests.arguments import Call

IDS = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 1, 2, 3]]
# What a model is given is read by a function of its own, which has tests of its own.
GIVEN = ("model", "tokens", "decoder_tokens", "attention_mask", "targets")


def hold(value: Any) -> Callable[[], Any]:
    return lambda: value


def measurements(model: Any) -> dict[str, Call]:
    base = {"model": hold(model), "tokens": hold(IDS)}
    probe = base | {"sigmas": hold([0.3]), "draws": hold(2)}
    sweep = base | {"sigmas": hold([0.1]), "replicates": hold(1)}
    return {
        "NormNoise": Call(hooks.NormNoise, {"sigma": hold(0.1)}),
        "CentredAttention": Call(hooks.CentredAttention),
        "collapse_probe": Call(hooks.collapse_probe, probe, skip=GIVEN),
        "sweep": Call(hooks.sweep, sweep, skip=GIVEN),
        "spread": Call(hooks.spread, base, skip=GIVEN),
        "interference": Call(hooks.interference, base | {"draws": hold(1)}, skip=GIVEN),
        "rank_profile": Call(hooks.rank_profile, base, skip=GIVEN),
        "spectral_gap": Call(hooks.spectral_gap, base, skip=GIVEN),
        "symmetry_gap": Call(hooks.symmetry_gap, base | {"permutations": hold(1)}, skip=GIVEN),
    }


def _applied(model: Any, noise: Any) -> Callable[..., Any]:
    def applied(
        first_prompt: Any = 0, attention_mask: Any = None, decoder_attention_mask: Any = None
    ) -> None:
        """`NormNoise.applied`, and a pass in it."""
        options = {
            "first_prompt": first_prompt,
            "attention_mask": attention_mask,
            "decoder_attention_mask": decoder_attention_mask,
        }
        with noise.applied(model, **options):
            model(torch.tensor([[1, 2], [3, 4]]))

    return applied


def noises(model: Any) -> dict[str, Call]:
    noise = hooks.NormNoise(sigma=0.1)
    of = {"layer": 0, "role": "q", "n_heads": 2, "n_pos": 3}
    drawn = {name: hold(value) for name, value in of.items()}
    sites = hooks.attention_sites(model)
    layer = sites.layers[0]
    s = torch.rand(3, 2)
    tensors = {"s_star": hold(s.amax(1) + 0.1), "s": hold(s)}
    return {
        "NormNoise.uniforms": Call(
            noise.uniforms,
            drawn | {"prompt": hold(0), "start": hold(0)},
            slow={"n_pos": ("2**70",), "n_heads": ("2**70",)},
        ),
        "NormNoise.factors": Call(noise.factors, drawn | {"prompts": hold([0, 1])}),
        "NormNoise.hooks": Call(noise.hooks, {"model": hold(model)}),
        "NormNoise.applied": Call(_applied(model, noise)),
        "CentredAttention.hooks": Call(hooks.CentredAttention().hooks, {"model": hold(model)}),
        "AttentionSites.layer": Call(sites.layer),
        "LayerSites.vector": Call(layer.vector),
        "LayerSites.sequence": Call(layer.sequence),
        "critical_half_width": Call(hooks.critical_half_width, tensors),
        "collapse_probability": Call(
            hooks.collapse_probability,
            tensors | {"sigma": hold(torch.full((3,), 0.2)), "law": hold(LAWS["uniform"])},
        ),
    }


def reports(model: Any, folder: Path) -> dict[str, Call]:
    report = hooks.collapse_probe(model, IDS, sigmas=[0.2, 0.4], draws=2)
    all_of = {
        "CollapseReport": report,
        "SweepReport": hooks.sweep(model, IDS, sigmas=[0.1, 0.5], replicates=2),
        "SpreadReport": hooks.spread(model, IDS),
        "InterferenceReport": hooks.interference(model, IDS),
        "RankReport": hooks.rank_profile(model, IDS),
        "SpectrumReport": hooks.spectral_gap(model, IDS),
        "SymmetryReport": hooks.symmetry_gap(model, IDS, permutations=2),
    }
    out = {}
    for name, each in all_of.items():
        each.save(folder / "nowhere")
        for method in (
            "to_frame",
            "sigma_at",
            "fragile",
            "kept_noise",
            "read_by",
            "exact_rate",
            "verdict",
            "vanishes",
            "merge",
            "save",
            "load",
        ):
            if not hasattr(each, method):
                continue
            right = {
                "exact_rate": {"sigma": hold(0.2), "rows": hold([0, 1])},
                "read_by": {"label": hold("L0"), "prompt": hold(0)},
            }.get(method, {})
            names = {"merge": {"later": "merge"}}.get(method, {})
            out[f"{name}.{method}"] = Call(getattr(each, method), right, names)
        settings = type(each.settings)
        right = {f.name: hold(getattr(each.settings, f.name)) for f in dataclasses.fields(settings)}
        out[settings.__name__] = Call(settings, right)
    site = all_of["RankReport"].settings.sites[0]
    out["RankSite"] = Call(
        hooks.RankSite, {k: hold(v) for k, v in dataclasses.asdict(site).items()}
    )
    out["KeptRows.weights"] = Call(report.kept.weights)
    return out


def groups() -> dict[str, Call]:
    import os, tempfile

    model = models.tiny_gpt2()
    folder = Path(tempfile.mkdtemp())
    os.chdir(folder)
    hooks.collapse_probe(model, IDS, sigmas=[0.2, 0.4], draws=2).sigma_at(0.5)
    return measurements(model) | noises(model) | tensors(model) | reports(model, folder)


def tensors(model: Any) -> dict[str, Call]:
    layer = hooks.attention_sites(model).layers[0]
    parts = hooks.split(layer, torch.randn(1, 4, 3, 3))
    return {
        "split": Call(hooks.split, {"sites": hold(layer), "scores": hold(torch.randn(1, 4, 3, 3))}),
        "ScoreParts.scores": Call(parts.scores),
        "ScoreParts.pattern": Call(parts.pattern),
        "ScoreParts.pattern_of": Call(parts.pattern_of),
    }
