"""The public calls that `test_arguments` tries, with arguments that are right."""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import hooks
from hooks.noise.laws import LAWS
from qkvnorm_lens.models.fields import HONOURED
from tests.support import models
from tests.support.arguments import Call
from tests.support.commands import characters

IDS = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 1, 2, 3]]
# What a model is given is read by a function of its own, which has tests of its own.
GIVEN = ("model", "tokens", "decoder_tokens", "attention_mask", "targets")


# Of every call, so that each is a test of its own; `test_arguments` holds them together.
NAMES = (
    "NormNoise",
    "CentredAttention",
    "collapse_probe",
    "probe_corpus",
    "measure_corpus",
    "merge_corpus",
    "sweep",
    "spread",
    "interference",
    "cache_risk",
    "rank_profile",
    "spectral_gap",
    "symmetry_gap",
    "observe",
    "NormNoise.uniforms",
    "NormNoise.factors",
    "NormNoise.hooks",
    "NormNoise.applied",
    "CentredAttention.hooks",
    "AttentionSites.layer",
    "LayerSites.vector",
    "LayerSites.sequence",
    "critical_half_width",
    "collapse_probability",
    "split",
    "ScoreParts.scores",
    "ScoreParts.pattern",
    "ScoreParts.pattern_of",
    "CollapseReport.to_frame",
    "CollapseReport.sigma_at",
    "CollapseReport.sigma_error",
    "CollapseReport.fragile",
    "CollapseReport.kept_noise",
    "CollapseReport.read_by",
    "CollapseReport.exact_rate",
    "CollapseReport.merge",
    "CollapseReport.save",
    "CollapseReport.load",
    "ProbeSettings",
    "SweepReport.to_frame",
    "SweepReport.sigma_at",
    "SweepReport.merge",
    "SweepReport.save",
    "SweepReport.load",
    "SweepSettings",
    "SpreadReport.to_frame",
    "SpreadReport.save",
    "SpreadReport.load",
    "SpreadSettings",
    "InterferenceReport.to_frame",
    "InterferenceReport.merge",
    "InterferenceReport.save",
    "InterferenceReport.load",
    "InterferenceSettings",
    "RankReport.to_frame",
    "RankReport.save",
    "RankReport.load",
    "RankSettings",
    "SpectrumReport.to_frame",
    "SpectrumReport.save",
    "SpectrumReport.load",
    "SpectrumSettings",
    "SymmetryReport.to_frame",
    "SymmetryReport.verdict",
    "SymmetryReport.vanishes",
    "SymmetryReport.save",
    "SymmetryReport.load",
    "SymmetrySettings",
    "RankSite",
    "KeptRows.weights",
    "plots.collapse_curve",
    "plots.head_map",
    "plots.row_margins",
    "plots.attention",
    "plots.attention_rows",
    "plots.fragile_text",
    "plots.spread_bands",
    "plots.interference_by_depth",
    "plots.cache_by_depth",
    "plots.accuracy_curve",
    "plots.sparsity_histogram",
    "plots.rank_by_depth",
    "plots.spectrum_by_depth",
    "plots.symmetry_by_depth",
    "plots.training_curves",
    "plots.save",
    "View",
    "View.save",
    "html_report",
    "write_html",
    "NormSpec",
    "Sinusoids",
    "QKVNormConfig",
    "QKVNormConfig.from_json",
    "named_config",
    "QKVNormTransformer",
    "to_bridge",
    "to_plain",
    "save_pretrained",
    "from_pretrained",
    "load_checkpoint",
    "checkpoint_card",
    "checkpoint_path",
    "load_model",
    "experiments.run",
    "experiments.get_experiment",
    "text.windows",
    "text.lines",
    "text.sums",
    "Split",
    "get_split",
    "draw",
    "Batch.by_length",
    "Batch.to",
    "get_recipe",
    "Recipe",
    "Run",
    "evaluate",
    "train",
    "dynamics.orthogonal",
    "dynamics.gaussian",
    "dynamics.unit_tokens",
    "Dynamics",
    "Dynamics.attention",
    "Dynamics.step",
    "Dynamics.run",
    "Trajectory.fit",
    "fit_decay",
    "dynamics.complete_mask",
    "dynamics.causal_mask",
    "dynamics.window_mask",
    "dynamics.one_way_window_mask",
    "dynamics.star_mask",
    "MaskGraph",
    "as_mask",
    "random_markov",
    "uniform",
    "random_softmax",
    "stable_rank",
    "Recursion",
    "Recursion.step",
    "propagate",
    "gradient_norms",
)


def hold(value: Any) -> Callable[[], Any]:
    return lambda: value


def measurements(model: Any) -> dict[str, Call]:
    base = {"model": hold(model), "tokens": hold(IDS)}
    probe = base | {"sigmas": hold([0.3]), "draws": hold(2)}
    sweep = base | {"sigmas": hold([0.1]), "replicates": hold(1)}
    observed = {
        "model": hold(model),
        "layers": hold(list(hooks.attention_sites(model))),
        "prompts": hold(hooks.encode(model, IDS)),
        "on_layer": hold(lambda view: None),
    }
    return {
        "NormNoise": Call(hooks.NormNoise, {"sigma": hold(0.1)}),
        "CentredAttention": Call(hooks.CentredAttention),
        "collapse_probe": Call(hooks.collapse_probe, probe, skip=GIVEN),
        "sweep": Call(hooks.sweep, sweep, skip=GIVEN),
        "spread": Call(hooks.spread, base, skip=GIVEN),
        "interference": Call(hooks.interference, base | {"draws": hold(1)}, skip=GIVEN),
        "cache_risk": Call(hooks.cache_risk, base | {"formats": hold(["fp8-e4m3"])}, skip=GIVEN),
        "rank_profile": Call(hooks.rank_profile, base, skip=GIVEN),
        "spectral_gap": Call(hooks.spectral_gap, base, skip=GIVEN),
        "symmetry_gap": Call(hooks.symmetry_gap, base | {"permutations": hold(1)}, skip=GIVEN),
        "observe": Call(hooks.observe, observed, skip=("model",)),
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
        ),
        "NormNoise.factors": Call(
            noise.factors, drawn | {"prompts": hold([0, 1])}, slow={"prompts": ("long list",)}
        ),
        "NormNoise.hooks": Call(noise.hooks, {"model": hold(model)}),
        "NormNoise.applied": Call(_applied(model, noise)),
        "CentredAttention.hooks": Call(hooks.CentredAttention().hooks, {"model": hold(model)}),
        "AttentionSites.layer": Call(sites.layer),
        "LayerSites.vector": Call(layer.vector),
        "LayerSites.sequence": Call(layer.sequence),
        "critical_half_width": Call(hooks.critical_half_width, tensors, {"s_star": "s_star|s"}),
        "collapse_probability": Call(
            hooks.collapse_probability,
            tensors | {"sigma": hold(torch.full((3,), 0.2)), "law": hold(LAWS["uniform"])},
            {"s_star": "s_star|s|sigma"},
        ),
    }


def reports(model: Any, folder: Path) -> dict[str, Call]:
    report = hooks.collapse_probe(model, IDS, sigmas=[0.2, 0.4], draws=2)
    all_of = {
        "CollapseReport": report,
        "SweepReport": hooks.sweep(model, IDS, sigmas=[0.1, 0.5], replicates=2),
        "SpreadReport": hooks.spread(model, IDS),
        "InterferenceReport": hooks.interference(model, IDS),
        "CacheRisk": hooks.cache_risk(model, IDS),
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
            "sigma_error",
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
            names = {"merge": {"later": "merge"}, "load": {"path": r"\w+"}}.get(method, {})
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


def tensors(model: Any) -> dict[str, Call]:
    layer = hooks.attention_sites(model).layers[0]
    parts = hooks.split(layer, torch.randn(1, 4, 3, 3))
    return {
        "split": Call(hooks.split, {"sites": hold(layer), "scores": hold(torch.randn(1, 4, 3, 3))}),
        "ScoreParts.scores": Call(parts.scores),
        "ScoreParts.pattern": Call(parts.pattern),
        "ScoreParts.pattern_of": Call(parts.pattern_of),
    }


def figures(model: Any) -> dict[str, Call]:
    from matplotlib.figure import Figure  # noqa: F401 - needed by the figures

    from qkvnorm_lens import plots
    from qkvnorm_lens.page import report as html_report

    report = hooks.collapse_probe(model, IDS, sigmas=[0.2, 0.4], draws=2)
    of: dict[str, dict[str, Any]] = {
        "collapse_curve": {"report": report},
        "head_map": {"report": report},
        "row_margins": {"report": report},
        "attention": {"report": report},
        "attention_rows": {"report": report},
        "fragile_text": {"report": report},
        "spread_bands": {"report": hooks.spread(model, IDS)},
        "interference_by_depth": {"report": hooks.interference(model, IDS)},
        "cache_by_depth": {"report": hooks.cache_risk(model, IDS)},
        "accuracy_curve": {"reports": hooks.sweep(model, IDS, sigmas=[0.1, 0.5], replicates=2)},
        "sparsity_histogram": {"table": pd.DataFrame({"low": [0.0, 0.5], "rows": [3, 4]})},
        "rank_by_depth": {"reports": hooks.rank_profile(model, IDS)},
        "spectrum_by_depth": {"reports": hooks.spectral_gap(model, IDS)},
        "symmetry_by_depth": {"reports": hooks.symmetry_gap(model, IDS, permutations=2)},
        "training_curves": {
            "logs": {"a": pd.DataFrame({"sequences": [1], "loss": [2.0], "per_token": [0.5]})}
        },
    }
    out = {
        f"plots.{name}": Call(getattr(plots, name), {k: hold(v) for k, v in right.items()})
        for name, right in of.items()
    }
    view = plots.View("<p>")
    page = {"report": hold(report)}
    return out | {
        "View": Call(plots.View, {"html": hold("<p>")}),
        "View.save": Call(view.save),
        "plots.save": Call(plots.save, {"figure": report.plot, "path": hold("figure.pdf")}),
        "html_report": Call(html_report.html_report, page),
        "write_html": Call(html_report.write_html, page | {"path": hold("page.html")}),
    }


def ours() -> dict[str, Call]:
    import qkvnorm_lens
    from qkvnorm_lens import experiments, text
    from qkvnorm_lens.models.shipped import checkpoint_path
    from qkvnorm_lens.training import addition, recipes, run as run_of, trainer as training

    tiny = {
        "placement": "pre",
        "d_model": 8,
        "d_head": 4,
        "n_heads": 2,
        "n_layers": 1,
        "n_ctx": 16,
        "d_vocab": 17,
        "d_mlp": 8,
    }

    def config(**fields: Any) -> Any:
        return qkvnorm_lens.QKVNormConfig(**{**tiny, **fields})

    cfg = config()
    parameters = [*inspect.signature(qkvnorm_lens.QKVNormConfig).parameters, *sorted(HONOURED)]
    config.__signature__ = inspect.Signature(
        [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in parameters if n != "fields"]
    )
    plain = qkvnorm_lens.QKVNormTransformer(cfg)
    bridge = qkvnorm_lens.load_checkpoint()
    batch = addition.draw("small-train", 4, seed=0)
    run = {"config": hold(config(n_ctx=32)), "split": hold("small-train")}
    return {
        "NormSpec": Call(qkvnorm_lens.NormSpec),
        "Sinusoids": Call(qkvnorm_lens.Sinusoids),
        "QKVNormConfig": Call(config, names={"norm": "norm|NormSpec"}),
        "QKVNormConfig.from_json": Call(qkvnorm_lens.QKVNormConfig.from_json),
        "named_config": Call(
            qkvnorm_lens.named_config, {"name": hold("study"), "placement": hold("pre")}
        ),
        "QKVNormTransformer": Call(qkvnorm_lens.QKVNormTransformer),
        "to_bridge": Call(
            qkvnorm_lens.to_bridge, {"model": lambda: qkvnorm_lens.QKVNormTransformer(cfg)}
        ),
        "to_plain": Call(qkvnorm_lens.to_plain, {"bridge": hold(bridge)}),
        "save_pretrained": Call(
            qkvnorm_lens.save_pretrained, {"model": hold(plain), "folder": hold("saved")}
        ),
        "from_pretrained": Call(
            qkvnorm_lens.from_pretrained, {"folder": hold(str(checkpoint_path()))}
        ),
        "load_checkpoint": Call(qkvnorm_lens.load_checkpoint),
        "checkpoint_card": Call(qkvnorm_lens.checkpoint_card),
        "checkpoint_path": Call(checkpoint_path),
        "load_model": Call(qkvnorm_lens.load_model, names={"name": "name|model"}),
        "experiments.run": Call(
            experiments.run,
            {"name": hold("theorems"), "size": hold("nothing")},
            names={
                "models": "models|size",
                "out": "out|size",
                "progress": "progress|size",
                "name": "name|size",
            },
        ),
        "experiments.get_experiment": Call(experiments.get_experiment),
        "text.windows": Call(text.windows, {"model": hold(bridge), "text": hold("1+2=3")}),
        "text.lines": Call(
            text.lines, {"model": hold(bridge), "text": hold("[1+2=3"), "limit": hold(1)}
        ),
        "text.sums": Call(text.sums, {"split": hold("small-train"), "n": hold(2), "seed": hold(0)}),
        "Split": Call(addition.Split, {"counts": hold((2,)), "digits": hold((1,))}),
        "get_split": Call(addition.get_split),
        "draw": Call(addition.draw, {"split": hold("small-train"), "n": hold(2), "seed": hold(0)}),
        "Batch.by_length": Call(batch.by_length),
        "Batch.to": Call(batch.to),
        "get_recipe": Call(recipes.get_recipe),
        "Recipe": Call(
            recipes.Recipe,
            {"optimizer": hold("adamw"), "lr": hold(0.1), "schedule": hold("cosine")},
        ),
        "Run": Call(training.Run, run),
        "evaluate": Call(
            run_of.evaluate,
            {"model": hold(bridge), "split": hold("small-train"), "rows": hold(4)},
        ),
        "train": Call(
            training.train,
            {
                "run": lambda: training.Run(
                    config(n_ctx=32), "small-train", "modern-adamw", steps=1, eval_rows=4
                ),
                "out": lambda: tempfile.mkdtemp(dir="."),
                "progress": hold(False),
            },
            skip=("compile_model",),  # torch takes long
        ),
    }


def alone() -> dict[str, Call]:
    from qkvnorm_lens.theory import dynamics, markov

    w = dynamics.gaussian(3, 0)
    system = dynamics.Dynamics(dynamics.causal_mask(4), w, w, w)
    x = dynamics.unit_tokens(4, 3, 0)
    trajectory = system.run(x, 4)
    n, seed = {"n": hold(3)}, {"seed": hold(0)}
    recursion = markov.Recursion()
    signal = markov.propagate(recursion, 3, 2, seed=0)
    d = {"d": hold(3)} | seed
    return {
        "dynamics.orthogonal": Call(dynamics.orthogonal, d),
        "dynamics.gaussian": Call(dynamics.gaussian, d),
        "dynamics.unit_tokens": Call(dynamics.unit_tokens, n | d),
        "Dynamics": Call(
            dynamics.Dynamics,
            {"mask": hold(dynamics.causal_mask(4)), **{f"w_{r}": hold(w) for r in "qkv"}},
        ),
        "Dynamics.attention": Call(system.attention, {"x": hold(x)}),
        "Dynamics.step": Call(system.step, {"x": hold(x)}),
        "Dynamics.run": Call(system.run, {"x0": hold(x), "layers": hold(2)}),
        "Trajectory.fit": Call(trajectory.fit),
        "fit_decay": Call(dynamics.fit_decay, {"mu": hold([1.0, 0.5, 0.25, 0.1])}),
        **{
            f"dynamics.{name}": Call(
                getattr(dynamics, name), n | ({"width": hold(1)} if "window" in name else {})
            )
            for name in (
                "complete_mask",
                "causal_mask",
                "window_mask",
                "one_way_window_mask",
                "star_mask",
            )
        },
        "MaskGraph": Call(dynamics.MaskGraph),
        "as_mask": Call(dynamics.as_mask),
        "random_markov": Call(markov.random_markov, {"n_tokens": hold(3)} | seed),
        "uniform": Call(markov.uniform, {"n_tokens": hold(3)}),
        "random_softmax": Call(markov.random_softmax, {"x": hold(x)} | seed),
        "stable_rank": Call(markov.stable_rank),
        "Recursion": Call(markov.Recursion),
        "Recursion.step": Call(recursion.step, {"x": hold(x), "weight": hold(w)} | seed),
        "propagate": Call(
            markov.propagate,
            {"recursion": hold(recursion), "n_tokens": hold(3), "depth": hold(2)} | seed,
        ),
        "gradient_norms": Call(markov.gradient_norms, {"signal": hold(signal)}),
    }


def corpora(folder: Path) -> dict[str, Call]:
    from transformers import AutoTokenizer

    characters().save_pretrained(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = models.tiny_gpt2(tokenizer=tokenizer)
    right = {"model": hold(model), "dataset": hold(["some words"]), "context": hold(8)}
    part = folder / "parts"
    hooks.probe_corpus(model, ["some words"], out=part, sigmas=[0.3], progress=False)
    skip = ("model", "options")
    return {
        "probe_corpus": Call(
            hooks.probe_corpus,
            right,
            {"dataset": "dataset|column|split", "context": "context|text"},
            skip=skip,
        ),
        "measure_corpus": Call(
            hooks.measure_corpus,
            right | {"measure": hold(hooks.spread)},
            {"dataset": "dataset|column|split", "context": "context|text"},
            skip=skip,
        ),
        "merge_corpus": Call(
            hooks.merge_corpus,
            {"folders": hold([part])},
            names={"folders": "folders|nowhere: format"},
        ),
    }


def every(model: Any, folder: Path) -> dict[str, Call]:
    """All of them; ``folder`` is the working directory."""
    made = [measurements(model), noises(model), tensors(model), reports(model, folder)]
    made += [figures(model), ours(), alone(), corpora(folder)]
    return {name: call for group in made for name, call in group.items()}
