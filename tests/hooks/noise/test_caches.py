"""Steps with a cache under noise: they see what the whole pass sees, or are refused by name.

Which bridges keep their cache is measured here without noise, and without this library: with
TransformerLens 4.3 all of these do on transformers 5.23, and those of KEPT on 5.24 too.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import CentredAttention, NormNoise, UnsupportedModelError, attention_sites
from hooks.noise import cache_check
from hooks.noise.clock import Clock, find_cache
from tests.support import builders, models
from tests.support.marks import slowly
from tests.support.watching import RENAMED, keeps_cache, watch

FAMILIES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",  # a sliding window of four in every layer but one
    "mistral": "MistralForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "neox": "GPTNeoXForCausalLM",
    "gptj": "GPTJForCausalLM",
    "ours": "QKVNormTransformer",
}
KEPT = {"bart", "neox", "gptj", "ours"}
LOST = r"generate with a cache: wanted .*; got .*use_past_kv_cache=False"
NOISE = NormNoise(sigma=0.5, on="qkv", seed=3)
IDS = models.tokens(2, 14, seed=5)


class Stepper:
    """A bridge whose Hugging Face model is called as a user would, at once or in steps."""

    def __init__(self, family: str, attn: str = "eager", **options: Any) -> None:
        self.bridge = builders.build(FAMILIES[family], attn=attn, **options).model
        self.inner: Any = self.bridge.original_model
        config = getattr(self.inner, "config", None)
        self.decoder = bool(getattr(config, "is_encoder_decoder", False))

    def call(self, ids: Tensor, cache: Any = None, **options: Any) -> Any:
        named = {"input_ids": IDS, "decoder_input_ids": ids} if self.decoder else {"input_ids": ids}
        given = {} if cache is None else {"past_key_values": cache}
        with torch.no_grad():
            return self.inner(**named, **given, **options)

    def whole(self, ids: Tensor = IDS) -> Tensor:
        out = self.call(ids)
        return out if isinstance(out, Tensor) else out.logits

    def stepped(self, steps: Sequence[int], cache: Any = None, ids: Tensor = IDS) -> Tensor:
        """Logits of all positions, some new ones at a time."""
        logits, first = [], 0
        for new in steps:
            out = self.call(ids[:, first : first + new], cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
            first += new
        return torch.cat(logits, 1)

    def plain(self, noise: NormNoise, ids: Tensor = IDS) -> Tensor:
        """The whole pass under plain hooks, which know of no cache."""
        with self.bridge.hooks(fwd_hooks=noise.hooks(self.bridge)):
            return self.whole(ids)


def noises(bridge: Any) -> list[NormNoise]:
    """Noise of each kind that can be written on this model."""
    found = []
    for noise in (NOISE, NormNoise(sigma=0.5, on="qk", rows="non-sparse", seed=3)):
        try:
            noise.hooks(bridge)
        except ValueError:
            continue
        found.append(noise)
    assert found
    return found


@pytest.mark.parametrize("attn", [*slowly("eager"), "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_steps_are_the_whole_pass_or_refused(family: str, attn: str) -> None:
    """Prefill in two chunks, then one token, then several; by the whole pass under plain hooks."""
    model = Stepper(family, attn)
    keeps = keeps_cache(model.bridge)
    assert keeps == (not RENAMED or family in KEPT)
    clean = model.whole()
    for noise in noises(model.bridge):
        wanted = model.plain(noise)
        with noise.applied(model.bridge):
            if keeps:
                biased = noise.rows != "all" and attention_sites(model.bridge).layer(0).has_bias
                assert not biased
                got = model.stepped((3, 2, 1, 1, 5, 1, 1))
                torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)
            else:
                with pytest.raises(UnsupportedModelError, match=LOST):
                    model.stepped((3, 1))
            # Without a cache it works, refused or not; and the next pass is a whole one again.
            torch.testing.assert_close(model.whole(), wanted, atol=1e-5, rtol=1e-5)
        assert (wanted - clean)[:, 3:].abs().max() > 0.05


@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_hooks_refuse_a_step_with_a_cache(family: str, new: int) -> None:
    """Also where the bridge has lost what the cache should hold, so that no pattern shows it."""
    model = Stepper(family)
    ids = IDS[:, :4]
    cache = model.call(ids, use_cache=True).past_key_values
    with (
        model.bridge.hooks(fwd_hooks=NOISE.hooks(model.bridge)),
        pytest.raises(ValueError, match=r"noise on .*cached step.*NormNoise\.applied"),
    ):
        model.call(IDS[:, 4 : 4 + new], cache)
    model.plain(NOISE, IDS[:, :2])


def test_centred_attention_refuses_a_step_with_a_cache_that_is_lost() -> None:
    model = Stepper("gpt2")
    cache = model.call(IDS[:, :4], use_cache=True).past_key_values
    for new in (1, 4):
        with (
            CentredAttention().applied(model.bridge),
            pytest.raises(ValueError, match="CentredAttention on a cached step: wanted a pass"),
        ):
            model.call(IDS[:, 4 : 4 + new], cache)


# -- every kind of cache ----------------------------------------------------------------------


def test_a_cache_is_found_whatever_its_argument_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next rename."""
    model = Stepper("ours")
    forward = type(model.inner).forward

    def renamed(self: Any, *args: Any, memory: Any = None, **kwargs: Any) -> Any:
        return forward(
            self, *args, **kwargs | ({} if memory is None else {"past_key_values": memory})
        )

    wanted = model.plain(NOISE)
    monkeypatch.setattr(type(model.inner), "forward", renamed)
    with NOISE.applied(model.bridge), torch.no_grad():
        first = model.inner(IDS[:, :6], use_cache=True)
        rest = model.inner(IDS[:, 6:], memory=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), wanted, atol=1e-4, rtol=1e-4)
    with (
        model.bridge.hooks(fwd_hooks=NOISE.hooks(model.bridge)),
        pytest.raises(ValueError, match="wanted a pass without a cache; got KVCache"),
    ):
        model.inner(IDS[:, 6:], memory=first.past_key_values)


@pytest.mark.parametrize("rows", ["all", "non-sparse"])
@pytest.mark.parametrize("family", ["neox", "llama", "gemma3"])
def test_static_caches(family: str, rows: Any) -> None:
    """They have room behind what they hold; a window's static cache rolls."""
    from transformers import StaticCache

    model = Stepper(family)
    noise = NormNoise(sigma=0.5, on="qk", rows=rows, seed=3)
    wanted = model.plain(noise)
    cache = StaticCache(config=model.inner.config, max_cache_len=20)
    with noise.applied(model.bridge):
        if RENAMED and family not in KEPT:
            with pytest.raises(UnsupportedModelError, match=LOST):
                model.stepped((6, 1), cache)
            return
        got = model.stepped((6, 1, 1, 4, 1, 1), cache)
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"past_key_values": ((torch.ones(2, 2, 4, 8),) * 2,) * 2}, "got tuple as past_key_values"),
        ({"anything": [[torch.ones(2, 2, 4, 8)] * 2]}, "got list as anything"),
        ({"cache": object()}, "got object as cache"),
        ({"a": models.N_CTX, "layer_past": {}}, "got dict as layer_past"),
    ],
)
def test_a_cache_that_does_not_say_what_it_holds_is_refused(
    kwargs: dict[str, Any], message: str
) -> None:
    model = Stepper("gpt2")
    with (
        NOISE.applied(model.bridge),
        pytest.raises(ValueError, match=rf"get_seq_length\); {message}"),
    ):
        model.inner(IDS, **kwargs)


def test_what_is_no_cache_is_left_alone() -> None:
    switches = {"use_cache": True, "cache_position": torch.arange(3), "past_key_values": None}
    vectors = (torch.ones(2, 3, 8), torch.ones(2, 3, 8))  # cosine and sine, an encoder's outputs
    assert find_cache((IDS, vectors), switches | {"past_key_values_length": 3}) is None


# -- generation by Hugging Face's own loop ------------------------------------------------------


def _generate(model: Stepper, **options: Any) -> Tensor:
    model.inner.generation_config.eos_token_id = None
    prompt = {"attention_mask": torch.ones_like(IDS[:, :6]), "pad_token_id": 0}
    settings = {"max_new_tokens": 8, "do_sample": False} | prompt | options
    with torch.no_grad():
        out: Tensor = model.inner.generate(IDS[:, :6], **settings)
    return out


@pytest.mark.parametrize("rows", ["all", "non-sparse"])
def test_generation_in_one_piece_in_chunks_and_by_hand(rows: Any) -> None:
    """Greedy tokens by the arg max of whole passes under plain hooks."""
    model = Stepper("neox")
    noise = NormNoise(sigma=0.5, on="qk", rows=rows, seed=3)
    by_hand = IDS[:, :6]
    for _ in range(8):
        best = model.plain(noise, by_hand)[:, -1:].argmax(-1)
        by_hand = torch.cat([by_hand, best], 1)
    assert not torch.equal(by_hand, _generate(model))
    with noise.applied(model.bridge):
        for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 2}):
            assert torch.equal(_generate(model, **options), by_hand), options


def test_speculation_takes_several_new_tokens_and_forgets_some() -> None:
    """An assistant that guesses wrong most of the time: the text is the one without it."""
    model, assistant = Stepper("neox"), Stepper("neox", seed=1)
    with NOISE.applied(model.bridge), torch.no_grad():
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        model.inner.generation_config.eos_token_id = None
        assistant.inner.generation_config.eos_token_id = None
        plain = model.inner.generate(IDS[:1, :6], use_cache=False, **options)
        helped = model.inner.generate(
            IDS[:1, :6], assistant_model=assistant.inner, use_cache=True, **options
        )
        itself = model.inner.generate(IDS[:1, :6], prompt_lookup_num_tokens=3, **options)
    assert torch.equal(helped, plain)
    assert torch.equal(itself, plain)


def test_rows_that_move_in_the_cache_are_refused() -> None:
    """A factor goes by the row of the batch, and a beam takes over another row's past."""
    model = Stepper("neox")
    with NOISE.applied(model.bridge):
        with pytest.raises(ValueError, match=r"rows were reordered.*Pass use_cache=False"):
            _generate(model, num_beams=3)
        _generate(model, num_beams=3, use_cache=False)
        for moved in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave"):
            cache = model.call(IDS[:, :6], use_cache=True).past_key_values
            getattr(cache, moved)(3 if "repeat" in moved else torch.tensor([1, 0]))
            ids = IDS.repeat_interleave(3, 0) if "repeat" in moved else IDS
            with pytest.raises(ValueError, match="rows were reordered"):
                model.call(ids[:, 6:7], cache)
    # One that was filled without noise may be taken up in any order.
    cache = model.call(IDS[:, :6], use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    with NOISE.applied(model.bridge):
        model.call(IDS[:, 6:7], cache)


def test_several_texts_of_one_prompt_keep_their_rows() -> None:
    model = Stepper("neox")
    texts = []
    for cached in (True, False):
        with NOISE.applied(model.bridge), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            options = {"do_sample": True, "num_return_sequences": 2}
            texts.append(_generate(model, use_cache=cached, **options))
    assert torch.equal(*texts)


# -- what is remembered, and what is one thread's -------------------------------------------------


def test_the_check_is_made_once_and_again_when_the_model_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    verdict = cache_check.Trial.verdict

    def counted(self: Any) -> Any:
        made.append(self)
        return verdict(self)

    monkeypatch.setattr(cache_check.Trial, "verdict", counted)
    model = Stepper("ours")
    for _ in range(2):
        with NOISE.applied(model.bridge):
            model.stepped((4, 1))
    assert len(made) == 1
    model.bridge.to(torch.float64)
    with NOISE.applied(model.bridge):
        model.stepped((4, 1))
    assert len(made) == 2


def test_a_step_whose_noise_is_not_the_whole_pass_s_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock that does not follow, as when it read the cache by a name that is no more."""
    monkeypatch.setattr(Clock, "cached", property(lambda self: 0))
    model = Stepper("ours")
    with (
        NOISE.applied(model.bridge),
        pytest.raises(UnsupportedModelError, match="under noise; pass use_past_kv_cache=False"),
    ):
        model.stepped((4, 1))


def test_steps_of_several_tokens_that_the_model_itself_gets_wrong() -> None:
    """Jamba's state-space layers begin anew at such a step, with or without a bridge."""
    bridge = builders.build("JambaForCausalLM").model
    inner: Any = bridge.original_model
    with NOISE.applied(bridge), torch.no_grad():
        cache = inner(input_ids=IDS[:, :4], use_cache=True).past_key_values
        with pytest.raises(UnsupportedModelError, match="a cached step of several tokens: wanted"):
            inner(input_ids=IDS[:, 4:7], past_key_values=cache)


def test_what_a_pass_holds_is_its_own_threads() -> None:
    clock = Clock(0, {})
    clock.steps = cache_check.CachedSteps()
    model = Stepper("ours")
    cache = model.call(IDS[:, :5], use_cache=True).past_key_values
    clock.read_cache(None, (IDS[:, 5:6],), {"past_key_values": cache})
    seen: list[Any] = []

    def other() -> None:
        seen.append((clock.now.cached, clock.now.new, clock.now.known))
        clock.read_cache(None, (IDS,), {})
        seen.append((clock.now.cached, clock.now.new, clock.now.known))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [(0, None, False), (0, 14, False)]
    assert (clock.now.cached, clock.now.new, clock.now.known) == (5, 1, True)


def test_rows_that_two_threads_keep_stay_apart() -> None:
    """q and k of one thread's pass, all of another thread's, then the first one's scores."""
    model = models.tiny_bloom()  # a bias: its rows are made of q and k again
    site = attention_sites(model).layer(0)
    noise = NormNoise(sigma=0.5, on="k", rows="non-sparse", layers=(0,))
    names = (site.q.dot.hook, site.k.dot.hook, site.scores)
    hook_fns = dict(noise.hooks(model))
    q, k, scores = (hook_fns[name] for name in names)
    long, short = (watch(model, ids, names) for ids in (IDS, IDS[:, :5]))

    def run(seen: dict[str, Tensor], between: Any = None) -> Tensor:
        q(seen[names[0]], None)
        k(seen[names[1]], None)
        if between is not None:
            between.start()
            between.join()
        out: Tensor = scores(seen[names[2]], None)
        return out

    alone = run(long)
    assert not torch.equal(alone, long[names[2]])
    assert torch.equal(run(long, threading.Thread(target=run, args=(short,))), alone)
