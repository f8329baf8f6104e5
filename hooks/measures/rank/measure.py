"""Rank profile: how far the tokens of a prompt are from being one token, by depth and site.

Source: Wu et al. 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks.arguments import brief, check_integers, check_layers, check_optional
from hooks.errors import UnsupportedModelError
from hooks.measures.rank.numbers import MEASURES, first_share, with_and_without_first
from hooks.measures.rank.report import WITH, RankReport, RankSettings, RankSite
from hooks.measures.rank.sites import Block, Found, blocks_of, final_norm, resolve
from hooks.model import (
    Finished,
    HookedModel,
    MaskLike,
    ModelInput,
    Prompts,
    Tokens,
    check_model,
    encode,
    measurement,
    over_batches,
    pass_dtype,
    run_with,
)
from hooks.sites import check_masks, model_facts


@measurement
def rank_profile(
    model: HookedModel,
    tokens: Tokens,
    *,
    layers: Sequence[int] | None = None,
    decoder_tokens: Tokens | None = None,
    attention_mask: MaskLike | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 8,
    progress: bool | None = None,
    name: str | None = None,
) -> RankReport:
    """Distance from the mean token, ranks and cosines of the tokens, by block and site.

        mu(X) = || X - 1 mean(X)^T ||_F,    stable rank = ||X||_F^2 / ||X||_2^2,
        effective rank = exp(-sum p ln p), p = s / sum s,    X [token, d_model], s its singular
                                                             values

    (the stable rank is that of X; Naderi et al. 2024 take X X^T's, with fourth powers) and mu /
    ||X||_F, the numerical rank (at least 1 for X != 0; :meth:`RankReport.to_frame`), the least
    singular value, the mean |cosine| of different tokens: for all tokens and without the first.
    Sites: the residual stream before, between and after a block's attention and MLP, and the
        outputs of the norms before them and after the last block, wherever the model's hook points
        show them. The sites are found on the tensors themselves, block by block; the report says
        what is missing, and why. One forward pass; a tensor is reduced to its numbers while its
        block runs. Needs no attention.
    Source: Wu et al. 2024; Rudelson and Vershynin 2007 (stable rank); Roy and Vetterli 2007.

    Args:
        model, tokens, decoder_tokens, attention_mask, prepend_bos, batch_size, progress, name: as
            in :func:`hooks.collapse_probe`.
        layers: block indices (of an encoder-decoder: in both stacks); default: all.

    Returns:
        :class:`RankReport`.

    Raises:
        UnsupportedModelError: the model has no stack of blocks with hooks on its stream, runs a
            block more than once, carries a stream that is not ``[batch, pos, d_model]``, passes a
            block something other than the output of the block before it, or gave a number that is
            not finite.
        ValueError: an unknown layer, empty text, a sequence longer than the context.
        TypeError: not a TransformerBridge or HookedTransformer.
    """
    check_model(model)
    (batch_size,) = check_integers(batch_size=(batch_size, 1))
    _, progress = check_optional(prepend_bos=prepend_bos, progress=progress)
    asked = None if layers is None else tuple(sorted(check_layers(layers)))
    stacks = blocks_of(model)
    chosen = _chosen(stacks, asked)
    prompts = encode(
        model,
        tokens,
        decoder_tokens=decoder_tokens,
        attention_mask=attention_mask,
        prepend_bos=prepend_bos,
    )
    check_masks(model, prompts)
    gathered = _Gathered(torch.finfo(pass_dtype(model)).eps / 2)

    def measure(indices: Sequence[int], given: ModelInput) -> None:
        watch = _Watch(stacks, chosen, indices, gathered)
        run_with(model, given, watch.hooks(model))
        watch.close()

    over_batches(model, prompts, batch_size, measure, what="rank", progress=progress)
    return gathered.report(asked, model_facts(model, prompts, name), prompts)


def _chosen(stacks: dict[str, list[Block]], layers: Sequence[int] | None) -> set[int]:
    known = sorted({block.layer for blocks in stacks.values() for block in blocks})
    if layers is None:
        return set(known)
    for layer in layers:
        if layer not in known:
            raise ValueError(f"layers: wanted some of {brief(known)}; got {layer}")
    return set(layers)


class _Gathered:
    """Each prompt's numbers at each site, and notes on the sites."""

    def __init__(self, rounding: float) -> None:
        self.rounding = rounding
        self.values: dict[RankSite, dict[int, tuple[np.ndarray, float]]] = {}
        self.notes: dict[str, list[str]] = {}

    def add(self, found: Found, prompts: Sequence[int]) -> None:
        """One tensor ``[batch, pos, d_model]``."""
        x = found.tensor.detach()
        if x.device.type == "meta" or not bool(torch.isfinite(x).all()):
            got = "none, on the meta device" if x.device.type == "meta" else "an infinity or NaN"
            where = f"{found.site.label} ({found.site.hook})"
            check = f"the rank profile at {where}"
            raise UnsupportedModelError(
                check, wanted="finite numbers", got=got, layer=found.site.layer
            )
        x = x.cpu()
        numbers = with_and_without_first(x, self.rounding).numpy(), first_share(x).numpy()
        for prompt, table, share in zip(prompts, *numbers, strict=True):
            self.values.setdefault(found.site, {})[prompt] = table, share

    def note(self, words: Sequence[str], label: str) -> None:
        """Note what is missing at a block."""
        for said in words:
            labels = self.notes.setdefault(said, [])
            if label not in labels:
                labels.append(label)

    def report(
        self, layers: tuple[int, ...] | None, model: dict[str, Any], prompts: Prompts
    ) -> RankReport:
        """All prompts, in their order."""
        order = range(len(prompts))
        for site, mine in self.values.items():
            if len(mine) < len(prompts):
                raise UnsupportedModelError(
                    f"the rank profile at {site.label}",
                    wanted="one site for all prompts",
                    got=f"it at {len(mine)} of {len(prompts)} prompts",
                    layer=site.layer,
                )
        sites = tuple(self.values)
        values, shares = (
            np.array([[self.values[s][i][part] for s in sites] for i in order]) for part in (0, 1)
        )
        notes = [f"{', '.join(labels)}: {said}." for said, labels in self.notes.items()]
        return RankReport(
            settings=RankSettings(layers=layers, sites=sites),
            model={**model, "notes": notes},
            tokens=prompts.strings,
            decoder_tokens=prompts.decoder_strings,
            numbers=values.reshape(len(prompts), len(sites), len(WITH), len(MEASURES)),
            first_share=shares,
        )


@dataclass
class _Watch:
    """Hooks of one forward pass: a block's tensors are kept until its output comes."""

    stacks: dict[str, list[Block]]
    chosen: set[int]
    indices: Sequence[int]
    gathered: _Gathered

    def __post_init__(self) -> None:
        self.done: set[str] = set()
        self.out: dict[str, Tensor] = {}  # of the latest block of each stack
        every = [block for blocks in self.stacks.values() for block in blocks]
        last = [block.prefix for block in every if block.layer in self.chosen]
        ends = {blocks[-1].prefix for blocks in self.stacks.values()}
        # A stack's norm follows its last block: a pass can be cut short only before it.
        self.stop = last[-1] if not ends & set(last) else ""

    def hooks(self, model: HookedModel) -> list[tuple[str, Any]]:
        entries: list[tuple[str, Any]] = []
        for stack, blocks in self.stacks.items():
            for block in blocks:
                entries += self._of_block(block)
            if blocks[-1].layer in self.chosen:
                entries += self._of_final(model, stack, blocks[-1])
        return entries

    def _of_block(self, block: Block) -> list[tuple[str, Any]]:
        kept: dict[str, Tensor] = {}

        def keep(tensor: Any, hook: Any, name: str) -> None:
            kept[name] = self._checked(tensor, block, hook.name).clone()

        def at_in(tensor: Any, hook: Any) -> None:
            kept.clear()
            keep(tensor, hook, "in")
            self._check_chain(block, kept["in"])

        def at_out(tensor: Any, hook: Any) -> None:
            out = self._checked(tensor, block, hook.name).clone()
            if block.prefix in self.done or "in" not in kept:
                raise UnsupportedModelError(
                    "the rank profile",
                    wanted=f"{block.prefix} run once in a forward pass",
                    got="it run more than once, or without its input",
                    layer=block.layer,
                )
            self.done.add(block.prefix)
            self.out[block.stack] = out
            if block.layer not in self.chosen:
                return
            found, notes = resolve(block, {**kept, "out": out})
            kept.clear()
            for site in found:
                self.gathered.add(site, self.indices)
            self.gathered.note(notes, block.label)
            if block.prefix == self.stop:
                raise Finished

        inner = block.inner if block.layer in self.chosen else ()
        return [
            (block.input, at_in),
            *((hook, partial(keep, name=hook)) for hook in inner),
            (block.output, at_out),
        ]

    def _of_final(self, model: HookedModel, stack: str, last: Block) -> list[tuple[str, Any]]:
        """The norm after a stack."""
        name = final_norm(model, stack)
        if name is None:
            self.gathered.note(["no hook after a norm of its output"], last.label)
            return []
        read: dict[str, bool] = {}

        def at_in(tensor: Any, hook: Any) -> None:
            read["stream"] = stack in self.out and torch.equal(tensor, self.out[stack])

        def at_out(tensor: Any, hook: Any) -> None:
            if not read.get("stream"):
                note = f"the norm {name} reads something other than its output, and is left out"
                self.gathered.note([note], last.label)
                return
            site = RankSite(
                stack=stack, layer=last.layer, site="final_norm", hook=f"{name}.hook_out"
            )
            tensor = self._checked(tensor, last, hook.name)
            self.gathered.add(Found(site, tensor), self.indices)

        return [(f"{name}.hook_in", at_in), (f"{name}.hook_out", at_out)]

    def _checked(self, tensor: Any, block: Block, hook: str) -> Tensor:
        if (
            not isinstance(tensor, Tensor)
            or tensor.ndim != 3
            or tensor.shape[0] != len(self.indices)
        ):
            got = list(tensor.shape) if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise UnsupportedModelError(
                f"the rank profile at {hook}",
                wanted=f"a tensor [{len(self.indices)}, pos, d_model]",
                got=str(got),
                layer=block.layer,
            )
        return tensor.detach()

    def _check_chain(self, block: Block, stream: Tensor) -> None:
        """Check that a block reads the output of the one before it."""
        before = self.out.get(block.stack)
        if before is not None and not _same(before, stream):
            raise UnsupportedModelError(
                f"the stream at {block.input}",
                wanted="the output of the block before it",
                got="something else",
                layer=block.layer,
            )

    def close(self) -> None:
        """After a pass: every chosen block has run."""
        for blocks in self.stacks.values():
            for block in blocks:
                if block.layer in self.chosen and block.prefix not in self.done:
                    raise UnsupportedModelError(
                        "the rank profile",
                        wanted=f"{block.prefix} run in a forward pass on these inputs",
                        got="no call of its hooks",
                        layer=block.layer,
                    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
