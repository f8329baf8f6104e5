"""One case: the library's numbers against the oracle's."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hooks
from tests.fuzz import zoo
from tests.fuzz.around import Wrong, changes, hooks_of, left_as_found, mode, torch_as_it_is
from tests.fuzz.cases import Case, Given, given
from tests.fuzz.truth import Truth, noise_edits
from tests.oracles import forward as oracle
from tests.support.families import N_HEADS


class Refused(AssertionError):
    """A valid case was refused, or refused in another form than the documented one."""


DOCUMENTED = (ValueError, TypeError, hooks.UnsupportedModelError)
FORM = re.compile(r": wanted .*; got ", re.DOTALL)


def may_refuse(case: Case) -> str:
    """Why this combination may be refused by name; empty: it must be measured."""
    if case.hook == "zero pattern":
        return "a pattern that is no softmax"
    if case.call == "interference":
        if case.hook:
            return "interference looks for the norm behind hooks"
        if case.family in ("bert", "t5", "bart", "ours") or case.attn == "sdpa":
            return "a norm that reaches q and k is looked for"
        if case.change == "adapter on" or case.change == "adapter off":
            return "an adapter beside the projections"
    if case.call in ("applied", "sweep") and case.hook == "patch v":
        return "v is no longer what the noise was put on"
    behind = case.side == "left" and case.padded
    if case.family == "bart" and (behind or case.decoder == "padded left"):
        return "positions count from the first column, padding or not"
    if behind and case.mode == "autocast":
        return "TransformerLens's mask is -inf under autocast: rows of padding are NaN"
    if behind and case.hook in ("patch v", "column"):
        return "a hook that counts columns"
    return ""


KNOWN: dict[str, Callable[[Case], bool]] = {}
"""Kinds of combinations that are known to be wrong, by what is wrong; empty when all is mended."""


def known(case: Case) -> str:
    """The kind of known fault that a case is of; empty: it must be right."""
    return next((name for name, holds in KNOWN.items() if holds(case)), "")


def must_refuse(case: Case) -> str:
    """Why it must be, with this name in the message."""
    if case.mask in ("square bias", "square soft"):
        return "attention_mask"
    if case.mask == "square bool" and case.family == "bert" and case.attn == "eager":
        return "a mask of True and False"
    return "past_key_values" if case.beside == "cache" else ""


def model_of(case: Case, *, fresh: bool = False) -> zoo.Model:
    """A case's model; built anew, or the one of the session."""
    build: Any = zoo.build if fresh else zoo.model
    model: zoo.Model = build(
        case.family,
        attn=case.attn,
        dtype=getattr(torch, case.dtype),
        tokenizer=case.tokenizer,
        adapter=case.change.startswith("adapter"),
    )
    return model


def truth(case: Case) -> Truth:
    """The oracle's numbers alone."""
    model = model_of(case)
    return Truth(case, model, given(case, model))


def judge(case: Case, *, model: zoo.Model | None = None) -> str:
    """Runs a case.

    Returns:
        "right", or "refused: ..." where that is allowed.

    Raises:
        Wrong, Refused: what the library did instead.
    """
    model = model_of(case) if model is None else model
    what = given(case, model)

    def report() -> Any:
        return _report(case, model, what)

    with left_as_found(model), changes(case, model, report) as before, mode(case, model):
        right = Truth(case, model, what)
        try:
            with hooks_of(case, model):
                check = _CALLS[case.call](case, model, what)
        except DOCUMENTED as error:
            if not FORM.search(str(error)):
                raise Refused(
                    f"{type(error).__name__}, not in the documented form: {error}"
                ) from error
            if may_refuse(case) or must_refuse(case):
                if must_refuse(case) not in str(error):
                    raise Refused(f"not by the name of {must_refuse(case)}: {error}") from error
                return f"refused: {may_refuse(case) or must_refuse(case)}: {error}"
            raise Refused(f"though valid: {type(error).__name__}: {error}") from error
        if must_refuse(case):
            raise Wrong(f"{must_refuse(case)} was taken")
        with torch_as_it_is():
            check(right)
        other = case.change == "asked before" and case.mode == "autocast"
        if (case.change == "merged after a change" or other) and before is not None:
            _refuses_to_merge(case, model, what, before)
    return "right"


# --- calls -----------------------------------------------------------------------------------

Check = Callable[[Truth], None]
QUIET: dict[str, Any] = {"progress": False}


def _probe(case: Case, model: zoo.Model, what: Given) -> Check:
    if case.change == "merged":
        return _merged(case, model, what)
    return _probed(case, _report(case, model, what))


def _report(case: Case, model: zoo.Model, what: Given, **options: Any) -> hooks.CollapseReport:
    chosen = {"sigmas": [case.sigma], "on": case.on, "draws": 0, "batch_size": case.batch_size}
    return hooks.collapse_probe(
        model.bridge, what.tokens, **(chosen | QUIET | what.options | options)
    )


def _probed(case: Case, report: hooks.CollapseReport) -> Check:
    def check(truth: Truth) -> None:
        _same_padding(report, truth)
        for index in range(len(truth.clean.attentions)):
            for prompt in range(truth.n_prompts):
                rows = truth.rows(index, prompt)
                where = f"attention {index}, prompt {prompt}"
                seen = rows.visible.sum(-1)
                for name, n in (("examined", seen >= 2), ("single_key", seen == 1)):
                    got = getattr(report, name)[index, :N_HEADS, prompt]
                    _equal(got, n.sum(-1), f"{where}: {name}")
                got = report.rows[index, :N_HEADS, prompt]
                low, high = _kinds(rows, truth.firsts(index, prompt))
                _between(got, low, high, f"{where}: sparse rows by head, content and sinks")
                loose = report.loose[0, index, :N_HEADS, prompt]
                least, most = _probabilities(case, rows, truth.firsts(index, prompt))
                _between(loose, least, most, f"{where}: rows that collapse", 2e-5)

    return check


def _same_padding(report: hooks.CollapseReport, truth: Truth) -> None:
    _equal(report.padding, np.array(truth.what.padding), "padding")


def _kinds(rows: oracle.Rows, firsts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Sparse rows [head, kind], for certain and perhaps."""
    sink = np.isin(rows.star, firsts)
    counts = [
        np.stack([(some & ~sink).sum(-1), (some & sink).sum(-1)], -1) for some in rows.sparse()
    ]
    return counts[0], counts[1]


def _probabilities(
    case: Case, rows: oracle.Rows, firsts: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the collapse probability over sparse rows, [head, kind]."""
    sure, maybe = rows.sparse()
    sink = np.isin(rows.star, firsts).astype(int)
    least, most = np.zeros((len(sure), 2)), np.zeros((len(sure), 2))
    at = maybe.nonzero()
    if len(at[0]):
        low, high = oracle.collapse_bounds(rows, at, case.sigma, on=case.on)
        kind = sink[at]
        np.add.at(least, (at[0], kind), np.where(sure[at], low, 0.0))
        np.add.at(most, (at[0], kind), high)
    # Where a bias is added and q and k are both noised, the library promises 3e-5 in every row.
    room = 6e-5 if rows.bias is not None else 4e-6
    count = np.zeros_like(most)
    np.add.at(count, (at[0], sink[at]), room)
    return least - count, most + count


def _sample(case: Case, model: zoo.Model, what: Given) -> Check:
    report = _report(case, model, what, method="sample", draws=2)

    def check(truth: Truth) -> None:
        _same_padding(report, truth)
        for index in range(len(truth.clean.attentions)):
            for draw in range(2):
                noise = hooks.NormNoise(sigma=case.sigma, on=case.on, draw=draw)
                bounds = np.zeros((4, N_HEADS))
                for prompt in range(truth.n_prompts):
                    bounds += _shifts(truth, index, prompt, noise)
                for name, least, most in (
                    ("loose", bounds[0], bounds[1]),
                    ("strict", bounds[2], bounds[3]),
                ):
                    got = getattr(report, f"{name}_draws")[0, draw, index, :N_HEADS].sum(-1)
                    _between(got, least, most, f"attention {index}, draw {draw}: {name} by head")

    return check


def _shifts(truth: Truth, index: int, prompt: int, noise: hooks.NormNoise) -> np.ndarray:
    """Rows that move, for certain and perhaps, and those that are sparse again: by head."""
    rows = truth.rows(index, prompt)
    _, n_query, n_key = rows.s.shape
    group = N_HEADS // truth.model.n_kv_heads
    s = rows.s
    for role, n, heads in (("q", n_query, N_HEADS), ("k", n_key, truth.model.n_kv_heads)):
        if role not in noise.roles:
            continue
        f = noise.factors(
            layer=index,
            role=role,  # type: ignore[arg-type]
            n_heads=heads,
            prompts=[prompt],
            n_pos=n,
        )[0].T.double()
        if role == "k":
            f = f.repeat_interleave(group, 0)
        s = s * (f.numpy()[:, :, None] if role == "q" else f.numpy()[:, None, :])
    total = s if rows.bias is None else s + rows.bias
    total = np.where(rows.visible, total, -np.inf)
    star = rows.star[..., None]
    own = np.take_along_axis(total, star, -1)
    np.put_along_axis(total, star, -np.inf, -1)
    lead = (total.max(-1, keepdims=True) - own)[..., 0]
    sure, maybe = rows.sparse()
    slack = 4 * rows.near
    surely, perhaps = sure & (lead > slack), maybe & (lead > -slack)
    again, almost = replace(rows, pattern=rows.softmax(s), near=2 * rows.near).sparse()
    each = (surely, perhaps, surely & again, perhaps & almost)
    return np.stack([some.sum(-1) for some in each])


def _sweep(case: Case, model: zoo.Model, what: Given) -> Check:
    on = case.on if case.seed else "qkv"
    report = hooks.sweep(
        model.bridge,
        what.tokens,
        sigmas=[case.sigma],
        replicates=2,
        on=on,
        batch_size=4 * case.batch_size,
        **(QUIET | what.options),
    )

    def check(truth: Truth) -> None:
        noise = hooks.NormNoise(sigma=case.sigma, on=on, draw=1)
        noisy = truth.run(noise_edits(truth, noise)).logits
        spans = what.decoder_spans or what.spans
        ids = what.inputs["decoder_input_ids" if what.decoder_spans else "input_ids"]
        for prompt, (first, end) in enumerate(spans):
            z = truth.clean.logits[prompt, first:end]
            y = noisy[prompt, first:end]
            room = (truth.slack.logits * 4 + 1e-3) * (end - first)
            where = f"prompt {prompt}: "
            kl = _kl(z, y)
            if case.family == "bert":  # nothing is next
                _near(report.kl[0, 1, prompt], kl.sum(), room, f"{where}KL")
                continue
            # Of the last token of each packed document, what follows is none of its own.
            firsts = (0,) if what.decoder_spans else what.firsts[prompt]
            told = np.isin(np.arange(1, end - first), firsts, invert=True)
            target = ids[prompt, first + 1 : end][told]
            z, y, kl = z[:-1][told], y[:-1][told], kl[:-1][told]
            _near(report.clean_loss[prompt], _loss(z, target), room, f"{where}clean loss")
            _near(report.loss[0, 1, prompt], _loss(y, target), room, f"{where}noisy loss")
            _near(report.kl[0, 1, prompt], kl.sum(), room, f"{where}KL")
            low, high = _top(z, target, truth.slack.logits * 4 + 1e-3)
            _between(report.clean_correct[prompt], low, high, f"{where}correct")

    return check


def _loss(z: Tensor, target: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(z, target, reduction="sum"))


def _kl(z: Tensor, y: Tensor) -> Tensor:
    p, q = z.log_softmax(-1), y.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _top(z: Tensor, target: Tensor, room: float) -> tuple[np.ndarray, np.ndarray]:
    own = z.gather(-1, target[:, None])[:, 0]
    rest = z.scatter(-1, target[:, None], -math.inf).amax(-1)
    return (own > rest + room).sum().numpy(), (own > rest - room).sum().numpy()


def _own_layers(model: zoo.Model) -> list[int] | None:
    """Layers that attend to their own sequence."""
    if not model.family.has_decoder:
        return None
    return [i for i in range(6) if i not in (3, 5)]


def _spread(case: Case, model: zoo.Model, what: Given) -> Check:
    of = ("k", "stream")[case.seed % 2]
    layers = None if of == "k" else _own_layers(model)
    report = hooks.spread(
        model.bridge,
        what.tokens,
        of=of,
        layers=layers,
        batch_size=case.batch_size,
        **(QUIET | what.options),
    )

    def check(truth: Truth) -> None:
        chosen = range(len(truth.clean.attentions)) if layers is None else layers
        for at, index in enumerate(chosen):
            queries, keys = truth.spans(index)
            weights, norms = [], []
            for prompt in range(truth.n_prompts):
                rows = truth.rows(index, prompt)
                weights.append(rows.pattern.sum(1))
                k = truth.clean.attentions[index].k[prompt][:, slice(*keys[prompt])]
                norms.append(k.norm(dim=-1).numpy()[:: N_HEADS // truth.model.n_kv_heads])
            room = 2 * truth.slack.scores[index] * max(b - a for a, b in queries) + 1e-3
            wanted = np.concatenate(weights, 1)
            if case.hook != "zero pattern":
                _near(report.weights[at], wanted, room, f"attention {index}: weights")
            if of == "k" and case.dtype == "float32" and case.mode != "autocast":
                wanted = np.concatenate(norms, 1)
                got = report.norms[at] * (wanted[0, 0] / report.norms[at][0, 0])
                _near(got, wanted, 1e-3 * wanted.max(), f"attention {index}: norms of k")

    return check


def _spectrum(case: Case, model: zoo.Model, what: Given) -> Check:
    layers = _own_layers(model)
    report = hooks.spectral_gap(
        model.bridge,
        what.tokens,
        k=3,
        layers=layers,
        batch_size=case.batch_size,
        **(QUIET | what.options),
    )

    def check(truth: Truth) -> None:
        chosen = range(len(truth.clean.attentions)) if layers is None else layers
        for at, index in enumerate(chosen):
            for prompt in range(truth.n_prompts):
                rows = truth.rows(index, prompt)
                wanted = np.linalg.svd(rows.pattern, compute_uv=False)[:, :3]
                room = 2 * rows.near * rows.pattern.shape[1] + 1e-4
                where = f"attention {index}, prompt {prompt}"
                _near(report.singular[at][prompt], wanted, room, f"{where}: singular values")
                seen = rows.visible / rows.visible.sum(-1, keepdims=True)
                wanted = np.linalg.svd(seen, compute_uv=False)[:, :3]
                _near(report.uniform[at][prompt], wanted, 1e-6, f"{where}: those of the mask")

    return check


def _interference(case: Case, model: zoo.Model, what: Given) -> Check:
    report = hooks.interference(
        model.bridge,
        what.tokens,
        draws=0,
        on="k",
        batch_size=case.batch_size,
        **(QUIET | what.options),
    )

    def check(truth: Truth) -> None:
        for index in range(len(truth.clean.attentions)):
            for prompt in range(truth.n_prompts):
                rows = truth.rows(index, prompt)
                low, high = _kinds(rows, truth.firsts(index, prompt))
                got = report.rows[index, :N_HEADS, prompt]
                _between(got, low, high, f"attention {index}, prompt {prompt}: sparse rows")

    return check


def _rank(case: Case, model: zoo.Model, what: Given) -> Check:
    report = hooks.rank_profile(
        model.bridge, what.tokens, batch_size=case.batch_size, **(QUIET | what.options)
    )

    def check(truth: Truth) -> None:
        streams, at = truth.clean.streams, 0
        room = 1e-4
        for number, site in enumerate(report.settings.sites):
            if site.site != "in":
                continue
            stream = streams[at]
            decoder = bool(what.decoder_spans) and at >= len(streams) // 2
            spans = what.decoder_spans if decoder else what.spans
            at += 1
            for prompt, (first, end) in enumerate(spans):
                x = stream[prompt, first:end]
                wanted = {"norm": float(x.norm()), "mu": float((x - x.mean(0)).norm())}
                for name, value in wanted.items():
                    got = report.numbers[prompt, number, 0, _measure(name)]
                    _near(got, value, room * wanted["norm"], f"{site.label}, {prompt}: {name}")
        if at != len(streams):
            raise Wrong(f"{at} blocks; the model has {len(streams)}")

    return check


def _measure(name: str) -> int:
    from hooks.measures.rank.numbers import MEASURES

    return MEASURES.index(name)


def _applied(case: Case, model: zoo.Model, what: Given) -> Check:
    noise = hooks.NormNoise(sigma=case.sigma, on=case.on if case.seed else "qkv", draw=1)
    inputs = dict(what.inputs)
    masks = {
        name: inputs[name]
        for name in ("attention_mask", "decoder_attention_mask")
        if name in inputs and model.family.has_decoder | (name == "attention_mask")
    }
    ids = inputs.pop("input_ids")
    with noise.applied(model.bridge, **masks):
        out = model.bridge(ids, **inputs)

    def check(truth: Truth) -> None:
        wanted = truth.run(noise_edits(truth, noise)).logits
        for prompt, (first, end) in enumerate(what.decoder_spans or what.spans):
            z = wanted[prompt, first:end]
            got = out.detach().double()[prompt, first:end]
            room = 8 * truth.slack.logits + 2e-3
            _near(got.numpy(), z.numpy(), room, f"prompt {prompt}: logits under noise")

    return check


_CALLS: dict[str, Callable[[Case, zoo.Model, Given], Check]] = {
    "probe": _probe,
    "sample": _sample,
    "sweep": _sweep,
    "spread": _spread,
    "spectrum": _spectrum,
    "interference": _interference,
    "rank": _rank,
    "applied": _applied,
}


# --- what is compared ------------------------------------------------------------------------


def _equal(got: Any, wanted: Any, what: str) -> None:
    if not np.array_equal(got, wanted):
        raise Wrong(f"{what}: {_short(got)}; the model has {_short(wanted)}")


def _between(got: Any, low: Any, high: Any, what: str, room: float = 0.0) -> None:
    got, low, high = np.asarray(got), np.asarray(low), np.asarray(high)
    if got.shape != low.shape or not ((low - room <= got) & (got <= high + room)).all():
        raise Wrong(f"{what}: {_short(got)}; the model has {_short(low)} to {_short(high)}")


def _near(got: Any, wanted: Any, room: float, what: str) -> None:
    got, wanted = np.asarray(got, dtype=float), np.asarray(wanted, dtype=float)
    if got.shape != wanted.shape or not (np.abs(got - wanted) <= room).all():
        raise Wrong(f"{what}: {_short(got)}; the model has {_short(wanted)} (within {room:.2g})")


def _short(x: Any) -> str:
    return re.sub(r"\s+", " ", np.array2string(np.asarray(x), precision=5, threshold=40))


def _refuses_to_merge(case: Case, model: zoo.Model, what: Given, before: Any) -> None:
    after = _report(case, model, what, first_prompt=len(what.spans))
    try:
        before.merge(after)
    except ValueError:
        return
    raise Wrong("parts of different models were merged")


def _merged(case: Case, model: zoo.Model, what: Given) -> Check:
    """Parts of a corpus, each by itself."""
    parts = []
    for i in range(len(what.spans)):
        tokens = what.tokens[i : i + 1]
        options = {n: v[i : i + 1] for n, v in what.options.items()}
        one = replace(what, tokens=tokens, options=options)
        parts.append(_report(case, model, one, first_prompt=i))
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    return _probed(case, whole)
