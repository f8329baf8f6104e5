"""Interference: the collapse that a trained Pre-Norm model really suffers from its common length.

The norm before an attention divides every token by its length s_t, and so every score of a head by
a number that is not the head's own choice. Here no noise is injected: in one layer at a time the
scale is frozen at one constant c for all tokens,

    y_t = g (x_t - [mean]) / s_t + b   ->   y_t = g (x_t - [mean]) / c + b,

and the sparse rows whose arg max then moves to another token, which direction alone would have
chosen, are counted. Menary et al. 2024 simulate interference with independent noise and name this
test as missing (Sec. "limitations"; theorems 2 and 7).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooks.arguments import (
    MANY,
    SEEDS,
    brief,
    check_booleans,
    check_choice,
    check_integers,
    check_number,
    check_optional,
    read_list,
)
from hooks.collapse import check_sparse
from hooks.errors import UnsupportedModelError
from hooks.measures.interference.count import (
    CleanRows,
    SparseRows,
    clean_rows,
    first_of,
    frozen_rows,
    row_sigma,
    scale_spread,
    shuffles,
    uniform_has,
    variances,
)
from hooks.measures.interference.output import Output
from hooks.measures.interference.report import PARTS, InterferenceReport, InterferenceSettings
from hooks.model import (
    HookedModel,
    MaskLike,
    Prompts,
    Tokens,
    counting,
    encode,
    evaluating,
    example_of,
    keeping_calls,
    measurement,
    without_hooks,
)
from hooks.noise import SPARSE
from hooks.sites import (
    CHECK,
    Hook,
    InnerNorm,
    LayerSites,
    LayerView,
    attention_facts,
    choose_layers,
    inner_norms,
    sites_for,
    view_layers,
)

_ON = ("k", "qk")
Part = Literal["scale", "outliers", "rest"]


@measurement
def interference(
    model: HookedModel,
    tokens: Tokens,
    *,
    constants: Sequence[float] | None = None,
    on: Sequence[str] = _ON,
    spare_first: bool = False,
    part: Part = "scale",
    outliers: int = 3,
    output: bool = False,
    targets: Int[Tensor, "*prompts target"] | Sequence[Any] | None = None,
    layers: Sequence[int] | None = None,
    sparse: float = SPARSE,
    draws: int = 8,
    seed: int = 0,
    decoder_tokens: Tokens | None = None,
    attention_mask: MaskLike | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 8,
    first_prompt: int = 0,
    progress: bool | None = None,
    name: str | None = None,
) -> InterferenceReport:
    """Share of sparse attention rows whose arg max depends on the tokens' lengths, per head.

    In one layer at a time, on clean inputs, the norm's scale s_t becomes one constant c; the model
    itself then shows where each row attends. For comparison, the clean pass gives what factors of
    the same size do to the same rows: s_t/c on the keys, unshuffled and shuffled among the prompt's
    tokens, and independent noise on the keys, exactly (`collapse_probability`; the uniform law
    where it can have that spread, else the lognormal one). A row's sigma is the standard deviation
    of s_t over its visible keys, divided by their mean. Source: Menary et al. 2024, theorems 2 and
    7; the test itself is not in the paper.

    One pass, after which each layer's block alone is run again with its norm frozen, from what the
    pass gave it. Where that does not give a pass's scores (checked once for each state of a model),
    or a hook is in the block, a pass ended at that layer takes its place.

    Args:
        model, tokens, decoder_tokens, layers, attention_mask, prepend_bos, name: as in
            :func:`hooks.collapse_probe`.
        batch_size, progress: likewise.
        constants: in units of the default constant, the median of s_t over the tokens of each
            prompt and layer (per prompt, so that no prompt's numbers depend on the others);
            default: 1. Where neither the norm nor the projections nor the scores have a bias, no
            loose count depends on it (unless ``spare_first``, or with a ``part``). With biases of
            norm and projections but without rotary positions (GPT-2), no loose count with
            ``on="k"`` does: such a bias adds the same to all scores of a row.
        on: ``"k"``: the frozen norm reaches k, and the clean q is put back; ``"qk"``: it reaches
            both. Freezing v too changes no arg max of the layer: see ``output``.
        spare_first: the first token keeps its own scale. In language models it is far longer than
            the others, and freezing it shows that and little else.
        part: ``"scale"``: all of s_t. ``"outliers"``: only what the outlier dimensions O add to
            s_t^2 = eps + (1/d) (sum_{i in O} + sum_{i not in O}) (x_ti - [mean])^2; ``"rest"``:
            only what all others and eps add. The part's root is frozen at its median over the
            prompt's tokens, times the constant; the other part stays each token's own.
        outliers: how many dimensions O has: those of a prompt and layer with the largest mean
            square over all tokens but the first (Kovaleva et al. 2021, arXiv 2105.06990).
        output: also compare the model's output with everything frozen that reads the norm (q, k, v;
            in parallel blocks the feed-forward too): KL, agreement and loss, at the cost of whole
            passes for each layer and constant.
        targets: for ``output``, as in :func:`hooks.sweep`.
        sparse: least maximum of a sparse row.
        draws: shuffles of the factors.
        seed: of the shuffles.
        first_prompt: index of the first prompt, where this is part of a corpus: see
            :meth:`InterferenceReport.merge`.

    Returns:
        :class:`InterferenceReport`.

    Raises:
        UnsupportedModelError: the model failed the self-check; a layer has no norm before its
            attention (No-Norm, QKV-Norm, post-norm models), or one that could not be verified.
        TypeError: ``spare_first`` or ``output`` is neither True nor False.
        ValueError: targets without ``output``; constants that are not positive numbers, an unknown
            ``on``, scores that are not finite; and as :func:`hooks.collapse_probe`.
    """
    spare_first, output = check_booleans(spare_first=spare_first, output=output)
    settings = _settings(constants, on, sparse, spare_first)
    part = cast(Part, check_choice("part", part, PARTS))
    draws, seed, batch_size, first_prompt, outliers = check_integers(
        draws=(draws, 0, MANY),
        seed=(seed, 0, SEEDS),
        batch_size=(batch_size, 1),
        first_prompt=(first_prompt, 0),
        outliers=(outliers, 1),
    )
    settings = replace(settings, part=part, outliers=outliers)
    _, progress = check_optional(prepend_bos=prepend_bos, progress=progress)
    if targets is not None and not output:
        raise ValueError("targets: wanted output=True with them, which compares the output")
    prompts = encode(
        model,
        tokens,
        decoder_tokens=decoder_tokens,
        attention_mask=attention_mask,
        prepend_bos=prepend_bos,
    )
    sites = sites_for(model, prompts)
    chosen = choose_layers(sites, layers)
    settings = replace(settings, draws=draws, seed=seed, layers=tuple(s.layer for s in chosen))
    batches = [indices for indices, _ in prompts.batches(batch_size)]
    steps = 2 * len(chosen) * len(batches)  # each layer as it is, and frozen
    with evaluating(model), counting(steps, "interference", "layer", progress) as bar:
        example = example_of(model, prompts)
        norms = inner_norms(model, sites, chosen, example)
        end = Output(model, prompts, targets, example) if output else None
        run = _Run(model, chosen, norms, settings, prompts.starts, first_prompt, end)
        for indices in batches:
            run.batch(prompts.some(indices), indices, bar.update)
    return run.report(attention_facts(model, sites, chosen, prompts, name), prompts)


def _settings(
    constants: Sequence[float] | None, on: Sequence[str], sparse: float, spare_first: bool
) -> InterferenceSettings:
    wanted = "positive numbers in a list, each once"
    given: Any = (1.0,) if constants is None else read_list("constants", constants, wanted)
    values = tuple(check_number("constants", c, wanted, lambda x: 0 < x < np.inf) for c in given)
    if not values or len(set(values)) < len(values):
        raise ValueError(f"constants: wanted {wanted}; got {brief(list(values))}")
    some = [on] if isinstance(on, str) else read_list("on", on, f"some of {list(_ON)}")
    roles = tuple(check_choice("on", role, _ON) for role in some)
    if not roles or len(set(roles)) < len(roles):
        raise ValueError(f"on: wanted some of {list(_ON)}, each once; got {brief(on)}")
    sparse = check_sparse(sparse)
    return InterferenceSettings(
        on=roles,
        constants=values,
        sparse=sparse,
        spare_first=spare_first,
        draws=0,
        layers=(),
        seed=0,
    )


@dataclass(frozen=True)
class _Clean:
    """What is kept of one layer from a clean pass: its q, and its norm's scales.

    Attributes:
        scale: s_t.
        own: what of s_t^2 stays each token's own: nothing, if all of it is frozen.
        constant: the median of what is frozen, as a root.
    """

    q: Tensor
    scale: Float[Tensor, "batch pos"]
    own: Float[Tensor, "batch pos"]
    constant: Float[Tensor, "batch"]
    rows: CleanRows


@dataclass
class _Run:
    """Passes over batches of prompts, and their sums."""

    model: HookedModel
    layers: tuple[LayerSites, ...]
    norms: tuple[InnerNorm, ...]
    settings: InterferenceSettings
    starts: Sequence[Sequence[int]]
    first_prompt: int
    end: Output | None

    def __post_init__(self) -> None:
        settings, n_prompts = self.settings, len(self.starts)
        n_l, n_h = len(self.layers), max(s.n_heads for s in self.layers)
        per_row = (n_l, n_h, n_prompts, 2)
        frozen = (len(settings.on), len(settings.constants), *per_row)
        self.sums = {
            **{n: np.zeros(frozen, np.int64) for n in ("loose", "strict", "to_first")},
            **{n: np.zeros(per_row, np.int64) for n in ("rows", "factored", "lognormal")},
            **{n: np.zeros(per_row[:3], np.int64) for n in ("examined", "ties")},
            "permuted": np.zeros((settings.draws, *per_row), np.int64),
            **{n: np.zeros(per_row) for n in ("predicted", "sigma_squared")},
            "variance": np.zeros((*per_row[:3], 3, 2, 3)),
            "constant": np.zeros((n_l, n_prompts)),
            "scale_spread": np.zeros((n_l, n_prompts, 2)),
        }
        # Where nothing but the model itself acts in a block, the block alone is run again.
        again = {s.block for s, n in zip(self.layers, self.norms, strict=True) if n.again}
        self.again = without_hooks(self.model, again)
        outputs = len(settings.constants) if self.end is not None else 0
        self.ends = {n: np.zeros((outputs, n_l, n_prompts)) for n in ("kl", "agree", "loss")}

    def batch(self, prompts: Prompts, indices: Sequence[int], done: Callable[[], Any]) -> None:
        """One batch of prompts of one length: a clean pass, then each layer frozen in each way."""
        seen: list[dict[str, Tensor]] = [{} for _ in self.layers]
        clean: dict[int, _Clean] = {}
        given = prompts.batch(range(len(prompts)))

        def take(view: LayerView) -> None:
            clean[view.index] = self._take_clean(view, seen[view.index], indices)
            done()

        with keeping_calls(self.model, self.again) as calls:
            reading = self._reading(seen)
            view_layers(self.model, given, self.layers, take, indices, ("q", "k"), hooks=reading)
        if self.end is not None:
            self.end.clean(prompts, indices)
        for index, layer in enumerate(self.layers):
            call = calls.get(layer.block, given)
            for j, constant in enumerate(self.settings.constants):
                for i, on in enumerate(self.settings.on):
                    hooks, count = self._freezing(indices, clean[index], (i, j, index), on)
                    view_layers(self.model, call, [layer], count, indices, hooks=hooks)
                if self.end is not None:
                    hooks = [self._frozen_norm(index, clean[index], constant)]
                    for name, values in self.end.compare(prompts, indices, hooks).items():
                        self.ends[name][j, index, list(indices)] = values
            del clean[index]  # its vectors are not needed any more
            done()
        if self.end is not None:
            self.end.forget()

    # -- the model as it is ------------------------------------------------------------------

    def _reading(self, seen: Sequence[dict[str, Tensor]]) -> list[Hook]:
        """Hooks that keep each norm's input and output, and q at its hook."""
        entries: list[Hook] = []
        for sites, norm, kept in zip(self.layers, self.norms, seen, strict=True):
            places = (("x", norm.before), ("y", norm.after), ("q", sites.q.dot.hook))
            entries += [(name, partial(_keep, kept=kept, what=what)) for what, name in places]
        return entries

    def _take_clean(
        self, view: LayerView, seen: dict[str, Tensor], indices: Sequence[int]
    ) -> _Clean:
        """Everything that follows from the clean pass alone."""
        norm, settings = self.norms[view.index], self.settings
        norm.check(seen["x"], seen.pop("y"))
        x = seen.pop("x")
        scale = norm.scale(x)
        if view.scores.shape[-1] != scale.shape[1]:
            raise UnsupportedModelError(
                CHECK,
                wanted="an output for each key",
                got=f"{scale.shape[1]} outputs, {view.scores.shape[-1]} keys",
                layer=norm.layer,
            )
        first = first_of([self.starts[i] for i in indices], view.scores.shape[-1])
        rows = clean_rows(view, settings.sparse, self._numbers(indices), first)
        frozen = self._frozen_part(norm, x, scale, rows.first)
        own = (scale.square() - frozen.square()).clamp_min(0)  # nothing, if it is all of it
        kept = _Clean(seen.pop("q"), scale, own, torch.quantile(frozen, 0.5, dim=1), rows)
        layer, mine = view.index, list(indices)
        self.sums["constant"][layer, mine] = kept.constant.cpu().numpy()
        self.sums["scale_spread"][layer, mine] = scale_spread(scale, rows.first)
        self._add("examined", (layer,), rows.sums(rows.examined).sum(-1), mine)
        self._add("ties", (layer,), rows.sums(rows.ties).sum(-1), mine)
        self._add("rows", (layer,), rows.sums(rows.sparse), mine)
        self._add("variance", (layer,), variances(view, rows), mine)
        factor = self._factor(kept, 1.0)
        sigma = row_sigma(view, factor)
        self._add("sigma_squared", (layer,), rows.sums(sigma.square() * rows.sparse), mine)
        self._add("lognormal", (layer,), rows.sums(rows.sparse & ~uniform_has(sigma)), mine)
        gathered = SparseRows(view.parts, rows)
        self._add("predicted", (layer,), rows.sums(gathered.predicted(sigma)), mine)
        self._add("factored", (layer,), rows.sums(gathered.moved(factor)), mine)
        numbers = self._numbers(indices)
        for draw in range(settings.draws):
            spared = rows.first & settings.spare_first
            order = shuffles(settings.seed, norm.layer, numbers, spared, draw)
            moved = gathered.moved(factor.gather(1, order.to(factor.device)))
            self._add("permuted", (draw, layer), rows.sums(moved), mine)
        return kept

    def _numbers(self, indices: Sequence[int]) -> list[int]:
        """Indices of the prompts in the whole corpus."""
        return [self.first_prompt + i for i in indices]

    def _frozen_part(
        self, norm: InnerNorm, x: Tensor, scale: Tensor, first: Tensor
    ) -> Float[Tensor, "batch pos"]:
        """The root of what of s_t^2 is frozen."""
        if self.settings.part == "scale":
            return scale
        squares = norm.squares(x)
        others = squares.masked_fill(first.to(squares.device)[..., None], 0)
        if not self.settings.outliers < squares.shape[-1]:
            wanted = f"fewer than the {squares.shape[-1]} dimensions of layer {norm.layer}'s norm"
            raise ValueError(f"outliers: wanted {wanted}; got {self.settings.outliers}")
        largest = others.sum(1).topk(self.settings.outliers).indices
        at = largest[:, None].expand(-1, squares.shape[1], -1)
        outliers = squares.gather(-1, at).sum(-1) / squares.shape[-1]
        frozen = outliers if self.settings.part == "outliers" else scale.square() - outliers
        return frozen.clamp_min(0).sqrt()

    def _factor(self, kept: _Clean, constant: float) -> Float[Tensor, "batch pos"]:
        """s_t over its value with a frozen part; s_t / c if it is all; 1 for a spared first token.

        sqrt(c^2) is c, to the bit.
        """
        factor = kept.scale / (kept.own + (constant * kept.constant)[:, None].square()).sqrt()
        if self.settings.spare_first:
            factor[kept.rows.first] = 1.0
        return factor

    # -- with a frozen norm ------------------------------------------------------------------

    def _frozen_norm(self, index: int, kept: _Clean, constant: float) -> Hook:
        norm, factor = self.norms[index], self._factor(kept, constant)

        def freeze(y: Tensor, hook: Any) -> Tensor:
            return norm.frozen(y, factor)

        return norm.after, freeze

    def _freezing(
        self, indices: Sequence[int], kept: _Clean, at: tuple[int, int, int], on: str
    ) -> tuple[list[Hook], Callable[[LayerView], None]]:
        """What freezes a layer's norm, and counts; ``at``: indices of on, constant and layer."""
        index, rows, q = at[2], kept.rows, kept.q
        constant = self.settings.constants[at[1]]
        hooks = [self._frozen_norm(index, kept, constant)]
        if on == "k":
            hooks.append((self.layers[index].q.dot.hook, lambda tensor, hook: q.clone()))
        when = f" with the norm frozen at {constant:g} times its median"

        def count(view: LayerView) -> None:
            moved = frozen_rows(view, rows, self.settings.sparse, self._numbers(indices), when)
            for name, some in moved.items():
                self._add(name, at, rows.sums(some), list(indices))

        return hooks, count

    # -- sums --------------------------------------------------------------------------------

    def _add(
        self, name: str, at: tuple[int, ...], values: np.ndarray, prompts: Sequence[int]
    ) -> None:
        """``[head, batch, ...]`` of these prompts, at the leading indices ``at``."""
        sums = self.sums[name]
        sums[at][: len(values), list(prompts)] += values.astype(sums.dtype)

    def report(self, model: Mapping[str, Any], prompts: Prompts) -> InterferenceReport:
        """The frozen result."""
        n = len(prompts)
        end = self.end
        return InterferenceReport(
            settings=self.settings,
            model=model,
            first_prompt=self.first_prompt,
            tokens=prompts.strings or ((),) * n,
            decoder_tokens=prompts.decoder_strings,
            positions=np.zeros(n, np.int64) if end is None else end.positions,
            targets=np.zeros(n, np.int64) if end is None else end.targets,
            clean_loss=np.zeros(n) if end is None else end.clean_loss,
            **self.sums,
            **self.ends,
        )


def _keep(tensor: Tensor, hook: Any, kept: dict[str, Tensor], what: str) -> None:
    kept[what] = tensor.clone()  # against edits in place
