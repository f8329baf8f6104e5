# %% [markdown]
# # 2 · Semantic subspaces and norm placement
#
# A transformer keeps many things in one residual stream and lets each attention head pick out its
# own. Menary, Kaski and Freitas ([arXiv 2406.17837](https://arxiv.org/abs/2406.17837)) call a part
# of the stream that can by itself determine an attention distribution a **semantic subspace**, and
# ask when two of them leave each other alone. The answer depends on where the norm layer stands.
#
# What you will learn:
#
# - to build a head by hand that works under No-Norm and QKV-Norm and **breaks under Pre-Norm**,
#   and why (theorems 1-3);
# - what noise on the lengths of queries, keys and values does at the two ends of attention, sparse
#   and isotropic, and exactly when a sparse row *collapses* (theorems 5-8);
# - how much of this is left in a trained model, which was free to learn its way around it.
#
# Takes about 30 minutes to read and 20 seconds to run on a CPU, offline. You need PyTorch, softmax
# attention and the idea of a null space; of TransformerLens only `run_with_cache`.

# %%
# On Colab this installs the package and goes to its tutorials; elsewhere it does nothing.
import os
import shutil
import subprocess
import sys
from pathlib import Path

if "google.colab" in sys.modules and not Path("../tutorials").is_dir():
    SOURCE = "qkvnorm-lens"  # a release; or a repository's address: "git+https://..."
    pip = [sys.executable, "-m", "pip"]
    get = ["download", "-q", "--no-deps", "--no-binary=qkvnorm-lens", "-d", "download", SOURCE]
    if subprocess.run([*pip, *get]).returncode:
        raise RuntimeError(f"pip finds no {SOURCE!r}: set SOURCE to your repository's address")
    archive = next(Path("download").iterdir())
    as_data = {} if archive.suffix == ".zip" else {"filter": "data"}  # only links of its own
    shutil.unpack_archive(archive, "source", **as_data)
    folder = next(Path("source").iterdir()).resolve()
    subprocess.run([*pip, "install", "-q", f"{folder}[experiments]"], check=True)
    os.chdir(folder / "tutorials")

# %%
import math

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch.autograd.functional import jvp

import hooks
from qkvnorm_lens import (
    NormSpec,
    QKVNormConfig,
    QKVNormTransformer,
    load_checkpoint,
    to_bridge,
    to_plain,
)
from qkvnorm_lens.experiments.paper import theorems
from qkvnorm_lens.models import Norm
from qkvnorm_lens.text import sums

RESULTS = Path("../results")
NAMES = {"none": "No-Norm", "pre": "Pre-Norm", "qkv": "QKV-Norm"}
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"  # for every kind of eye
COLOURS = {"none": GREEN, "pre": BLUE, "qkv": ORANGE}
torch.set_num_threads(1)  # for tensors this small more threads are in each other's way
torch.set_default_dtype(torch.float64)  # so that "exactly" can be tested to 1e-12
random = torch.Generator().manual_seed(0)

# %% [markdown]
# ## 1. Tokens made of two subspaces
#
# Our stream has six dimensions. A token holds two independent things: a content $a$ with three
# coordinates in subspace A, which our head will read, and a content $b$ in subspace B, which is
# somebody else's business:
#
# $$x = A\,a + B\,b .$$
#
# A is spanned by the first three axes. B is **linearly independent** of A, but not orthogonal to
# it: its axes lean towards those of A.

# %%
A = torch.eye(6)[:, :3]
B = torch.eye(6)[:, 3:] + 0.7 * A
basis = torch.cat([A, B], 1)
read_a = torch.linalg.inv(basis)[:3]  # takes a out of x, whatever b is

assert torch.linalg.matrix_rank(basis) == 6  # independent
assert (A.T @ B).abs().max() == 0.7  # not orthogonal


def tokens(a, b, basis=basis):
    return torch.cat([a, b], -1) @ basis.T


# %% [markdown]
# The head reads A and nothing else: $W_K$ takes $a$ out of a token, and $W_Q$ does the same and
# then turns it by a rotation $P$, so that a token looks for another content than its own. The
# score of a sender $y_t$ is $x^\top W_Q^\top W_K\, y_t$. All of subspace B lies in the **null
# space** of that matrix: this is how a head ignores something.

# %%
P = torch.eye(3).roll(1, 0)  # turns the first axis into the second, and so on
W_Q, W_K = P @ read_a, read_a
W_QK = W_Q.T @ W_K

print(f"rank of W_QK: {torch.linalg.matrix_rank(W_QK)} of 6")
print(f"largest entry of W_QK A: {(W_QK @ A).abs().max():.1f}")
print(f"largest entry of W_QK B: {(W_QK @ B).abs().max():.1f}")
assert torch.linalg.matrix_rank(W_QK) == 3
assert (W_QK @ B).abs().max() < 1e-12

# %% [markdown]
# The three placements differ in where RMSNorm, $N(z) = \sqrt{n}\, z/|z|$, stands. We leave out its
# learned gain; the paper has no $1/\sqrt{d}$ in the scores, and neither have we.
#
# | placement | query | keys |
# |---|---|---|
# | No-Norm | $W_Q x$ | $W_K y_t$ |
# | Pre-Norm | $W_Q N(x)$ | $W_K N(y_t)$ |
# | QKV-Norm | $N(W_Q x)$ | $N(W_K y_t)$ |


# %%
def rms_norm(z):
    return math.sqrt(z.shape[-1]) * z / z.norm(dim=-1, keepdim=True)


def scores(placement, x, y, W_Q=W_Q, W_K=W_K):
    """Scores of a receiver x [d] for the senders y [..., token, d]."""
    if placement == "pre":
        x, y = rms_norm(x), rms_norm(y)
    q, k = W_Q @ x, y @ W_K.T
    if placement == "qkv":
        q, k = rms_norm(q), rms_norm(k)
    return k @ q


# %% [markdown]
# Four senders: one that matches what the receiver looks for, a runner-up whose $a$ has 0.8 of the
# match's score (less under Pre-Norm, since that token is the longer one), and two others. Every
# token has $|a| = |b| = 1$. One number for each placement,
# the inverse temperature, is set so that the match starts with a score of 25. The row is then
# **sparse** (one token has at least 95% of the attention) under all three.

# %%
SENDERS = ["match", "runner-up", "third", "fourth"]
a = torch.tensor([[1, 0, 0], [0.8, 0.6, 0], [0.3, 0, math.sqrt(0.91)], [-1, 0, 0]])
b = torch.tensor([[0.0, 1, 0]]).expand(4, 3)
looks_for = torch.tensor([1.0, 0, 0])
x, y = tokens(P.T @ looks_for, b[0]), tokens(a, b)

beta = {p: float(25 / scores(p, x, y)[0]) for p in NAMES}


def attention(placement, y):
    return (beta[placement] * scores(placement, x, y)).softmax(-1)


at_start = {NAMES[p]: attention(p, y).numpy() for p in NAMES}
assert all(row[0] >= hooks.SPARSE for row in at_start.values())
pd.DataFrame(at_start, index=SENDERS).T.round(3)

# %% [markdown]
# ## 2. No-Norm: independence is enough (theorem 1)
#
# Replace every token's $b$ by something random and five times as large. The head must not notice,
# and it does not: each score is a function of $a$ alone.

# %%
anything = tokens(a.expand(1000, 4, 3), 5 * torch.randn(1000, 4, 3, generator=random))
change = (scores("none", x, anything) - scores("none", x, y)).abs().max()
print(f"largest change of a No-Norm score: {change:.0e}")
assert change < 1e-12

# %% [markdown]
# ## 3. Pre-Norm: a head that breaks (theorem 2)
#
# Pre-Norm divides the token by its whole length, $b$ included. When $b$ grows, nothing changes in
# $a$, and $b$ still lies in the null space; but all that the head reads from that token shrinks.
# Its score is multiplied by
#
# $$\frac{w'_t}{w_t} = \frac{|y_t|}{|y'_t|},$$
#
# **one factor for the token**, the same for every head, for its key and for its value. Let the
# match's $b$ become four times as long:

# %%
longer = b.clone()
longer[0] *= 4
y_long = tokens(a, longer)

for p in NAMES:
    ratio = scores(p, x, y_long) / scores(p, x, y)
    print(f"{NAMES[p]:9} scores times {[round(r, 3) for r in ratio.tolist()]}")
    factor = y.norm(dim=-1) / y_long.norm(dim=-1) if p == "pre" else torch.ones(4)
    assert torch.allclose(ratio, factor, atol=1e-12)

# %% [markdown]
# The match's score falls behind that of the runner-up, although nobody touched what the head
# reads. Each panel shows the row before and after; rings mark the arg max.


# %%
def show_rows(ax, rows, title):
    weights = torch.stack(rows).numpy()
    image = ax.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ax.plot(weights.argmax(1), [0, 1], "o", ms=15, mfc="none", mec=ORANGE, mew=2)
    ax.set_xticks(range(4), SENDERS)
    ax.set_yticks([0, 1], ["before", "match's b\n4 x as long"])
    ax.set_title(title, fontsize=10)
    return image


fig, axes = plt.subplots(3, 1, figsize=(6.4, 4.6), layout="constrained")
for ax, p in zip(axes, NAMES, strict=True):
    rows = [attention(p, y), attention(p, y_long)]
    image = show_rows(ax, rows, NAMES[p])
    assert (rows[1].argmax() != 0) == (p == "pre")
fig.colorbar(image, ax=axes, label="attention weight")
plt.show()

# %% [markdown]
# This is **circuit collapse**: a sparse row whose arg max moves to another token because lengths
# changed. It is no gentle effect. The head is at work up to some length, and then it points
# elsewhere. The arg max jumps where the match's factor equals the ratio of the two scores,
# $|y'_*| = |y_*|\, w_*/w_t$, with $t$ the runner-up, and that can be solved for the length of $b$.

# %%
size = 2 ** torch.linspace(-2, 2, 401)
grown = b.expand(401, 4, 3).clone()
grown[:, 0] *= size[:, None]
grown = tokens(a.expand(401, 4, 3), grown)

wanted = y[0].norm() / (scores("pre", x, y)[1] / scores("pre", x, y)[0])
predicted = size[(grown[:, 0].norm(dim=-1) > wanted).int().argmax()]
jumped = size[(attention("pre", grown).argmax(-1) != 0).int().argmax()]
print(f"the arg max jumps at |b| = {jumped:.2f}, predicted {predicted:.2f}")
assert jumped == predicted

# %%
fig, ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
for p, style in zip(NAMES, ("-", "-", ":"), strict=True):
    ax.plot(size, attention(p, grown)[:, 0], style, color=COLOURS[p], label=NAMES[p], lw=2.5)
ax.axvline(jumped, color=GREY, lw=1, ls="--")
ax.annotate("arg max jumps", (jumped, 0.6), (6, 0), textcoords="offset points", color=GREY)
ax.set_xscale("log", base=2)
ax.xaxis.set_major_formatter("{x:g}")
ax.set(xlabel="length of the match's b (1 at the start)", ylabel="attention on the match")
ax.legend(loc="lower left")
plt.show()


# %% [markdown]
# ### What Pre-Norm needs
#
# The factor is 1 only if $|x|$ is the same for all contents. Now
#
# $$|x|^2 = |Aa|^2 + |Bb|^2 + 2\,(Aa)\cdot(Bb),$$
#
# which asks for two things at once: **spheres** ($|Aa|$ and $|Bb|$ are constants) and
# **orthogonality** (the mixed term is zero).
#
# So we try three worlds. In each of them $b$ is redrawn 1000 times, and the table shows the
# largest relative change of any of the head's scores.


# %%
def largest_change(placement, basis, new_b):
    own = torch.linalg.inv(basis)[:3]
    receiver = tokens(P.T @ looks_for, b[0], basis)
    before = scores(placement, receiver, tokens(a, b, basis), P @ own, own)
    after = scores(placement, receiver, tokens(a.expand(1000, 4, 3), new_b, basis), P @ own, own)
    return float((after / before - 1).abs().max())


turned = torch.randn(1000, 4, 3, generator=random)
turned /= turned.norm(dim=-1, keepdim=True)  # on its sphere
stretched = 4 * torch.rand(1000, 4, 1, generator=random) * turned
worlds = {
    "independent, b on its sphere": (basis, turned),
    "orthogonal, b of any length": (torch.eye(6), stretched),
    "orthogonal spheres": (torch.eye(6), turned),
}

# %%
table = pd.DataFrame(
    {world: {NAMES[p]: largest_change(p, *what) for p in NAMES} for world, what in worlds.items()}
).T
assert (table[["No-Norm", "QKV-Norm"]] < 1e-12).all(axis=None)
assert list(table["Pre-Norm"] > 0.1) == [True, True, False]
assert table.loc["orthogonal spheres", "Pre-Norm"] < 1e-12
table.map(lambda value: f"{value:.2f}" if value > 1e-12 else "0")

# %% [markdown]
# Each condition alone is not enough for Pre-Norm; both together are. No-Norm and QKV-Norm need
# neither.
#
# ## 4. QKV-Norm: independence is enough again (theorem 3)
#
# Under QKV-Norm the norm stands *behind* the projection. By then $b$ is gone: $W_K(Aa + Bb) = a$.
# Whatever is done to $b$, the norm does not see it. The price is that the head can no longer read
# the length of $a$ itself: one dimension is lost for each subspace.

# %%
change = (scores("qkv", x, anything) - scores("qkv", x, y)).abs().max()
print(f"b replaced:    largest change of a QKV-Norm score {change:.0e}")
assert change < 1e-12

lengths = {p: scores(p, x, tokens(2 * a, b)) / scores(p, x, y) for p in ("none", "qkv")}
for p, ratio in lengths.items():
    print(f"a twice as long: {NAMES[p]} scores times {[round(r, 3) for r in ratio.tolist()]}")
assert torch.allclose(lengths["none"], torch.full((4,), 2.0))
assert torch.allclose(lengths["qkv"], torch.ones(4))

# %% [markdown]
# ## 5. A trap: constant offsets
#
# "Orthogonal" in theorem 2 is easily misread. Take
#
# $$x_A = (2, \cos\alpha, \sin\alpha, 0, 0), \qquad x_B = (3, 0, 0, \cos\beta, \sin\beta).$$
#
# $x_A \cdot x_B = 6$ always: they are nowhere near orthogonal. And still Pre-Norm lets them live
# together, since the 2 and the 3 never change. The theorem speaks of what is left when **constant
# offsets are moved into a vector of their own**, here $(5, 0, 0, 0, 0)$. A cosine between two
# subspaces measured in a trained model, means included, does not test the theorem.

# %%
turns = torch.linspace(0, 2 * math.pi, 100)
flat = torch.zeros_like(turns)
x_A = torch.stack([flat + 2, turns.cos(), turns.sin(), flat, flat], -1)
x_B = torch.stack([flat + 3, flat, flat, turns.cos(), turns.sin()], -1)
both = x_A[:, None] + x_B  # every pair of angles

print("x_A . x_B of all pairs:", (x_A @ x_B.T).unique().tolist())
print(f"|x|^2 from {both.square().sum(-1).min():.6f} to {both.square().sum(-1).max():.6f}")
assert torch.allclose(x_A @ x_B.T, torch.tensor(6.0))
assert torch.allclose(both.square().sum(-1), torch.tensor(27.0))

# %% [markdown]
# ## 6. Pre-Norm followed by QKV-Norm is QKV-Norm
#
# Some models norm the stream and then norm queries, keys and values again. The first norm
# multiplies a token by one number, the second takes any such number out: RMSNorm in front of
# QKV-Norm changes nothing. We check it on the package's own model. In a `QKVNormTransformer` with
# `placement="qkv"` the place in front of the attention is an identity; we put an RMSNorm there.

# %%
sizes = {"d_model": 24, "n_heads": 2, "d_head": 12, "d_mlp": 48, "n_layers": 2}
sizes |= {"n_ctx": 16, "d_vocab": 20, "seed": 0, "initializer_range": 0.3}
exact = {"eps": 1e-30, "dtype": torch.float64}
ids = torch.randint(0, 20, (8, 16), generator=random)


@torch.no_grad()
def change_by_norm_in_front(**choices):
    """Largest change of a logit when RMSNorm is put in front of every attention."""
    model = QKVNormTransformer(QKVNormConfig(**choices, **sizes, **exact)).eval()
    before = model(ids)
    for layer in model.layers:
        layer.ln1 = Norm("rms", gain=None, eps=1e-30)
    return float((model(ids) - before).abs().max())


# %%
in_front = {
    "QKV-Norm (q, k and v)": change_by_norm_in_front(placement="qkv"),
    "QK-norm (q and k only)": change_by_norm_in_front(placement="qkv", norm=NormSpec(on="qk")),
    "No-Norm": change_by_norm_in_front(placement="none"),
}
print({name: f"{change:.0e}" for name, change in in_front.items()})
assert in_front["QKV-Norm (q, k and v)"] < 1e-10 < 1e-2 < in_front["QK-norm (q and k only)"]

# %% [markdown]
# With QK-norm, which norms queries and keys only, the common factor is removed from the scores
# and **survives on the values**. (`eps` is zero in effect here. With the usual 1e-5 and very
# short vectors "nothing" becomes "nearly nothing".)
#
# ## 7. Noise on q, k and v, from isotropic to sparse (theorems 4-6)
#
# So far lengths changed because of $b$. From here on we follow the paper and imitate this by
# noise. Let one head write $\sum_t p_t\, m_t$, where $p_t$ is its attention and $m_t = W_O v_t$
# are the messages; $\mathbb{E}$ is the mean under the weights $p_t$. To first order (theorem 4)
# the output moves by
#
# $$\mathbb{E}[m\,\tilde k^\top]\, e_q, \qquad \mathbb{E}[\tilde m\, e_k^\top]\, q, \qquad
# \mathbb{E}[e_m],$$
#
# with $\tilde k = k - \mathbb{E}[k]$, $\tilde m$ alike, and $e$ the noise on q, on k, on m. Two
# limits follow:
#
# - **sparse** (theorem 5): $\tilde k$ and $\tilde m$ vanish at the one attended token, so noise on
#   q and k does *nothing*, and noise on m passes through unchanged;
# - **isotropic** (theorem 6): the same formulas with plain means over all tokens.
#
# One head, whose scores get a factor from 0.01 (isotropic) to 1000 (sparse). The keys live in the
# first two of its four dimensions and the factor acts there only, so that the query does not
# vanish together with it.


# %%
def draw(*shape):
    return torch.randn(*shape, generator=random)


q, k, m = draw(4), torch.cat([draw(8, 2), torch.zeros(8, 2)], 1), draw(8, 3)
e = {"q": draw(4), "k": draw(8, 4), "m": draw(8, 3)}


def output(q, k, m):
    return (k @ q).softmax(-1) @ m


def measured(q, on):
    """How far the output moves, per unit of noise: a derivative, without any formula."""
    noise = {site: e[site] if site == on else torch.zeros_like(e[site]) for site in "qkm"}
    return float(jvp(output, (q, k, m), tuple(noise.values()))[1].norm())


def first_order(q, on, p):
    """Theorem 4, under the attention p."""
    k_off, m_off = k - p @ k, m - p @ m
    if on == "q":
        return float(((p[:, None] * m).T @ k_off @ e["q"]).norm())
    if on == "k":
        return float(((p * (e["k"] @ q)) @ m_off).norm())
    return float((p @ e["m"]).norm())


# %%
factors = 10 ** torch.linspace(-2, 3, 41)
heads = [torch.cat([f * q[:2], q[2:]]) for f in factors]
moves = {site: [measured(head, site) for head in heads] for site in "qkm"}
lines = {site: [first_order(h, site, (k @ h).softmax(-1)) for h in heads] for site in "qkm"}

for site in "qkm":
    torch.testing.assert_close(torch.tensor(moves[site]), torch.tensor(lines[site]))  # theorem 4
    plain_means = first_order(heads[0], site, torch.full((8,), 1 / 8))
    assert abs(moves[site][0] / plain_means - 1) < 0.1  # theorem 6, at the isotropic end
star = (k @ heads[-1]).argmax()
for site, limit in (("q", 0), ("k", 0), ("m", e["m"][star].norm())):
    assert abs(moves[site][-1] - limit) < 1e-9  # theorem 5, at the sparse end
for site in "qk":
    assert max(moves[site]) > 1.5 * max(moves[site][0], moves[site][-1])  # the bump in between

# %%
fig, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
for site, colour, marker in (("q", BLUE, "o"), ("k", ORANGE, "s"), ("m", GREEN, "^")):
    ax.plot(factors, lines[site], color=colour)
    ax.plot(factors[::4], moves[site][::4], marker, color=colour, label=f"noise on {site}")
ax.set(xscale="log", xlabel="factor on the scores (isotropic to sparse)")
ax.set_yscale("symlog")
ax.set(ylim=(0, 30), ylabel="movement of the output\nper unit of noise")
ax.yaxis.set_major_formatter("{x:g}")
ax.legend()
plt.show()

# %% [markdown]
# Points were measured with a derivative, lines are theorem 4; the cell asserts that they agree,
# and both limits. In between there is a bump: noise on this head's keys and queries hurts most when
# attention is neither sparse nor isotropic. That is no theorem: for another head it may be so for
# noise on keys only (section 11 has one).
#
# A sparse row is thus *immune* to small noise on q and k. That is one half of the story. The other
# half is that large enough noise does not move the output a little, but sends it to another token.
#
# ## 8. When does a sparse row collapse? (theorem 7)
#
# Noise on lengths multiplies: $q \to (1+\kappa_q)\,q$, $k_t \to (1+\kappa_t)\,k_t$. The score is a
# dot product, so the factors come out of it, exactly:
#
# $$w'_t = (1+\kappa_q)(1+\kappa_t)\, w_t .$$
#
# **The query's factor is common to the row and cannot change its order.** Ten thousand random
# rows, the query shortened or lengthened at will:

# %%
rows_w = 10 * torch.randn(10_000, 8, generator=random)
kappa_q = 0.99 * (2 * torch.rand(10_000, 1, generator=random) - 1)
moved = ((1 + kappa_q) * rows_w).argmax(-1) != rows_w.argmax(-1)
print("rows whose arg max query noise moved:", int(moved.sum()))
assert not moved.any()

# %% [markdown]
# Key noise can. The row leaves its token $*$ if for some $t$
#
# $$\frac{w_*}{w_t} < \frac{1+\kappa_q+\kappa_t}{1+\kappa_q+\kappa_*}\ \ \text{(theorem 7)},
# \qquad \frac{w_*}{w_t} < \frac{1+\kappa_t}{1+\kappa_*}\ \ \text{(exactly)}$$
#
# with the comparison turned round where $w_t$ is negative (and as long as the denominators are
# positive). We put both inequalities against brute force: noise on all keys and on the query, then
# an arg max.

# %%
kappa = 0.5 * (2 * torch.rand(10_000, 8, generator=random) - 1)
brute = ((1 + kappa_q) * (1 + kappa) * rows_w).argmax(-1) != rows_w.argmax(-1)


def collapses(top, bottom):
    """Whether some t has w*/w_t < top_t/bottom, turned round for negative w_t (bottom > 0)."""
    star = rows_w.argmax(-1, keepdim=True)
    ratio, noise = rows_w.gather(1, star) / rows_w, top / bottom.gather(1, star)
    lost = torch.where(rows_w > 0, ratio < noise, ratio > noise).scatter(1, star, False)
    return lost.any(-1)


exact_form = collapses(1 + kappa, 1 + kappa)
safe = ((1 + kappa_q + kappa) > 0).all(-1)  # the first order needs positive factors
first = collapses(1 + kappa_q + kappa, 1 + kappa_q + kappa)
print(f"rows that collapse: {brute.double().mean():.1%}")
print(f"misjudged by the exact form: {(exact_form != brute).sum()} of 10000")
print(f"misjudged by the first order: {(first != brute)[safe].sum()} of {safe.sum()}")
assert (exact_form == brute).all()
assert (first != brute)[safe].any()

# %% [markdown]
# The exact form is never wrong. The paper's is of first order in the noise. It is the same
# without noise on the query, and misjudges rows near the boundary when both are as large as here
# (up to 50% on keys and 99% on the query). This library uses the exact form throughout.
#
# For one competitor with $\rho = w_*/w_t$, both scores positive, the inequality is a straight line
# in the plane of the two noises,
#
# $$1+\kappa_t = \rho\,(1+\kappa_*).$$
#
# The square is uniform noise of half-width $\alpha$. The row is safe as long as the square does
# not reach the line, $\alpha \le (\rho-1)/(\rho+1)$: the row's **critical half-width**.

# %%
w = torch.tensor([[25.0, 20.0]])  # the match and the runner-up of our head
a_critical = hooks.critical_half_width(w[:, 0], w[:, 1:])[0, 0]
points = 0.3 * (2 * torch.rand(4000, 2, generator=random) - 1)
went = ((1 + points) * w).argmax(-1) == 1
print(f"critical half-width {a_critical:.4f} (1/9 = {1 / 9:.4f})")
assert abs(a_critical - (1.25 - 1) / (1.25 + 1)) < 1e-12
assert not went[(points.abs() < a_critical).all(-1)].any()

fig, ax = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
for chosen, colour, label in ((~went, BLUE, "stays"), (went, ORANGE, "collapses")):
    ax.scatter(*points[chosen].T, s=4, color=colour, label=label, alpha=0.6)
edge = torch.tensor([-0.3, 0.3])
ax.plot(edge, 1.25 * (1 + edge) - 1, "k", lw=1.5, label="theorem 7")
corner, side = -float(a_critical), 2 * float(a_critical)
square = plt.Rectangle((corner, corner), side, side, fill=False, lw=2, ls="--", label="safe square")
ax.add_patch(square)
ax.set(xlabel="noise on the match's key", ylabel="noise on the runner-up's key", ylim=(-0.3, 0.3))
ax.legend(loc="lower right", markerscale=3, framealpha=0.95)
plt.show()

# %% [markdown]
# How *often* the row collapses under noise of RMS $\sigma$ is the orange share of the square of
# half-width $\sqrt3\,\sigma$. `hooks.collapse_probability` knows it for any number of
# competitors, by integration and without sampling. Sampling agrees:

# %%
sigmas = torch.tensor([0.05, 0.1, 0.15, 0.2])
w_row = beta["none"] * scores("none", x, y)  # our head's four scores
p = hooks.collapse_probability(
    w_row[:1].expand(4), w_row[1:].expand(4, 3), sigmas, hooks.LAWS["uniform"]
)
unit = math.sqrt(3) * (2 * torch.rand(200_000, 4, generator=random) - 1)
drawn = [((1 + s * unit) * w_row).argmax(-1).ne(0).double().mean().item() for s in sigmas]
print(pd.DataFrame({"sigma": sigmas, "exact": p, "sampled": drawn}).round(4).to_string(index=False))
assert all(abs(d - e) <= 5 * math.sqrt(e / 200_000) for d, e in zip(drawn, p.tolist(), strict=True))
assert p[0] == 0  # its half-width, 0.087, is below the critical one: never
assert sigmas[0] * math.sqrt(3) < a_critical < sigmas[1] * math.sqrt(3)
assert p[1] > 0

# %% [markdown]
# ## 9. Key noise on isotropic attention (theorem 8)
#
# At the other end nothing jumps. With all scores equal to $w$, noise $\kappa_t$ on the keys moves
# the output by $w\,\langle \tilde m_t \kappa_t\rangle$: an average, which is small if the noise
# has nothing to do with the messages, and zero if it is the same for all keys, or $w = 0$.

# %%
m = torch.randn(50, 3, generator=random)
m_off = m - m.mean(0)
own = 0.02 * math.sqrt(3) * (2 * torch.rand(50, generator=random) - 1)
blind = own - torch.linalg.lstsq(m_off, own[:, None]).solution[:, 0] @ m_off.T
cases = {
    "each key its own": (3.0, own),
    "the same for all keys": (3.0, torch.full((50,), 0.02)),
    "uncorrelated with m": (3.0, blind),
    "w = 0": (0.0, own),
}
rows = {}
for name, (w_all, noise) in cases.items():
    moved = (w_all * (1 + noise)).softmax(-1) @ m - m.mean(0)
    theorem = w_all * (m_off * noise[:, None]).mean(0)
    rows[name] = {"measured": float(moved.norm()), "theorem 8": float(theorem.norm())}
table = pd.DataFrame(rows).T
assert abs(table.iloc[0, 0] / table.iloc[0, 1] - 1) < 0.1
assert table.iloc[2, 0] < 0.1 * table.iloc[0, 0]
assert (table.iloc[[1, 3]] < 1e-12).all(axis=None)
table.map(lambda value: f"{value:.1e}" if value > 1e-12 else "0")

# %% [markdown]
# What is left in the third row is of second order in the noise.
#
# ## 10. A trap: the score level
#
# Softmax ignores a constant that is added to all scores of a row. Collapse does not: noise
# *multiplies* scores, and a score of 45 moves further than one of 15. Three rows with exactly the
# same attention, a gap of 5 to the one competitor, and noise of $\sigma = 11\%$:

# %%
levels = torch.tensor([15.0, 25.0, 45.0])
rows_w = torch.stack([levels, levels - 5], -1)
patterns = rows_w.softmax(-1)
p = hooks.collapse_probability(
    rows_w[:, 0], rows_w[:, 1:], torch.full((3,), 0.11), hooks.LAWS["uniform"]
)
print(f"attention on *: {[round(v, 4) for v in patterns[:, 0].tolist()]}")
print(f"collapse probability: {[round(v, 2) for v in p.tolist()]}")
assert torch.allclose(patterns, patterns[:1])  # the same pattern
assert torch.allclose(p, torch.tensor([0, 0.09, 0.24]), atol=0.005)

# %% [markdown]
# So a collapse rate never follows from an attention pattern. Two models that attend alike can
# differ in it, and then the difference says something about their *score level*. The reports of
# this library give the level beside the rate, and the rate in a gauge that is the same for all
# models ([the score level](../docs/concepts/score-level.md)).
#
# ## 11. The same head inside a transformer
#
# Now we put our hand-made head into a real model: one layer, one head, five known tokens, and a
# sixth that is the match with a $b$ of four times the length. `to_bridge` makes it a
# `TransformerBridge` with all of TransformerLens's hooks.

# %%
VOCABULARY = [*SENDERS, "match, long b", "receiver"]
embedding = torch.cat([y, y_long[:1], x[None]])


@torch.no_grad()
def by_hand(placement):
    config = QKVNormConfig(
        placement=placement, score_scale="learned", positional_embedding_type="none",
        attn_only=True, normalization_type=None, n_layers=1, n_heads=1, d_model=6, d_head=3,
        n_ctx=8, d_vocab=6, eps=1e-30, dtype=torch.float64,
    )  # fmt: skip
    model = QKVNormTransformer(config).eval()
    model.tok_embed.weight.copy_(embedding)
    model.head.weight.copy_(embedding)
    attn = model.layers[0].attn
    for linear, weight in ((attn.q, W_Q), (attn.k, W_K), (attn.v, W_K), (attn.o, A)):
        linear.weight.copy_(weight)
    attn.score_scale.weight.fill_(math.log(beta[placement]))
    return to_bridge(model)


hand_made = {p: by_hand(p) for p in NAMES}

# %% [markdown]
# Two prompts that differ in one token, the match with a short and with a long $b$. The last row of
# the pattern is the receiver's; its entries for the four senders are those that we computed with
# bare hands in section 3, now read from a hook.

# %%
prompts = torch.tensor([[0, 1, 2, 3, 5], [4, 1, 2, 3, 5]])
rows = {}
for p, model in hand_made.items():
    _, cache = model.run_with_cache(prompts)
    w = cache["blocks.0.attn.hook_attn_scores"][:, 0, -1, :4]
    with_bare_hands = beta[p] * torch.stack([scores(p, x, y), scores(p, x, y_long)])
    torch.testing.assert_close(w, with_bare_hands)
    row = cache["blocks.0.attn.hook_pattern"][:, 0, -1]  # the receiver's, in both prompts
    attends = [VOCABULARY[i] for i in prompts.gather(1, row.argmax(-1, keepdim=True)).flatten()]
    rows[NAMES[p]] = {"short b": attends[0], "long b": attends[1]}
    assert (attends[1] == "runner-up") == (p == "pre")
pd.DataFrame(rows).T

# %% [markdown]
# The library's tools see it too. `hooks.interference` freezes the norm's scale at one constant
# for all tokens of a prompt and counts the sparse rows that then attend elsewhere: rows whose
# choice hung on lengths. There are none in the first prompt, and some in the second. A model
# without a norm in front of its attention is refused: there is nothing to freeze.

# %%
report = hooks.interference(hand_made["pre"], prompts, on=["qk"], progress=False)
moved, sparse = report.loose[0, 0, 0, 0].sum(-1), report.rows[0, 0].sum(-1)
for prompt in (0, 1):
    print(f"Pre-Norm, prompt {prompt}: {moved[prompt]} of {sparse[prompt]} sparse rows move")
assert moved[0] == 0 < moved[1]

for p in ("none", "qkv"):
    try:
        hooks.interference(hand_made[p], prompts, progress=False)
    except hooks.UnsupportedModelError as error:
        print(f"{NAMES[p]} is refused: wanted {error.wanted}; got {error.got}")
    else:
        raise AssertionError("wanted a refusal")

# %% [markdown]
# `hooks.collapse_probe` gives the noise at which rows begin to collapse. The receiver's row begins
# where section 8 said: at the critical half-width 1/9, divided by $\sqrt3$ for the $\sigma$ of
# uniform noise.

# %%
probe = hooks.collapse_probe(hand_made["none"], prompts[:1], progress=False)
rows = probe.fragile(10)
begins = rows.loc[rows["query_pos"] == 4, "sigma"].item()  # the receiver is token 4
print(f"the receiver's row can collapse from sigma = {begins:.4f}")
print(f"1 / (9 sqrt 3) = {1 / 9 / math.sqrt(3):.4f}")
assert abs(begins - 1 / 9 / math.sqrt(3)) < 1e-5

# %% [markdown]
# `qkvnorm-lens experiment theorems` does all this on such blocks for every theorem from 1 to 8,
# and its results come with the repository. Points were measured, lines are what a theorem
# predicts.

# %%
measured_table = pd.read_csv(RESULTS / "addition/theorems/table.csv")
theorems.figure(measured_table)

# %% [markdown]
# ## 12. And in a trained model?
#
# Everything above shows what *can* happen. A trained model has had every reason to arrange its
# subspaces so that it does not. We ask two questions of the models that come with the package,
# which add integers.
#
# **Could it happen?** For each head, find what it does not read: the null space of its $W_Q$ and
# $W_K$ together (64 of the stream's 128 dimensions). In front of that layer, give every token the
# null-space part of *another* token, times a factor. At factor 1 this is content of natural size
# that the head ignores; larger factors strain the model. By theorems 1 and 3 nothing can move
# under No-Norm and QKV-Norm. Pre-Norm is free to break.

# %%
torch.set_default_dtype(torch.float32)  # the trained models are
trained = {p: load_checkpoint(f"addition-{p}") for p in NAMES}
drawn = [torch.tensor(ids) for ids in sums("small-train", 64, seed=0).ids]
batch = torch.stack([ids[:14] for ids in drawn if len(ids) >= 14])
print(f"{len(batch)} sums of 14 tokens or more, cut to 14")


@torch.no_grad()
def null_space(attention, head, n=32):
    """Orthonormal basis of what neither W_Q nor W_K of one head reads."""
    readers = []
    for site in "qk":
        weight = getattr(attention, site).weight[head * n : (head + 1) * n]
        gain = getattr(attention, f"{site}_gain")  # Pre-Norm's learned gain, an identity elsewhere
        readers.append(weight * getattr(gain, "weight", 1.0))
    return torch.linalg.svd(torch.cat(readers))[2][2 * n :].T


# %%
FACTORS = [1, 2, 4, 8]
other = torch.randperm(batch.numel(), generator=random)  # whose content each token gets


@torch.no_grad()
def moves_when_swapped(bridge, layer, basis, head):
    """Sparse rows of the head, and how many of them move, for each factor."""
    stream, pattern = f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.attn.hook_pattern"
    seen = {}

    def swap(x, hook):  # the first copy of the batch stays as it is, one copy for each factor
        clean = x[: len(batch)]
        borrowed = clean.flatten(0, 1)[other].view_as(clean)
        return torch.cat(
            [clean, *(clean + (f * borrowed - clean) @ basis @ basis.T for f in FACTORS)]
        )

    def keep(a, hook):
        seen["top"], seen["at"] = a[:, head, 1:].max(-1)  # row 0 sees one key only

    bridge.run_with_hooks(
        batch.repeat(1 + len(FACTORS), 1), fwd_hooks=[(stream, swap), (pattern, keep)]
    )
    top, at = (seen[name].unflatten(0, (1 + len(FACTORS), -1)) for name in ("top", "at"))
    sparse = top[0] >= hooks.SPARSE
    return int(sparse.sum()), (sparse & (at[1:] != at[0])).sum((1, 2)).tolist()


# %%
swapped = {}
for p, bridge in trained.items():
    layers = to_plain(bridge).layers
    found = [
        moves_when_swapped(bridge, i, null_space(layer.attn, head), head)
        for i, layer in enumerate(layers)
        for head in range(4)
    ]
    rows, moved = (torch.tensor(values).sum(0) for values in zip(*found, strict=True))
    swapped[NAMES[p]] = {
        "sparse rows": int(rows),
        **dict(zip(FACTORS, moved.tolist(), strict=True)),
    }
swapped = pd.DataFrame(swapped).T
assert (swapped.loc[["No-Norm", "QKV-Norm"], FACTORS] == 0).all(axis=None)  # theorems 1 and 3
assert swapped.loc["Pre-Norm", 8] > swapped.loc["Pre-Norm", 1]
assert swapped.loc["Pre-Norm", 1] < 0.01 * swapped.loc["Pre-Norm", "sparse rows"]
assert 0.01 < swapped.loc["Pre-Norm", 8] / swapped.loc["Pre-Norm", "sparse rows"] < 0.03
swapped

# %% [markdown]
# The columns 1 to 8 are the rows whose arg max moved at that factor. Zero under No-Norm and
# QKV-Norm is the theorem, on real weights. Under Pre-Norm rows do move; but at natural size
# hardly any, and at eight times that size 2%.
#
# **Does it happen?** `hooks.interference` needs no made-up content: freeze the scale of the norm
# in one layer at a time, and count the sparse rows that attend elsewhere, which are those that
# hung on their tokens' real lengths. Beside it stands what independent noise of the same spread
# would do to the same rows (exactly), which is how the paper imitates interference. Rows that
# attend to the first token are left out ([sinks](../docs/concepts/sinks.md)).

# %%
report = hooks.interference(trained["pre"], sums("small-train", 128, seed=1).ids, progress=False)
whole = report.to_frame(by="model").query("on == 'k'").iloc[0]
print(f"{whole['rows'] - whole['sinks']} sparse content rows")
print(f"spread of the scales: {whole['scale_spread']:.0%}")
print(f"moved by freezing the scale: {whole['moved_content']:.2%} (s.e. {whole['se_content']:.2%})")
print(f"by independent noise of that spread: {whole['predicted_content']:.2%}")
print(f"by the same factors, shuffled: {whole['permuted_content']:.2%}")
assert 0 < whole["moved_content"] < 0.02

try:
    hooks.interference(trained["qkv"], batch, progress=False)
except hooks.UnsupportedModelError as error:
    print(f"addition-qkv is refused: wanted {error.wanted}; got {error.got}")
else:
    raise AssertionError("wanted a refusal")

# %%
by_head = report.to_frame(by="head").query("on == 'k'")
shown = by_head[by_head["rows"] - by_head["sinks"] >= 50]
worst = shown.loc[shown["moved_content"].idxmax()]
n_rows = worst["rows"] - worst["sinks"]
print(f"most in {worst['label']}: {worst['moved_content']:.0%} of {n_rows} rows")

probe = hooks.collapse_probe(trained["pre"], sums("small-train", 128, seed=1).ids, progress=False)
one_percent = probe.sigma_at(0.01, by="head", content=True)  # layers by heads
ours = [(one_percent.loc[r["layer"], r["head"]], r["label"]) for _, r in shown.iterrows()]
print(f"first of these to lose 1% of its rows under noise: {min(ours)[1]}")
assert min(ours)[1] == worst["label"]

# %%
fig, (left, right) = plt.subplots(
    1, 2, figsize=(8.6, 3.4), layout="constrained", width_ratios=[2, 3]
)
for p, style in zip(NAMES, ("-", "-", ":"), strict=True):
    row = swapped.loc[NAMES[p]]
    share = [100 * row[f] / row["sparse rows"] for f in FACTORS]
    left.plot(FACTORS, share, style, marker="o", color=COLOURS[p], label=NAMES[p], lw=2)
left.set_xscale("log", base=2)
left.xaxis.set_major_formatter("{x:g}")
left.set(xlabel="size of the borrowed content (1: natural)", ylabel="sparse rows that move (%)")
left.set_title("content that the head does not read", fontsize=10)
left.legend()
at = range(len(shown))
for shift, column, colour, label in (
    (-0.2, "moved_content", BLUE, "the real lengths"),
    (0.2, "predicted_content", GREY, "independent noise of their spread"),
):
    right.bar([i + shift for i in at], 100 * shown[column], 0.4, color=colour, label=label)
right.set_xticks(at, shown["label"], rotation=60)
right.set(ylabel="sparse rows that move (%)", xlabel="head of addition-pre")
right.set_title("hooks.interference, no noise injected", fontsize=10)
right.set_ylim(0, 1.35 * 100 * shown["moved_content"].max())
right.legend(loc="upper left")
plt.show()

# %% [markdown]
# On the left, content that the head does not read; on the right the lengths as they really are,
# for the heads with 50 sparse content rows or more. The lengths of this Pre-Norm model's tokens
# differ a good deal, and still well below 1% of its sparse rows hang on that, about as many as
# independent noise of the same spread would move. Most heads bear it; one, L2H3, does so less well
# (a few rows, as its rows are few). It is the same head that the
# [collapse probe](01_collapse_probe.ipynb) names as the first to go.
#
# Is that so in other models? The results that come with the repository have twelve seeds of a
# smaller addition model, and a language model, SmolLM2-135M-Instruct, in which the first token is
# far longer than the others; so there it is done twice, the second time with the first token's
# own scale spared.

# %%
tables = [
    pd.read_csv(RESULTS / name / "interference/table.csv") for name in ("addition", "smollm2")
]
found = pd.concat(tables).query("by == 'model' and on == 'k' and constant == 1").copy()
found["content_rows"] = found["rows"] - found["sinks"]
shares = found.pivot_table("moved_content", ["model", "content_rows"], "first")
assert (shares.loc["addition-pre"] < 0.01).all(axis=None)
assert (shares.loc["smollm2-135m-instruct"] > 0.15).all(axis=None)
seeds = shares[shares.index.get_level_values("model").str.startswith("study-pre")]
assert 0.025 < seeds["frozen too"].max() < 0.03
assert seeds["spared"].max() < 0.006
shares.map("{:.2%}".format)

# %% [markdown]
# In the addition models hardly a sparse content row hangs on lengths: 3% at the most, in one seed,
# and of these most are rid of it once the first token is spared. In the language model few sparse rows
# attend to content at all, but of those a large share hangs on the lengths of tokens, even with
# the first token spared ([tutorial 5](05_language_model.ipynb) looks closer). Whether a model
# *suffers* from that is another question: it may also have learnt to use lengths. Theorem 2 is no
# prophecy. It says what a Pre-Norm model has to arrange if its heads are to be independent, and
# what No-Norm and QKV-Norm get for free.
#
# ## What you have learnt
#
# - A head ignores a subspace by having it in the null space of $W_{QK}$. Pre-Norm undoes this
#   through one factor for the whole token, unless subspaces are orthogonal spheres (up to
#   constant offsets). No-Norm and QKV-Norm need linear independence only.
# - To first order a sparse row does not feel noise on q and k. Beyond a critical half-width, known
#   from its clean scores alone, it jumps to another token; noise on q alone never makes it.
# - Rates of collapse hang on the score level, which no attention pattern shows.
# - What happens to a head built to break hardly happens in the trained addition models; in the one
#   language model measured, a fifth of the few sparse content rows do hang on lengths.
#
# ## Exercises
#
# 1. Count the dimensions that the head can attend to (theorem 3): the rank of the
#    `torch.autograd.functional.jacobian` of its key with respect to $x$, for a random token. How
#    many are lost under each placement, with this head and with a second one that reads $b$?
# 2. Give every token of section 3 a seventh coordinate with the constant 10. How much longer can
#    $b$ get now before the arg max jumps? What did it cost in score, and who pays?
# 3. Write the head that reads $b$, and let $a$ grow. Theorem 2 says *one factor for the token*:
#    check that both heads see the same one.
# 4. In section 12, swap the null-space content among the tokens of *one* sum instead of the batch.
#
# ## Where to go next
#
# - [3 · Build and train](03_train_placements.ipynb) the three placements; [4 · Reproducing the
#   paper](04_reproduction.ipynb); [7 · Writing your own](07_your_own.ipynb) laws, hooks and models.
# - [The place of the norm](../docs/concepts/placements.md),
#   [circuit collapse](../docs/concepts/collapse.md),
#   [interference without noise](../docs/concepts/interference.md).
