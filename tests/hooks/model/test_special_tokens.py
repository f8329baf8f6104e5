"""Texts: BOS, chat templates, and tokens that are said or added."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hooks import collapse_probe
from hooks.model.encoding import encode
from qkvnorm_lens.text import windows
from tests.support.models import (
    tiny_llama,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:transformer_lens", "ignore::FutureWarning"
)


WORDS = ["the", "cat", "sat", "on", "mat", "user", "assistant", "system"]
SPECIAL = ["<s>", "</s>", "<pad>", "<unk>", "<turn>", "<end>"]
TEMPLATE = (
    "{{ BOS }}{% for m in messages %}<turn> {{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant{% endif %}"
)


@pytest.fixture(scope="module", params=["<s> ", ""], ids=["template with bos", "without"])
def speaker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose tokenizer has a chat template, with a BOS of its own or none."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<turn>", "<end>"],
        chat_template=TEMPLATE.replace("{{ BOS }}", request.param),
    ).save_pretrained(folder)
    return tiny_llama(tokenizer=AutoTokenizer.from_pretrained(folder))


CHAT = [{"role": "user", "content": "the cat sat"}]


def test_a_templates_text_gets_no_second_bos(speaker: Any) -> None:
    """Its text, its messages and its own ids are one prompt."""
    tokenizer = speaker.tokenizer
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for given in (text, [text], CHAT, [CHAT], [ids]):
        found = encode(speaker, given)
        assert [row.tolist() for row in found.first] == [ids], given
    assert "got no BOS" in encode(speaker, text).notes[0]
    assert "chat template" in encode(speaker, CHAT).notes[0]
    report = collapse_probe(speaker, [CHAT, "the cat"], draws=0, sparse=0.5)
    assert "written by the tokenizer's chat template (1 of 2 prompts)" in report.summary()


@pytest.mark.parametrize(
    ("text", "prepend_bos", "expected"),
    [
        ("the cat", None, "<s> the cat"),
        ("<s> the cat", None, "<s> the cat"),
        ("<s> the cat", True, "<s> <s> the cat"),
        ("the cat", False, "the cat"),
        ("<s> the cat", False, "<s> the cat"),
        ("<unk> cat", None, "<s> <unk> cat"),
        ("the cat </s>", None, "<s> the cat </s>"),
        ("<pad> the <pad> cat <pad>", None, "<s> <pad> the <pad> cat <pad>"),
        ("<s> the </s> <s> cat </s>", None, "<s> the </s> <s> cat </s>"),
    ],
)
def test_special_tokens_in_a_text_are_what_they_say(
    speaker: Any, text: str, prepend_bos: bool | None, expected: str
) -> None:
    ids = speaker.tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert encode(speaker, text, prepend_bos=prepend_bos).first[0].tolist() == ids


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose tokenizer puts a token before and one behind, as BERT's does."""
    from transformers import AutoTokenizer, BertTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return tiny_llama(tokenizer=AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("begins", ["", "[CLS] "])
@pytest.mark.parametrize("ends", ["", " [SEP]"])
def test_a_text_with_its_own_last_token_gets_no_second(reader: Any, begins: str, ends: str) -> None:
    """What was written out is what the tokenizer would have put there, once."""
    given, ids = f"{begins}the cat sat{ends}", reader.tokenizer("the cat sat")["input_ids"]
    found = encode(reader, given)
    assert found.first[0].tolist() == ids == [2, 5, 6, 7, 3]
    notes = " ".join(found.notes)
    assert ("got no BOS" in notes, "got none after it" in notes) == (bool(begins), bool(ends))
    whole = windows(reader, given, length=8)
    assert whole.ids == [ids]
    first, *later = windows(reader, given, length=4).ids
    assert first == ids[:4]
    # Each window begins as a prompt does, unless the text brought its own beginning.
    assert later == ([] if begins else [[2, 3]])


def test_pad_tokens_are_padding_only_where_rows_differ_in_them(speaker: Any) -> None:
    """A text, a list and a tensor of one row keep them; in a batch the longest row has none."""
    pad, row = 2, [0, 6, 2, 7, 2]
    for given in ([row], torch.tensor(row), torch.tensor([row])):
        assert encode(speaker, given).first[0].tolist() == row
    batch = torch.tensor([row, [0, 6, 7, 2, 2], [0, 6, 2, 2, 2]])
    found = encode(speaker, batch)
    assert [r.tolist() for r in found.first] == [row, [0, 6, 7, 2], [0, 6, 2]]
    assert found.padding == (0, 1, 2)
    assert "is taken for padding" in found.notes[0]
    left = encode(speaker, batch.flip(1))
    assert left.padding == (0, 1, 2)
    assert encode(speaker, batch, attention_mask=torch.ones_like(batch)).padding == (0, 0, 0)
    assert pad == speaker.tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([[{"role": "user", "content": "a"}], "the", 3], "prompt 2: wanted|tokens: wanted integer"),
        ([CHAT, None], "prompt 1: wanted text or integer ids; got None"),
        ([CHAT, ""], "prompt 1: wanted text; got an empty one"),
        (["the cat", 3.5], "prompt 1: wanted|tokens: wanted integer ids"),
    ],
)
def test_what_is_no_text_is_named(speaker: Any, given: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        encode(speaker, given)
