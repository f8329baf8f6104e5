"""Which of a block's tensors are its residual stream, and which come after a norm.

Found on the tensors of the pass itself, not by name: the input of the norm that attention reads is
the block's input; the stream between attention and MLP is the input plus what attention adds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hooks.errors import UnsupportedModelError
from hooks.measures.rank.report import LETTERS, RankSite
from hooks.model import HookedModel

_BLOCK: Final = re.compile(r"^((?:encoder_|decoder_)?blocks)\.(\d+)\.(hook_in|hook_resid_pre)$")
_NORM: Final = re.compile(r"^ln\w*$|norm")
_ATTENTION: Final = ("attn", "self_attn", "linear_attn")
_CROSS: Final = ("cross_attn",)
_MLP: Final = ("mlp", "moe", "ffn")
_FEW: Final = 16  # units of rounding by which a sum may be off

_Places = dict[str, tuple[str, Tensor]]  # hook and tensor of each site


@dataclass(frozen=True)
class Block:
    """Hook points of one block.

    Attributes:
        stack, layer, prefix: ``blocks``, 3, ``blocks.3``.
        input, output: hooks of the stream.
        inner: other hooks that identify its sites.
    """

    stack: str
    layer: int
    prefix: str
    input: str
    output: str
    inner: tuple[str, ...]

    @property
    def label(self) -> str:
        """``L3``; ``E3``, ``D3`` in an encoder and a decoder."""
        return f"{LETTERS.get(self.stack, 'L')}{self.layer}"


@dataclass(frozen=True)
class Found:
    """A site of a block with its tensor ``[batch, pos, d_model]``."""

    site: RankSite
    tensor: Tensor


def blocks_of(model: HookedModel) -> dict[str, list[Block]]:
    """Blocks of each stack that has hooks on its stream."""
    names = model.hook_dict
    stacks: dict[str, dict[int, Block]] = {}
    for name in names:
        match = _BLOCK.match(name)
        if not match:
            continue
        stack, layer = match[1], int(match[2])
        prefix = f"{stack}.{layer}"
        ends = [f"{prefix}.{end}" for end in ("hook_out", "hook_resid_post")]
        end = next((end for end in ends if end in names), None)
        if end is None:
            continue
        of = stacks.setdefault(stack, {})
        if layer not in of:
            of[layer] = Block(stack, layer, prefix, name, end, _inner(model, prefix))
    if not stacks:
        raise UnsupportedModelError(
            "the residual stream",
            wanted="a stack of blocks with hooks hook_in and hook_out, or hook_resid_pre and "
            "hook_resid_post",
            got="none",
        )
    return {stack: [of[layer] for layer in sorted(of)] for stack, of in stacks.items()}


def _inner(model: HookedModel, prefix: str) -> tuple[str, ...]:
    names = model.hook_dict
    children = {
        name[len(prefix) + 1 :].split(".")[0]
        for name in names
        if name.startswith(f"{prefix}.") and name.count(".") == prefix.count(".") + 2
    }
    outs = ("hook_attn_out", "hook_cross_attn_out", "hook_mlp_out")
    wanted = [f"{prefix}.{name}" for name in ("hook_resid_mid", "hook_resid_mid2", *outs)]
    for child in sorted(children):
        if _NORM.search(child):
            wanted += [f"{prefix}.{child}.hook_in", f"{prefix}.{child}.hook_out"]
        elif child in (*_ATTENTION, *_CROSS, *_MLP, "mixer"):
            wanted.append(f"{prefix}.{child}.hook_in")
    return tuple(name for name in wanted if name in names)


def final_norm(model: HookedModel, stack: str) -> str | None:
    """Name of the norm after a stack, if hooks show its input and output."""
    name = f"{stack.removesuffix('blocks')}ln_final"
    both = all(f"{name}.{end}" in model.hook_dict for end in ("hook_in", "hook_out"))
    return name if both else None


def resolve(block: Block, kept: Mapping[str, Tensor]) -> tuple[list[Found], list[str]]:
    """Sites of a block in the order of its pass, and notes on those that are missing.

    ``kept``: tensors by hook; the block's own as ``in`` and ``out``.
    """
    streams, notes = _streams(block, kept)
    found = [_found(block, "in", block.input, kept["in"])]
    norms, said = _norms(block, kept, streams)
    notes += said
    order = ("attn_norm", "mixer_norm", "mid", "cross_norm", "mid2", "mlp_norm")
    inner = {**{k: v for k, v in streams.items() if k in ("mid", "mid2")}, **norms}
    found += [_found(block, site, *inner[site]) for site in order if site in inner]
    found.append(_found(block, "out", block.output, kept["out"]))
    return found, notes


def _found(block: Block, site: str, hook: str, tensor: Tensor) -> Found:
    return Found(RankSite(stack=block.stack, layer=block.layer, site=site, hook=hook), tensor)


def _streams(block: Block, kept: Mapping[str, Tensor]) -> tuple[_Places, list[str]]:
    """The stream at the input and between the branches, as sums of it and the branches show."""

    def get(name: str) -> Tensor | None:
        return kept.get(f"{block.prefix}.{name}")

    streams = {"in": (block.input, kept["in"])}
    mid, attn, mlp = get("hook_resid_mid"), get("hook_attn_out"), get("hook_mlp_out")
    mid2, cross = get("hook_resid_mid2"), get("hook_cross_attn_out")
    if mid is None:
        parallel = (
            attn is not None and mlp is not None and _is_sum(kept["out"], kept["in"], attn, mlp)
        )
        why = "attention and MLP read the same stream" if parallel else "no hook shows it"
        if attn is None and mlp is None:
            why = "no attention followed by an MLP"
        return streams, [f"no stream between attention and MLP ({why})"]
    second = (kept["out"], mid, mlp) if mid2 is None else (mid2, mid, cross)
    sums = [(mid, kept["in"], attn), second]
    if mid2 is not None:
        sums.append((kept["out"], mid2, mlp))
    if all(part is not None and _is_sum(whole, rest, part) for whole, rest, part in sums):
        streams["mid"] = (f"{block.prefix}.hook_resid_mid", mid)
        if mid2 is not None:
            streams["mid2"] = (f"{block.prefix}.hook_resid_mid2", mid2)
        return streams, []
    return _behind_a_norm(block, kept, streams)


def _behind_a_norm(
    block: Block, kept: Mapping[str, Tensor], streams: _Places
) -> tuple[_Places, list[str]]:
    """Post-norm: the norms follow the sums, and their outputs are the stream."""
    read = _reads(block, kept, _MLP)
    behind = {name: kept[f"{name}.hook_out"] for name in _norm_names(block, kept)}
    of_mlp = [n for n, x in behind.items() if read is not None and torch.equal(x, read)]
    of_out = [n for n, x in behind.items() if torch.equal(x, kept["out"])]
    if of_mlp and of_out and not torch.equal(kept[f"{of_mlp[0]}.hook_in"], kept["in"]):
        crosses = _reads(block, kept, _CROSS) is not None
        streams["mid2" if crosses else "mid"] = (f"{of_mlp[0]}.hook_out", behind[of_mlp[0]])
        names = " and ".join(name.rsplit(".", 1)[-1] for name in (of_mlp[0], of_out[0]))
        return streams, [f"its norms {names} follow the sums: the stream is their output"]
    return streams, [
        "no stream between attention and MLP (the hook of that name is not the input plus what "
        "attention adds)"
    ]


def _norms(block: Block, kept: Mapping[str, Tensor], streams: _Places) -> tuple[_Places, list[str]]:
    """The output of the norm of each branch's input."""
    branches = {"attn": _ATTENTION, "mixer": ("mixer",), "cross": _CROSS, "mlp": _MLP}
    found: _Places = {}
    notes = []
    for branch, children in branches.items():
        read = _reads(block, kept, children)
        if read is None:
            continue
        for name in _norm_names(block, kept):
            x, y = kept[f"{name}.hook_in"], kept[f"{name}.hook_out"]
            if not torch.equal(y, read) or not any(torch.equal(x, s) for _, s in streams.values()):
                continue
            if torch.equal(x, y):
                notes.append(f"no norm before {branch}: {name.rsplit('.', 1)[-1]} is none")
                break
            found[f"{branch}_norm"] = (f"{name}.hook_out", y)
            break
        else:
            if not any(torch.equal(read, s) for _, s in streams.values()):
                notes.append(f"no hook shows what {branch} reads as the norm of a stream")
            else:
                notes.append(f"no norm before {branch}")
    if not any(_reads(block, kept, c) is not None for c in branches.values()):
        notes.append("no hook shows the output of its norms")
    if "attn_norm" in found and found["attn_norm"] == found.get("mlp_norm"):
        del found["mlp_norm"]
        notes.append("attention and MLP read one norm")
    return found, notes


def _norm_names(block: Block, kept: Mapping[str, Tensor]) -> list[str]:
    """Norms whose input and output were both seen."""
    ends = [name.removesuffix(".hook_out") for name in block.inner if name.endswith(".hook_out")]
    return [n for n in ends if f"{n}.hook_in" in kept and f"{n}.hook_out" in kept]


def _reads(block: Block, kept: Mapping[str, Tensor], children: tuple[str, ...]) -> Tensor | None:
    names = [f"{block.prefix}.{child}.hook_in" for child in children]
    return next((kept[name] for name in names if name in kept), None)


def _is_sum(whole: Tensor, *parts: Tensor) -> bool:
    """Whether a tensor is the sum of these, token by token, up to its dtype's rounding."""
    if any(part.shape != whole.shape for part in parts):
        return False
    wide = [x.float() if x.device.type == "mps" else x.double() for x in (whole, *parts)]
    off = torch.linalg.vector_norm(wide[0] - torch.stack(wide[1:]).sum(0), dim=-1)
    lengths = torch.stack([torch.linalg.vector_norm(x, dim=-1) for x in wide]).sum(0)
    return bool((off <= _FEW * torch.finfo(whole.dtype).eps * lengths).all())
