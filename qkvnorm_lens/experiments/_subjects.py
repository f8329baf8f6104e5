"""Which models an experiment looks at, by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qkvnorm_lens import loading
from qkvnorm_lens.checkpoints import checkpoint_path, checkpoints
from qkvnorm_lens.experiments._base import Size, Subject
from qkvnorm_lens.experiments.train import trained

_EDGE = 1 << 20
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def default_subjects(size: Size) -> tuple[Subject, ...]:
    """The study models and the shipped ones; few of them in the small forms.

    ``full``: all; ``quick``: the shipped ones and the first seed of each study model; ``smoke``:
    the first seed of Pre-Norm and QKV-Norm.
    """
    study = trained("study-")
    if size == "smoke":
        chosen = [study[name] for name in ("study-pre-1", "study-qkv-1")]
    elif size == "quick":
        chosen = [path for name, path in study.items() if name.endswith("-1")]
    else:
        chosen = list(study.values())
    shipped = [] if size == "smoke" else [checkpoint_path(name) for name in checkpoints()]
    return tuple(_from_directory(path.name, path) for path in [*chosen, *shipped])


def find_subjects(names: Sequence[str]) -> tuple[Subject, ...]:
    """Models by name: a trained or shipped one, ``study`` for all of those, a directory, a hub id.

    Raises:
        LoadError: no such model.
    """
    found: list[Subject] = []
    for name in names:
        known = trained("study-") if name == "study" else trained()
        if name == "study":
            found += [_from_directory(n, path) for n, path in known.items()]
        elif name in known:
            found.append(_from_directory(name, known[name]))
        else:
            source = loading.find(name)
            if source.path is None:
                found.append(Subject(name, "language", None, "", name, None, ""))
            else:
                found.append(_from_directory(source.path.name, source.path))
    return tuple({subject.name: subject for subject in found}.values())


def _from_directory(name: str, path: Path) -> Subject:
    config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    ours = config.get("architecture") == "QKVNormTransformer"
    card = path / "card.json"
    run = json.loads(card.read_text(encoding="utf-8")).get("run", {}) if card.is_file() else {}
    seed = run.get("seed")
    group = name.removesuffix(f"-{seed}") if seed is not None else name
    return Subject(
        name=name,
        kind="addition" if ours and config.get("d_vocab") == 17 else "language",
        path=path,
        placement=str(config.get("placement", "")) if ours else "",
        group=group,
        seed=seed,
        digest=_digest(path),
    )


def _digest(path: Path) -> str:
    """Of the configuration, and of the size and both ends of each file of weights."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted({f for pattern in _WEIGHTS for f in path.glob(pattern)}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_EDGE))
            stream.seek(max(0, size - _EDGE))
            digest.update(stream.read(_EDGE))
    return digest.hexdigest()[:16]
