# %% [markdown]
# # 1 · The collapse probe in five minutes
#
# An attention head that puts 95% of its weight on one token works like a switch. How wrong may
# the *lengths* of its vectors be before it points at another token? You will learn
#
# - what circuit collapse is, on one row of attention, and how the probe finds it in a whole
#   model;
# - to read its report: rates, heads, rows, and what the numbers do not say;
# - to check a row by hand, and to check the prediction by injecting the noise for real.
#
# **Time**: half a minute to run. **Needs**: `pip install 'qkvnorm-lens[plots]'`, nothing to
# download, no GPU. You should know PyTorch and what an attention head is.

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
import json
import math
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LogNorm

import hooks
from qkvnorm_lens import load_model, plots
from qkvnorm_lens.text import passage, sums, windows

MODEL = "addition-pre"  # or "gpt2"
OURS = MODEL == "addition-pre"  # some checks below are about this model

# %% [markdown]
# ## One row of attention
#
# A head compares one query $q$ with every key $k_t$. The scores $s_t = q \cdot k_t / \sqrt{d}$ go
# through a softmax and become a row of weights. Where one weight is at least 0.95 the row is
# called **sparse**: the head has chosen a token.
#
# Now let every vector have a slightly wrong *length*: $k_t \to (1 + \kappa_t)\,k_t$ and
# $q \to (1 + \kappa_q)\,q$. A score is a product of lengths and a cosine, so it becomes
#
# $$s'_t = (1 + \kappa_q)(1 + \kappa_t)\,s_t ,$$
#
# exactly. The factor of the query is the same for all tokens: it makes the row sharper or flatter
# and never changes its winner. The factors of the keys are not the same, and a runner-up can win.
# Below, the attended key becomes 20% shorter and its rival 25% longer.

# %%
scores = torch.tensor([10.0, 6.5, 3.0, -1.0])
on_keys = torch.tensor([0.80, 1.25, 1.00, 1.00])
rows = {"as it is": scores, "query x 1.5": 1.5 * scores, "keys x factors": on_keys * scores}

figure, axes = plt.subplots(1, 3, figsize=(8, 2.4), sharey=True, layout="constrained")
for ax, (name, row) in zip(axes, rows.items(), strict=True):
    weights = row.softmax(0).numpy()
    colours = ["#D55E00" if t == weights.argmax() else "#0072B2" for t in range(4)]
    bars = ax.bar(range(4), weights, color=colours)
    ax.bar_label(bars, [f"s = {s:.3g}" for s in row], fontsize=8)
    ax.set(title=name, xlabel="token", xticks=range(4), ylim=(0, 1.12))
axes[0].set_ylabel("attention weight")
plt.show()

winners = [int(row.argmax()) for row in rows.values()]
assert winners == [0, 0, 1]
assert scores.softmax(0)[0] >= 0.95

# %% [markdown]
# The winner (orange) has changed: the **arg max** of a sparse row **has moved**. Menary, Kaski
# and Freitas ([arXiv 2406.17837](https://arxiv.org/abs/2406.17837)) call this *circuit collapse*:
# the head now reads another token. How large must the noise be?
#
# We write $\sigma$ for its RMS. The paper's noise is uniform, $\kappa \in [-a, a]$ with
# $a = \sqrt{3}\,\sigma$. So $\sigma = 0.05$ means that lengths are off by 5% RMS, and by 8.7% at
# the most.

# %% [markdown]
# ## A model, and something to read
#
# `addition-pre` comes with the package: a small Pre-Norm transformer (4 layers of 4 heads) that
# adds and subtracts integers, one token per character. A prompt such as `[15+N8=7` begins with
# `[`, and `N` marks a negative number. Nothing is downloaded.
#
# To read a language model, set `MODEL = "gpt2"` above: it comes from the Hugging Face hub and
# reads the beginning of *Pride and Prejudice*. Every later cell works for both.

# %%
model = load_model(MODEL)
if OURS:
    prompts = sums("small-train", 128, seed=0)
else:
    prompts = windows(model, passage(), length=64, limit=4)

print(f"{MODEL}: {model.cfg.n_layers} layers of {model.cfg.n_heads} heads")
print("reads", prompts.source)

# %% [markdown]
# ## The probe
#
# One call. It runs the model once, without any noise, and keeps what it needs of each layer's
# scores. As $s'_t$ follows from $s_t$ exactly, so does the probability that a row's arg max
# moves: it is computed and not sampled.

# %%
report = hooks.collapse_probe(model, prompts.ids, progress=False)
print(report)

# %% [markdown]
# How to read these sentences:
#
# 1. **What was done.** Uniform noise on the lengths of q and k. *One layer at a time*: each layer
#    gets its clean inputs, so every number is about that layer alone.
# 2. **How many rows are sparse.** Only these are followed. *Sinks* are sparse rows that look at
#    the first token of the prompt. In a language model that may be nearly all of them.
# 3. **1% of sparse rows collapse at sigma = ...** The headline. More is more robust.
# 4. **Most fragile head.** The head whose rows collapse first.
# 5. **In the centred gauge.** A control. Softmax ignores a constant added to all scores of a row,
#    but the collapse rate does not ([why](../docs/concepts/score-level.md)). So the report gives
#    the *score level*, the mean score of the attended tokens, and a second rate, with each row's
#    mean score taken away first. To compare two models, use that one.
# 6. **What noise at the projection would do.** Here it arrives unchanged. In a model with QK-norm
#    it would be removed ([shielded sites](../docs/concepts/shields.md)).
#
# ## The same as data
#
# `to_frame()` has a row for each sigma, layer and head; `by="model"` pools them.

# %%
frame = report.to_frame(by="model").set_index("sigma")
frame.loc[[0.04, 0.1, 0.2, 0.3, 0.4, 0.5], ["loose", "strict", "loose_content", "loose_centred"]]

# %%
assert frame["loose"].is_monotonic_increasing
assert (frame["strict"] <= frame["loose"] + 1e-9).all()
if OURS:
    assert frame.loc[0.04, "loose"] < 1e-6
    assert 0.02 < frame.loc[0.4, "loose"] < 0.10
    assert frame.loc[0.4, "strict"] < frame.loc[0.4, "loose"] / 4

# %% [markdown]
# - **loose**: the share of sparse rows whose arg max moves.
# - **strict**: ... and whose new maximum is again at least 0.95. The head has not just lost its
#   token, it has firmly chosen a wrong one. This happens less often. It is an estimate between two
#   computed bounds, `strict_low` and `strict_high`.
# - **loose_content**: sinks left out.
# - **loose_centred**: the control from above.
#
# In this model nothing happens up to 4%. At 40% some rows have moved, but less than a quarter of
# them onto a new firm choice: most rows that lose their token end up undecided.
#
# The noise at which a given share of the rows has moved is `sigma_at`. It is solved on the exact
# curve and does not depend on the grid of sigmas.

# %%
print(f"1% of all sparse rows:   sigma = {report.sigma_at(0.01):.1%}")
print(f"the same, without sinks: sigma = {report.sigma_at(0.01, content=True):.1%}")
by_head = report.sigma_at(0.01, by="head")
(100 * by_head).round(1)

# %% [markdown]
# Heads differ a lot. `NaN` means that a head has no sparse rows: it can't collapse, because there
# is no choice to lose. That is *not* robustness. The figure of the curve and the map of the heads
# show the same numbers:

# %%
plots.collapse_curve(report)

# %%
plots.head_map(report)

# %% [markdown]
# In the map dark heads go first, pale cells have no sparse rows. A number in brackets stands for
# fewer than 20 rows; don't build on those.

# %%
many = report.rows.sum((-2, -1)) >= 20  # layers by heads
first = by_head.where(many).stack().idxmin()
print(f"of the heads with 20 sparse rows or more L{first[0]}H{first[1]} goes first")
if OURS:
    assert first == (2, 3)
    assert 0.10 < by_head.loc[first] < 0.18
    assert by_head.loc[1, [0, 1]].isna().all()

# %% [markdown]
# ## Which tokens
#
# `fragile` lists single rows: the token that asks, the one it attends to, the one it would jump
# to, and the least $\sigma$ of uniform noise with which that can happen. `content=True` leaves the
# sinks out.

# %%
columns = ["label", "prompt", "query_token", "key_token", "jump_token", "sigma", "sink"]
fragile = report.fragile(10)
assert not OURS or fragile["sigma"].between(0.07, 0.10).all()
fragile[columns].round(4)

# %% [markdown]
# Each of these rows gives 95% or more to one token, and noise of 7 to 10% RMS can already undo
# that. In the first one the head stands on `=` and looks at `=` itself; its nearest rival is `[`,
# the first token.
#
# For the very first rows the report also keeps the attention itself: before, and under one of 16
# draws of the noise, just strong enough to move the row. `plots.attention` shows it as
# circuitsvis heads to open and hover. Run the notebook to see it; a stored notebook can't keep
# it.

# %%
plots.attention(report)

# %% [markdown]
# The static twin. A ring marks the arg max, first without noise and then with noise of the given
# RMS. That $\sigma$ is larger than the one in the table: there the worst case decides, here a
# draw. And a draw may well favour another token than the nearest rival.

# %%
plots.attention_rows(report)

# %% [markdown]
# `plots.fragile_text` colours whole prompts: the darker a token, the less noise can move one of
# its rows (in any head). Also to be seen when run; below it the same numbers as a still figure.
# White: no sparse row stands there, or none that such noise can move.

# %%
chosen = list(dict.fromkeys(report.fragile(200)["prompt"]))[:4]
plots.fragile_text(report, chosen)

# %%
table = report.table  # arrays, one entry for each row that can move
height = 0.75 if OURS else 1.3
figure, axes = plt.subplots(len(chosen), 1, figsize=(8, height * len(chosen)), layout="constrained")
for ax, p in zip(axes, chosen, strict=True):
    least = np.full(len(report.tokens[p]), np.inf)
    mine = table.prompt == p
    np.minimum.at(least, table.query[mine], table.half_width[mine] / math.sqrt(3))
    image = ax.imshow(100 * least[None], cmap="Oranges_r", norm=LogNorm(2, 58), aspect="auto")
    size, turn = (10, 0) if OURS else (6, 90)
    ax.set_xticks(range(len(least)), report.tokens[p], fontsize=size, rotation=turn)
    ax.set(yticks=[], ylabel=f"prompt {p}")
    ax.yaxis.label.set(rotation=0, ha="right", va="center")
bar = figure.colorbar(image, ax=axes, ticks=[2, 5, 10, 20, 50], format="%g", label="least σ (%)")
bar.minorticks_off()
plt.show()
# %% [markdown]
# ## A certificate, by hand
#
# Behind the column `sigma` above stands a number that needs no sampling and no noise law. Let a
# row attend to $*$ with score $s_*$ and let $t$ be a rival. With all factors in $[1 - a, 1 + a]$,
# $a \le 1$, the worst case is $(1 - a)\,s_*$ against $(1 + a)\,s_t$ (both scores positive), so the
# row can move only if
#
# $$a > a_t = \frac{s_* - s_t}{|s_*| + |s_t|} .$$
#
# (Other signs give the same formula; where $a_t = 1$, never.) The row's *critical half-width* is
# the smallest $a_t$. Below it **no** factors of that range can move the row, whatever their
# distribution; for uniform noise that is $\sigma = a / \sqrt 3$. Let us take the most fragile row
# of all and compute it from the model's own scores.

# %%
row = report.fragile(1).iloc[0]
sites = hooks.attention_sites(model).layer(row["layer"])
head, query = row["head"], row["query_pos"]
ids = torch.tensor([prompts.ids[row["prompt"]][: query + 1]])  # later tokens are not visible

_, cache = model.run_with_cache(ids, names_filter=sites.scores)
s = cache[sites.scores][0, head, query].double()
star = int(s.argmax())
others = torch.cat([s[:star], s[star + 1 :]])

a_t = (s[star] - others) / (s[star].abs() + others.abs())
from_library = hooks.critical_half_width(s[star][None], others[None])[0]
a = float(a_t.min())
print(f"{row['label']} attends to {row['key_token']!r}: s* = {s[star]:.3f}")
print(f"critical half-width {a:.4f}, so sigma = {a / math.sqrt(3):.2%}")

# %%
assert star == row["key_pos"]
torch.testing.assert_close(a_t[a_t < 1], from_library[a_t < 1])
assert from_library[a_t >= 1].isinf().all()
assert abs(a - row["half_width"]) < 1e-5

# %% [markdown]
# Now with real noise in the model. `NormNoise` gives TransformerLens hooks; `applied` puts them
# on for a while. Each prompt of a batch has factors of its own, so a batch of copies of one
# prompt is a batch of draws. The factors can be asked for, and with them every outcome can be
# predicted from the clean scores: the winner is the largest $f_t s_t$ (the query's factor
# cancels).

# %%
DRAWS = 600 if OURS else 60
copies = ids.repeat(DRAWS, 1)


def seen_and_predicted(sigma):
    """The row's arg max in the noised model, as predicted from clean scores; keys' factors."""
    noise = hooks.NormNoise(sigma=sigma, on="qk", layers=(sites.layer,), seed=1)
    with noise.applied(model):
        _, cache = model.run_with_cache(copies, names_filter=sites.pattern)
    size = {"n_heads": sites.n_kv_heads, "n_pos": ids.shape[1]}
    f = noise.factors(layer=sites.layer, role="k", prompts=range(DRAWS), **size)
    f = f[:, :, sites.kv_head_of[head]].double()
    return cache[sites.pattern][:, head, query].argmax(-1), (f * s).argmax(-1), f


# %% [markdown]
# First just below the certificate, then at twice its size.

# %%
below, _, _ = seen_and_predicted(0.99 * a / math.sqrt(3))
sigma = min(2 * a / math.sqrt(3), 0.55)
seen, predicted, factors = seen_and_predicted(sigma)
moved = seen != star

law = hooks.LAWS["uniform"]
exact = hooks.collapse_probability(s[star][None], others[None], torch.tensor([sigma]), law)
print(f"sigma = {0.99 * a / math.sqrt(3):.2%}: moved in {int((below != star).sum())} of {DRAWS}")
print(f"sigma = {sigma:.2%}: moved in {int(moved.sum())} of {DRAWS}")
print(f"predicted one by one: {int((predicted == seen).sum())} of {DRAWS} right")
print(f"share moved {moved.double().mean():.3f}, exact probability {float(exact):.3f}")

# %%
p = float(exact)
assert (below == star).all()  # the certificate holds
assert torch.equal(seen, predicted)  # moved exactly where predicted, and to that token
assert 0 < p < 1
assert abs(float(moved.double().mean()) - p) < 5 * math.sqrt(p * (1 - p) / DRAWS)

# %% [markdown]
# Drawn: each mark is a draw of the noise, by the factors of the attended key and of its nearest
# rival. Above the line $f_t s_t = f_* s_*$ the rival beats the attended token. The dashed square is
# the certificate: it touches the line with one corner, so no draw inside it can move the row to
# this rival. (Crosses went to a third token, whose factor is not drawn here. It was out
# of range where a cross lies inside the square: the certificate asks for *all* factors.)

# %%
rival = int(row["jump_pos"])
x, y = factors[:, star], factors[:, rival]
figure, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
for mask, colour, marker, name in (
    (~moved, "#999999", ".", "stays"),
    (moved & (seen == rival), "#D55E00", "o", "moves to the rival"),
    (moved & (seen != rival), "#0072B2", "x", "moves to another token"),
):
    ax.scatter(x[mask], y[mask], s=18, color=colour, marker=marker, label=name)
line = torch.linspace(float(x.min()), float(x.max()), 2)
ax.plot(line, line * s[star] / s[rival], color="black", label=r"$f_t s_t = f_* s_*$")
ax.add_patch(plt.Rectangle((1 - a, 1 - a), 2 * a, 2 * a, fill=False, linestyle="--"))
ax.set(xlabel="factor of the attended key", ylabel="factor of its nearest rival")
ax.set_ylim(float(y.min()) - 0.03, float(y.max()) + 0.03)
ax.set_aspect("equal")
ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8)
plt.show()

# %% [markdown]
# ## On the command line, and as one HTML page
#
# In a terminal the same probe is
#
# ```sh
# qkvnorm-lens probe --out runs/first
# qkvnorm-lens probe gpt2 --file story.txt --out runs/gpt2
# ```
#
# `--out` writes the report as data, figures, and `report.html`: curve, head map, the first rows
# with their attention, sortable tables and caveats in one file that opens offline. `--json`
# prints numbers for a program. The next cell calls the same command from Python and checks that
# it agrees.

# %%
from IPython.utils.capture import capture_output

from qkvnorm_lens.cli import main

options = [] if OURS else ["--length", "64", "--prompts", "4"]
with tempfile.TemporaryDirectory() as folder:
    with capture_output() as captured:
        code = main(["probe", MODEL, "--json", "--out", folder, *options])
    for path in sorted(Path(folder).iterdir()):
        print(f"{path.name:20} {path.stat().st_size / 1e3:8.0f} kB")
answer = json.loads(captured.stdout)
assert code == 0
assert answer["rows"]["sinks"] <= answer["rows"]["sparse"] == report.n_sparse
assert abs(answer["sigma_at"]["model"] - report.sigma_at(0.01)) < 1e-4

# %% [markdown]
# In Python `qkvnorm_lens.page.write_html(report, path)` writes the page of a report, and
# `report.save(path)` / `hooks.CollapseReport.load(path)` keep it as one file.

# %% [markdown]
# ## What you have learnt
#
# - A sparse row collapses when unequal errors on the lengths of its *keys* let a rival win. An
#   error of the query's length alone never does that (where nothing is added to the scores).
# - The rate follows exactly from clean scores. The certificate needs not even a noise law.
# - Read *loose* beside *strict*, with and without sinks, and the number of rows beside each rate.
#
# What the numbers do not say: the noise is imposed and independent from vector to vector. They
# tell what a circuit *tolerates*, not what a model *suffers*. And one layer is noised at a time;
# what noise in all layers does to the output is a [sweep](../docs/how-to/sweeps.md).
#
# ## Exercises
#
# 1. Noise the query alone: `hooks.collapse_probe(model, prompts.ids, on="q", draws=4)`. What must
#    `loose` be, and why? Then read `addition-none` (No-Norm): more or less robust, and in which
#    gauge?
# 2. Probe `addition-qkv`. How many rows are sparse? What does the last sentence of its report
#    say?
# 3. Move the threshold: `sparse=0.8`. Does the first head change? Why do rates of two thresholds
#    not compare?
# 4. `seen_and_predicted` uses uniform noise. Give `NormNoise` `law="gaussian"` at the same sigma
#    just below the certificate: does the row still never move? (What is the half-width of a
#    Gaussian?)
#
# ## Where to go next
#
# - [Semantic subspaces and the place of the norm](02_subspaces.ipynb): why a length matters at
#   all.
# - [A language model under the probe](05_language_model.ipynb): sinks, grouped keys, quantised
#   caches.
# - [Concepts](../docs/concepts/index.md), first [circuit collapse](../docs/concepts/collapse.md),
#   and [probe your own model](../docs/how-to/probe-your-model.md).
