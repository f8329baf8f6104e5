"""A model as given: its state, its passes, its inputs, its threads."""

from hooks.model.ambient import measurement, model_pass, on_cpu, was_compiled
from hooks.model.calls import BlockCall, keeping_calls, without_hooks
from hooks.model.encoding import encode
from hooks.model.given import (
    TOKENS_ALONE,
    MaskLike,
    added,
    arguments_of,
    chat_ids,
    is_chat,
    knows_words,
    refuse_other_inputs,
    shorten,
    tensor_of,
    text_ids,
)
from hooks.model.identity import changing, fingerprint, key_of, states, versions
from hooks.model.inputs import (
    ModelInput,
    NoRoom,
    check_model,
    has_decoder,
    input_device,
    learn_cache,
    real_spans,
    short_input,
    without_cache,
)
from hooks.model.known_wrong import refuse_known_wrong
from hooks.model.progress import counting, tell
from hooks.model.prompts import Prompts, Tokens, example_of
from hooks.model.protocol import ROLES, Anchor, HookedModel, Role
from hooks.model.running import checked_logits, over_batches, run_with
from hooks.model.standing import Standing, names, resting, users
from hooks.model.state import (
    Finished,
    active_dropout,
    checking,
    dtype_of_passes,
    evaluating,
    is_checking,
    model_dtype,
    pass_dtype,
    paused_in_checks,
    refuse_unreadable,
)
from hooks.model.tap import AttentionTap, Fused, Taken
from hooks.model.threads import TapOfThreads, hooked, intervening, standing_hooks

__all__ = [
    "ROLES", "TOKENS_ALONE", "Anchor", "AttentionTap", "BlockCall", "Finished", "Fused",
    "HookedModel", "MaskLike", "ModelInput", "NoRoom", "Prompts", "Role", "Standing", "Taken",
    "TapOfThreads", "Tokens", "active_dropout", "added", "changing", "chat_ids", "check_model",
    "checked_logits", "checking", "counting", "dtype_of_passes", "encode", "evaluating",
    "example_of", "fingerprint", "has_decoder", "hooked", "input_device", "intervening", "is_chat",
    "is_checking", "keeping_calls", "key_of", "knows_words", "learn_cache", "measurement",
    "model_dtype", "model_pass", "names", "on_cpu", "over_batches", "pass_dtype",
    "paused_in_checks", "real_spans", "refuse_known_wrong", "refuse_other_inputs",
    "refuse_unreadable", "resting", "run_with", "short_input", "shorten", "standing_hooks",
    "states", "arguments_of", "tell", "tensor_of", "text_ids", "users", "versions",
    "was_compiled", "without_cache", "without_hooks",
]  # fmt: skip
