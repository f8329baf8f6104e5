"""The three placements: what each is invariant to, equality with known models, hooks, padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hooks import attention_sites
from qkvnorm_lens.models.bridge import from_pretrained, save_pretrained, to_bridge, to_plain
from qkvnorm_lens.models.config import NormSpec, QKVNormConfig, named_config
from qkvnorm_lens.models.model import CachedOutput, QKVNormTransformer
from qkvnorm_lens.models.norms import Calibrated, Norm
from qkvnorm_lens.training.addition import build_tokenizer
from tests.support.our_models import PLACEMENTS, SIZES, VARIANTS, far, make, tokens


def scaled_by(factor: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda value, hook: value * factor


# --- what each placement is invariant to -----------------------------------------------------


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_are_their_formula(kind: str) -> None:
    z = torch.randn(5, 7, dtype=torch.float64)
    centred = z - z.mean(-1, keepdim=True) if kind == "layer" else z
    norm = Norm(kind, gain=(7,), eps=0.0).double()
    with torch.no_grad():
        norm.weight.normal_()
    wanted = 7**0.5 * norm.weight * centred / centred.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(norm(z), wanted)


def attention_update(model: QKVNormTransformer, x: torch.Tensor) -> torch.Tensor:
    """One block's attention, as a function of the block's input."""
    block = model.layers[0]
    visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None]
    out: torch.Tensor = block.attn(block.ln1(x), visible=visible)
    return out


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_positive_scaling_of_the_blocks_input(placement: str) -> None:
    model = make(placement=placement, eps=1e-14, dtype=torch.float64)
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    factor = torch.rand(2, 6, 1, dtype=torch.float64) + 0.5
    same = torch.allclose(attention_update(model, factor * x), attention_update(model, x))
    # QKV-Norm too: scaling a token's whole input scales its q, k and v before their norms
    assert same == (placement != "none")


@pytest.mark.parametrize("site", ["q", "k", "v"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_positive_scaling_of_q_k_v_before_their_norm(placement: str, site: str) -> None:
    bridge = to_bridge(make(placement=placement, eps=1e-14, dtype=torch.float64))
    clean = bridge(tokens())
    factor = torch.rand(3, 11, 4, 1, dtype=torch.float64) + 0.5
    hooks = [(f"blocks.{layer}.attn.hook_{site}", scaled_by(factor)) for layer in (0, 1)]
    noised = bridge.run_with_hooks(tokens(), fwd_hooks=hooks)
    assert torch.allclose(noised, clean) == (placement == "qkv")
    if placement == "qkv":
        after = [(name.replace(f"_{site}", f"_{site}_normed"), f) for name, f in hooks]
        assert far(bridge.run_with_hooks(tokens(), fwd_hooks=after), clean)


def test_qk_norm_shields_q_and_k_and_not_v() -> None:
    norm = NormSpec(on="qk")
    bridge = to_bridge(make(placement="qkv", norm=norm, eps=1e-14, dtype=torch.float64))
    clean = bridge(tokens())
    for site in "qkv":
        hook = (f"blocks.0.attn.hook_{site}", scaled_by(torch.tensor(2.0)))
        assert far(bridge.run_with_hooks(tokens(), fwd_hooks=[hook]), clean) == (site == "v")
    assert "blocks.0.attn.hook_v_normed" not in bridge.hook_dict


def test_a_norm_over_the_projection_removes_only_a_common_factor() -> None:
    norm = NormSpec(over="projection")
    bridge = to_bridge(make(placement="qkv", norm=norm, eps=1e-14, dtype=torch.float64))
    clean = bridge(tokens())
    token = torch.rand(3, 11, 1, 1, dtype=torch.float64) + 0.5
    head = torch.rand(3, 11, 4, 1, dtype=torch.float64) + 0.5
    for factor, removed in ((token, True), (head, False)):
        hook = ("blocks.0.attn.hook_k", scaled_by(factor))
        noised = bridge.run_with_hooks(tokens(), fwd_hooks=[hook])
        assert torch.allclose(noised, clean) == removed


@pytest.mark.parametrize("on", ["qkv", "qk"])
def test_pre_norm_followed_by_qkv_norm_is_qkv_norm(on: str) -> None:
    model = make(placement="qkv", norm=NormSpec(on=on), eps=1e-14, dtype=torch.float64)
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    plain = attention_update(model, x)
    model.layers[0].ln1 = Norm("rms", gain=None, eps=1e-14)
    assert torch.allclose(attention_update(model, x), plain) == (on == "qkv")


# --- hooks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_hook_points_have_the_usual_shapes_and_true_scores(variant: str) -> None:
    bridge = to_bridge(make(**VARIANTS[variant]))
    cfg = bridge.cfg
    _, cache = bridge.run_with_cache(tokens())
    n_kv = cfg.n_key_value_heads or 4
    for layer in range(2):
        at = f"blocks.{layer}."
        shapes = {"q": (3, 11, 4, 8), "k": (3, 11, n_kv, 8), "v": (3, 11, n_kv, 8)}
        for site, shape in shapes.items():
            assert cache[f"{at}attn.hook_{site}"].shape == shape
            if cfg.placement == "qkv" and site in cfg.norm.on:
                assert cache[f"{at}attn.hook_{site}_normed"].shape == shape
            if cfg.positional_embedding_type == "rotary" and site != "v":
                assert cache[f"{at}attn.hook_rot_{site}"].shape == shape
        assert cache[f"{at}attn.hook_z"].shape == (3, 11, 4, 8)
        assert cache[f"{at}hook_attn_out"].shape == (3, 11, 24)
        assert cache[f"{at}hook_resid_post"].shape == (3, 11, 24)
        scores = cache[f"{at}attn.hook_attn_scores"]
        pattern = cache[f"{at}attn.hook_pattern"]
        assert scores.shape == pattern.shape == (3, 4, 11, 11)
        torch.testing.assert_close(scores.softmax(-1), pattern)
        back = torch.arange(11)[:, None] - torch.arange(11)[None]
        seen = back >= 0 if cfg.attention_dir == "causal" else torch.ones_like(back).bool()
        if cfg.window_size:
            seen = seen & (back.abs() < cfg.window_size)
        assert (scores.isneginf() == ~seen).all()
    assert pattern.max(-1).values.mean() > 1.2 / 11, "flat attention would hide mistakes"


@pytest.mark.parametrize("variant", ["none", "pre", "qkv", "qk-gqa", "rotary"])
def test_every_advertised_hook_fires_once(variant: str) -> None:
    bridge = to_bridge(make(**VARIANTS[variant]))
    fired: dict[int, int] = {}
    points = {id(p): n for n, p in bridge.hook_dict.items()}
    gated = ("hook_mlp_in",)

    def count(value: torch.Tensor, hook: Any) -> None:
        fired[id(hook)] = fired.get(id(hook), 0) + 1

    names = [n for n in points.values() if not n.endswith(gated)]
    bridge.run_with_hooks(tokens(), fwd_hooks=[(n, count) for n in names])
    silent = [points[i] for i in points if fired.get(i, 0) != 1 and points[i] in names]
    assert not silent


@pytest.mark.parametrize("variant", ["none", "pre", "qkv", "qk-gqa", "rotary", "paper"])
def test_edits_land(variant: str) -> None:
    bridge = to_bridge(make(**VARIANTS[variant]))
    clean, cache = bridge.run_with_cache(tokens())
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda value, hook: seen.update({name: value.detach()})

    # scores: only the first key is left, so that z is its value
    def first_only(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        return scores.clone().index_fill_(-1, torch.arange(1, 11), -torch.inf)

    at = "blocks.1.attn."
    watch = [(f"{at}hook_pattern", keep("pattern")), (f"{at}hook_z", keep("z"))]
    edited = bridge.run_with_hooks(
        tokens(), fwd_hooks=[(f"{at}hook_attn_scores", first_only), *watch]
    )
    assert far(edited, clean)
    assert (seen["pattern"][..., 0] == 1).all()
    name = "hook_v_normed" if f"{at}hook_v_normed" in cache else "hook_v"
    v = cache[f"{at}{name}"].repeat_interleave(4 // bridge.cfg.n_kv, 2)
    torch.testing.assert_close(seen["z"], v[:, :1].expand_as(seen["z"]))
    # pattern: nothing is attended to
    bridge.run_with_hooks(
        tokens(), fwd_hooks=[(f"{at}hook_pattern", lambda p, hook: p * 0), watch[1]]
    )
    assert (seen["z"] == 0).all()
    assert torch.equal(bridge(tokens()), clean)


@pytest.mark.parametrize("name", ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"])
def test_sdpa_refuses_hooks_on_what_it_does_not_make(name: str) -> None:
    bridge = to_bridge(make(placement="qkv", attn_implementation="sdpa"))
    asked = {
        "run_with_hooks": lambda: bridge.run_with_hooks(
            tokens(), fwd_hooks=[(name, lambda x, hook: x)]
        ),
        "add_hook": lambda: bridge.add_hook(name, lambda x, hook: x),
        "run_with_cache": lambda: bridge.run_with_cache(tokens(), names_filter=name),
        "hooks": lambda: bridge.hooks(fwd_hooks=[(name, lambda x, hook: x)]).__enter__(),
    }
    for ask in asked.values():
        with pytest.raises(ValueError, match=f"{name}: sdpa makes no scores.*eager"):
            ask()
    _, cache = bridge.run_with_cache(tokens())
    assert name not in cache
    assert "blocks.0.attn.hook_z" in cache
    eager = to_bridge(make(placement="qkv"))
    _, wanted = eager.run_with_cache(tokens())
    for site in ("hook_q", "hook_k_normed", "hook_z"):
        got = cache[f"blocks.1.attn.{site}"]
        torch.testing.assert_close(got, wanted[f"blocks.1.attn.{site}"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_nothing_of_the_size_of_the_context_is_kept(implementation: str) -> None:
    model = make(
        placement="qkv",
        n_ctx=10**9,
        positional_embedding_type="rotary",
        attn_implementation=implementation,
        window_size=4,
    )
    assert sum(b.numel() for b in model.buffers()) == 0
    assert sum(p.numel() for p in model.parameters()) < 10_000


# --- padding, cache, dtype, state ------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "implementation"),
    [
        *((variant, "eager") for variant in sorted(VARIANTS)),
        *((variant, "sdpa") for variant in ("pre", "qk-gqa", "rotary", "window", "bidirectional")),
    ],
)
def test_padding_changes_nothing_and_stays_finite(variant: str, implementation: str) -> None:
    options = {**VARIANTS[variant], "attn_implementation": implementation}
    bridge = to_bridge(make(**options, dtype=torch.float64))
    real, other = tokens(1, 7), tokens(1, 11, seed=3)
    pad, ones = torch.full((1, 4), 16), torch.ones(1, 11, dtype=torch.long)
    alone, beside = bridge(real), bridge(other)
    for side in ("left", "right"):
        left = side == "left"
        row = torch.cat((pad, real) if left else (real, pad), 1)
        mask, where = ones.clone(), slice(4, 11) if left else slice(0, 7)
        mask[:, row[0] == 16] = 0
        out = bridge(torch.cat((row, other)), attention_mask=torch.cat((mask, ones)))
        assert out.isfinite().all()
        torch.testing.assert_close(out[:1, where], alone)
        torch.testing.assert_close(out[1:], beside)
        bridge.zero_grad()
        out[:, where].square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in bridge.parameters())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ["none", "pre", "qkv", "qk-gqa", "rotary", "window"])
def test_cached_forward_equals_the_whole_one(variant: str, implementation: str) -> None:
    model = make(**VARIANTS[variant], attn_implementation=implementation)
    whole = model(tokens())
    first = model(tokens()[:, :6], use_cache=True)
    assert isinstance(first, CachedOutput)
    rest = model(tokens()[:, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat((first.logits, rest), 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_generate_with_and_without_cache(placement: str) -> None:
    model = make(placement=placement, positional_embedding_type="sinusoidal")
    model.tokenizer = build_tokenizer()
    bridge = to_bridge(model)
    assert bridge.to_tokens("[1+2=").tolist() == [[14, 1, 10, 2, 12]]
    assert bridge.to_str_tokens("[1+2=") == ["[", "1", "+", "2", "="]
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "verbose": False}
    start = bridge.to_tokens("[1+2=")
    cached = bridge.generate(start, **options)
    assert torch.equal(cached, bridge.generate(start, use_past_kv_cache=False, **options))
    by_hand = start
    for _ in range(9):
        by_hand = torch.cat((by_hand, bridge(by_hand)[:, -1:].argmax(-1)), 1)
        if by_hand[0, -1] == bridge.tokenizer.eos_token_id:
            break
    assert torch.equal(cached[:, : by_hand.shape[1]], by_hand)
    alone = [bridge.generate(text, **options) for text in ("[1+2=", "[15-N27=")]
    assert bridge.generate(["[1+2=", "[15-N27="], **options) == alone


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_state_dict_round_trips_strictly(variant: str) -> None:
    options = VARIANTS[variant]
    bridge = to_bridge(make(seed=0, **options))
    other = to_bridge(make(seed=1, **options))
    assert far(bridge(tokens()), other(tokens()))
    state = {name: value.clone() for name, value in bridge.state_dict().items()}
    plain = to_plain(bridge)
    n_bias = 17  # TransformerLens adds a zero bias to the unembedding
    assert sum(v.numel() for v in state.values()) == n_bias + sum(
        v.numel() for v in plain.state_dict().values()
    )
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(tokens()), bridge(tokens()))
    torch.testing.assert_close(plain.eval()(tokens()), bridge(tokens()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["none", "pre-shared", "qkv", "paper"])
def test_save_and_load(variant: str, tmp_path: Path) -> None:
    model = make(**VARIANTS[variant])
    model.tokenizer = build_tokenizer()
    bridge = to_bridge(model)
    save_pretrained(bridge, tmp_path / "model")
    again = from_pretrained(tmp_path / "model")
    assert torch.equal(again(tokens()), bridge(tokens()))
    assert again.tokenizer.convert_ids_to_tokens([14, 1]) == ["[", "1"]
    assert not again.training
    assert from_pretrained(tmp_path / "model", dtype=torch.bfloat16).cfg.dtype == torch.bfloat16
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"wanted config\.json"):
        from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_bfloat16_and_to(placement: str) -> None:
    bridge = to_bridge(make(placement=placement, positional_embedding_type="sinusoidal"))
    wide = bridge(tokens())
    bridge.to(torch.bfloat16)
    narrow = bridge(tokens())
    assert narrow.dtype == torch.bfloat16
    assert narrow.isfinite().all()
    assert torch.nn.functional.cosine_similarity(narrow.float(), wide, dim=-1).min() > 0.99


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_gradients_reach_every_parameter(variant: str) -> None:
    bridge = to_bridge(make(**VARIANTS[variant]))
    bridge(tokens()).square().mean().backward()
    plain = dict(bridge.original_model.named_parameters())
    none = [n for n, p in plain.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not none


def test_calibration_gives_the_papers_standard_deviations() -> None:
    cfg = named_config("small", "pre", score_scale="calibrated", calibrated=True)
    model = QKVNormTransformer(cfg).eval()
    long = tokens(64, 20)
    with model.calibrating():
        model(long)
    frozen = [m.weight.clone() for m in model.modules() if isinstance(m, Calibrated)]
    bridge = to_bridge(model)
    _, cache = bridge.run_with_cache(long)
    wanted = {"hook_embed": 0.5, "blocks.0.hook_resid_pre": 1.0}
    for layer in range(4):
        wanted[f"blocks.{layer}.hook_attn_out"] = 0.05
        wanted |= {f"blocks.{layer}.attn.{site}.hook_in": 1.0 for site in "qkv"}
    for name, std in wanted.items():
        assert cache[name].std().item() == pytest.approx(std, rel=1e-3), name
    scores = cache["blocks.2.attn.hook_attn_scores"]
    assert scores[scores.isfinite()].std().item() == pytest.approx(0.1, rel=1e-3)
    bridge(tokens(2, 5))
    after = [m.weight for m in model.modules() if isinstance(m, Calibrated)]
    assert all(torch.equal(a, b) for a, b in zip(frozen, after, strict=True))


def test_building_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = (QKVNormTransformer(named_config("study", "qkv")) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    other = QKVNormTransformer(named_config("study", "qkv", seed=7))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_positions_are_shifted_in_training_only() -> None:
    model = make(placement="pre", positional_embedding_type="sinusoidal")
    assert torch.equal(model(tokens()), model(tokens()))
    model.train()
    assert far(model(tokens()), model(tokens()))
    positions = torch.arange(11)[None]
    shown = model(tokens(), position_ids=positions)
    torch.testing.assert_close(shown, model.eval()(tokens()))


# --- what the neighbouring papers change -------------------------------------------------------


@pytest.mark.parametrize("skip", ["both", "attn", "mlp", "none"])
def test_an_update_without_a_skip_takes_the_streams_place(skip: str) -> None:
    model = make(placement="pre", skip=skip, n_layers=1)
    block, ids = model.layers[0], tokens()
    x = model.tok_embed(ids) + model.pos(torch.arange(ids.shape[1]))
    seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
    attn = block.attn(block.ln1(x), visible=seen)
    middle = attn + (x if skip in ("both", "attn") else 0)
    end = block.mlp(block.ln2(middle)) + (middle if skip in ("both", "mlp") else 0)
    torch.testing.assert_close(model(ids), model.head(model.ln_out(end)))


def test_a_mask_of_four_axes_says_which_keys_are_seen() -> None:
    model, ids = make(placement="pre"), tokens(1, 9)
    other = make(placement="pre", attention_dir="bidirectional")
    other.load_state_dict(model.state_dict())
    full = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    assert torch.equal(model(ids, attention_mask=full), other(ids))
    assert torch.equal(model(ids, attention_mask=full.tril()), model(ids))
    assert far(model(ids), other(ids))
    torch.testing.assert_close(to_bridge(model)(ids, attention_mask=full), other(ids))


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 9, 9), torch.ones(1, 9, 9) > 0])
def test_a_mask_that_cannot_be_read_is_refused(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="attention_mask: wanted"):
        make(placement="pre")(tokens(1, 9), attention_mask=mask)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_self_check_sees_that_the_average_is_centred(implementation: str) -> None:
    bridge = to_bridge(make(placement="pre", centred=True, attn_implementation=implementation))
    assert [s.averaging for s in attention_sites(bridge)] == ["centred", "centred"]


def test_an_unknown_skip_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"skip: wanted one of.*'all'"):
        make(placement="pre", skip="all")


def test_defaults_leave_older_files_as_they_are() -> None:
    plain = QKVNormConfig(placement="pre", **SIZES).to_json()
    assert not {"skip", "centred"} & plain.keys()
    changed = QKVNormConfig(placement="pre", skip="mlp", centred=True, **SIZES)
    assert QKVNormConfig.from_json(changed.to_json()).skip == "mlp"
    assert QKVNormConfig.from_json(changed.to_json()).centred is True


def test_a_loaded_models_configuration_makes_its_start_again() -> None:
    """Drawn from its seed, whatever the global state."""
    from qkvnorm_lens.models.shipped import checkpoint_card, load_checkpoint

    loaded = load_checkpoint("addition-pre")
    torch.manual_seed(1)
    start = QKVNormTransformer(loaded.cfg).state_dict()
    known = QKVNormConfig.from_json(checkpoint_card("addition-pre")["run"]["config"])
    for name, value in QKVNormTransformer(known).state_dict().items():
        torch.testing.assert_close(start[name], value, rtol=0, atol=0)
