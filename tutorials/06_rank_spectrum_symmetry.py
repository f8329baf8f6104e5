# %% [markdown]
# # 6 · Rank collapse, the spectral gap, symmetry
#
# Three papers ask other things of the layers that this package probes: how alike attention makes
# the tokens (Wu et al., [arXiv 2405.18781](https://arxiv.org/abs/2405.18781)), which singular
# values its matrices have (Naderi et al., [arXiv 2410.07799](https://arxiv.org/abs/2410.07799)),
# and how a model knows the order of its tokens (Zuo and Guerzhoy, [arXiv
# 2402.05969](https://arxiv.org/abs/2402.05969)).
#
# You will learn
#
# - how fast attention alone makes all tokens one, what of the mask decides that, and what stands
#   against it;
# - what a random attention matrix looks like without a mask and with one, and what taking away its
#   largest part does, and does not do;
# - why one causal layer can't see order and two can, and how to take positions out of a model.
#
# Half a minute; needs `qkvnorm-lens[experiments]` and the repository's `results/`. No network.

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
import numpy as np
import pandas as pd
import torch
from scipy import stats

import hooks
from qkvnorm_lens import (
    QKVNormConfig,
    QKVNormTransformer,
    checkpoint_card,
    load_checkpoint,
    load_model,
    named_config,
    plots,
    theory,
    to_bridge,
)
from qkvnorm_lens.text import sums
from qkvnorm_lens.training import Split, build_tokenizer, draw, evaluate

RESULTS = Path("../results")
BLUE, ORANGE, GREEN, BLACK, PURPLE = "#0072b2", "#d55e00", "#009e73", "#000000", "#cc79a7"
torch.set_num_threads(1)

# %% [markdown]
# ## Rank collapse under a mask (Wu et al.)
#
# Attention averages tokens, and averages of averages become alike. With $X$ the tokens of a prompt,
# one per row,
#
# $$\mu(X) = \lVert X - \mathbf 1\,\overline{x}^{\,T} \rVert_F$$
#
# is their distance from their mean; it is zero exactly if all tokens are equal. We iterate
# attention and nothing else,
#
# $$X \leftarrow A\,X\,W_V, \qquad A = \mathrm{softmax}\big(X W_Q (X W_K)^T / \sqrt d\big),$$
#
# with fresh random $W_Q, W_K$ and a fresh orthogonal $W_V$ in each layer, so that values alone
# neither shrink nor stretch. `qkvnorm_lens.theory` does that in float64. First the masks, 32
# tokens each: a filled cell says that the row's token attends to the column's.

# %%
N = D = 32
half = torch.arange(N) < N // 2
masks = {
    "complete": theory.complete_mask(N),
    "causal": theory.causal_mask(N),
    "window 4": theory.window_mask(N, 4),
    "one-way 4": theory.one_way_window_mask(N, 4),
    "two parts": half[:, None] == half,
}
figure, axes = plt.subplots(1, len(masks), figsize=(9, 2.1), layout="constrained")
for ax, (name, mask) in zip(axes, masks.items(), strict=True):
    ax.imshow(mask.numpy(), cmap="Greys", vmin=0, vmax=1.6)
    ax.set_title(name, fontsize=10)
    ax.set(xticks=[], yticks=[])
axes[0].set(xlabel="key (sender)", ylabel="query (receiver)")
plt.show()

# %% [markdown]
# A mask is a graph: content flows from $j$ to $i$ where $i$ attends to $j$. `MaskGraph` says
# whether some token attends to itself and reaches all others (its `centre`), and in how many layers
# (`radius`). With such a token, and weights that don't go to zero, collapse is a theorem: column
# `centre` of the product of `radius` layers has a positive entry in each row, so that all rows
# share a part and differ by less. The module's docstring has the bound and its proof. "Two parts"
# has no such token.


# %%
def run(mask, layers=128, seed=0, **options):
    w_q, w_k = (math.sqrt(D) * theory.gaussian(D, seed + i, layers) for i in (1, 2))
    w_v = theory.orthogonal(D, seed + 3, layers)
    return theory.Dynamics(mask, w_q, w_k, w_v, **options).run(
        theory.unit_tokens(N, D, seed), layers
    )


def even_rate(mask):
    """Rate of attention that weighs all visible keys alike: -ln |second eigenvalue|."""
    even = mask.double() / mask.sum(1, keepdim=True)
    second = sorted(torch.linalg.eigvals(even).abs().tolist())[-2]
    return -math.log(second) if second > 1e-12 else math.inf


paths = {name: run(mask) for name, mask in masks.items()}
rows = {}
for name, path in paths.items():
    below = np.flatnonzero(path.relative_mu < 1e-3)
    rows[name] = {
        "radius": path.graph.radius,
        "centre": path.graph.centre,
        "layers to 0.001": below[0] if len(below) else np.nan,
        "rate": path.fit(path.fit().last // 2).rate,
        "rate of even attention": even_rate(masks[name]),
    }
rows = pd.DataFrame(rows).T.astype(float)
rows.round(3) + 0.0  # no -0

# %%
figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
for (name, path), colour in zip(paths.items(), (BLUE, ORANGE, GREEN, BLACK, PURPLE), strict=True):
    ax.semilogy(np.maximum(path.relative_mu, 1e-12), color=colour, label=name)
ax.set(xlabel="layers of attention", ylabel=r"$\mu(X)\,/\,\Vert X\Vert_F$", ylim=(1e-10, 2))
ax.legend(frameon=False, loc="lower right")
ax.grid(visible=True, alpha=0.3)
plt.show()

# %% [markdown]
# What to read:
#
# - All four masks with a centre collapse; two parts that don't see each other do not: each becomes
#   one token of its own.
# - In the long run the rate is that of *even* attention under the mask. Once tokens are nearly
#   alike, so are their scores, and softmax of equal scores is even. For the causal mask that is
#   $\ln 2$: the second token sees two, the first among them, and halves its distance to it.
# - The complete mask is faster than exponential: there even attention averages everything away in
#   one layer.
# - A narrow two-way window is slow: 4 neighbours on each side have to carry content over 32 tokens.
#   But a one-way window of the same width ends with the rate of the causal mask, though its radius
#   is larger than that of both. "Local masks are slower" holds among masks of one kind, and not
#   across kinds.

# %%
assert np.isnan(rows.loc["two parts", "layers to 0.001"])  # never
assert paths["two parts"].relative_mu[-1] > 0.3
assert all(part.std(0).max() < 1e-9 for part in paths["two parts"].states[-1].chunk(2))
assert paths["window 4"].relative_mu[-1] < 0.02
assert (rows.loc[["complete", "causal", "one-way 4"], "layers to 0.001"] < 40).all()
slow = rows.loc[["causal", "window 4", "one-way 4"]]
assert np.allclose(slow["rate"], slow["rate of even attention"], rtol=0.05)
assert abs(rows.loc["causal", "rate of even attention"] - math.log(2)) < 1e-6
assert rows.loc["window 4", "rate"] < 0.1 * rows.loc["one-way 4", "rate"]
assert rows.loc["window 4", "radius"] < rows.loc["one-way 4", "radius"]
for name in ("complete", "causal", "window 4", "one-way 4"):  # the proved bound holds
    assert (paths[name].mu <= paths[name].bound + 1e-9 * paths[name].mu[0]).all()

# %% [markdown]
# ### More layers, more settings
#
# `results/addition/masks` has the same over five seeds, 256 layers, and with temperature, norms, a
# residual stream and an MLP: the layers until $\mu/\lVert X\rVert$ is a thousandth of its start
# (median of the seeds; `-`: not within 256).

# %%
table = pd.read_csv(RESULTS / "addition/masks/table.csv")
runs = table[table["row"] == "run"].assign(reached=lambda t: t["reached"].fillna(np.inf))
layers = runs.pivot_table("reached", "setting", "mask", aggfunc="median", sort=False)
layers = layers[["complete", "causal", "window 4", "one-way 4"]]
layers.map(lambda n: "-" if np.isinf(n) else f"{n:.0f}")

# %% [markdown]
# Norms alone change next to nothing: behind RMSNorm or LayerNorm, with orthogonal values, tokens
# collapse as fast as before. A residual stream ("skip connection") slows collapse severalfold under
# the complete and the causal mask, and does not stop it there. It need not slow it everywhere: see
# the last row under the narrow window.
#
# Careful with "exponential": the logarithm was a straight line for some of these cells only. The
# text beside the table names the others.

# %%
one_by_one = layers.loc[["RMSNorm", "LayerNorm"]] / layers.loc["attention"]
assert one_by_one.min(axis=None) > 0.9
assert one_by_one.max(axis=None) < 1.4
assert (layers.loc["residual", ["complete", "causal"]] / layers.loc["attention"]).min() > 3
assert np.isfinite(layers.loc["residual", ["complete", "causal"]].astype(float)).all()
assert layers.loc["residual, MLP, RMSNorm", "window 4"] < layers.loc["attention", "window 4"]
assert "not exponential" in (RESULTS / "addition/masks/text.md").read_text()

# %% [markdown]
# ### With a norm, suitable values hold tokens apart
#
# The paper's second half: with LayerNorm there are value matrices under which tokens of *any* rank
# stay where they are. The smallest example we know can be done by hand. Two tokens of length 1,
# causal mask, even attention ($W_Q = W_K = 0$), $W_V = \mathrm{diag}(1, 3)$. The first token, $(1,
# 0)$, sees itself alone and is an eigenvector of $W_V$: it stays. The second, at angle $t$, becomes
# the direction of
#
# $$\big(1 + \cos t,\; 3 \sin t\big), \qquad\text{so that}\qquad \tan t \mapsto 3 \tan\tfrac t2,$$
#
# whose fixed point apart from $t = 0$ has $\cos t = \tfrac12$: 60 degrees. The second token goes
# there from any angle between 0 and 180 degrees; near it, a layer halves what is missing. (Norm
# `"rms"` divides by the length; LayerNorm would take the mean off before.)

# %%
zero = torch.zeros(2, 2, dtype=torch.float64)
w_v = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
pair = theory.Dynamics(theory.causal_mask(2), zero, zero, w_v, norm="rms")


def tokens_at(first, second):
    angles = torch.tensor([first, second], dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


figure, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
for first, second, colour in ((0, 10, BLUE), (0, 60, GREEN), (0.1, 60, ORANGE)):
    states = pair.run(tokens_at(first, second), 30).states
    apart = torch.linalg.vector_norm(states[:, 1] - states[:, 0], dim=1)
    ax.plot(apart, color=colour, label=f"start at {first:g} and {second:g} degrees")
ax.set(xlabel="layers", ylabel="distance of the two tokens", ylim=(-0.05, 1.2))
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# The orange line is the other half of the truth. If the *first* token is off by a tenth of a
# degree, it is driven away from its eigenvector (by 3 a layer) to the other one, $(0, 1)$, and the
# second follows: collapse. An equilibrium that exists need not be one that attracts.

# %%
held, let_go = (pair.run(tokens_at(first, 60), 60) for first in (0, 0.1))
assert torch.linalg.matrix_rank(held.states[-1]) == 2
assert pair.run(tokens_at(0, 10), 60).relative_mu[-1] > 0.49
assert let_go.relative_mu[-1] < 1e-6

# %% [markdown]
# The results have equilibria of each rank up to 8. Those called *leaning* (a construction of ours,
# in which every token leans on the first) all keep their rank when started 0.1% off. Of those for
# which $W_V$ was solved for random tokens, all but that of rank 1 are lost to rounding alone.

# %%
held = table[table["row"] == "equilibrium"]
columns = {"rank": "rank", "end_rank": "rank after 1024 layers", "near_rank": "started 0.1% off"}
held = (
    held[["setting", *columns]].rename(columns=columns).astype(dict.fromkeys(columns.values(), int))
)
held.groupby("setting", sort=False).agg(list).map(lambda x: ", ".join(map(str, x)))

# %%
leaning = held[held["setting"] == "leaning"]
assert (leaning["rank"] == leaning["started 0.1% off"]).all()
assert set(leaning["rank"]) == set(range(1, 9))
solved = held[held["setting"].str.startswith("solved") & (held["rank"] > 1)]
assert (solved["rank after 1024 layers"] == 1).all()

# %% [markdown]
# ### In a model: `rank_profile`
#
# A real block has skip connections, norms and an MLP. `hooks.rank_profile` measures $\mu$, ranks
# and cosines of the tokens at each site of each block, in one pass. We compare a trained model with
# its own random start. The *effective rank* is the exponential of the entropy of the singular values
# over their sum: how many directions the tokens use. The first token is left out (`without_first`),
# since in language models it is often so long that it would be most of the norm.

# %%
trained = load_checkpoint("addition-pre")
config = QKVNormConfig.from_json(checkpoint_card("addition-pre")["run"]["config"])
untrained = to_bridge(QKVNormTransformer(config).eval(), build_tokenizer())
ids = sums("small-train", 24, seed=0).ids
profiles = {
    name: hooks.rank_profile(model, ids, progress=False).to_frame(without_first=True)
    for name, model in (("trained", trained), ("random start", untrained))
}
plots.rank_by_depth(profiles)

# %%
ends = pd.DataFrame({name: p[p["site"] == "out"].iloc[-1] for name, p in profiles.items()}).T
ends = ends[["label", "relative_mu", "effective_rank", "mean_cosine"]]
assert ends.loc["trained", "relative_mu"] > 1.2 * ends.loc["random start", "relative_mu"]
start = profiles["random start"]
assert (start[start["site"] == "out"]["relative_mu"].diff().dropna() < 0).all()
assert ends.loc["trained", "mean_cosine"] < ends.loc["random start", "mean_cosine"]
assert ends.loc["trained", "effective_rank"] < ends.loc["random start", "effective_rank"]
ends

# %% [markdown]
# At random start the tokens of this model approach each other in each layer, as the theory has it.
# Those of the trained model stay further apart: $\mu$ and the cosines say so. The effective rank
# says something else: the trained model uses *fewer* directions, and stands further apart in them.
# One word, "rank collapse", for two things that can go opposite ways.
#
# A language model, SmolLM2-135M-Instruct, from the committed results (126 tokens a prompt, 30
# blocks):

# %%
smol = pd.read_csv(RESULTS / "smollm2/rank/table.csv")
smol = smol[(smol["first"] == 0) & smol["site"].isin(["in", "mid", "out"])]  # first token left out
by_state = dict(list(smol.groupby("state", sort=False)))
plots.rank_by_depth(by_state)

# %%
plots.rank_by_depth(by_state, measure="effective_rank")

# %% [markdown]
# Here both agree: the trained model holds its tokens apart, in more directions than at random
# start. One model, one random start. The small models of all six kinds in `results/addition/rank`
# are further from their mean than at their start, too. Between Pre-Norm and QKV-Norm nothing is
# decided, trained or not. Of 12 comparisons six are, once one corrects for their number: all with
# No-Norm, most of them at random start.

# %%
for measure in ("relative_mu", "effective_rank"):
    last = {state: frame[measure].iloc[-1] for state, frame in by_state.items()}
    assert last["trained"] > 1.5 * last["random start"], last
said = (RESULTS / "addition/rank/text.md").read_text()
assert said.count("Training leaves the tokens farther from their mean") == 6  # kinds of model
assert "corrected for all of them (Bonferroni, 99.58%): 6." in said
for line in said.splitlines():
    if line.startswith("Pre-Norm minus QKV-Norm"):
        assert line.count("not decided") == 2, line

# %% [markdown]
# ## The spectral gap (Naderi et al.)
#
# Another look at the same matrices. The rows of an attention matrix $A$ sum to one, so that
# $A\mathbf 1 = \mathbf 1$ and its largest singular value is at least 1. What of the others? At
# random start, *without a mask*, softmax attention is much like a *random Markov matrix*: softmax
# of independent normal entries, here of variance $\ln 2$. For such a one
#
# $$s_1 \to 1, \qquad s_2 \approx \frac{2}{\sqrt T} \qquad (T \text{ tokens}),$$
#
# a gap that widens with the length of the prompt. (For heads narrower than the prompt is long,
# scores are of low rank and $s_2$ falls more slowly: exercise 4.) We draw Markov matrices, five of
# each size, without a mask and with a causal one.

# %%
lengths = (20, 30, 50, 75, 100, 150)


def singular(matrix, k=3):
    return torch.linalg.svdvals(matrix)[:k].tolist()


spectra = pd.DataFrame(
    [
        {
            "T": T,
            "causal": causal,
            "seed": seed,
            **dict(zip(("s1", "s2", "s3"), found, strict=True)),
        }
        for T in lengths
        for causal in (False, True)
        for seed in range(5)
        for found in [singular(theory.random_markov(T, seed=seed, causal=causal))]
    ]
)
means = spectra.pivot_table(["s1", "s2", "s3"], "T", "causal")
even = pd.DataFrame(
    {T: singular(theory.uniform(T, causal=True)) for T in lengths}, ("s1", "s2", "s3")
).T

# %%
figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.3), sharey=True, layout="constrained")
for ax, causal, title in zip(axes, (False, True), ("no mask", "causal mask"), strict=True):
    for name, colour in (("s1", BLUE), ("s2", ORANGE), ("s3", GREEN)):
        some = spectra[spectra["causal"] == causal]
        ax.plot(some["T"], some[name], ".", color=colour, alpha=0.6, label=f"${name[0]}_{name[1]}$")
        if causal:
            ax.plot(even.index, even[name], "--", color=colour, lw=1)
    ax.set(title=title, xlabel="tokens T", ylim=(0, 1.85))
T = np.linspace(18, 155)
axes[0].plot(T, 2 / np.sqrt(T), "--", color=BLACK, lw=1, label=r"$2/\sqrt{T}$")
axes[1].plot([], [], "--", color="grey", lw=1, label="uniform causal")
axes[0].set_ylabel("singular value of A")
handles = {h.get_label(): h for ax in axes for h in ax.lines if not h.get_label().startswith("_")}
figure.legend(handles.values(), handles, loc="outside right center", frameon=False)
plt.show()

# %% [markdown]
# On the left, the paper's law. On the right, the same entries under a causal mask: no single large
# value, no bulk that shrinks. But the random entries have little part in this: the *uniform*
# causal matrix, which averages each row's visible keys evenly, has much the same spectrum, a little
# lower (dashed). So a gap under a mask has to be read beside that of the uniform matrix of the same
# mask, here called $U$.

# %%
free, masked = (means.xs(causal, axis=1, level="causal") for causal in (False, True))
assert (free["s1"] < 1.03).all()
assert np.allclose(free["s2"] * np.sqrt(free.index) / 2, 1, atol=0.25)
assert (masked["s1"] > 1.5).all()
assert (masked["s2"].diff().dropna() > -0.05).all()  # does not fall with T
assert (abs(masked[["s1", "s2"]] - even[["s1", "s2"]]) < 0.2).to_numpy().all()
beside = {"no mask": free, "causal": masked, "uniform causal": even}
pd.concat({name: f.loc[[20, 150]].round(2) for name, f in beside.items()}, axis=1)

# %% [markdown]
# ### What the gap does: rank collapse in width
#
# Behind one layer $AXW$ almost everything has been projected on one direction, the more so the
# *longer* the prompt. The stable rank of $\Sigma = XX^T$, that is
# $\lVert\Sigma\rVert_F^2/\lVert\Sigma\rVert_2^2$, says how many directions count. The fix is to
# take the largest part away:
#
# $$A \;\to\; A - \tfrac1T \mathbf 1 \mathbf 1^T .$$
#
# It needs no change of $A$: since rows of $A$ sum to one, $(A - \tfrac1T\mathbf 1\mathbf 1^T)V =
# A\,(V - \mathbf 1\bar v^T)$, attention over *centred values*. Under a causal mask the uniform
# matrix is $U$, each row has a mean of its own, and there is no one centring that does the same.

# %%
x = theory.propagate(theory.Recursion(), 50, 1, seed=0).states[0]
a = theory.random_markov(50, seed=1)
centred = x - x.mean(0)
assert torch.allclose((a - theory.uniform(50)) @ x, a @ centred)
a = theory.random_markov(50, seed=1, causal=True)
assert not torch.allclose((a - theory.uniform(50, causal=True)) @ x, a @ centred)


def width(T, **options):
    """Stable rank behind one layer, mean of five seeds."""
    signals = (theory.propagate(theory.Recursion(**options), T, 1, seed=s) for s in range(5))
    return np.mean([theory.stable_rank(signal.states[-1].detach()) for signal in signals])


kinds = {
    (mask, fix): {T: width(T, causal=mask == "causal", centred=fix == "A - U") for T in lengths}
    for mask in ("no mask", "causal")
    for fix in ("A", "A - U")
}
ranks = pd.DataFrame(kinds)
ranks.loc[[20, 50, 150]].round(2)

# %%
assert (ranks["no mask", "A"] < 1.3).all()
assert ranks["no mask", "A"].loc[150] < 1.05
assert ranks["no mask", "A - U"].loc[150] > 3 * ranks["no mask", "A - U"].loc[20]
assert ranks["causal", "A"].loc[150] > 1.2
assert ranks["causal", "A - U"].loc[150] < 0.5 * ranks["no mask", "A - U"].loc[150]

# %% [markdown]
# Without a mask: collapse to one direction, and with the fix a stable rank that grows with $T$.
# Under a causal mask there is less to mend, and the fix mends less of it.
#
# And in depth? From the results, behind 10 layers of softmax attention on 100 tokens without a
# mask, 20 seeds (geometric mean of gradients). `nothing left`: $A - U$ shrinks $X$, with it the
# scores, and so on to zero.

# %%
table = pd.read_csv(RESULTS / "addition/spectrum/table.csv")
ours = table.query("attention == 'softmax' and scaled == 0 and mask == 'none'").copy()
kind = {(0, 0): "neither", (1, 0): "LayerNorm", (0, 1): "skip", (1, 1): "both"}
ours["network"] = [kind[int(n), int(s)] for n, s in zip(ours["norm"], ours["skip"], strict=True)]
ours["fix"] = np.where(ours["fix"] > 0, "A - U", "A")
depth = ours[(ours["what"] == "depth") & (ours["layer"] == 10)]
depth = depth.pivot_table("value", "network", "fix", sort=False)
first = ours[(ours["what"] == "gradient") & (ours["layer"] == 0)]
first = first.pivot_table("value", "network", "fix", aggfunc=lambda x: stats.gmean(x), sort=False)
shown = {"stable rank, layer 10": depth.round(2), "gradient, first layer": first.round(0)}
pd.concat(shown, axis=1).loc[list(kind.values())].astype(object).fillna("nothing left")

# %% [markdown]
# The fix helps where there is a skip connection: then the rank stays up, and the first layer's
# gradient is 20 times smaller, or 6 with LayerNorm too. Alone it makes the signal vanish; with
# LayerNorm and no skip it keeps no rank. "Centring cures rank collapse" is true here *with skip
# connections*, which transformers have.

# %%
second = table[(table["quantity"] == "s2") & (table["mask"] == "none") & (table["tokens"] == 150)]
second = second[second["what"] == "spectrum"].groupby("attention")["value"].mean()
assert second["softmax narrow"] > 1.5 * second["markov"]  # d_head = 16
assert depth["A"].max() < 1.01
assert depth.loc[["skip", "both"], "A - U"].min() > 15
assert depth.loc["LayerNorm", "A - U"] < 1.1
assert round(first.loc["skip", "A"] / first.loc["skip", "A - U"], -1) == 20
assert round(first.loc["both", "A"] / first.loc["both", "A - U"]) == 6
assert first.loc["LayerNorm", "A - U"] > first.loc["LayerNorm", "A"]

# %% [markdown]
# ### In a model: `spectral_gap`
#
# Singular values of every head's attention matrix on your prompts, beside $U$'s. The band goes from
# the least to the greatest head of a layer.

# %%
spectrum = hooks.spectral_gap(trained, ids, progress=False)
print(spectrum)
plots.spectrum_by_depth(spectrum)

# %% [markdown]
# On these short sums the trained model's gap is smaller than that of uniform causal attention: its
# second singular value is larger as well. In a language model this is another matter. SmolLM2, by
# length of the prompt, means over layers and heads:

# %%
layer = spectrum.to_frame("layer")
assert layer["gap"].mean() < layer["uniform_gap"].mean()
assert (layer["s2"] > layer["uniform_s2"]).all()
smol = pd.read_csv(RESULTS / "smollm2/spectrum/table.csv")
smol = smol[smol["what"] == "trained"].pivot_table("value", "tokens", "quantity")
smol = smol[["s1", "s2", "gap", "uniform_gap", "left_s1"]]
assert (smol["gap"] > 3 * smol["uniform_gap"]).all()
assert (smol["left_s1"] > 0.75 * smol["s1"]).all()
smol.round(2)

# %% [markdown]
# A gap eight times that of uniform attention at 150 tokens, and it grows with the length. Is this
# the random matrix's gap? No. `left_s1`, the largest value of $A - U$, is most of $s_1$: the fix
# would not take it away. It is what an *attention sink* makes, and this model has many
# ([tutorial 5](05_language_model.ipynb)): where $T$ rows put all their weight on one token, $A$ has a
# column of ones, of length $\sqrt T$.

# %%
assert smol.loc[150, "gap"] > 8 * smol.loc[150, "uniform_gap"]
sink = torch.zeros(150, 150, dtype=torch.float64)
sink[:, 0] = 1
print("a pure sink of 150 rows: s1 =", round(singular(sink)[0], 2), "= sqrt(150)")
assert abs(singular(sink)[0] - math.sqrt(150)) < 1e-9

# %% [markdown]
# ### Does the fix help to train?
#
# `hooks.CentredAttention` puts $A - U$ into a trained model. That model never learned to do
# without, so it breaks:

# %%
before = evaluate(trained, "small-train", rows=1000)
with hooks.CentredAttention().applied(trained):
    after = evaluate(trained, "small-train", rows=1000)
print(f"right tokens: {100 * before.per_token:.1f}%, with the fix {100 * after.per_token:.1f}%")
assert after.per_token < before.per_token - 0.2

# %% [markdown]
# The fair question is about models trained with it (`QKVNormConfig(..., centred=True)`): eight
# seeds with and eight without, Pre-Norm, 4,000 steps. With the fix minus without, and 95% intervals
# over seeds:

# %%
table = pd.read_csv(RESULTS / "addition/centring/table.csv")
numbers = table[table["what"] == "number"]
numbers = numbers.pivot_table("value", "seed", ["quantity", "variant", "fix"])
rows = {}
kinds = ("in distribution", "interpolation")
for of in (("final loss", "-"), ("mean loss", "-"), *(("accuracy", kind) for kind in kinds)):
    name = ", ".join(part for part in of if part != "-")
    gain = numbers[of][1] - numbers[of][0]  # seed by seed
    half = stats.t.ppf(0.975, len(gain) - 1) * stats.sem(gain)
    rows[name] = {"without": numbers[of][0].mean(), "with": numbers[of][1].mean()}
    rows[name] |= {"difference": gain.mean(), "±": half}
    decided = abs(gain.mean()) > half
    assert decided == (of[0] == "mean loss")
pd.DataFrame(rows).T.round(3)

# %% [markdown]
# No benefit: with the fix these models train more slowly (the mean loss over the run is the higher
# one, decidedly); how they end is not decided. This was a causal model on a dozen tokens, where the
# gap is small anyway; for long prompts without a mask, where the theory speaks, we have measured
# nothing.

# %%
frame = pd.DataFrame(rows).T
assert (frame.loc[["final loss", "mean loss"], "difference"] > 0).all()
assert frame.loc["accuracy, in distribution", "difference"] < 0

# %% [markdown]
# ## Symmetry: who tells the model the order? (Zuo and Guerzhoy)
#
# What a head writes at the last position $n$ is a sum over keys,
#
# $$z_n = \sum_{t \le n} \mathrm{softmax}_t(q_n \cdot k_t)\, v_t ,$$
#
# and a sum does not know its order. If $k_t$ and $v_t$ hang on the token at $t$ alone, because
# there are no positions, then permuting tokens $1 \dots n-1$ leaves $z_n$ as it is. That is so in
# the *first* layer, causal mask or not: the last row sees all. In the *second* layer it isn't:
# under a causal mask the token at $t$ has meanwhile seen the tokens before $t$, and those are
# others after a permutation. So
#
# | no positions | causal mask | no mask |
# |---|---|---|
# | one layer | order invisible | order invisible |
# | two or more | **order visible** | order invisible |
#
# `hooks.symmetry_gap` permutes the tokens before the last and measures what becomes of its
# prediction. A difference of exactly zero can't be expected of floating point: sums in another
# order round otherwise. So the same prompt is also run with the last digit of its stream changed,
# and `verdict` says `none` where permuting does no more than rounding.


# %%
def random_model(n_layers, skip="both"):
    config = named_config(
        "study", "pre", n_layers=n_layers, positional_embedding_type="none", skip=skip, seed=3
    )
    return to_bridge(QKVNormTransformer(config).eval(), build_tokenizer())


some = ids[:12]
random = {f"{n} layer{'s' * (n > 1)}": random_model(n) for n in (1, 2)}
gaps = {name: hooks.symmetry_gap(m, some, progress=False) for name, m in random.items()}
columns = ["variant", "tv", "largest", "floor_logits", "verdict"]
shown = {name: gap.to_frame()[columns].set_index("variant") for name, gap in gaps.items()}
pd.concat(shown).map(lambda x: f"{x:.2g}" if isinstance(x, float) else x)

# %%
assert gaps["1 layer"].vanishes("as is")
assert gaps["1 layer"].vanishes("mask removed")
assert gaps["2 layers"].verdict("as is") == "gap"
assert gaps["2 layers"].vanishes("mask removed")
behind = gaps["2 layers"].to_frame("layer").set_index(["variant", "layer"])["stream"]
assert behind["as is", 0] < 1e-5
assert 0.1 < behind["as is", 1] < 0.4
plots.symmetry_by_depth(gaps)

# %% [markdown]
# `tv` is the total variation between the next token's distributions, from 0 to 1; `largest` is the
# most that a logit moved, `floor_logits` what rounding moves it. In the figure, the last position's
# stream: behind the first block it changes by rounding alone (dashed), behind the second by a fifth
# of its length.
#
# The results have this for 72 random models: 1, 2 and 4 layers, three placements, with and without
# skip connections. One layer: a gap in none; two and four: in all.

# %%
table = pd.read_csv(RESULTS / "addition/symmetry/table.csv")
drawn = table[(table["by"] == "variant") & table["group"].str.startswith("random")]
drawn = drawn[drawn["variant"] == "as is"]
verdicts = drawn.groupby(["layers", "skip"]).agg(
    models=("tv", "size"), no_gap=("vanishes", "sum"), tv=("tv", "mean")
)
verdicts["no_gap"] = verdicts["no_gap"].astype(int)
assert verdicts["models"].sum() == 72
for (n, _), row in verdicts.iterrows():
    assert row["no_gap"] == (row["models"] if n == 1 else 0)
verdicts

# %% [markdown]
# So skip connections are not what shows a model the order: without any (`skip` = none) the gap is
# there as well. Version 2 of the paper says that it found no definitive evidence that they are; for
# *seeing* order at random start they are not needed.
#
# ### A trained model: taking positions out
#
# `addition-pre` has learned positions. `symmetry_gap` measures with them, without them (every token
# gets the same position), without the mask, and without both.

# %%
gap = hooks.symmetry_gap(trained, some, progress=False)
variants = gap.to_frame().set_index("variant")
assert list(variants["verdict"]) == ["gap", "gap", "gap", "none"]
print(gap)
plots.symmetry_by_depth(gap)

# %% [markdown]
# With positions or with the mask there is a gap; without both there is none, which shows that
# nothing else in this model carries order. Without positions (blue) you see the law again: behind
# the first block only rounding, from the second on a gap. (The black line, "as is", lies under the
# orange one.)
#
# Beware of the lines between: this model was trained *with* positions. What it does without them
# says what its mask lets through, and not how a model would use the mask that never had anything
# else.
#
# SmolLM2 (rotary positions), from the results:

# %%
points = gap.to_frame("layer")
points = points[points["variant"] == "positions removed"].set_index("layer")
assert points.loc[0, "stream"] < 10 * points.loc[0, "floor_stream"]
assert points.loc[1, "stream"] > 1000 * points.loc[1, "floor_stream"]
table = pd.read_csv(RESULTS / "smollm2/symmetry/table.csv")
smol = table[(table["by"] == "variant") & table["group"].str.startswith("smollm2")]
smol = smol.set_index("variant")[["tv", "moved", "vanishes"]].astype({"vanishes": bool})
assert smol.loc["as is", "tv"] > 4 * smol.loc["positions removed", "tv"] > 0.4
assert list(smol["vanishes"]) == [False, False, False, True]
smol.round(3)

# %% [markdown]
# ### Models that never had positions
#
# Can order be *learned* from the causal mask alone? The `order-` models of the experiments add two
# positive integers of three digits: two layers, Pre-Norm, three seeds of each kind. Without order
# no model can tell 123+456 from 321+654.

# %%
nope = load_model("order-nope-1")
digits = Split((2,), (3,), signed=False)
right = evaluate(nope, digits, rows=1000)
print(f"positions: {nope.cfg.positional_embedding_type}; exact: {100 * right.exact:.1f}%")
assert nope.cfg.positional_embedding_type == "none"
assert right.exact > 0.98
questions = draw(digits, 8, seed=0).tokens[:, :9].tolist()  # "[123+456="
swap = [0, 5, 6, 7, 4, 1, 2, 3, 8]  # the two integers change places
permuted = hooks.symmetry_gap(nope, questions, progress=False)
swapped = hooks.symmetry_gap(nope, questions, permutations=[swap], progress=False)
for name, report in (("permuted", permuted), ("integers swapped", swapped)):
    print(f"{name:17s} total variation {report.to_frame()['tv'].iloc[0]:.4f}")

# %% [markdown]
# It adds, so it sees the order: permuting the question changes its prediction. And it has learned
# which order does *not* matter: 123+456 and 456+123 are the same sum to it.

# %%
assert permuted.verdict("as is") == "gap"
assert permuted.vanishes("mask removed")
assert swapped.tv[0].mean() < 0.05 < 0.3 < permuted.tv[0].mean()

# %% [markdown]
# All kinds, from `results/addition/positions`: exact answers over three seeds, and without which
# skip connections.

# %%
table = pd.read_csv(RESULTS / "addition/positions/table.csv")
exact = table[table["quantity"] == "exact"].pivot_table("value", "group", "seed", sort=False)
names = {
    "order-rotary": "rotary positions",
    "order-rotary-no-skip": "rotary, no skips",
    "order-nope": "no positions",
    "order-nope-no-attn": "no positions, no skip of attention",
    "order-nope-no-skip": "no positions, no skips",
}
shown = (100 * exact.loc[list(names)]).rename(names)
assert shown.loc["no positions"].min() > 95
worst = shown.loc[["no positions, no skip of attention", "no positions, no skips"]]
assert worst.min(axis=1).max() < 60 < 95 < worst.max(axis=1).min()
shown.round(1)

# %% [markdown]
# Decided: without positions the task can be learned from the mask alone, in each of three seeds.
# *Not* decided: whether skip connections help with that. With rotary positions models without skips
# learn it in each seed, so that skips are not needed to train at all; without positions and without
# skips some runs fail and others are perfect. That looks like a reason, but three seeds can't tell:

# %%
full = shown.loc["no positions"]
for name in worst.index:
    test = stats.ttest_ind(full, shown.loc[name], equal_var=False)
    low, high = test.confidence_interval(0.95)
    print(f"no positions minus {name}: {(low + high) / 2:.1f} points, {low:.0f} to {high:.0f}")
    assert low < 0 < high
assert shown.loc["rotary, no skips"].min() > 95

# %% [markdown]
# ## What you have learnt: what is decided, and what is not
#
# Decided, as far as we measured:
#
# - Attention alone collapses under each mask with a centre: proved, and seen; in the end at the rate
#   of even attention, for the complete mask faster than exponentially. Local masks are slower among
#   masks of one kind, and not across kinds.
# - Norms do not prevent that. Suitable values do; but many of these equilibria let go of what is
#   near them.
# - Without a mask, a random matrix has one singular value near 1 and the others below about
#   $2/\sqrt T$. Under a causal mask it shows little more than the mask itself does.
# - $A - U$ keeps the rank up without a mask; in depth, where there are skip connections.
# - Order is invisible to one causal layer, by construction and in 24 random models, and visible to
#   two or four, in 48. Skip connections are not needed to see it, nor positions to learn a task
#   that needs it.
#
# Not decided:
#
# - Whether trained models in general hold their tokens apart: the small ones of six kinds and the
#   one language model here do, more than at random start.
# - Whether $A - U$ helps to train. It did not show, on short causal prompts.
# - Whether skip connections help to learn order.
# - Whether a placement of the norm changes any of this.
#
# ## Exercises
#
# 1. `theory.star_mask(32)`: every token sees the first and itself. What rate do you expect of even
#    attention? Measure it.
# 2. Run the causal mask with `temperature=1 / 64`. Is $\mu$ still a straight line? Look at
#    `path.least_weight`.
# 3. Change $W_V$ of the two tokens to $\mathrm{diag}(1, 2)$, then $\mathrm{diag}(1, 1.5)$. From
#    which ratio on is there an equilibrium? ($\cos t = 1/(\text{ratio} - 1)$.)
# 4. `theory.random_softmax` with `d_head=16` in place of `random_markov`: does $s_2$ still fall as
#    $2/\sqrt T$?
# 5. `hooks.symmetry_gap(random_model(2, skip="none"), some)`: larger or smaller than with skip
#    connections?
# 6. `hooks.spectral_gap(trained, ids, lengths=(6, 9, 12))` and `to_frame("length")`: the gap by
#    length, beside $U$'s.
#
# ## Where to go next
#
# - [1 · The collapse probe](01_collapse_probe.ipynb): noise on the same attention; [3 · Build and
#   train](03_train_placements.ipynb): train a model without positions or with `centred=True`
#   yourself.
# - [7 · Writing your own](07_your_own.ipynb): a law, a hook, a model of your own.
# - [Concepts](../docs/concepts/geometry.md) and [how to measure your own
#   model](../docs/how-to/rank-spectrum-symmetry.md); [the API of `dynamics` and
#   `markov`](../docs/api/dynamics.md).
# - [Reproduction](../docs/reproduction/index.md): the experiments `masks`, `rank`, `spectrum`,
#   `centring`, `symmetry` and `positions` in full.
