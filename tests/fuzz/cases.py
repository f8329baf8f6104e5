"""What is fuzzed: inputs x modes x calls, as flat records that shrink to their plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import BatchEncoding, DynamicCache

from tests.fuzz import zoo
from tests.support.families import VOCAB


@dataclass(frozen=True)
class Case:
    """One combination; every field's default is its plain value.

    Attributes:
        family, attn, dtype, tokenizer: the model.
        call: what is asked of the library.
        form: how the inputs are given.
        lengths: real tokens of each prompt.
        side: where prompts of unequal length are padded (with ``extra`` columns more).
        mask: of which kind, "" for none.
        positions: of which kind.
        cache: the inputs' ``use_cache``.
        beside: further inputs.
        decoder: of an encoder-decoder, how its decoder's tokens are given.
        words: of texts, what stands in them.
        mode: what is set around the call.
        change: what happens to the model between a first call and the one that is judged.
        hook: of the user's, on the model.
        batch_size, seed, sigma, on: as in the library.
    """

    family: str = "llama"
    call: str = "probe"
    form: str = "tensor"
    lengths: tuple[int, ...] = (9, 9)
    side: str = "right"
    extra: int = 0
    mask: str = ""
    positions: str = ""
    cache: str = ""
    beside: str = ""
    decoder: str = ""
    words: str = ""
    tokenizer: str = ""
    mode: str = ""
    change: str = ""
    hook: str = ""
    attn: str = "eager"
    dtype: str = "float32"
    on: str = "qk"
    sigma: float = 0.3
    batch_size: int = 8
    seed: int = 0

    def __repr__(self) -> str:
        """As code, without what is plain."""
        said = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"Case({', '.join(said)})"

    @property
    def padded(self) -> bool:
        return len(set(self.lengths)) > 1 or self.extra > 0


TEXTS = ("text", "texts", "chat", "template")
MAPPINGS = ("dict", "arrays", "lists", "encoding", "encoding of lists")
RAGGED = ("rows", "tensors", "records", "ragged lists", *TEXTS)
MASKS = ("int", "bool", "float", "int32")
CALLS = ("probe", "sample", "sweep", "spread", "spectrum", "interference", "rank", "applied")
MODES = ("", "train", "dropout", "grad", "inference", "float64 by default", "autocast")
HOOKS = ("", "scale q", "ablate z", "patch v", "zero pattern", "torch", "column", "long")
LONG = 8  # tokens of a prompt, above which the hook "long" acts
SQUARES = ("square", "square bool", "square bias", "square soft")
CHANGES = (
    "",
    "weight by data",
    "weight in place",
    "weight replaced",
    "weight undone",
    "weight back from zero",
    "asked before",
    "window",
    "buffer",
    "attention",
    "adapter off",
    "adapter on",
    "merged",
    "merged after a change",
)
DECODERS = ("padded", "padded left", "unmasked", "collated", "labels too", "labels alone")
# Those that are tried with tokenizers: two of which begin no text with BOS.
WITH_WORDS = ("llama", "gpt2", "qwen3", "bloom")
ROTARY = ("llama", "gemma2", "qwen3", "gptoss", "mistral")
# Models that take a mask [batch, 1, query, key] of what is added to the scores.
SQUARE = ("llama", "gpt2", "qwen3", "mistral", "bert")
# Where an edit of the pattern changes what follows (elsewhere it is discarded).
LANDS = ("llama", "gpt2", "gemma2", "qwen3", "mistral", "gptoss", "bloom", "ours")
KINDS_OF_POSITIONS = (
    "", "count", "offset", "gap", "stretched", "zero", "packed", "packed inside", "shared",
)  # fmt: skip


FEW = ("llama", "gpt2", "t5", "bloom", "gptoss")


@st.composite
def cases(draw: Any, few: bool = False) -> Case:
    """Combinations that a user can make; ``few``: of some models, which are soon built."""

    def one(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    family = one(*(FEW if few else zoo.FAMILIES))
    kind = zoo.FAMILIES[family]
    call = one(*CALLS)
    inputs = _draw_inputs(draw, one, family, few)
    mode = one("", *MODES) if draw(st.booleans()) else ""
    hook, change = "", ""
    if draw(st.integers(0, 3)) == 3:
        hook = one(*HOOKS)
    elif draw(st.integers(0, 2)) == 2:
        change = one(*CHANGES)
    return plain(
        Case(
            family=family,
            call=call,
            **inputs,
            mode=mode,
            change=change,
            hook=hook,
            attn=one("eager", "sdpa") if kind.sdpa and not few else "eager",
            dtype="float32" if few else one(*["float32"] * 4, "bfloat16"),
            on=one("qk", "k", "q"),
            sigma=one(0.3, 0.1, 0.5),
            batch_size=one(8, 1, 2),
            seed=one(0, 1, 2),
        )
    )


def _draw_inputs(draw: Any, one: Any, family: str, few: bool) -> dict[str, Any]:
    """The form of the inputs, and everything that is in them."""
    kind = zoo.FAMILIES[family]
    bare = family not in WITH_WORDS
    texts = () if bare else TEXTS
    form = one("tensor", "dict", "row", "rows", "numpy", "arrays", "lists", "ragged lists")
    if draw(st.integers(0, 5)) == 5:
        form = one("tensors", "records")
    if draw(st.booleans()):
        form = one("dict", "encoding", "encoding of lists", *texts)
    mapping = form in MAPPINGS or form == "ragged lists"
    n = 1 if form in ("row", "text") else one(2, 1, 3)
    lengths = (one(9, 7, 12),) * n
    if not draw(st.booleans()):
        lengths = tuple(one(7, 12, 9, 5) for _ in range(n))
    can_pad = form not in RAGGED and form != "row"
    extra = one(0, 0, 2) if can_pad else 0
    padded = can_pad and (len(set(lengths)) > 1 or extra > 0)
    mask = ""
    if can_pad and (padded or draw(st.booleans())):
        mask = one(*MASKS, *(SQUARES if form == "dict" and family in SQUARE else ()))
    if form in ("ragged lists", "records") and draw(st.booleans()):
        mask = "int"
    if form == "tensor" and len(set(lengths)) > 1 and draw(st.booleans()):
        mask = "pads"
    found = {"form": form, "lengths": lengths, "extra": extra, "mask": mask}
    found["side"] = one("right", "left") if padded else "right"
    if mapping:
        if "position_ids" in kind.named and form != "ragged lists":
            found["positions"] = one(*KINDS_OF_POSITIONS, "", "")
        if "use_cache" in kind.named:
            found["cache"] = one("", "", "False", "True")
        types = ["token types"] * ("token_type_ids" in kind.named)
        found["beside"] = one("", "", "", "labels", "", "cache", *types)
    if kind.has_decoder:
        found["decoder"] = one("given", "", *(DECODERS if mapping else ()))
    if form in TEXTS:
        found["tokenizer"] = "adds" if few else one("plain", "adds", "one")
        if form in ("text", "texts"):
            found["words"] = one("", "begins", "ends", "pad inside", "no bos")
    elif not few and not bare and draw(st.integers(0, 3)) == 3:
        found["tokenizer"] = one("plain", "one")
    return found


def plain(case: Case) -> Case:
    """The same without what its model or its call has no part in."""
    return _plain_model(_plain_inputs(case))


def _plain_inputs(case: Case) -> Case:
    kind, words = zoo.FAMILIES[case.family], case.family in WITH_WORDS
    if case.form not in (*MAPPINGS, "ragged lists"):
        decoder = "" if case.decoder == "" else "given"
        case = replace(case, positions="", cache="", beside="", decoder=decoder)
    if not kind.has_decoder:
        case = replace(case, decoder="")
    if case.form in ("row", "text"):
        case = replace(case, lengths=case.lengths[:1])
    if case.form in RAGGED or case.form == "row":
        case = replace(case, extra=0, side="right", positions="", mask=case.mask and "int")
    if case.form in ("row", "rows", "tensors", *TEXTS):
        case = replace(case, mask="")
    if case.form in TEXTS:
        call = "probe" if case.call == "applied" else case.call
        case = replace(case, call=call, tokenizer=case.tokenizer or "plain")
    if case.mask == "pads":
        told = case.form == "tensor" and len(set(case.lengths)) > 1
        case = replace(case, mask="pads" if told and words else "int")
    if case.mask == "pads":
        case = replace(case, tokenizer="plain", extra=0)
    if case.mask in SQUARES and (
        case.padded or case.form != "dict" or case.family not in SQUARE or case.call == "applied"
    ):
        case = replace(case, mask="int")
    if case.positions == "shared" and case.padded:
        case = replace(case, positions="offset")
    bare = case.family in ("ours", "bert") and case.beside in ("labels", "cache")
    if case.call == "applied" or bare:
        case = replace(case, beside="")
    uneven = case.padded or len(set(case.lengths)) > 1
    if kind.has_decoder and case.beside == "labels" and (uneven or case.decoder in DECODERS):
        case = replace(case, beside="")  # "collated" has labels of its own, and where they end
    if case.decoder in DECODERS and len(case.lengths) == 1:
        case = replace(case, decoder="given")
    return case


def _plain_model(case: Case) -> Case:
    kind, change = zoo.FAMILIES[case.family], case.change
    nothing = {
        "window": case.family not in ("mistral", "gemma2"),
        "buffer": case.family not in ROTARY,
        "attention": not kind.sdpa or case.family == "ours",
        "adapter": case.family not in ("llama", "mistral", "qwen3"),
        "merged": case.call != "probe"
        or (change == "merged" and (len(case.lengths) < 2 or case.form not in ("tensor", "rows"))),
    }
    if nothing.get(change.split(" ")[0], False):
        case = replace(case, change="")
    # The rest on eager attention alone: each combination of these is a model to build.
    special = case.tokenizer or case.dtype != "float32" or case.change.startswith("adapter")
    if special or case.change == "attention" or case.hook == "zero pattern":
        case = replace(case, attn="eager")
    if (case.hook == "torch" and not kind.matters.endswith(("norm.weight", "ln_1.weight"))) or (
        case.hook == "zero pattern" and case.family not in LANDS
    ):
        case = replace(case, hook="")
    # By the length of a prompt: padded with others, it would be another's.
    if case.hook == "long" and (case.padded or len(set(case.lengths)) > 1):
        case = replace(case, hook="")
    if case.call in ("spread", "spectrum", "interference", "rank"):
        case = replace(case, on="qk", sigma=0.3)
    # In half precision what is read is close to nothing else than attention itself.
    if case.dtype == "bfloat16" and case.call not in ("probe", "spread", "spectrum"):
        case = replace(case, dtype="float32")
    if case.mode == "autocast" and (case.call != "probe" or case.dtype != "float32"):
        case = replace(case, mode="")
    if case.mode == "autocast" and case.change:
        case = replace(case, change="asked before")
    return case


# --- from a case to inputs -------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """A case's inputs, as the library takes them and as Hugging Face's model does.

    Attributes:
        tokens, options: the library's argument, and what is given beside it.
        inputs: the model's own, padded tensors.
        spans: each prompt's real columns.
        decoder_spans: the same of the decoder's tokens.
        firsts: of each prompt, real positions (counted from its first one) of first tokens.
        padding: columns of each prompt that are none of its tokens.
    """

    tokens: Any
    options: dict[str, Any]
    inputs: dict[str, Any]
    spans: tuple[tuple[int, int], ...]
    decoder_spans: tuple[tuple[int, int], ...] = ()
    firsts: tuple[tuple[int, ...], ...] = ()
    padding: tuple[int, ...] = field(default=())


def given(case: Case, model: zoo.Model) -> Given:
    """The inputs of a case."""
    if case.form in TEXTS:
        return _texts(case, model)
    rows = _ids(case)
    ids, mask, spans = _pad(rows, case.side, case.extra)
    inputs: dict[str, Any] = {"input_ids": ids}
    if case.padded and case.form not in RAGGED:
        inputs["attention_mask"] = mask
    elif case.mask in SQUARES:
        inputs["attention_mask"] = _documents(ids)
    elif case.mask and case.form not in ("ragged lists", "records"):
        inputs["attention_mask"] = mask
    positions = _positions(case.positions, ids, spans)
    firsts: list[tuple[int, ...]] = [(0,) for _ in rows]
    if positions is not None:
        inputs["position_ids"] = positions
        each = positions.expand(len(rows), -1)
        firsts = [_firsts(p[a:b]) for p, (a, b) in zip(each, spans, strict=True)]
    if case.cache:
        inputs["use_cache"] = case.cache == "True"
    generator = torch.Generator().manual_seed(case.seed + 50)
    if case.beside == "token types":
        inputs["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=generator)
    decoder_spans: tuple[tuple[int, int], ...] = ()
    beside: dict[str, Any] = {}
    if model.family.has_decoder:
        decoder_spans, beside = _decoder(case, rows, generator)
        inputs |= {n: v for n, v in beside.items() if n != "labels"}
    tokens, options = _as_given(case, inputs, rows, beside)
    padding = tuple(ids.shape[1] - (b - a) for a, b in spans)
    if case.form in RAGGED:
        padding = (0,) * len(rows)
        inputs["attention_mask"] = mask  # rows of unequal length are prompts of their own
        if not case.padded:
            del inputs["attention_mask"]
    return Given(tokens, options, inputs, spans, decoder_spans, tuple(firsts), padding)


def _ids(case: Case) -> list[list[int]]:
    """No special tokens, some words twice."""
    rng = np.random.default_rng(case.seed)
    return [rng.integers(6, VOCAB, n).tolist() for n in case.lengths]


def _pad(
    rows: list[list[int]], side: str, extra: int
) -> tuple[Tensor, Tensor, tuple[tuple[int, int], ...]]:
    width = max(map(len, rows)) + extra
    ids = torch.full((len(rows), width), zoo.PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    spans = []
    for i, row in enumerate(rows):
        first = width - len(row) if side == "left" else 0
        spans.append((first, first + len(row)))
        ids[i, slice(*spans[-1])] = torch.tensor(row)
        mask[i, slice(*spans[-1])] = 1
    return ids, mask, tuple(spans)


def _documents(ids: Tensor) -> Tensor:
    """[batch, 1, query, key]: causal, and two documents that do not see each other."""
    at = torch.arange(ids.shape[1])
    document = at >= ids.shape[1] // 2
    seen = (at[:, None] >= at) & (document[:, None] == document)
    hidden = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    return hidden.expand(len(ids), 1, -1, -1)


def _squared(hidden: Tensor, kind: str) -> Tensor:
    """The same as a caller writes it; biased, and hidden by half, it is no mask."""
    if kind == "square bool":
        return hidden == 0
    if kind == "square soft":
        return hidden.clamp_min(-10_000.0)
    distance = torch.arange(hidden.shape[-1]) - torch.arange(hidden.shape[-1])[:, None]
    return hidden + 0.125 * distance.clamp_max(0) if kind == "square bias" else hidden


def _positions(kind: str, ids: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor | None:
    """Ids of positions, counted from each prompt's first real token; 0 under padding."""
    if not kind:
        return None
    out = torch.zeros_like(ids)
    for i, (first, end) in enumerate(spans):
        p = torch.arange(end - first)
        half = (end - first) // 2
        out[i, first:end] = {
            "count": p,
            "offset": p + 5,
            "shared": p + 5,
            "gap": p + 20 * (p >= half),
            "stretched": 2 * p,
            "zero": 0 * p,
            "packed": torch.where(p >= half, p - half, p),
            "packed inside": torch.where(p >= half, p - half, p + 4),  # a row cuts a document
        }[kind]
    return out[:1] if kind == "shared" else out


def _firsts(positions: Tensor) -> tuple[int, ...]:
    """Where a document begins: at the first token, and where positions restart."""
    p = positions.tolist()
    return (0, *(i for i in range(1, len(p)) if p[i] < p[i - 1]))


def _decoder(
    case: Case, rows: list[list[int]], generator: torch.Generator
) -> tuple[tuple[tuple[int, int], ...], dict[str, Any]]:
    """The decoder's real columns and inputs; by default the start token and the prompt."""
    if not case.decoder:
        shifted = [[zoo.BOS, *row[:-1]] for row in rows]
        ids, mask, spans = _pad(shifted, "right", 0)
        return spans, {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    n = len(rows)
    lengths = [7] * n
    padded = case.decoder in ("padded", "padded left", "unmasked", "collated")
    if padded:
        lengths = [7 - 2 * (i % 2) for i in range(n)]
    made = [
        [zoo.BOS, *torch.randint(6, VOCAB, (m - 1,), generator=generator).tolist()] for m in lengths
    ]
    side = "left" if case.decoder.endswith("left") else "right"
    ids, mask, spans = _pad(made, side, 0)
    out = {"decoder_input_ids": ids}
    if case.decoder.startswith("padded"):
        out["decoder_attention_mask"] = mask
    if case.decoder == "collated":  # as `DataCollatorForSeq2Seq` makes them of labels
        labels = torch.cat([ids[:, 1:], torch.full((n, 1), zoo.PAD)], 1)
        for i, m in enumerate(lengths):
            labels[i, m - 1], labels[i, m:] = zoo.EOS, -100
        moved = torch.cat([ids[:, :1], labels[:, :-1]], 1)
        spans = tuple((0, min(m + 1, ids.shape[1])) for m in lengths)
        out = {"decoder_input_ids": moved.where(moved >= 0, zoo.PAD), "labels": labels}
    if case.decoder == "labels too":
        out["labels"] = torch.cat([ids[:, 1:], torch.full((n, 1), zoo.EOS)], 1)
    if case.decoder == "labels alone":  # the model shifts them itself
        return spans, {"decoder_input_ids": ids, "labels": torch.roll(ids, -1, 1)}
    return spans, out


def _as_given(
    case: Case, inputs: Mapping[str, Any], rows: list[list[int]], beside: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The library's argument, and the options beside it."""
    kinds = {"bool": torch.bool, "float": torch.float32, "int32": torch.int32}
    options: dict[str, Any] = {}
    named = {n: v for n, v in inputs.items() if not n.startswith("decoder")}
    if "attention_mask" in named:
        mask = named["attention_mask"]
        if case.mask in SQUARES:
            named["attention_mask"] = _squared(mask, case.mask)
        else:
            named["attention_mask"] = mask.to(kinds.get(case.mask, torch.long))
    if case.decoder:
        named |= beside
    if case.decoder == "labels alone":
        del named["decoder_input_ids"]
    if case.beside == "labels":
        real = _pad(rows, case.side, case.extra)[1] == 1  # as collators make them
        named["labels"] = named["input_ids"].where(real, -100)
    if case.beside == "cache":
        named["past_key_values"] = DynamicCache()
    if case.form in ("tensor", "numpy", "row", "rows", "tensors"):
        if "attention_mask" in named and case.form in ("tensor", "numpy") and case.mask != "pads":
            options["attention_mask"] = named["attention_mask"]
        if "decoder_input_ids" in named:
            options["decoder_tokens"] = named["decoder_input_ids"]
        ids = named["input_ids"]
        forms: dict[str, Any] = {"tensor": ids, "row": ids[0], "numpy": ids.numpy()}
        forms |= {"rows": rows, "tensors": [torch.tensor(row) for row in rows]}
        if case.form == "row" and "decoder_tokens" in options:
            options["decoder_tokens"] = options["decoder_tokens"][0]
        return forms[case.form], options

    def lists(x: Any) -> Any:
        return x.tolist() if isinstance(x, Tensor) else x

    if case.form == "arrays":
        return {n: v.numpy() if isinstance(v, Tensor) else v for n, v in named.items()}, options
    if case.form == "encoding":
        return BatchEncoding(named), options
    if case.form in ("lists", "encoding of lists"):
        made = {n: lists(v) for n, v in named.items()}
        return (made if case.form == "lists" else BatchEncoding(made)), options
    if case.form == "records":
        records: list[dict[str, Any]] = [{"input_ids": row} for row in rows]
        for i, record in enumerate(records):
            if case.mask:
                record["attention_mask"] = [1] * len(rows[i])
            if "decoder_input_ids" in named:
                record["decoder_input_ids"] = named["decoder_input_ids"][i].tolist()
        return records, options
    if case.form == "ragged lists":
        made = {n: lists(v) for n, v in named.items()} | {"input_ids": rows}
        made.pop("attention_mask", None)
        if case.mask:
            made["attention_mask"] = [[1] * len(row) for row in rows]
        if case.beside == "labels":
            made["labels"] = rows
        return made, options
    return dict(named), options


def _texts(case: Case, model: zoo.Model) -> Given:
    """Texts, and what the tokenizer's template makes of them: one BOS at the front."""
    rng = np.random.default_rng(case.seed)
    words = [rng.integers(6, VOCAB, n - 1).tolist() for n in case.lengths]
    options: dict[str, Any] = {}
    tokenizer = model.tokenizer
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if case.form in ("chat", "template"):
        chats = [[{"role": "user", "content": zoo.said(row)}] for row in words]
        rows = [tokenizer.apply_chat_template(c, tokenize=True)["input_ids"] for c in chats]
        tokens: Any = chats
        if case.form == "template":
            tokens = [tokenizer.apply_chat_template(c, tokenize=False) for c in chats]
        tokens = tokens[0] if len(tokens) == 1 else tokens
    else:
        if case.words == "pad inside":
            for row in words:
                row[len(row) // 2] = tokenizer.pad_token_id
        if case.words == "ends":
            words = [[*row, eos] for row in words]
        if case.words == "no bos":
            options["prepend_bos"] = False
        begun = [[bos, *row] for row in words]
        said = begun if case.words == "begins" else words
        bare = case.words == "no bos" or not (model.family.bos or case.words == "begins")
        rows = words if bare else begun
        texts = [zoo.said(row) for row in said]
        tokens = texts[0] if case.form == "text" else texts
    ids, mask, spans = _pad(rows, "right", 0)
    inputs: dict[str, Any] = {"input_ids": ids}
    if len({len(row) for row in rows}) > 1:
        inputs["attention_mask"] = mask
    n = len(rows)
    return Given(tokens, options, inputs, spans, (), ((0,),) * n, (0,) * n)
