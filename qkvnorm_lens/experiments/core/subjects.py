"""Which models an experiment looks at, by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qkvnorm_lens.experiments.core.base import Size, Subject
from qkvnorm_lens.experiments.core.digest import digest_of, digest_of_hub
from qkvnorm_lens.experiments.core.studies import trained
from qkvnorm_lens.models import (
    LoadError,
    checkpoint_path,
    checkpoints,
    find,
    how_to_get,
    read_card,
    read_object,
)


def default_subjects(size: Size) -> tuple[Subject, ...]:
    """The study models, where they are here, and the shipped ones; few in the small forms.

    ``full``: all, and further seeds of the shipped ones; ``quick``: the shipped ones and the first
    seed of each study model; ``smoke``: the first seed of Pre-Norm and QKV-Norm (without study
    models: the shipped ones).
    """
    study = trained("study-")
    if size == "smoke":
        chosen = [
            study.get(f"study-{placement}-1", checkpoint_path(f"addition-{placement}"))
            for placement in ("pre", "qkv")
        ]
    elif size == "quick":
        chosen = [path for name, path in study.items() if name.endswith("-1")]
    else:
        chosen = list(study.values())
    shipped = [] if size == "smoke" else [checkpoint_path(name) for name in checkpoints()]
    further = trained("addition-").values() if size == "full" else []
    return tuple(_from_directory(path.name, path) for path in [*chosen, *shipped, *further])


def find_subjects(names: Sequence[str]) -> tuple[Subject, ...]:
    """Models by name: a trained or shipped one, a directory, a hub id.

    ``study`` and ``language`` stand for all trained models of that name.

    Raises:
        LoadError: no such model.
        ValueError: two models of one name, which results could not tell apart.
    """
    found: list[Subject] = []
    for name in names:
        several = name in ("study", "language")
        known = trained(f"{name}-") if several else trained()
        if several and not known:
            raise LoadError(f"models: wanted the models {name}-*; got none: {how_to_get()}")
        if several:
            found += [_from_directory(n, path) for n, path in known.items()]
        elif name in known:
            found.append(_from_directory(name, known[name]))
        else:
            source = find(name)
            if source.path is None:
                digest = digest_of_hub(name)
                found.append(Subject(name, "language", None, "", name, None, digest))
            else:
                found.append(_from_directory(source.path.name, source.path))
    unique = list({(s.name, s.path): s for s in found}.values())
    names_of = [s.name for s in unique]
    for subject in unique:
        if names_of.count(subject.name) > 1:
            paths = [str(s.path) for s in unique if s.name == subject.name]
            raise ValueError(f"models: wanted directories of different names; got {paths}")
    return tuple(unique)


def _from_directory(name: str, path: Path) -> Subject:
    config: dict[str, Any] = read_object(path / "config.json")
    ours = config.get("architecture") == "QKVNormTransformer"
    card = path / "card.json"
    run = read_card(card).get("run", {}) if card.is_file() else {}
    seed = run.get("seed")
    group = name.removesuffix(f"-{seed}") if seed is not None else name
    return Subject(
        name=name,
        kind="addition" if ours and config.get("d_vocab") == 17 else "language",
        path=path,
        placement=_placement(config) if ours else "",
        group=group,
        seed=seed,
        digest=digest_of(path),
    )


def _placement(config: dict[str, Any]) -> str:
    """Where a model of ours has its norm; ``"qk"`` where v has none."""
    norm = config.get("norm")
    on = norm.get("on") if isinstance(norm, dict) else None
    return "qk" if on == "qk" else str(config.get("placement", ""))
