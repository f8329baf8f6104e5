"""What theorems 1-3 and 5-8 of Menary et al. 2024 say, measured on constructed heads of ours.

Each function gives rows (panel, theorem, placement, series, x, value, predicted): ``value`` was
measured on a block, ``predicted`` follows from the theorem by other means (NaN where nothing does).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Final

import pandas as pd
import torch
from torch import Tensor
from torch.autograd.functional import jacobian, jvp

from qkvnorm_lens.experiments.paper.theorems import constructions as heads
from qkvnorm_lens.models import Block

PLACEMENTS: Final = ("none", "pre", "qkv")
COLUMNS: Final = ("panel", "theorem", "placement", "series", "x", "value", "predicted")
SHARPNESS: Final = 25.0  # w = SHARPNESS a_r.a_t in the matching heads
MATCH: Final = 0.8  # a_r.a_t of the runner-up; the match has 1
RHOS: Final = (1.1, 1.2, 1.4)  # w_*/w_t of the rows whose collapse is shown
POINTS_RHO: Final = 1.2
CANDIDATES: Final = (1.0, 0.85, 0.8, 0.7, 0.4, -0.3)  # w_t / w_* of a sparse row
LEVEL: Final = 40.0  # w_* of that row
ISOTROPIC_SCORE: Final = 3.0  # w of the isotropic head


def frame(
    panel: str,
    theorem: int,
    placement: str,
    series: str,
    x: Iterable[float | int] | Tensor,
    value: Iterable[float | int] | Tensor,
    predicted: Iterable[float | int] | Tensor | float = math.nan,
) -> pd.DataFrame:
    """Rows of one curve."""
    columns: dict[str, Any] = {"x": x, "value": value, "predicted": predicted}
    plain = {
        name: c.flatten().tolist() if isinstance(c, Tensor) else c for name, c in columns.items()
    }
    about = {"panel": panel, "theorem": theorem, "placement": placement, "series": series}
    return pd.DataFrame({**about, **plain})[list(COLUMNS)].astype(dict.fromkeys(columns, float))


# -- theorems 1-3: which subspaces do not interfere --------------------------------------------

_SPACES: Final[dict[str, Callable[[], Tensor]]] = {
    "independent": heads.independent_basis,
    "orthogonal": heads.orthogonal_basis,
}


def _sender_changes(
    panel: str, x: Tensor, b: Tensor, cases: Iterable[tuple[str, str, str]]
) -> pd.DataFrame:
    """Score of head A, which reads a, as one sender's content b in subspace B changes.

    Args:
        panel: name.
        x: what is changed.
        b: the sender's coordinates in B, ``[x, 3]``; the first is the reference.
        cases: placement, kind of subspaces, kind of norm.
    """
    a = heads.tokens((1, 0.3, 0), (0, 1, 1), (1, 0, 0))  # sender, another token, receiver
    others = heads.tokens((0, 0, 1), (0, 1, 0))
    frames = []
    for placement, spaces, kind in cases:
        basis = heads.orthogonal_basis(mean_free=True) if kind == "layer" else _SPACES[spaces]()
        all_b = torch.cat([b[:, None], others.expand(len(b), -1, -1)], 1)
        given = heads.stream(basis, (2 * heads.unit(a)).expand(len(b), -1, -1), all_b)
        score = heads.attend(heads.readers(placement, basis, kind), given).row[:, 0, 0]
        length = given[:, 0].norm(dim=-1)
        interferes = placement == "pre"
        predicted = length[0] / length if interferes else torch.ones_like(length)
        norm = "LayerNorm, " if kind == "layer" else ""
        frames.append(
            frame(
                panel,
                2 if interferes else 1 if placement == "none" else 3,
                placement,
                f"{norm}{spaces} subspaces",
                x,
                score / score[0],
                predicted,
            )
        )
    return pd.concat(frames, ignore_index=True)


def turning(n: int) -> pd.DataFrame:
    """Theorems 1-3: B's content turns on its sphere; x is the angle in turns.

    Predicted: head A's score stays for No-Norm and QKV-Norm, and for Pre-Norm where A and B are
    orthogonal; where they are not, it goes with 1/|x|.
    """
    turns = torch.linspace(0, 1, n, dtype=heads.F64)
    angle = 2 * math.pi * turns
    b = 2 * torch.stack([angle.cos(), angle.sin(), torch.zeros_like(angle)], 1)
    cases = (
        ("none", "independent", "rms"),
        ("pre", "independent", "rms"),
        ("pre", "orthogonal", "rms"),
        ("qkv", "independent", "rms"),
    )
    return _sender_changes("turning", turns, b, cases)


def growing(n: int) -> pd.DataFrame:
    """Theorem 2: B's content grows, off its sphere; x is its length over that at the start.

    Predicted: Pre-Norm's score goes with 1/|x|, also where A and B are orthogonal.
    """
    size = 2 ** torch.linspace(0, 3, n, dtype=heads.F64)
    b = size[:, None] * heads.tokens((0, 1, 0))
    cases = (
        ("none", "independent", "rms"),
        ("pre", "orthogonal", "rms"),
        ("pre", "orthogonal", "layer"),
        ("qkv", "independent", "rms"),
    )
    return _sender_changes("growing", size, b, cases)


def _matching_head(placement: str) -> tuple[Block, Tensor]:
    """Head A attends to the token of its content: w = SHARPNESS a_r.a_t while |a| = |b| = 1."""
    basis = heads.orthogonal_basis() if placement == "pre" else heads.independent_basis()
    block = heads.readers(placement, basis)
    # A norm gives q.k a factor of 3: of |x|^2 = 2 in 6 dimensions, or of |q| = 1 in 3.
    heads.scale_queries(block, SHARPNESS if placement == "none" else SHARPNESS / 3)
    return block, basis


def matching(n: int) -> pd.DataFrame:
    """Theorem 2: a matching head; x is the length of the matched token's content in B.

    Values are the attention on the match, and, in the series "arg max jumps", the length at which
    it goes to the runner-up: predicted where |x(s)| = |x(1)| w_*/w_t.
    """
    rest = math.sqrt(1 - MATCH**2)
    a = heads.tokens((1, 0, 0), (MATCH, rest, 0), (0.3, 0, math.sqrt(0.91)), (-1, 0, 0), (1, 0, 0))
    products = a[:-1] @ a[-1]

    def run(placement: str, size: Tensor) -> heads.Seen:
        block, basis = _matching_head(placement)
        b = heads.tokens((0, 1, 0)).expand(len(size), len(a), -1).clone()
        b[:, 0] *= size[:, None]
        return heads.attend(block, heads.stream(basis, a.expand(len(size), -1, -1), b))

    size = 2 ** torch.linspace(-2, 2, n, dtype=heads.F64)
    frames = []
    for placement in PLACEMENTS:
        w = (SHARPNESS * products).expand(n, -1).clone()
        if placement == "pre":
            w[:, 0] *= torch.sqrt(2 / (1 + size**2))
        value, predicted = run(placement, size).attention[:, 0, 0], w.softmax(-1)[:, 0]
        theorem, series = {"none": 1, "pre": 2, "qkv": 3}[placement], "attention on the match"
        frames.append(frame("matching", theorem, placement, series, size, value, predicted))

    def jumped(size: Tensor) -> Tensor:
        return run("pre", size).row[:, 0].argmax(-1) != 0

    at = heads.bisect(
        jumped, torch.ones(1, dtype=heads.F64), torch.full((1,), 4.0, dtype=heads.F64)
    )
    wanted = math.sqrt(2 / MATCH**2 - 1)
    frames.append(frame("matching", 2, "pre", "arg max jumps", [MATCH], at, [wanted]))
    return pd.concat(frames, ignore_index=True)


def offset(n: int) -> pd.DataFrame:
    """Theorem 2 behind constant offsets: x = (2 + 3, cos a, sin a, r cos b, r sin b).

    x_A = (2, cos a, sin a, 0, 0) and x_B = (3, 0, 0, cos b, sin b) have x_A.x_B = 6 and do not
    interfere: |x| is constant as b turns (x in turns). Off the circle (r = 1 + 2 x) it is not.
    """
    block = heads.new_block("pre", d_model=5)
    read = torch.eye(heads.DIM, 5, dtype=heads.F64)  # the offset and A
    heads.set_weights(block, q=read, k=read, v=read, o=read.T)
    x = torch.linspace(0, 1, n, dtype=heads.F64)

    def score(angle: Tensor, radius: Tensor) -> Tensor:
        a, own = 0.5, torch.stack([angle.cos(), angle.sin()], 1) * radius[:, None]
        rows = torch.tensor([[5, math.cos(a), math.sin(a), 0, 0], [5, 1, 0, 1, 0]], dtype=heads.F64)
        given = rows.expand(n, -1, -1).clone()
        given[:, 0, 3:] = own
        return heads.attend(block, given).row[:, 0, 0]

    still, one = torch.zeros_like(x), torch.ones_like(x)
    turned, grown = score(2 * math.pi * x, one), score(still, 1 + 2 * x)
    shrink = torch.sqrt(27 / (26 + (1 + 2 * x) ** 2))
    turns = frame("offset", 2, "pre", "B turns on its circle", x, turned / turned[0], one)
    leaves = frame("offset", 2, "pre", "B leaves its circle", x, grown / grown[0], shrink)
    return pd.concat([turns, leaves], ignore_index=True)


def freedom(most: int) -> pd.DataFrame:
    """Dimensions that heads cannot attend to, of N; x is the number of subspaces N_s.

    Measured: N minus the rank of the keys' derivative by the coordinates. Predicted: 0, N_s,
    N_s + 1, N_s. For Pre-Norm the coordinates move on spheres, where subspaces do not interfere.
    """
    cases = (
        ("none", "rms", 1, "No-Norm", lambda n: 0),
        ("pre", "rms", 2, "Pre-Norm, RMSNorm", lambda n: n),
        ("pre", "layer", 2, "Pre-Norm, LayerNorm", lambda n: n + 1),
        ("qkv", "rms", 3, "QKV-Norm", lambda n: n),
    )
    frames = []
    for placement, kind, theorem, series, lost in cases:
        counts = list(range(1, most + 1))
        value = [_dimensions_lost(placement, n, kind) for n in counts]
        predicted = [float(lost(n)) for n in counts]
        frames.append(frame("freedom", theorem, placement, series, counts, value, predicted))
    return pd.concat(frames, ignore_index=True)


def _dimensions_lost(placement: str, n: int, kind: str) -> int:
    pre, layer = placement == "pre", kind == "layer"
    basis = heads.orthogonal_basis(n, mean_free=layer) if pre else heads.independent_basis(n)
    block = heads.readers(placement, basis, kind)

    def keys(free: Tensor) -> Tensor:
        parts = free[: n * heads.DIM].reshape(n, heads.DIM)
        x = basis @ (heads.unit(parts) if pre else parts).flatten()
        if layer:
            x = x + free[-1]  # the mean, which LayerNorm takes away
        return heads.attend(block, x[None, None]).k.flatten()

    free = heads.rand(len(basis), seed=9)
    rank = int(torch.linalg.matrix_rank(jacobian(keys, free), rtol=1e-9))
    return len(basis) - rank


# -- theorems 5 and 6: the sparse and the isotropic limit ---------------------------------------


def _tempered(placement: str, beta: float) -> Block:
    """A head whose scores have the factor beta, and whose queries do not vanish with it.

    Keys live in the first half of the head's dimensions; beta scales the queries there.
    """
    block = heads.new_block(placement, d_model=8, d_head=4)
    heads.set_weights(
        block, **{s: 0.4 * heads.rand(4, 8, seed=30 + i) for i, s in enumerate("qkv")}
    )
    heads.set_weights(block, o=0.4 * heads.rand(8, 4, seed=34))
    block.attn.k.weight[2:] = 0
    heads.scale_queries(block, torch.tensor([beta, beta, 1, 1], dtype=heads.F64))
    return block


def limits(n: int) -> pd.DataFrame:
    """Theorems 5 and 6: how far noise on q, k, v moves the output, per unit of noise.

    x is the factor on the scores: 0 is isotropic attention, a large one sparse. Measured: the
    derivative of the block's output. Predicted along the way by the first order of theorem 4, at
    the ends by theorem 6 (plain means) and theorem 5 (0, 0, e_m of the attended token).
    """
    betas = (10 ** torch.linspace(-2, 3, n, dtype=heads.F64)).tolist()
    given, noise = heads.rand(1, 8, 8, seed=40), heads.rand(1, 8, 1, 4, seed=41)
    frames = []
    for placement in PLACEMENTS:
        for site in "qkv":
            both = [_moved(_tempered(placement, b), given, site, noise) for b in betas]
            value, predicted, _ = zip(*both, strict=True)
            value_0, _, means = _moved(_tempered(placement, 0.0), given, site, noise)
            end = _sparse_limit(_tempered(placement, betas[-1]), given, site, noise)
            frames += [
                frame("limits", theorem, placement, site + which, *curve)
                for theorem, which, *curve in (
                    (4, "", betas, value, predicted),
                    (6, ", isotropic", [0], [value_0], [means]),
                    (5, ", sparse", betas[-1:], value[-1:], [end]),
                )
            ]
    return pd.concat(frames, ignore_index=True)


def _moved(block: Block, x: Tensor, site: str, noise: Tensor) -> tuple[float, float, float]:
    """Movement of the last token's output: measured, theorem 4, and theorem 6 (plain means)."""

    def out(e: Tensor) -> Tensor:
        return heads.attend(block, x, **{site: lambda value: value + e}).out[0, -1]

    measured = jvp(out, torch.zeros_like(noise), noise)[1]
    seen = heads.attend(block, x)
    a, k, m = seen.attention[0, 0], seen.k[0, 0, :-1], seen.m[0, 0, :-1]
    e, q = noise[0, :, 0], seen.q[0, 0, -1]

    def under(a: Tensor) -> float:
        if site == "q":  # E[m k~^T] e_q
            moved = (a[:, None] * m).T @ ((k - a @ k) @ e[-1])
        elif site == "k":  # E[m~ e_k^T] q
            moved = (a[:, None] * (m - a @ m)).T @ (e[:-1] @ q)
        else:  # E[e_m]
            moved = block.attn.o.weight @ (a @ e[:-1])
        return float(moved.norm())

    return float(measured.norm()), under(a), under(torch.full_like(a, 1 / len(a)))


def _sparse_limit(block: Block, x: Tensor, site: str, noise: Tensor) -> float:
    """Theorem 5: nothing for q and k; for v the message of the attended token's noise."""
    if site != "v":
        return 0.0
    star = int(heads.attend(block, x).row[0, 0].argmax())
    return float((block.attn.o.weight @ noise[0, star, 0]).norm())


# -- theorem 7: collapse ----------------------------------------------------------------------


def _candidates(placement: str, ratios: tuple[float, ...]) -> tuple[Block, Tensor]:
    """A head and tokens whose last row has the scores LEVEL x ratios; the stream ``[pos, 6]``."""
    block, basis = _matching_head(placement)
    heads.scale_queries(block, LEVEL / SHARPNESS)
    a = heads.tokens(*((r, math.sqrt(1 - r * r), 0) for r in ratios), (1, 0, 0))
    return block, heads.stream(basis, a, heads.tokens((0, 1, 0)).expand(len(a), -1))


def _arg_max(block: Block, x: Tensor, site: str, factors: Tensor) -> Tensor:
    """Arg max of the last row where q or k have factors ``[draw, pos]``."""
    given = x.expand(len(factors), -1, -1)

    def scale(value: Tensor) -> Tensor:
        return value * factors[:, :, None, None]

    return heads.attend(block, given, **{site: scale}).row[:, 0].argmax(-1)


def boundary(n: int, n_points: int) -> pd.DataFrame:
    """Theorem 7: at which k_t a sparse row goes to t, for k_* (x) and rho = w_*/w_t.

    Measured by bisection, predicted rho (1 + k_*) - 1. In the series "moved" and "stays" the values
    are the k_t of random points; in "query noise" the share of arg maxes that query noise (x)
    moves, predicted zero.
    """
    frames = []
    for i, placement in enumerate(PLACEMENTS):
        star = torch.linspace(-0.5, 0.5, n, dtype=heads.F64) + (i - 1) / (3 * n)
        for rho in RHOS:
            block, x = _candidates(placement, (1.0, 1 / rho))

            def moved(k_t: Tensor, block: Block = block, x: Tensor = x) -> Tensor:
                return _arg_max(block, x, "k", _factors(star, k_t)) != 0  # noqa: B023

            low, high = torch.full_like(star, -0.99), torch.full_like(star, 3.0)
            found = heads.bisect(moved, low, high)
            frames.append(
                frame("boundary", 7, placement, f"{rho:g}", star, found, rho * (1 + star) - 1)
            )
        block, x = _candidates(placement, (1.0, 1 / POINTS_RHO))
        sizes = torch.linspace(-0.99, 4, n, dtype=heads.F64)
        shifted = _arg_max(block, x, "q", (1 + sizes)[:, None].expand(-1, len(x))) != 0
        zeros = torch.zeros_like(sizes)
        frames.append(
            frame("boundary", 7, placement, "query noise", sizes, shifted.to(heads.F64), zeros)
        )
        points = heads.even(n_points, 2, seed=50 + i) / (2 * math.sqrt(3))
        went = _arg_max(block, x, "k", _factors(*points.T)) != 0
        for series, chosen in (("moved", went), ("stays", ~went)):
            some = points[chosen]
            frames.append(frame("boundary", 7, placement, series, some[:, 0], some[:, 1]))
    return pd.concat(frames, ignore_index=True)


def _factors(star: Tensor, k_t: Tensor) -> Tensor:
    """Of two keys; the third vector is the last token's own, which it does not see."""
    return torch.stack([1 + star, 1 + k_t, torch.ones_like(star)], 1)


def probability(draws: int) -> pd.DataFrame:
    """Theorem 7 under uniform noise: share of draws that collapse a sparse row, against sigma (x).

    Key noise: sampled on the block; predicted by the closed form for the row's scores. Query noise
    alone: never.
    """
    from hooks import LAWS, collapse_probability

    sigmas = (0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
    exact = collapse_probability(
        torch.full((len(sigmas),), LEVEL, dtype=heads.F64),
        LEVEL * torch.tensor(CANDIDATES[1:], dtype=heads.F64).expand(len(sigmas), -1),
        torch.tensor(sigmas, dtype=heads.F64),
        LAWS["uniform"],
    )
    frames = []
    for i, placement in enumerate(PLACEMENTS):
        block, x = _candidates(placement, CANDIDATES)
        if float(heads.attend(block, x[None]).attention.max()) < 0.95:
            raise RuntimeError("probability: wanted a sparse row; got another")
        for j, (site, name) in enumerate((("k", "key noise"), ("q", "query noise"))):
            noise = heads.even(draws, len(x), seed=60 + 2 * i + j)
            gone = [_arg_max(block, x, site, 1 + s * noise) != 0 for s in sigmas]
            shares = [float(each.double().mean()) for each in gone]
            predicted = exact if site == "k" else torch.zeros_like(exact)
            frames.append(frame("probability", 7, placement, name, sigmas, shares, predicted))
    return pd.concat(frames, ignore_index=True)


# -- theorem 8: isotropic attention ---------------------------------------------------------------


def isotropic(n: int) -> pd.DataFrame:
    """Theorem 8: how far key noise of RMS x moves the output of an isotropic head.

    In units of the RMS of m~; measured at that size of noise, predicted to first order:
    w <m~_t k_t> sigma, which is zero where noise is the same for all keys, independent of m~, or
    q = 0.
    """
    sigmas = torch.linspace(0.02, 0.3, n, dtype=heads.F64)
    content = heads.unit(heads.rand(13, 5, seed=70))
    x = torch.cat(
        [torch.ones(13, 1, dtype=heads.F64), content], 1
    )  # k reads the constant, v the rest
    frames = []
    for placement in PLACEMENTS:
        block = heads.new_block(placement, d_model=6, d_head=5)
        constant, rest = torch.zeros(5, 6, dtype=heads.F64), torch.eye(6, dtype=heads.F64)[1:]
        constant[0, 0] = 1
        heads.set_weights(block, q=constant, k=constant, v=rest, o=rest.T)
        level = float(heads.attend(block, x[None]).row[0, 0, 0])
        heads.scale_queries(block, ISOTROPIC_SCORE / level)
        clean = heads.attend(block, x[None])
        m = clean.m[0, 0, :-1]
        off = m - m.mean(0)
        for series, kappa, on in _key_noises(off):
            if not on:
                heads.scale_queries(block, 0.0)
            w = ISOTROPIC_SCORE * on
            first = float((w * (off * kappa[:, None]).mean(0)).norm())
            rms = float(off.norm(dim=-1).square().mean().sqrt())
            moved = _key_noise_moves(block, x, sigmas[:, None] * kappa) / rms
            predicted = sigmas * first / rms
            frames.append(frame("isotropic", 8, placement, series, sigmas, moved, predicted))
    return pd.concat(frames, ignore_index=True)


def _key_noises(off: Tensor) -> list[tuple[str, Tensor, bool]]:
    """Noise of RMS one on the keys in each case of the theorem, and whether q is not zero."""
    own = heads.even(len(off), seed=71)
    own = own / own.square().mean().sqrt()
    blind = torch.linalg.svd(off.T)[2][-1]  # sum of m~_t k_t = 0
    blind = blind / blind.square().mean().sqrt()
    return [
        ("each key its own", own, True),
        ("the same for all keys", torch.ones_like(own), True),
        ("independent of m", blind, True),
        ("q = 0", own, False),
    ]


def _key_noise_moves(block: Block, x: Tensor, kappa: Tensor) -> Tensor:
    """Length of the last output's movement, for each row of ``kappa`` ``[draw, key]``."""
    factors = torch.cat([1 + kappa, torch.ones(len(kappa), 1, dtype=heads.F64)], 1)
    given = x.expand(len(kappa), -1, -1)
    noisy = heads.attend(block, given, k=lambda value: value * factors[:, :, None, None]).out[:, -1]
    moved: Tensor = (noisy - heads.attend(block, given).out[:, -1]).norm(dim=-1)
    return moved
