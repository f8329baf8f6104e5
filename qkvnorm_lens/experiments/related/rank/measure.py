"""What is measured: a table for each part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.core import Amount, Part, Size, Subject, reading, reading_parts

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

AMOUNT: Final = core.by_size(Amount(16, 1, 64), Amount(64, 4), Amount(256, 16))
STATES: Final = ("trained", "random start")
STREAM: Final = {"in": 0.0, "mid": 0.5, "mid2": 0.75, "out": 1.0}  # place within a block
SHOWN: Final = {
    "relative_mu": "distance from mean\nμ(X) / |X|",
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
    "mean_cosine": "mean |cosine| of tokens",
}
NOT_BUILT: Final = "not built"
SEED: Final = 1  # of a language model's random start


# -- measuring ------------------------------------------------------------------------------


def measure(subject: Subject, amount: Amount) -> pd.DataFrame:
    """`hooks.rank_profile` by site, with and without the first token, trained and at the start."""
    ids = reading(subject, amount).ids
    frames = [profile(subject.load(), ids).assign(state="trained")]
    start = at_start(subject)
    fresh = pd.DataFrame([{"site": NOT_BUILT}]) if start is None else profile(start, ids)
    frames.append(fresh.assign(state="random start"))
    rows = pd.concat(frames, ignore_index=True)
    rows = rows.assign(tokens=float(np.mean([len(row) for row in ids])), prompts=len(ids))
    return core.about(subject, rows, "state", "first", "stack", "layer", "site", "label")


def profile(model: TransformerBridge, ids: list[list[int]]) -> pd.DataFrame:
    """One row per site, for all tokens (``first`` 1) and without the first (0)."""
    import hooks

    report = hooks.rank_profile(model, ids, batch_size=16, progress=False)
    return pd.concat(
        [report.to_frame(without_first=w).assign(first=int(not w)) for w in (False, True)],
        ignore_index=True,
    )


def at_start(subject: Subject) -> TransformerBridge | None:
    """The same configuration before training; None where it isn't at hand.

    Ours: the weights of its own seed, from which it was trained. Others: weights as transformers
    draws them, of a fixed seed.
    """
    if subject.path is None:
        return None
    if subject.placement:
        from qkvnorm_lens.models import QKVNormTransformer, to_bridge, to_plain

        cfg = to_plain(subject.load()).cfg
        if cfg.calibrated or cfg.score_scale == "calibrated":
            return None  # its scales were fixed on the first batch of its training
        return to_bridge(QKVNormTransformer(cfg).eval())
    import torch
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(subject.path)
    if not config.architectures:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        plain = plain.float().eval()
        bridge: TransformerBridge = build_bridge_from_module(
            plain, config.architectures[0], hf_config=plain.config, tokenizer=None
        )
    return bridge.eval()


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model."""
    return reading_parts(subjects, AMOUNT[size], measure, start=SEED)


# -- reading the table ----------------------------------------------------------------------


def stream(table: pd.DataFrame, state: str, *, first: bool = False) -> pd.DataFrame:
    """The residual stream's rows in order; ``depth`` is in blocks: 0.5 is within the first one.

    Of an encoder-decoder the encoder.
    """
    some = core.pick(table, state=state, first=int(first))
    some = some[some["site"].isin(STREAM) & ~some["stack"].astype(str).str.startswith("decoder")]
    some = some.assign(depth=some["layer"] + some["site"].map(STREAM).astype(float))
    # A block's input is the output of the one before.
    return some[(some["site"] != "in") | (some["layer"] == 0)]


def ends(table: pd.DataFrame, state: str, *, first: bool = False) -> pd.DataFrame:
    """One row per model: the stream behind the last block."""
    some = stream(table, state, first=first)
    return some.loc[some.groupby("model", sort=False)["depth"].idxmax()]
