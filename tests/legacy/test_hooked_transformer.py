"""TransformerLens 3.9: our models as a HookedTransformer, and `hooks` on them.

`make test-legacy` runs this in an environment of its own, and before that
`tests.legacy.reference` in the main one.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

import hooks
from qkvnorm_lens import cli
from qkvnorm_lens.models import bridge as adapter
from qkvnorm_lens.models.config import ARCHITECTURE, NormSpec
from qkvnorm_lens.models.hooked_transformer import (
    from_pretrained,
    hooked_config,
    to_hooked_transformer,
)
from qkvnorm_lens.models.model import QKVNormTransformer
from qkvnorm_lens.models.shipped import checkpoint_path, checkpoints
from tests.legacy.cases import CASES, OLD_SIZES, SIGMAS, config, random_model, tokens

torch.set_num_threads(1)
REFERENCE = Path(sys.prefix) / "reference"
WRITTEN = sorted(path.parent for path in REFERENCE.glob("*/probe.json"))

PRE = {"placement": "pre"}
QKV = {"placement": "qkv"}
GQA = {"n_key_value_heads": 2}


def differences(options: dict[str, Any], **inputs: Any) -> float:
    """The largest difference of a logit between our module and the HookedTransformer."""
    plain = random_model(**options)
    seen = tokens()
    mask = inputs.get("attention_mask")
    with torch.no_grad():
        wanted, got = plain(seen, **inputs), to_hooked_transformer(plain)(seen, **inputs)
    difference = (wanted - got).abs()
    return float((difference if mask is None else difference[mask.bool()]).max())


def test_this_is_the_last_transformer_lens_with_the_class() -> None:
    assert importlib.metadata.version("transformer-lens") == "3.9.0"
    model = to_hooked_transformer(random_model(**QKV))
    assert isinstance(model, HookedTransformer)
    assert isinstance(model.cfg, HookedTransformerConfig)
    assert isinstance(model.blocks[0].ln1, torch.nn.Identity)


def test_the_main_environment_wrote_its_numbers() -> None:
    names = {path.name for path in WRITTEN}
    assert {*CASES, "addition-pre"} <= names, "`make test-legacy` writes them first"


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda path: path.name)
def test_logits_and_hooks_are_those_of_the_bridge_on_4(folder: Path) -> None:
    seen = load_file(folder / "seen.safetensors")
    model = from_pretrained(folder)
    given = seen.pop("tokens")
    with torch.no_grad():
        logits, cache = model.run_with_cache(given)
    wanted = seen.pop("logits")
    assert len(seen) >= 5 * model.cfg.n_layers
    for name, value in seen.items():
        assert cache[name].shape == value.shape, name
    if folder.name in CASES:
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)
        for name, value in seen.items():
            torch.testing.assert_close(cache[name], value, atol=1e-5, rtol=1e-5, msg=name)
        return
    # Shipped models have scores in the thousands: float32's own rounding is the measure.
    exact = QKVNormTransformer.from_pretrained(folder).double()
    exact.cfg.dtype = torch.float64
    with torch.no_grad():
        truth = exact(given)
    rounding = float((wanted - truth).abs().max())
    assert float((logits - truth).abs().max()) < 4 * rounding


@pytest.mark.parametrize("name", checkpoints())
def test_shipped_models_differ_by_rounding_alone(name: str) -> None:
    plain = QKVNormTransformer.from_pretrained(checkpoint_path(name)).double()
    plain.cfg.dtype = torch.float64
    seen = tokens().remainder(plain.cfg.d_vocab)
    with torch.no_grad():
        difference = to_hooked_transformer(plain)(seen) - plain(seen)
    assert float(difference.abs().max()) < 1e-10


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda path: path.name)
def test_the_probe_gives_the_numbers_of_the_bridge_on_4(folder: Path) -> None:
    wanted = pd.read_json(folder / "probe.json", orient="table")
    model = from_pretrained(folder)
    given = load_file(folder / "seen.safetensors")["tokens"]
    got = hooks.collapse_probe(model, given, sigmas=SIGMAS, progress=False).to_frame()
    assert got["rows"].sum() > 50
    assert got["loose"].max() > 0.01
    pd.testing.assert_frame_equal(
        got[wanted.columns], wanted, check_dtype=False, atol=1e-4, rtol=1e-4
    )


def test_a_plain_hooked_transformer_is_probed_like_its_converted_weights() -> None:
    """The same weights, as they were saved in 2.x and 3.x and as 4.x converts them."""
    weights = load_file(REFERENCE / "old" / "old.safetensors")
    logits = weights.pop("logits")
    with pytest.warns(DeprecationWarning, match="HookedTransformer is deprecated"):
        model = HookedTransformer(HookedTransformerConfig(**OLD_SIZES))
    model.load_state_dict(weights, strict=False)
    model.eval()
    torch.testing.assert_close(model(tokens()).detach(), logits, atol=1e-4, rtol=1e-4)
    got = hooks.collapse_probe(model, tokens(), sigmas=SIGMAS, progress=False).to_frame()
    wanted = pd.read_json(REFERENCE / "old" / "old.json", orient="table")
    assert got["rows"].sum() > 50
    assert got["loose"].max() > 0.01
    pd.testing.assert_frame_equal(
        got[wanted.columns], wanted, check_dtype=False, atol=1e-4, rtol=1e-4
    )
    # There a hook shows the scores, on the native bridge of 4.x none does.
    assert all(not sites.tapped for sites in hooks.attention_sites(model))


@pytest.mark.parametrize("name", CASES)
def test_the_sites_are_verified(name: str) -> None:
    sites = hooks.attention_sites(to_hooked_transformer(random_model(**CASES[name])))
    frame = sites.to_frame()
    assert set(frame["shield"]) == {"removed" if name.startswith("qkv") else "none"}
    assert frame["scores_editable"].all()
    assert list(frame["projection"][:3]) == [f"blocks.0.attn.hook_{site}" for site in "qkv"]
    assert ("removed by a norm over each head" in sites.describe()) == name.startswith("qkv")


@pytest.mark.parametrize("placement", ["none", "pre", "qkv"])
@pytest.mark.parametrize("kv", [None, 2, 1])
@pytest.mark.parametrize("positions", ["standard", "none", "rotary"])
def test_same_logits_as_the_plain_module(placement: str, kv: int | None, positions: str) -> None:
    options = {
        "placement": placement,
        "n_key_value_heads": kv,
        "positional_embedding_type": positions,
    }
    assert differences(options) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {**PRE, "norm": NormSpec(over="input", gains="none")},
        {**PRE, "norm": NormSpec(over="input", gains="shared")},
        {**PRE, "norm": NormSpec(kind="layer", over="input", gains="none")},
        {**PRE, "norm": NormSpec(kind="layer", over="input", gains="shared")},
        {**PRE, "norm": NormSpec(kind="layer", over="input"), "attn_bias": True},
        {**QKV, "norm": NormSpec(gains="none")},
        {**QKV, "norm": NormSpec(gains="shared")},
        {**QKV, **GQA, "norm": NormSpec(over="projection")},
        {**QKV, **GQA, "norm": NormSpec(on="qk")},
        {**QKV, "norm": NormSpec(kind="layer"), "attn_bias": True},
        {**QKV, "attention_dir": "bidirectional"},
        {**QKV, "window_size": 3},
        {**QKV, "attn_only": True, "normalization_type": None},
        {**QKV, "normalization_type": "RMS", "act_fn": "silu"},
        {**QKV, "score_scale": "none", "act_fn": "gelu_new"},
        {**QKV, "positional_embedding_type": "rotary", "rotary_dim": 4, "rotary_base": 100},
        {**QKV, "positional_embedding_type": "rotary", "rotary_adjacent_pairs": False},
        {**QKV, "positional_embedding_type": "rotary", "rotary_adjacent_pairs": True},
    ],
    ids=str,
)
def test_options(options: dict[str, Any]) -> None:
    assert differences(options) < 1e-5
    mask = torch.ones(4, 20, dtype=torch.long)
    mask[0, :5] = 0
    assert differences(options, attention_mask=mask) < 1e-5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"output_mlp": (8,)}, r"output_mlp.*\(8,\)"),
        ({"positional_embedding_type": "sinusoidal"}, "positional_embedding_type.*'sinusoidal'"),
        ({"score_scale": "learned"}, "score_scale.*'learned'"),
        ({"score_scale": "calibrated"}, "score_scale.*'calibrated'"),
        ({"calibrated": True}, "calibrated.*False.*got True"),
        ({"centred": True}, "centred.*False.*got True"),
        ({"skip": "mlp"}, "skip.*'both'.*'mlp'"),
        ({"attn_implementation": "sdpa"}, "attn_implementation.*'eager'.*'sdpa'"),
        ({"attention_dir": "bidirectional", "window_size": 3}, "window_size.*got 3"),
    ],
)
def test_what_it_cannot_express_is_refused_by_name(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        hooked_config(config(placement="qkv", **options))


def test_noise_before_the_norm_goes_and_behind_it_stays() -> None:
    model = to_hooked_transformer(random_model(**QKV))
    clean = model(tokens())

    def moved(name: str) -> float:
        def double(x: torch.Tensor, hook: Any) -> torch.Tensor:
            return 2 * x

        noisy = model.run_with_hooks(tokens(), fwd_hooks=[(f"blocks.0.attn.{name}", double)])
        return float((noisy - clean).abs().max().detach())

    for site in "qkv":
        assert moved(f"hook_{site}") < 0.01
        assert moved(f"hook_{site}_normed") > 0.1
    assert moved("hook_attn_scores") > 0.1
    assert moved("hook_pattern") > 0.1
    assert moved("hook_z") > 0.1


def test_split_inputs_and_ungrouped_heads() -> None:
    model = to_hooked_transformer(random_model(**QKV, **GQA))
    clean = model(tokens())
    model.set_use_split_qkv_input(True)
    torch.testing.assert_close(model(tokens()), clean, atol=1e-5, rtol=0)
    model.set_ungroup_grouped_query_attention(True)
    logits, cache = model.run_with_cache(tokens())
    torch.testing.assert_close(logits, clean, atol=1e-5, rtol=0)
    assert cache["blocks.0.attn.hook_k_normed"].shape == (4, 20, 4, 8)


def test_sites_follow_a_switch_that_is_turned_afterwards() -> None:
    """With its keys ungrouped, a model has noise on each query head's own key."""
    model = to_hooked_transformer(random_model(**QKV, **GQA))
    clean = model(tokens())
    noise = hooks.NormNoise(sigma=0.3, on="k")
    outs = []
    for ungrouped, n_kv_heads in ((False, 2), (True, 4)):
        model.set_ungroup_grouped_query_attention(ungrouped)
        assert {s.n_kv_heads for s in hooks.attention_sites(model)} == {n_kv_heads}
        with noise.applied(model):
            outs.append(model(tokens()))
    for one, other in ((outs[0], clean), (outs[1], clean), (outs[0], outs[1])):
        assert float((one - other).abs().max().detach()) > 0.01


def test_training_keeps_what_the_model_does_not_have_at_zero() -> None:
    plain = random_model(placement="qkv", positional_embedding_type="none").train()
    before = {name: p.clone() for name, p in plain.state_dict().items()}
    model = to_hooked_transformer(plain)
    assert model.training
    assert sum(p.requires_grad for p in model.parameters()) == len(list(plain.parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(tokens(), return_type="loss").backward()
    assert model.blocks[0].attn.q_norm.weight.grad is not None
    optimizer.step()
    for name in ("b_Q", "b_K", "b_V", "b_O"):
        assert not getattr(model.blocks[0].attn, name).any()
    assert not model.pos_embed.W_pos.any()
    assert all(torch.equal(p, before[name]) for name, p in plain.state_dict().items())


def test_the_random_state_and_the_original_are_left_alone() -> None:
    plain = random_model(placement="pre", seed=5)
    state = torch.get_rng_state()
    model = to_hooked_transformer(plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(copy.deepcopy(model)(tokens()), model(tokens()))


def test_weight_processing_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="wanted a plain load_state_dict"):
        to_hooked_transformer(random_model(**QKV)).process_weights_()


def test_a_shipped_model_adds() -> None:
    model = from_pretrained(checkpoint_path("addition-pre"))
    assert model.to_str_tokens("[12+34=") == ["[", "1", "2", "+", "3", "4", "="]
    written = model.generate("[12+34=", max_new_tokens=2, do_sample=False, verbose=False)
    assert written == "12+34=46"
    assert "sparse" in str(hooks.collapse_probe(model, "[12+34=46]", progress=False))


def test_bfloat16() -> None:
    model = from_pretrained(checkpoint_path("addition-pre"), dtype=torch.bfloat16)
    full = from_pretrained(checkpoint_path("addition-pre"))
    seen = tokens().remainder(17)
    assert model(seen).dtype == torch.bfloat16
    agree = model(seen).argmax(-1) == full(seen).argmax(-1)
    assert agree.float().mean() > 0.9


def test_the_architecture_says_which_version_it_needs() -> None:
    ArchitectureAdapterFactory.discover_entry_points()  # a failure there is a warning: an error
    assert ArchitectureAdapterFactory._adapters[ARCHITECTURE] is adapter.QKVNormArchitectureAdapter
    for use in (
        lambda: adapter.QKVNormArchitectureAdapter(config(placement="qkv")),
        lambda: adapter.to_bridge(random_model(placement="qkv")),
        lambda: adapter.from_pretrained(checkpoint_path("addition-pre")),
    ):
        with pytest.raises(ImportError, match=r"needs transformer-lens 4 .*got 3\.9\.0") as error:
            use()
        module, name = str(error.value).rpartition(": ")[2].rsplit(".", 1)
        assert getattr(importlib.import_module(module), name) is to_hooked_transformer


def test_the_command_line_says_which_version_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe"]) == 1
    err = capsys.readouterr().err
    assert "needs transformer-lens 4 " in err
    assert "got 3.9.0; on 3.9 make a HookedTransformer" in err
