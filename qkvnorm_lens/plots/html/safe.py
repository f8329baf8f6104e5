"""Text and data of unknown origin, made safe for a page.

Tokens may be anything: markup, quotes, template syntax, characters that change the reading
direction. Text goes through ``escape`` (or a template with autoescape), data through `island`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from markupsafe import Markup

_LONGEST = 40
_SHORT = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def visible(text: str, longest: int = _LONGEST) -> str:
    """Invisible and direction-changing characters become their codes; long text is cut."""
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return "".join(_SHORT.get(c, c if c.isprintable() else repr(c)[1:-1]) for c in text)


def token(text: str) -> Markup:
    """A token as an element that other text's direction does not affect."""
    return Markup("<bdi>{}</bdi>").format(visible(text) or "∅")


def as_json(data: Any) -> str:
    """JSON that is safe in a page: nothing in it ends a script or starts a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def island(name: str, data: Any) -> Markup:
    """Data for a script, in an element that is never run."""
    return Markup('<script type="application/json" id="{}">{}</script>').format(
        name, Markup(as_json(data))
    )


def script(source: str) -> Markup:
    """One of our own scripts, inline.

    Raises:
        ValueError: it would end its own element.
    """
    if "</script" in source.lower():
        raise ValueError("script: wanted a source without its closing tag; got one")
    return Markup("<script>{}</script>").format(Markup(source))


def policy(scripts: list[str]) -> str:
    """The page's content security policy: only these scripts run, and nothing is loaded."""
    hashes = " ".join(
        "'sha256-" + base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() + "'"
        for s in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes or chr(39) + 'none' + chr(39)}; style-src "
        "'unsafe-inline'; img-src data:; font-src data:; base-uri 'none'; form-action 'none'"
    )
