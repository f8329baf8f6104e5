"""Which model a directory holds: its bytes, never its name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

_BLOCK: Final = 1 << 24
_FILES: Final = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf",
    "config.json", "adapter_config.json", "tokenizer*", "vocab.*", "merges.txt", "*.model",
    "special_tokens_map.json", "added_tokens.json", "*.py",
)  # fmt: skip


def digest_of(path: Path) -> str:
    """Of configuration, weights and tokenizer, byte by byte."""
    digest = hashlib.sha256()
    for file in sorted({f for pattern in _FILES for f in path.glob(pattern)}):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()[:16]


def digest_of_hub(name: str) -> str:
    """The same of what the Hugging Face cache holds of a name; empty where it holds nothing."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        held = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # an alias of TransformerLens, or no name at all
        return ""
    return digest_of(Path(held).parent) if isinstance(held, str) else ""
