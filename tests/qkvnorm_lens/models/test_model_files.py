"""Our models on disk: what was written is loaded, or refused by one error that names the file."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qkvnorm_lens import load_model
from qkvnorm_lens.models.bridge import from_pretrained, save_pretrained, to_bridge
from qkvnorm_lens.models.cards import LoadError, write_card
from qkvnorm_lens.models.config import named_config
from qkvnorm_lens.models.loading import find
from qkvnorm_lens.models.model import QKVNormTransformer
from qkvnorm_lens.training.addition import build_tokenizer, trained_on
from tests.support import mutations
from tests.support.runs import TINY

FILES = ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "card.json"]
CARD = {"name": "tiny", "run": {"seed": 3, "split": {"counts": [2, 3], "digits": [2]}}, "x": 0.5}


def tiny() -> QKVNormTransformer:
    model = QKVNormTransformer(named_config("study", "pre", **TINY)).eval()
    model.tokenizer = build_tokenizer()
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(tiny(), folder)
    write_card(CARD, folder / "card.json")
    return folder


@pytest.fixture(scope="module")
def undigested(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as the build before wrote it."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(written, tmp_path_factory.mktemp("old") / "model"))
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "card.json").write_text(json.dumps(CARD))
    return folder


def loaded(folder: Path) -> dict[str, Any]:
    """Everything that a directory gives."""
    model = load_model(str(folder), device="cpu")
    plain = {n: p.detach() for n, p in sorted(model.original_model.named_parameters())}
    return {
        "weights": [(n, p.dtype, tuple(p.shape), p.numpy().tobytes()) for n, p in plain.items()],
        "config": {k: v for k, v in model.cfg.to_json().items() if k != "model_name"},
        "tokens": model.tokenizer.get_vocab(),
        "bos": (model.tokenizer.bos_token_id, model.tokenizer.pad_token_id),
        "split": trained_on(find(str(folder))),
    }


@pytest.fixture(scope="module")
def whole(written: Path) -> dict[str, Any]:
    return loaded(written)


def refused_or_equal(
    name: str, seeds: range, written: Path, whole: dict[str, Any], folder: Path
) -> int:
    refused = 0
    for seed in seeds:
        path = folder / "model"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(written, path)
        kinds = mutations.SAFETENSORS if name.endswith("safetensors") else mutations.BYTES
        what, data = mutations.damaged((path / name).read_bytes(), seed, kinds)
        (path / name).write_bytes(data)
        try:
            found = loaded(path)
        except LoadError:
            refused += 1
        else:
            assert found == whole, f"{name}: {what}"
    return refused


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_model_is_refused_or_equal(
    name: str, written: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    assert refused_or_equal(name, range(18), written, whole, tmp_path) > 9


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
def test_six_hundred_damaged_models(
    name: str, written: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    assert refused_or_equal(name, range(100, 220), written, whole, tmp_path) > 60


def usable(name: str, seeds: range, undigested: Path, folder: Path) -> None:
    """Without a digest a number can change unseen; what loads then is a model that runs."""
    for seed in seeds:
        path = folder / "model"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(undigested, path)
        kinds = mutations.SAFETENSORS if name.endswith("safetensors") else mutations.BYTES
        what, data = mutations.damaged((path / name).read_bytes(), seed, kinds)
        (path / name).write_bytes(data)
        try:
            loaded(path)
            logits = load_model(str(path), device="cpu")(torch.tensor([[1, 2, 3, 4]]))
        except LoadError:
            continue
        except Exception as error:
            raise AssertionError(f"{name}: {what}: {error!r}") from error
        assert logits.shape[:2] == (1, 4), what


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "card.json"])
def test_one_of_the_build_before_is_refused_or_runs(
    name: str, undigested: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    assert loaded(undigested) == whole
    usable(name, range(10), undigested, tmp_path)


# -- by name --------------------------------------------------------------------------------------


def _bit(data: bytes) -> bytes:
    at = len(data) - 3
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


CASES: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("model.safetensors", _bit, r"model.safetensors: wanted what was written"),
    ("model.safetensors", lambda data: data[:-1], r"model.safetensors: .*wanted .* bytes; got"),
    ("model.safetensors", lambda data: b"junk", r"model.safetensors: header: wanted"),
    ("config.json", lambda data: data.replace(b'"pre"', b'"qkv"'), r"config.json: wanted what was"),
    ("config.json", lambda data: b"[1]", r"config.json: wanted a JSON object; got list"),
    ("config.json", lambda data: b"{" * 99_999, r"config.json: wanted JSON; got"),
    ("config.json", lambda data: b"\xff\xfe", r"config.json: wanted JSON; got"),
    ("tokenizer.json", lambda data: data.replace(b'"1"', b'"x"'), r"tokenizer.json: wanted what"),
    ("tokenizer_config.json", lambda data: b"{}", r"tokenizer_config.json: wanted what was"),
    ("card.json", lambda data: data.replace(b"3", b"4"), r"card.json: wanted the card that was"),
    ("card.json", lambda data: data[:-9], r"card.json: wanted JSON; got"),
    ("card.json", lambda data: b'{"run": 3}', r"card.json: wanted an object in run; got int"),
    ("card.json", lambda data: b'{"run": {"split": 3}}', r"card.json: wanted a kind of sums"),
    ("card.json", lambda data: b'{"run": {"split": {}}}', r"card.json: wanted a kind of sums"),
]


@pytest.mark.parametrize(("name", "change", "said"), CASES)
def test_the_damaged_file_is_named(
    name: str, change: Callable[[bytes], bytes], said: str, written: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "model"))
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(LoadError, match=said):
        loaded(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", 10**9),
        ("n_layers", 10**6),
        ("d_mlp", 17),
        ("n_ctx", 10**12),
        ("n_heads", 3),
        ("n_layers", 5),
        ("n_heads", 10**9),
    ],
)
def test_a_configuration_of_another_size_costs_no_memory(
    field: str, value: int, undigested: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(undigested, tmp_path / "model"))
    values = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(LoadError, match="wanted"):
        loaded(folder)


def test_how_attention_runs_may_be_changed_by_hand(written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "model"))
    values = json.loads((folder / "config.json").read_text())
    values["attn_implementation"] = "sdpa"
    (folder / "config.json").write_text(json.dumps(values))
    assert from_pretrained(folder).cfg.attn_implementation == "sdpa"


def test_a_missing_tokenizer_is_missed(written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(LoadError, match=r"tokenizer.json: wanted .* got no such file"):
        from_pretrained(folder)


def test_the_same_model_is_written_in_the_same_bytes(written: Path, tmp_path: Path) -> None:
    for i in range(4):
        save_pretrained(tiny(), tmp_path / f"{i}")
        for name in FILES[:4]:
            assert (tmp_path / f"{i}" / name).read_bytes() == (written / name).read_bytes()


@pytest.mark.parametrize("room", [0, 100, 3000])
def test_a_full_disk_leaves_the_model_before(room: int, written: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    folder = Path(shutil.copytree(written, tmp_path / "model"))
    bridge = to_bridge(tiny())
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    bridge.tokenizer = None
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        with pytest.raises(OSError, match="not written, the file of before is whole") as full:
            save_pretrained(bridge, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert full.value.errno == errno.EFBIG
    for name in FILES:
        assert (folder / name).read_bytes() == (written / name).read_bytes()
