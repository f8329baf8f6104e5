# %% [markdown]
# # 7 · Writing your own
#
# The other tutorials use what is there. This one builds: each part takes one piece of the library
# and puts something of your own in its place.
#
# What you will learn:
#
# - to write a **noise law** of your own and to test it, and to put noise on exactly the vectors,
#   layers, heads and rows that you mean, with the library's hooks or yours;
# - to tell a hook that lands from one that does not, and what the library does about it;
# - to train a small transformer of your own configuration, and to run a **complete experiment** on
#   it: is it the length of keys that its induction heads need, with a control and error bars?
#
# Takes about 40 minutes to read and 30 seconds to run on a CPU, offline. You need PyTorch and
# TransformerLens's hooks; [01](01_collapse_probe.ipynb) first helps. The four parts can be read
# alone.

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
import tempfile
import warnings

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from transformer_lens.tools.analysis import NormMatchedPlacebo, SubspaceInterchange, random_basis

import hooks
from qkvnorm_lens import (
    NormSpec,
    QKVNormConfig,
    QKVNormTransformer,
    load_checkpoint,
    load_model,
    save_pretrained,
    to_bridge,
)
from qkvnorm_lens.text import sums

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # for colour-blind eyes too
torch.set_num_threads(1)  # for models this small more threads are in each other's way

# %% [markdown]
# # A. A noise law of your own
#
# Noise turns a vector $x$ into $f x$, with a factor $f$ of mean 1 and RMS deviation $\sigma$. The
# three laws that come with the library (uniform, normal, lognormal) spread all factors alike.
# Suppose that your errors are not like that: nine vectors in ten are nearly right and one is far
# off. So:
#
# $$f \sim \begin{cases} \text{uniform on } 1 \pm c\,\sigma & \text{with probability } 0.9\\
# \text{uniform on } 1 \pm 5c\,\sigma & \text{with probability } 0.1\end{cases}$$
#
# with $c$ such that the RMS is $\sigma$: $c^2 (0.9 + 0.1\cdot 5^2) / 3 = 1$.
#
# A law has to answer four questions: which factor belongs to a uniform number $u$ (`factor`, and
# `base` for the part in which $\sigma$ has no share), how probable smaller factors are (`cdf`),
# how dense they lie (`density`), and between which points (`knots`) that is smooth: the integral
# is taken piece by piece between them. `limit` is the $\sigma$ at which a factor could turn negative.


# %%
class Outliers:
    """Most factors lie close to 1; one in ten comes from a range five times as wide."""

    name, share, reach = "outliers", 0.1, 5.0
    c = math.sqrt(3 / (1 - share + share * reach**2))
    limit = 1 / (c * reach)
    limit_included = False
    reason = "the outliers' half-width would reach 1 and factors could turn negative"

    def base(self, u):
        edge = (1 - self.share) / 2 + self.share / (2 * self.reach)  # mass from 1 to 1 + c sigma
        off = (u - 0.5).abs()
        far = 1 + (off - edge) * 2 * self.reach / self.share
        return (u - 0.5).sign() * torch.where(off < edge, off / edge, far)

    def factor(self, u, sigma):
        return 1 + self.c * sigma * self.base(u)

    def cdf(self, f, sigma):
        x = (f - 1) / (self.c * sigma)
        inner, outer = ((x / r + 1).clamp(0, 2) / 2 for r in (1, self.reach))
        return (1 - self.share) * inner + self.share * outer

    def density(self, f, sigma):
        x = (f - 1).abs() / (self.c * sigma)
        inner, outer = ((x < r).to(x) / (2 * r) for r in (1, self.reach))
        return ((1 - self.share) * inner + self.share * outer) / (self.c * sigma)

    def knots(self, sigma):
        jumps = torch.tensor([-self.reach, -1, 1, self.reach]).to(sigma)
        return 1 + self.c * sigma[:, None] * jumps


law = Outliers()
assert isinstance(law, hooks.Law)  # it has all that a law needs

# %% [markdown]
# A law is a handful of formulas that must fit together, so test that they do: mean 1, RMS
# $\sigma$, the distribution function of a factor gives back its $u$, and the density is its
# derivative.

# %%
sigma = torch.tensor(0.1, dtype=torch.float64)
u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
f = law.factor(u, float(sigma))
print(f"mean {f.mean():.6f}, RMS {(f - 1).square().mean().sqrt():.6f}, largest {f.max():.3f}")
assert abs(f.mean() - 1) < 1e-6
assert abs((f - 1).square().mean().sqrt() - 0.1) < 1e-6
assert (law.cdf(f, sigma) - u).abs().max() < 1e-9
slope = (law.cdf(f + 1e-7, sigma) - law.cdf(f - 1e-7, sigma)) / 2e-7
off_edges = ((f - 1).abs() - law.c * 0.1).abs() > 1e-6
assert torch.allclose(slope[off_edges][1:-1], law.density(f, sigma)[off_edges][1:-1], rtol=1e-4)

# %% [markdown]
# Now the exact collapse probability takes it as it is. We hold it against brute force: draw
# factors, multiply scores, look at the arg max. Four rows of one attended score and four
# competitors.
#
# The comparison also shows what `knots` are for: `Forgetful` names the ends of its range only, not
# where its density jumps, and is wrong by far more than rounding.


# %%
class Forgetful(Outliers):
    """The same law, with knots that leave out the jumps inside."""

    def knots(self, sigma):
        return super().knots(sigma)[:, [0, -1]]


rows = [[6, 4.8, 4, 1, -2], [6, 5.5, 5, 5, 5], [6, 5.9, -1, -1, -2], [-2, -2.5, -3, -3, -4]]
rows = torch.tensor(rows, dtype=torch.float64)
given = rows[:, 0], rows[:, 1:], torch.full((4,), 0.15, dtype=torch.float64)
exact = hooks.collapse_probability(*given, law)
forgetful = hooks.collapse_probability(*given, Forgetful())

random = torch.Generator().manual_seed(0)
factors = law.factor(torch.rand(1_000_000, 5, generator=random, dtype=torch.float64), 0.15)
drawn = torch.stack([((factors * row).argmax(1) != 0).double().mean() for row in rows])
error = (drawn * (1 - drawn) / 1_000_000).sqrt()

assert ((exact - drawn).abs() < 5 * error).all()
assert (forgetful - exact).abs().max() > 1e-4
columns = {"exact": exact, "drawn": drawn, "s.e.": error, "forgetful": forgetful}
pd.DataFrame({name: p.numpy() for name, p in columns.items()}).round(5)

# %% [markdown]
# Does the law matter, at one and the same RMS? The row below needs factors of at least $\pm 20\%$
# to lose its token ($\rho = 1.5$). Rare large factors reach that long before the uniform law
# does; where the noise is larger still, the law with most of its factors near 1 collapses less.

# %%
row = torch.tensor([6.0, 4.0], dtype=torch.float64)
grid = torch.linspace(0.02, 0.21, 96, dtype=torch.float64)
fig, ax = plt.subplots(figsize=(6.4, 3.3), layout="constrained")
curves = {}
for shown, colour, style in ((hooks.LAWS["uniform"], GREY, "--"), (law, ORANGE, "-")):
    given = row[:1].expand(96), row[1:].expand(96, 1)
    curves[shown.name] = hooks.collapse_probability(*given, grid, shown)
    ax.plot(100 * grid, 100 * curves[shown.name], style, color=colour, label=shown.name, lw=2)
ax.set(xlabel="RMS of the noise, sigma (%)", ylabel="rows that collapse (%)")
ax.legend()
plt.show()

first = {name: float(grid[(p > 0).int().argmax()]) for name, p in curves.items()}
print("collapse begins at:", {name: f"{s:.1%}" for name, s in first.items()})
assert first["outliers"] < first["uniform"]
assert curves["outliers"][-1] < curves["uniform"][-1]

# %% [markdown]
# Put into `hooks.LAWS` under its name, the law works in `NormNoise` and `sweep`.
# (`collapse_probe` knows the built-in laws only: its kernel is compiled for them.) So on a real
# model we compute the exact rate ourselves, from the clean scores of a layer, and count against
# it.

# %%
hooks.LAWS["outliers"] = law
model = load_checkpoint("addition-none")
ids = [torch.tensor(row) for row in sums("small-train", 64, seed=0).ids]
batch = torch.stack([row[:14] for row in ids if len(row) >= 14])  # one length: no padding
LAYER, PATTERN = 3, "blocks.3.attn.hook_pattern"

_, cache = model.run_with_cache(batch, names_filter=[PATTERN, "blocks.3.attn.hook_attn_scores"])
clean = cache[PATTERN]
sparse = clean.amax(-1) >= hooks.SPARSE
sparse[:, :, 0] = False  # the first row sees one key: nothing to lose
w = cache["blocks.3.attn.hook_attn_scores"][sparse]  # [row, key]
s_star, star = w.max(-1)
others = w.isfinite().scatter(1, star[:, None], False)  # visible, and not the attended one


def exact_rate(law, sigma):
    p = hooks.collapse_probability(
        s_star, w.masked_fill(~others, 0.0), torch.full_like(s_star, sigma), law, valid=others
    )
    return float(p.mean())


# %%
def counted(name, sigma, draws=16):
    """Share of the layer's sparse rows whose arg max moves, draw by draw."""
    shares = []
    for draw in range(draws):
        noise = hooks.NormNoise(sigma=sigma, on="k", law=name, layers=(LAYER,), draw=draw)
        with noise.applied(model):
            _, noisy = model.run_with_cache(batch, names_filter=PATTERN)
        shares.append((noisy[PATTERN].argmax(-1) != clean.argmax(-1))[sparse].double().mean())
    shares = torch.stack(shares)
    return float(shares.mean()), float(shares.std() / math.sqrt(draws))


table = []
for name in ("uniform", "outliers"):
    mean, error = counted(name, 0.15)
    exact = exact_rate(hooks.LAWS[name], 0.15)
    table.append({"law": name, "exact": exact, "counted": mean, "s.e.": error})
    assert abs(mean - exact) < 4 * error
print(f"{int(sparse.sum())} sparse rows of layer {LAYER}, sigma = 15%")
pd.DataFrame(table).set_index("law").map("{:.2%}".format)

# %% [markdown]
# The error is over draws, not over rows: a key's noise is shared by all rows that look at it.
#
# # B. Sites: where noise goes
#
# ## What the library found in this model
#
# `attention_sites` runs the model on a few tokens and finds out which hook carries what, layer by
# layer. Nothing is looked up by architecture. For each of q, k, v there are two places: the
# `projection`'s output, and the vectors that enter the dot product (`dot`). A norm in between is a
# **shield**: it removes what noise did to the length.

# %%
three = {name: load_checkpoint(f"addition-{name}") for name in ("none", "pre", "qkv")}
frames = [
    hooks.attention_sites(m).to_frame().query("layer == 1").assign(model=name)
    for name, m in three.items()
]
pd.concat(frames)[["model", "vector", "projection", "dot_product", "shield"]].set_index("model")

# %% [markdown]
# ## Reading with `by_position`
#
# Hooks of different architectures have different layouts. `site.by_position(tensor)` is
# `[batch, pos, head, d_head]` always. Here are the lengths of the keys of layer 1 at both places,
# as deviation over mean: QKV-Norm takes most of their spread away. (Not all: after the norm each
# component has a learned gain, and then lengths depend on directions.)


# %%
def spread_of_lengths(model, place):
    site = getattr(hooks.attention_sites(model).layer(1).k, place)
    _, cache = model.run_with_cache(batch, names_filter=site.hook)
    lengths = site.by_position(cache[site.hook]).norm(dim=-1)  # [batch, pos, head]
    return float((lengths.std((0, 1)) / lengths.mean((0, 1))).mean())


places = ("projection", "dot")
table = pd.DataFrame({n: {p: spread_of_lengths(m, p) for p in places} for n, m in three.items()}).T
assert table.loc["pre", "projection"] == table.loc["pre", "dot"]  # the same hook
assert table.loc["qkv", "dot"] < table.loc["qkv", "projection"]
table.map("{:.0%}".format)

# %% [markdown]
# ## Which vectors, which layers, which rows
#
# What do the options of `NormNoise` change? We noise layer 1 of `addition-pre` in different ways
# and look at its own scores and arg maxes, and at the scores of layer 2 behind it.

# %%
SCORES = [f"blocks.{layer}.attn.hook_attn_scores" for layer in (1, 2)]
model = three["pre"]
_, before = model.run_with_cache(batch, names_filter=SCORES)
visible = before[SCORES[0]].isfinite()
sparse_rows = before[SCORES[0]].softmax(-1).amax(-1)[:, :, 1:] >= hooks.SPARSE  # row 0: one key


def effect(**options):
    with hooks.NormNoise(sigma=0.2, layers=(1,), seed=1, **options).applied(model):
        _, after = model.run_with_cache(batch, names_filter=SCORES)
    changed = [(after[name] != before[name])[visible] for name in SCORES]
    moved = (after[SCORES[0]].argmax(-1) != before[SCORES[0]].argmax(-1))[:, :, 1:]
    return {
        "scores": changed[0].double().mean().item(),
        "arg max, sparse": moved[sparse_rows].double().mean().item(),
        "arg max, other": moved[~sparse_rows].double().mean().item(),
        "scores of layer 2": changed[1].double().mean().item(),
    }


# %%
options = [
    {"on": "k"},
    {"on": "q"},
    {"on": "v"},
    {"on": "k", "shared": "token"},
    {"on": "k", "rows": "sparse"},
    {"on": "k", "rows": "non-sparse"},
]
table = pd.DataFrame({", ".join(given.values()): effect(**given) for given in options}).T
assert (table.loc[["q", "v"], ["arg max, sparse", "arg max, other"]] == 0).all(axis=None)
assert table.loc["v", "scores"] == 0 < table.loc["v", "scores of layer 2"]
assert table.loc["k, sparse", "arg max, other"] == 0 < table.loc["k, sparse", "arg max, sparse"]
assert table.loc["k, non-sparse", "arg max, sparse"] == 0
table.map("{:.1%}".format)

# %% [markdown]
# Three things to see: noise on q and v moves **no** arg max in its own layer (q's factor is
# common to a row; v is not in the scores); all three change what follows; and `rows=` touches
# only the rows it names. That last one scales the q.k part of those rows' *scores*, since noise
# on a key itself would reach every row.
#
# ## One head alone
#
# `NormNoise` has no option for heads, and does not need one: `noise.factors` gives the factors,
# `site.scale` applies them, whatever the layout of the hook. Set the other heads' factors to one.


# %%
def on_head(noise, model, layer, role, head):
    """Hooks that put `noise` on one head alone."""
    site = hooks.attention_sites(model).layer(layer).vector(role).dot

    def hook_fn(vectors, hook):
        where = {"n_pos": site.n_pos(vectors), "prompts": range(len(vectors))}
        factors = noise.factors(layer=layer, role=role, n_heads=site.n_heads, **where)
        others = torch.arange(site.n_heads) != head
        return site.scale(vectors, factors.masked_fill(others, 1.0))

    return [(site.hook, hook_fn)]


noise = hooks.NormNoise(sigma=0.2, on="k", seed=1)
with model.hooks(fwd_hooks=on_head(noise, model, 1, "k", head=2)):
    _, after = model.run_with_cache(batch, names_filter=SCORES[:1])
with hooks.NormNoise(sigma=0.2, on="k", layers=(1,), seed=1).applied(model):
    _, whole = model.run_with_cache(batch, names_filter=SCORES[:1])
for head in range(4):
    same_as = whole if head == 2 else before
    assert torch.equal(after[SCORES[0]][:, head], same_as[SCORES[0]][:, head])
print("head 2 is as under the library's noise, the others are clean")

# %% [markdown]
# ## A hook that does not land
#
# The most expensive mistake of an experiment with hooks is one that runs without an error and does
# nothing, or something else than its name says. Three cases.
#
# **A shielded site.** Noise at the projection of a QKV-Norm model is removed by the norm behind
# it. The hook fires, the tensor is changed, the model's output is not. The library lets you,
# since it can be what you want to show, but says so:

# %%
shielded = hooks.NormNoise(sigma=0.3, on="k", at="projection")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fwd_hooks = shielded.hooks(three["qkv"])
print("warning:", caught[0].message)

clean = three["qkv"](batch)
noisy = three["qkv"].run_with_hooks(batch, fwd_hooks=fwd_hooks)
behind = hooks.NormNoise(sigma=0.3, on="k").hooks(three["qkv"])
noisy_behind = three["qkv"].run_with_hooks(batch, fwd_hooks=behind)
changes = [(p.softmax(-1) - clean.softmax(-1)).abs().max() for p in (noisy, noisy_behind)]
print(f"largest change of a probability, noise in front of the norm: {changes[0]:.0e}")
print(f"largest change of a probability, noise behind the norm:      {changes[1]:.1f}")
assert changes[0] < 1e-3 < 0.1 < changes[1]

# %% [markdown]
# **A hook of yours in the way.** If another hook changes a pattern, it is no softmax of the
# scores any more, and whatever follows from clean scores would be wrong. The self-check runs
# again while there are hooks on the attention, finds this, and refuses. To have both, open the
# noise's context first: then the model is checked before your hook is on.


# %%
def halve(pattern, hook):
    return pattern * 0.5


mine = [("blocks.1.attn.hook_pattern", halve)]
noise = hooks.NormNoise(sigma=0.1, on="k")
try:
    with model.hooks(fwd_hooks=mine), noise.applied(model):
        model(batch)
except hooks.UnsupportedModelError as error:
    print(f"refused in layer {error.layer}: {error.check}")
else:
    raise AssertionError("wanted a refusal")

with noise.applied(model), model.hooks(fwd_hooks=mine):
    both = model(batch)
assert not torch.equal(both, model.run_with_hooks(batch, fwd_hooks=mine))

# %% [markdown]
# **Another kind of attention.** Say that you try out a new attention whose scores are squared
# (with their sign): $w = s\,|s|$. Its hooks have the usual names and shapes, and a probe that
# believed them would compute with $w' = (1+\kappa_q)(1+\kappa_t)\,w$ and be wrong: the truth has
# the square of those factors. The self-check predicts what noise does, compares, and refuses with
# both numbers.


# %%
class SquaredScores(torch.nn.Module):
    def forward(self, scores, where=None):
        return 4 * scores * scores.abs()


sizes = {"d_model": 64, "n_heads": 4, "d_head": 16, "d_mlp": 128, "n_layers": 2, "n_ctx": 64}
config = QKVNormConfig(placement="pre", d_vocab=25, seed=0, initializer_range=0.2, **sizes)
plain = QKVNormTransformer(config).eval()
plain.layers[1].attn.score_scale = SquaredScores()
strange = to_bridge(plain)
try:
    hooks.collapse_probe(strange, [1, 2, 3, 4, 5, 6], progress=False)
except hooks.UnsupportedModelError as error:
    print(error)
else:
    raise AssertionError("wanted a refusal")

# %% [markdown]
# `attention_sites(model).check` has what was measured on a model that passes. The error pages
# ([index](../docs/errors/index.md)) say for each check what it means and what to do.
#
# # C. A model of your own
#
# `QKVNormConfig` is TransformerLens's configuration with a few fields more. We take what no
# shipped model has: **QK-norm** (a norm on q and k only, as in Qwen 3), a **learned temperature**
# for each head, **rotary** positions, and attention only. It has to learn a task that needs two
# layers working together: in a random string that is repeated, predict the next token in the
# second half. How long the string is changes from batch to batch, so positions alone do not help:
# a head must find the earlier occurrence of the current token and look at what came *after* it,
# an **induction head**, and that needs a head in the layer before that tells each token its
# predecessor.

# %%
VOCAB, BOS = 24, 0
config = QKVNormConfig(
    placement="qkv", norm=NormSpec(on="qk"), score_scale="learned",
    positional_embedding_type="rotary", rotary_base=100, attn_only=True,
    n_layers=2, n_heads=4, d_model=64, d_head=16, n_ctx=64, d_vocab=VOCAB + 1,
    initializer_range=0.05, seed=0,
)  # fmt: skip


def repeated(n, length, random):
    """[BOS, string, string], no token twice in a string."""
    string = torch.rand(n, VOCAB, generator=random).argsort(1)[:, :length] + 1
    return torch.cat([torch.full((n, 1), BOS), string, string], 1)


print(repeated(1, 6, torch.Generator().manual_seed(0)).tolist())

# %% [markdown]
# The loss counts where the answer can be known: from the second half's second token on.
# `QKVNormTransformer` is a plain `torch.nn.Module` that gives logits, so the loop is yours.


# %%
def answers(logits, tokens):
    """Logits [n, d_vocab] and targets [n] of the second half, its first token left out."""
    length = (tokens.shape[1] - 1) // 2
    return logits[:, length + 1 : -1].flatten(0, 1), tokens[:, length + 2 :].flatten()


def train(config, steps=250, batch=64, lr=3e-3, seed=0):
    random, module = torch.Generator().manual_seed(seed), QKVNormTransformer(config)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.98))
    warm, cool = lambda t: (t + 1) / 20, lambda t: (steps - t) / 50
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1, warm(t), cool(t)))
    losses = []
    for _ in range(steps):
        length = int(torch.randint(6, 15, (1,), generator=random))
        tokens = repeated(batch, length, random)
        loss = F.cross_entropy(*answers(module(tokens), tokens))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return module.eval(), losses


# %%
module, losses = train(config)
print("loss at step 0, 50, .., 249:", [round(x, 3) for x in [*losses[::50], losses[-1]]])
assert losses[-1] < 0.1
one_layer, one_layer_losses = train(QKVNormConfig.from_json({**config.to_json(), "n_layers": 1}))
print(f"with one layer: {one_layer_losses[-1]:.2f}")
assert one_layer_losses[-1] > 1

# %% [markdown]
# Two layers learn it in 250 steps, within seconds; one layer does not, as the theory of induction
# heads has it. (Some seeds may need more steps: exercise 3.)
#
# `to_bridge` gives it hooks, and we can see what the heads do. The *induction score* of a head is
# its mean attention from the second half to the token behind the earlier occurrence; the
# *previous-token score* that to the token before.

# %%
toy = to_bridge(module)
random = torch.Generator().manual_seed(123)
LENGTH = 12
held_out = repeated(128, LENGTH, random)
_, cache = toy.run_with_cache(held_out)

second = torch.arange(LENGTH + 1, 2 * LENGTH)
every = torch.arange(1, 2 * LENGTH + 1)
scores = []
for layer in (0, 1):
    pattern = cache[f"blocks.{layer}.attn.hook_pattern"].mean(0)  # [head, query, key]
    induction = pattern[:, second, second - LENGTH + 1].mean(-1)
    previous = pattern[:, every, every - 1].mean(-1)
    scores += [(f"L{layer}H{h}", float(previous[h]), float(induction[h])) for h in range(4)]
table = pd.DataFrame(scores, columns=["head", "previous token", "induction"]).set_index("head")
assert (table["induction"][4:] > 0.5).all()
table.round(2)

# %% [markdown]
# Probe it like any other model. The report says that noise at the projection of q and k would be
# removed by the norm, and that of v would not: QK-norm is half a shield.

# %%
report = hooks.collapse_probe(toy, held_out[:64], progress=False)
print(report)
shields = hooks.attention_sites(toy).to_frame().query("layer == 0").set_index("vector")["shield"]
assert shields.to_dict() == {"q": "removed", "k": "removed", "v": "none"}

# %% [markdown]
# Keep it and load it again: `save_pretrained` writes configuration and weights, `load_model`
# takes a shipped model's name, a directory of ours or of Hugging Face's, or a hub id.

# %%
with tempfile.TemporaryDirectory() as folder:
    save_pretrained(toy, folder)
    print(sorted(os.listdir(folder)))
    again = load_model(folder)
assert torch.equal(again(held_out), toy(held_out))
assert again.cfg.norm == NormSpec(on="qk")

# %% [markdown]
# # D. Noise in your own experiment
#
# ## Around `generate`
#
# Inside `applied` each token keeps its factor from one step to the next, with or without a cache.
# So a noisy model is *one* model, whose keys are off by fixed amounts, and it can be asked to
# add:

# %%
model = three["pre"]
table = {}
for sigma in (0.0, 0.1, 0.2, 0.3):
    for draw in range(4):
        with hooks.NormNoise(sigma=sigma, on="k", draw=draw).applied(model):
            text = model.generate("[47+36=", max_new_tokens=4, do_sample=False, verbose=False)
        table.setdefault(f"{sigma:.0%}", {})[f"draw {draw}"] = text.partition("=")[2]
assert set(table["0%"].values()) == {"83"}
assert len(set(table["30%"].values())) > 1
pd.DataFrame(table).T

# %%
with hooks.NormNoise(sigma=0.3, on="k", draw=1).applied(model):
    options = {"max_new_tokens": 4, "do_sample": False, "verbose": False}
    cached = model.generate("[47+36=", **options)
    uncached = model.generate("[47+36=", use_past_kv_cache=False, **options)
assert cached == uncached

# %% [markdown]
# ## Batches and padding: same seed, same draw
#
# A factor is a function of seed, draw, layer, vector, prompt, position and head, and of nothing
# else. Positions count from a prompt's first real token, so a padded batch has to say where that
# is; a prompt run alone has to say which prompt of the corpus it is (`first_prompt`).

# %%
short, long = repeated(1, 6, random), repeated(1, 10, random)
padded = torch.full((2, long.shape[1]), BOS)
padded[0, -short.shape[1] :], padded[1] = short[0], long[0]
mask = torch.ones_like(padded)
mask[0, : -short.shape[1]] = 0

noise = hooks.NormNoise(sigma=0.3, on="qkv", seed=5)
together = toy.run_with_hooks(
    padded, fwd_hooks=noise.hooks(toy, attention_mask=mask), attention_mask=mask
)
for i, alone in enumerate((short, long)):
    fwd_hooks = noise.hooks(toy, first_prompt=i)
    logits = toy.run_with_hooks(alone, fwd_hooks=fwd_hooks)[0]
    torch.testing.assert_close(together[i, -alone.shape[1] :], logits, rtol=1e-4, atol=1e-4)
print("padded together or each alone: the same logits under the same noise")

# %% [markdown]
# ## A patching loop with noise in place of patches
#
# Activation patching runs a model once for each place and asks where the output changes. With
# norm noise as the intervention the same loop says **where lengths matter**. Here every vector of
# every head of our toy, one at a time, at $\sigma = 40\%$, with the loss of the second half as
# the metric and three draws for each cell. `on_head` is the hook from part B.


# %%
def loss_and_accuracy(fwd_hooks=(), tokens=held_out):
    with torch.no_grad():
        logits, targets = answers(toy.run_with_hooks(tokens, fwd_hooks=list(fwd_hooks)), tokens)
    right = (logits.argmax(-1) == targets).double().mean()
    return float(F.cross_entropy(logits, targets)), float(right)


def rise(layer, role, head, draws=3):
    noisy = [
        loss_and_accuracy(
            on_head(hooks.NormNoise(sigma=0.4, on=role, draw=d), toy, layer, role, head)
        )[0]
        for d in range(draws)
    ]
    return sum(noisy) / draws - clean_loss


clean_loss, clean_accuracy = loss_and_accuracy()
print(f"clean: loss {clean_loss:.4f}, accuracy {clean_accuracy:.1%}")
heads = [(layer, head) for layer in (0, 1) for head in range(4)]
rises = torch.tensor([[rise(layer, role, head) for layer, head in heads] for role in "qkv"])

# %%
fig, ax = plt.subplots(figsize=(6.4, 2.4), layout="constrained")
image = ax.imshow(rises.numpy(), cmap="Blues", vmin=0, aspect="auto")
ax.set_xticks(range(8), [f"L{layer}H{head}" for layer, head in heads])
ax.set_yticks(range(3), ["q", "k", "v"])
for (i, j), value in zip(
    ((i, j) for i in range(3) for j in range(8)), rises.flatten(), strict=True
):
    dark = value > 0.6 * rises.max()
    shown = f"{value:.2f}".replace("-0.00", "0.00")
    ax.text(j, i, shown, ha="center", va="center", color="white" if dark else "black")
fig.colorbar(image, ax=ax, label="rise of the loss (nats)")
plt.show()

# %%
most = int(rises.argmax())
print("most:", "qkv"[most // 8], "of L{}H{}".format(*heads[most % 8]))
assert (most // 8, heads[most % 8]) == (1, (0, 3))
assert rises[1, 4:].min() > 0.02  # the keys of every induction head
assert rises[[0, 2]].abs().max() < 0.05  # queries and values

# %% [markdown]
# Of the lengths, those of keys matter. The lengths of queries set a temperature for a row and those
# of values scale what is written; this model bears both. Among the keys one head stands out, L0H3,
# the best previous-token head. The four induction heads score much alike, and noise on one of
# them costs little: it seems that they share their job, and that L0H3 has nobody to share with.
#
# ## A small complete experiment
#
# **Question.** Do the induction heads need the *lengths* of their keys, so that noise on these
# destroys their function? Or would any change of that size do?
#
# **Intervention.** Noise of RMS $\sigma$ on the norms of all keys of one layer. **Controls** of
# exactly the same size, key by key, $|\kappa|\,|k|$:
#
# - *direction*: the key moves at right angles to itself, in a random direction of its own. To
#   first order its length stays;
# - *placebo*: TransformerLens's `NormMatchedPlacebo` moves it inside a random subspace, here a
#   line, the same for all keys. Its sign and direction still depend on the key: a part of the
#   move goes along the key itself. So we expect it between the two.
#
# **Metric.** Accuracy on the second half. **Error bars.** Standard error over draws: noise on a
# key is shared by all rows that look at it, so rows and tokens are no independent samples.


# %%
def displaced(kind, layer, sigma, draw):
    """Hooks that move all keys of a layer by |kappa| |k|: along k, across k, or along one line."""
    site = hooks.attention_sites(toy).layer(layer).k.dot
    noise = hooks.NormNoise(sigma=sigma, on="k", draw=draw)

    def hook_fn(k, hook):
        k = site.by_position(k)  # here the hook's own layout too, [batch, pos, head, d_head]
        where = {"prompts": range(len(k)), "n_pos": k.shape[1], "n_heads": site.n_heads}
        noisy = k * noise.factors(layer=layer, role="k", **where)[..., None]
        if kind == "norm":
            return noisy
        if kind == "placebo":
            whole = SubspaceInterchange(torch.eye(16))  # its displacement is the noise itself
            return NormMatchedPlacebo(whole, random_basis(16, 1, seed=draw))(k, noisy)
        across = torch.randn(k.shape, generator=torch.Generator().manual_seed(draw))
        across = across - (across * k).sum(-1, keepdim=True) * k / k.square().sum(-1, keepdim=True)
        return k + F.normalize(across, dim=-1) * (noisy - k).norm(dim=-1, keepdim=True)

    return [(site.hook, hook_fn)]


# %% [markdown]
# A control has to be controlled. All three must move a key by the same distance; how much of the
# move goes along the key is what should differ. (`sites.layer(1).k.dot` is behind the norm and
# the rotation: a hook in front of the norm would not have landed, as part B showed.)

# %%
site = hooks.attention_sites(toy).layer(1)
K_HOOK, Q_HOOK = site.k.dot.hook, site.q.dot.hook
_, clean = toy.run_with_cache(held_out, names_filter=[K_HOOK, Q_HOOK])
attended = second - LENGTH + 1
w = (clean[Q_HOOK][:, second] * clean[K_HOOK][:, attended]).sum(-1)

table = {}
for kind in ("norm", "placebo", "direction"):
    with toy.hooks(fwd_hooks=displaced(kind, 1, 0.3, draw=0)):
        _, noisy = toy.run_with_cache(held_out, names_filter=K_HOOK)
    k, move = clean[K_HOOK], noisy[K_HOOK] - clean[K_HOOK]
    change = (clean[Q_HOOK][:, second] * move[:, attended]).sum(-1)
    table[kind] = {
        "size / |k|": float((move.square().sum() / k.square().sum()).sqrt()),
        "share along k": float(F.cosine_similarity(move, k, dim=-1).square().mean()),
        "change of the attended score": float((change.square().sum() / w.square().sum()).sqrt()),
    }
table = pd.DataFrame(table).T
assert (table["size / |k|"] - table["size / |k|"].iloc[0]).abs().max() < 1e-3
assert table.iloc[:, 1].is_monotonic_decreasing
assert table.iloc[:, 2].is_monotonic_decreasing
table.round(3)

# %% [markdown]
# Equal sizes; the share of the squared move that goes along the key falls from one to zero, and
# with it what happens to the score. A head that attends sharply has a query that points along the
# key, and in 16 dimensions a random direction is nearly at right angles to both. Now the sweep.

# %%
SIGMAS, DRAWS = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5], 6
records = [
    {"layer": layer, "kind": kind, "sigma": sigma, "draw": draw, "accuracy": accuracy}
    for layer in (0, 1)
    for kind in ("norm", "placebo", "direction")
    for sigma in SIGMAS
    for draw in range(DRAWS)
    for accuracy in [loss_and_accuracy(displaced(kind, layer, sigma, draw))[1]]
]
results = pd.DataFrame(records).groupby(["layer", "kind", "sigma"])["accuracy"].agg(["mean", "sem"])


# %%
LOOKS = {
    "norm": (ORANGE, "o", "its length"),
    "placebo": (GREY, "s", "placebo: along one line"),
    "direction": (BLUE, "^", "direction: at right angles"),
}
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), sharey=True, layout="constrained")
for ax, layer, job in zip(axes, (0, 1), ("previous-token", "induction"), strict=True):
    for kind, (colour, marker, label) in LOOKS.items():
        curve = 100 * results.loc[(layer, kind)]
        look = {"color": colour, "marker": marker, "label": label, "capsize": 3}
        ax.errorbar([100 * s for s in SIGMAS], curve["mean"], 2 * curve["sem"], **look)
    ax.set_xlabel("size of the move (% of the key's length)")
    ax.set_title(f"keys of layer {layer} ({job} heads)", fontsize=10)
axes[0].set_ylabel("accuracy, second half (%)")
axes[0].legend(loc="lower left")
plt.show()

# %%
table = results.reset_index().pivot_table("mean", ["layer", "kind"], "sigma")
print(f"largest standard error: {results['sem'].max():.1%}")
assert (table[0.10] > 0.99).all()
for layer in (0, 1):
    norm, placebo, direction = (table.loc[(layer, kind), 0.5] for kind in LOOKS)
    assert norm < placebo < direction
    assert 0.7 < norm < 0.85
    assert placebo > 0.95
    assert direction > 0.98
table.map("{:.1%}".format)

# %% [markdown]
# **Answer.** Up to 10% nothing happens in either layer. At 50%, noise on the lengths of keys
# costs a fifth to a quarter of the answers; moves of the same size at right angles to the key
# cost 2% at the most, and the placebo lies between, nearer to those. So it is not the size of a
# change that hurts, but that it goes along the key, where the query looks. "Destroy" would be too
# much said: three answers in four are right even then, where guessing would get one in 24.
#
# **What it does not show.** One model, one seed, one task. The noise is independent from key to
# key, and stands *behind* a norm that would take such noise away if it came from the residual
# stream: it is a model of errors that arise there, of a quantised cache say, and not of
# interference ([02](02_subspaces.ipynb)). And the accuracy of 128 strings is that of one sample
# of strings; the bars are twice the standard error over draws of noise alone.
#
# ## What you have learnt
#
# - A law is five short formulas. Test that they fit together, then against brute force, and name
#   each of its jumps and corners among its `knots`.
# - `attention_sites` says where q, k and v are and what shields them; `site.by_position`,
#   `site.scale` and `noise.factors` are what your own hooks need.
# - A hook that fires need not land. The library predicts, compares and refuses; your own hooks
#   deserve the same: measure what they did, and give them a control of the same size.
# - Draws and prompts are the samples of an error bar, rows are not.
#
# ## Exercises
#
# 1. Write a skewed law: vectors mostly get a little longer, and sometimes much shorter, with a mean
#    of 1. Which rows collapse earlier, those with many near competitors or those with one?
# 2. Put your law into `hooks.sweep` (`law="outliers"`) on `addition-pre`, beside the uniform one.
# 3. Train the toy with `seed=1`, `2`, `3` in the configuration and in `train`. Do all learn the
#    task in 250 steps? Are the same kinds of heads fragile?
# 4. Repeat the experiment with `placement="pre"` and `"none"`, and with a placebo in a subspace
#    of 4 or 8 dimensions. Predict the order of the curves first.
#
# ## Where to go next
#
# - [2 · Semantic subspaces](02_subspaces.ipynb) for why lengths matter at all; [1 · The collapse
#   probe](01_collapse_probe.ipynb) and [4 · Reproducing the paper](04_reproduction.ipynb) for what
#   is ready-made.
# - How-to pages: [a law of your own](../docs/how-to/custom-law.md), [noise in your own
#   experiment](../docs/how-to/noise-in-your-experiment.md), [train a
#   placement](../docs/how-to/train-a-placement.md); concepts: [the
#   self-check](../docs/concepts/self-check.md), [shielded sites](../docs/concepts/shields.md).
