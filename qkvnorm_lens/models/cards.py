"""JSON files of a model: its configuration and its card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


class LoadError(ValueError):
    """A model that can't be loaded; the message says what was expected and what to do."""


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        LoadError: it is not one, or can't be read.
    """
    from hooks.reports import Unsound, read_json

    try:
        value = read_json(path.read_bytes(), str(path))
    except Unsound as error:
        raise LoadError(str(error)) from error
    except OSError as error:
        raise LoadError(f"{path}: wanted a file that can be read; got {error}") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path}: wanted a JSON object; got {type(value).__name__}")
    return value


def read_card(path: Path) -> dict[str, Any]:
    """How a model was made, as its card says.

    Raises:
        LoadError: it is not a card, or not the one that was written.
    """
    card = read_object(path)
    if "digest" in card and card["digest"] != card_digest(card):
        raise LoadError(f"{path}: wanted the card that was written; got another digest")
    if not isinstance(card.get("run", {}), dict):
        raise LoadError(f"{path}: wanted an object in run; got {type(card['run']).__name__}")
    return card


def card_digest(card: dict[str, Any]) -> str:
    """Digest of everything in a card except the digest."""
    said = json.dumps({k: v for k, v in card.items() if k != "digest"}, sort_keys=True)
    return f"sha256:{hashlib.sha256(said.encode()).hexdigest()}"


def write_card(card: dict[str, Any], path: Path) -> None:
    """Write a card with its digest, whole or not at all."""
    from hooks.reports import write_whole

    plain = json.loads(json.dumps(card))
    text = json.dumps({**plain, "digest": card_digest(plain)}, indent=2)
    write_whole(path, f"{text}\n".encode())
