"""Rank dynamics: the proved bounds are never exceeded, the equilibria are equilibria."""

from __future__ import annotations

import math
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from scipy import sparse
from torch import Tensor

from qkvnorm_lens.theory import dynamics as dyn, equilibria as eq
from tests.support.watching import shape_checks_off

seeds = st.integers(0, 10**6)
one = torch.eye(4, dtype=torch.float64)


def random_mask(n: int, seed: int, share: float) -> Tensor:
    """Each token attends to itself, and to others at random."""
    mask = torch.rand(n, n, generator=torch.Generator().manual_seed(seed)) < share
    return mask | torch.eye(n, dtype=torch.bool)


def layers_of(mask: Tensor, seed: int, layers: int = 12, **options: Any) -> dyn.Dynamics:
    d = 5
    values = options.pop("values", dyn.orthogonal(d, seed + 3, layers))
    weights = [2 * dyn.gaussian(d, seed + i, layers) for i in (1, 2)]
    return dyn.Dynamics(mask, *weights, values, **options)


# -- graphs -----------------------------------------------------------------------------------


@given(n=st.integers(1, 9), seed=seeds, share=st.floats(0, 0.6))
def test_graphs_are_networkxs(n: int, seed: int, share: float) -> None:
    mask = random_mask(n, seed, share)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from((j, i) for i in range(n) for j in range(n) if mask[i, j])
    reach = dict(nx.all_pairs_shortest_path_length(graph))
    wanted = [max(r.values()) if len(r) == n else math.inf for _, r in sorted(reach.items())]
    found = dyn.MaskGraph(mask)
    assert list(found.eccentricities) == wanted
    assert found.radius == min(wanted)
    assert found.centres == tuple(i for i, x in enumerate(wanted) if x < math.inf)
    assert found.strongly_connected == nx.is_strongly_connected(graph)
    assert found.quasi_strongly_connected == bool(found.centres)


@given(n=st.integers(1, 7), seed=seeds, share=st.floats(0, 0.6))
@settings(max_examples=30)
def test_a_mask_is_the_same_in_any_form(n: int, seed: int, share: float) -> None:
    mask = random_mask(n, seed, share)
    names = [f"token {(i * 5 + seed) % 11}" for i in range(n)]  # in an order of their own
    graph = nx.DiGraph()
    graph.add_nodes_from(names)
    seen = [(i, j) for i in range(n) for j in range(n) if mask[i, j]]
    graph.add_edges_from((names[i], names[j]) for i, j in reversed(seen))
    forms = [
        mask.numpy(),
        sparse.csr_matrix(mask.numpy()),
        sparse.coo_array(mask.double().numpy()),
        graph,
        nx.MultiDiGraph(graph),
    ]
    for form in forms:
        assert torch.equal(dyn.MaskGraph(form).mask, mask)
        assert torch.equal(dyn.Dynamics(form, one, one, one).mask, mask)
    both = graph.to_undirected()
    assert torch.equal(dyn.MaskGraph(both).mask, mask | mask.T)


def test_to_be_reached_from_a_token_is_not_enough_for_collapse() -> None:
    """Two tokens that see each other alone change places; a self-loop at one ends it."""
    swap = ~torch.eye(2, dtype=torch.bool)
    start = dyn.unit_tokens(2, 4, 0)
    path = dyn.Dynamics(swap, one, one, one).run(start, 101)
    assert path.graph.quasi_strongly_connected
    assert path.graph.centre is None
    assert np.isnan(path.bound).all()
    assert path.mu == pytest.approx(path.mu[0])
    assert torch.equal(path.states[-1], start.flip(0))
    swap[0, 0] = True
    path = dyn.Dynamics(swap, one, one, one).run(start, 101)
    assert path.graph.centre == 0
    assert path.mu[-1] < 1e-6 * path.mu[0]


@given(n=st.integers(2, 20), width=st.integers(1, 6))
def test_radii_of_the_named_masks(n: int, width: int) -> None:
    assert dyn.MaskGraph(dyn.complete_mask(n)).radius == 1
    assert dyn.MaskGraph(dyn.causal_mask(n)).radius == 1
    assert dyn.MaskGraph(dyn.causal_mask(n)).centres == (0,)
    assert dyn.MaskGraph(dyn.star_mask(n)).centres == (0,)
    two = dyn.MaskGraph(dyn.window_mask(n, width))
    assert two.radius == math.ceil((n // 2) / width)
    assert two.strongly_connected
    one_way = dyn.MaskGraph(dyn.one_way_window_mask(n, width))
    assert one_way.radius == math.ceil((n - 1) / width)
    assert one_way.centres == (0,)


# -- one layer --------------------------------------------------------------------------------


def by_loops(d: dyn.Dynamics, x: np.ndarray, layer: int) -> np.ndarray:
    """The update, token by token."""
    w_q, w_k, w_v = (w.numpy() if w.ndim == 2 else w[layer].numpy() for w in (d.w_q, d.w_k, d.w_v))
    out = []
    for i, mine in enumerate(x):
        seen = [j for j in range(len(x)) if d.mask[i, j]]
        scores = [(mine @ w_q) @ (x[j] @ w_k) / math.sqrt(d.d) / d.temperature for j in seen]
        weights = np.exp(np.array(scores) - max(scores))
        weights /= weights.sum()
        y = sum(a * (x[j] @ w_v) for a, j in zip(weights, seen, strict=True))
        y = mine + y if d.residual else y
        if d.mlp is not None:
            z = np.maximum(y @ d.mlp[0].numpy(), 0) @ d.mlp[1].numpy()
            y = y + z if d.residual else z
        if d.norm == "layer":
            y = y - y.mean()
        out.append(y if d.norm == "none" else y / np.linalg.norm(y))
    return np.array(out)


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("mlp", [False, True])
def test_a_layer_is_its_formula(norm: Any, residual: bool, mlp: bool) -> None:
    weights = (dyn.gaussian(20, 7)[:5], dyn.gaussian(20, 8)[:, :5]) if mlp else None
    mask = dyn.one_way_window_mask(7, 3)
    d = layers_of(mask, 0, norm=norm, residual=residual, mlp=weights, temperature=0.3)
    path = d.run(dyn.unit_tokens(7, 5, 1) * 2 + 0.1, 4)
    for layer in range(4):
        wanted = by_loops(d, path.states[layer].numpy(), layer)
        np.testing.assert_allclose(path.states[layer + 1].numpy(), wanted, atol=1e-12)
    sums = path.attention.sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert (path.attention[:, ~mask] == 0).all()


@given(seed=seeds, n=st.integers(2, 7))
def test_value_matrices(seed: int, n: int) -> None:
    q = dyn.orthogonal(n, seed, 3)
    torch.testing.assert_close(q @ q.mT, torch.eye(n, dtype=torch.float64).expand(3, n, n))
    assert torch.equal(dyn.gaussian(n, seed), dyn.gaussian(n, seed))
    torch.testing.assert_close(
        dyn.unit_tokens(n, n, seed).norm(dim=1), torch.ones(n, dtype=torch.float64)
    )


# -- bounds -----------------------------------------------------------------------------------


def gains(path: Any) -> np.ndarray:
    """prod of |W_V|_2 up to each layer."""
    w, steps = path.dynamics.w_v, len(path.attention)
    of = [
        1.0 if w is None else np.linalg.norm((w if w.ndim == 2 else w[t]).numpy(), 2)
        for t in range(steps)
    ]
    return np.cumprod([1.0, *of])


@given(n=st.integers(2, 8), seed=seeds, share=st.floats(0.1, 1), random=st.booleans())
@settings(max_examples=40)
def test_mu_never_exceeds_the_bound_of_the_graph(
    n: int, seed: int, share: float, random: bool
) -> None:
    mask = random_mask(n, seed, share)
    values = {"values": dyn.gaussian(5, seed + 3, 12)} if random else {}
    path = layers_of(mask, seed, **values).run(3 * dyn.unit_tokens(n, 5, seed), 12)
    slack = 1e-12 * float(path.states.abs().max()) * n
    gain = gains(path)
    assert (path.mu <= math.sqrt((n - 1) / 2) * path.diameter + slack).all()
    assert (path.diameter <= path.ergodicity * path.diameter[0] * gain + slack).all()
    if path.graph.centre is None:
        assert np.isnan(path.bound).all()
        return
    assert (path.mu <= path.bound + slack).all()
    r = max(int(path.graph.eccentricities[path.graph.centre]), 1)
    eps = float(path.least_weight.min())
    assert (path.ergodicity <= (1 - eps**r) ** (np.arange(13) // r) + 1e-12).all()
    assert path.bound_rate == pytest.approx(-math.log1p(-(eps**r)) / r)


@given(n=st.integers(2, 8), seed=seeds, share=st.floats(0.1, 1), lean=st.floats(0.5, 5))
@settings(max_examples=40)
def test_with_rmsnorm_and_orthogonal_values_tokens_of_a_half_space_obey_it_too(
    n: int, seed: int, share: float, lean: float
) -> None:
    mask = random_mask(n, seed, share)
    start = dyn.unit_tokens(n, 5, seed) + lean * dyn.unit_tokens(1, 5, seed + 1)
    path = layers_of(mask, seed, norm="rms").run(start, 12)
    assume(path.graph.centre is not None)
    assert np.isfinite(path.bound).all() == (path.margin > 0)
    if path.margin > 0:
        assert (path.mu <= path.bound + 1e-12 * n).all()


def test_without_a_half_space_or_with_more_than_attention_there_is_no_bound() -> None:
    mask = dyn.complete_mask(4)
    apart = torch.cat([torch.eye(2, 5), -torch.eye(2, 5)]).double()
    assert np.isnan(layers_of(mask, 0, norm="rms").run(apart, 3).bound).all()
    tokens = dyn.unit_tokens(4, 5, 0) + 3
    assert np.isfinite(layers_of(mask, 0, norm="rms").run(tokens, 3).bound).all()
    for options in (
        {"residual": True},
        {"norm": "layer"},
        {"norm": "rms", "values": dyn.gaussian(5, 3)},
    ):
        assert np.isnan(layers_of(mask, 0, **options).run(tokens, 3).bound).all()


def test_two_parts_that_do_not_see_each_other_stay_two_points() -> None:
    half = torch.arange(6) < 3
    mask = half[:, None] == half
    path = layers_of(mask, 0, layers=300).run(dyn.unit_tokens(6, 5, 2), 300)
    assert path.graph.centre is None
    assert path.graph.radius == math.inf
    last = path.states[-1]
    assert float(last[:3].std(0).norm()) < 1e-9
    assert path.mu[-1] > 0.1


def test_even_causal_attention_halves_the_second_token() -> None:
    """Without scores the rate is that of the second eigenvalue: 1/2."""
    d = dyn.Dynamics(dyn.causal_mask(6), 0 * one, 0 * one, one)
    path = d.run(dyn.unit_tokens(6, 4, 0), 60)
    assert path.fit(20).rate == pytest.approx(math.log(2), rel=1e-3)
    second = (path.states[:20, 1] - path.states[:20, 0]).norm(dim=1)
    torch.testing.assert_close(second[1:] / second[:-1], torch.full((19,), 0.5).double())


@given(rate=st.floats(0.01, 2), start=st.integers(0, 5))
def test_a_fit_finds_an_exponential_and_stops_at_rounding(rate: float, start: int) -> None:
    mu = np.exp(-rate * np.arange(40.0))
    fit = dyn.fit_decay(mu, start)
    assert fit.rate == pytest.approx(rate, rel=1e-9)
    assert mu[fit.last] > 1e-10
    assert fit.last == 39 or mu[fit.last + 1] <= 1e-10
    assert fit.off == pytest.approx(0, abs=1e-9)
    noise = np.maximum(mu, 1e-14)
    assert dyn.fit_decay(noise, start).rate == pytest.approx(rate, rel=1e-9)


def test_too_few_layers_have_no_rate() -> None:
    assert math.isnan(dyn.fit_decay([1.0, 0.1, 1e-12, 1e-13]).rate)
    with pytest.raises(ValueError, match="first: wanted an integer from 0 to 1"):
        dyn.fit_decay([1.0, 0.5], 2)


# -- equilibria -------------------------------------------------------------------------------


@given(ratio=st.floats(2.05, 20))
@settings(max_examples=15)
def test_two_tokens_in_two_dimensions_stay_at_rank_two(ratio: float) -> None:
    found = eq.two_tokens(ratio)
    assert found.rank == 2
    assert found.moved < 1e-12
    first, second = found.multipliers.tolist()
    assert first == pytest.approx(ratio, rel=1e-6)  # the first token, off its eigenvector
    assert second == pytest.approx(1 / (ratio - 1), rel=1e-6)  # the second one's angle
    pushed = found.tokens.clone()
    pushed[1] = torch.tensor([0.9, 0.5]).double()
    after = found.dynamics.run(pushed, 300).states[-1]
    torch.testing.assert_close(after, found.tokens, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("n", "d"), [(2, 2), (5, 5), (6, 4), (4, 7)])
def test_leaning_tokens_hold_any_rank_and_what_is_near(n: int, d: int) -> None:
    for rank in range(1, min(n, d) + 1):
        found = eq.anchored(n, d, rank)
        assert found.rank == rank
        assert found.moved < 1e-12
        assert found.spectral_radius <= 1 + 1e-9
        push = 1e-3 * dyn.gaussian(max(n, d), rank)[:n, :d]
        path = found.dynamics.run(found.tokens + push, 500)
        s = torch.linalg.svdvals(path.states[-1])
        assert int((s > 0.05 * s[0]).sum()) >= rank
        assert float((path.states[-1] - found.tokens).norm()) < 0.1
        # What they came to is an equilibrium again.
        assert eq.Equilibrium(found.dynamics, path.states[-1]).moved < eq.HELD


@given(angle=st.floats(1.7, 3.0), ratio=st.floats(0.1, 0.9))
@settings(max_examples=25)
def test_the_leaning_angle_has_the_multiplier_zero(angle: float, ratio: float) -> None:
    found = eq.anchored(2, 2, 2, ratio=ratio, angle=angle)
    top, low = found.multipliers.tolist()
    assert top == pytest.approx(ratio, rel=1e-6)
    assert low == pytest.approx(0, abs=1e-6)


@given(seed=seeds, n=st.integers(2, 5))
@settings(max_examples=30)
def test_a_value_matrix_holds_independent_tokens_under_a_causal_mask(seed: int, n: int) -> None:
    x = dyn.unit_tokens(n, 6, seed)
    assume(float(torch.linalg.cond(x)) < 50)
    w = [dyn.gaussian(6, seed + i) for i in (1, 2)]
    found = eq.hold(x, dyn.causal_mask(n), *w)
    assert found.rank == n
    torch.testing.assert_close(found.dynamics.step(found.tokens), found.tokens, atol=1e-8, rtol=0)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_groups_of_equal_tokens_are_held_at_their_rank(rank: int) -> None:
    x = dyn.unit_tokens(rank, 5, 1).repeat(3, 1)
    w = [dyn.gaussian(5, i) for i in (1, 2)]
    assert eq.hold(x, dyn.complete_mask(3 * rank), *w).rank == rank


def test_multipliers_are_those_of_a_small_step() -> None:
    """The top one is how far the layers carry a small deviation, step by step."""
    w = [dyn.gaussian(4, i) for i in (1, 2)]
    found = eq.hold(dyn.unit_tokens(3, 4, 5), dyn.causal_mask(3), *w)
    x = found.tokens + 1e-7 * dyn.gaussian(4, 9)[:3]
    x = x / x.norm(dim=1, keepdim=True)
    sizes = []
    for _ in range(6):
        x = found.dynamics.step(x)
        sizes.append(float((x - found.tokens).norm()))
    assert found.spectral_radius > 1
    jacobian = torch.autograd.functional.jacobian(found.dynamics.step, found.tokens)
    eigenvalues = torch.linalg.eigvals(jacobian.reshape(12, 12)).abs()
    assert float(eigenvalues.max()) == pytest.approx(found.spectral_radius, rel=1e-6)
    assert sizes[-1] > sizes[0]


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: dyn.window_mask(4, 0), "width: wanted an integer >= 1; got 0"),
        (lambda: dyn.complete_mask(True), "n: wanted an integer from 1 to 16384; got True"),
        (lambda: dyn.MaskGraph(torch.ones(2, 3, dtype=torch.bool)), r"got shape \[2, 3\]"),
        (lambda: dyn.MaskGraph(torch.ones(2, 2)), "got torch.float32"),
        (lambda: dyn.MaskGraph(torch.eye(2, dtype=torch.bool) & False), r"got none in \[0, 1\]"),
        (lambda: dyn.Dynamics(dyn.complete_mask(2), one, one, one, temperature=0.0), "temperature"),
        (lambda: dyn.Dynamics(dyn.complete_mask(2), one, one, one, norm="L2"), "norm: wanted"),  # type: ignore[arg-type]
        (lambda: dyn.Dynamics(dyn.complete_mask(2), one[:2], one, one), "w_q: wanted"),
        (lambda: dyn.Dynamics(dyn.complete_mask(2), one, one, one, mlp=(one, one[:2])), "mlp"),
        (lambda: dyn.Dynamics(dyn.complete_mask(2), one, one, one).run(one, 3), "x0: wanted"),
        (lambda: dyn.Dynamics(dyn.complete_mask(4), one, one, one).run(one, 0), "layers: wanted"),
        (lambda: layers_of(dyn.complete_mask(5), 0).run(torch.eye(5).double(), 13), "at most 12"),
        (lambda: dyn.MaskGraph([[True]]), "a networkx graph .*got list"),
        (lambda: dyn.MaskGraph(np.ones((2, 2))), "mask != 0.*got float64"),
        (lambda: dyn.MaskGraph(sparse.eye(2) * 2), "zeros and ones; got 2.0"),
        (lambda: dyn.MaskGraph(nx.path_graph(2, nx.DiGraph)), r"got none in \[1\]"),
        (lambda: dyn.unit_tokens(-1, 2, 0), "n: wanted an integer from 1 to 16384; got -1"),
        (lambda: dyn.orthogonal(0, 0), "d: wanted an integer from 1 to 16384; got 0"),
        (lambda: dyn.gaussian(2, 0.5), "seed: wanted an integer >= 0; got 0.5"),  # type: ignore[arg-type]
        (lambda: dyn.fit_decay([1.0, 0.5], 1.0), "first: wanted an integer from 0 to 1; got 1.0"),  # type: ignore[arg-type]
        (lambda: dyn.fit_decay([], 0), "mu: wanted one number or more"),
        (lambda: eq.two_tokens(2.0), "ratio: wanted a number > 2"),
        (lambda: eq.anchored(3, 3, 4), "rank: wanted 1 to 3; got 4"),
        (lambda: eq.anchored(3, 3, 2, ratio=1.0), "ratio: wanted"),
        (lambda: eq.anchored(3, 3, 2, angle=1.0), "angle: wanted"),
        (lambda: eq.hold(one[[0, 1, 1]], dyn.causal_mask(3), one, one), "wanted an equilibrium"),
    ],
)
def test_what_cannot_be_is_named(make: Any, said: str) -> None:
    with shape_checks_off(), pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": "1"}, "temperature: wanted a number > 0; got '1'"),
        ({"temperature": True}, "temperature: wanted a number > 0; got True"),
        ({"residual": 1}, "residual: wanted True or False; got 1"),
        ({"mlp": (one,)}, r"mlp: wanted a pair \(W_1, W_2\); got a tuple of 1"),
        ({"mlp": one}, "mlp: wanted a pair .*got a Tensor"),
    ],
)
def test_wrong_types_are_named(options: dict[str, Any], said: str) -> None:
    with shape_checks_off(), pytest.raises(TypeError, match=said):
        dyn.Dynamics(dyn.complete_mask(2), one, one, one, **options)


def test_float32_and_overflow_are_refused() -> None:
    with shape_checks_off(), pytest.raises(TypeError, match="w_v: wanted a float64 tensor"):
        dyn.Dynamics(dyn.complete_mask(4), one, one, one.float())
    grows = dyn.Dynamics(dyn.complete_mask(4), 0 * one, 0 * one, 1e200 * one)
    with pytest.raises(ArithmeticError, match="layer 1: wanted finite tokens"):
        grows.run(one + 1, 5)


def test_a_frame_has_a_row_per_layer() -> None:
    path = layers_of(dyn.causal_mask(6), 0).run(dyn.unit_tokens(6, 5, 0), 7)
    frame = path.to_frame()
    assert frame["layer"].tolist() == list(range(8))
    np.testing.assert_array_equal(frame["mu"], path.mu)
    assert frame["rank"].iloc[0] == 5
    assert (frame["bound"] >= frame["mu"]).all()
