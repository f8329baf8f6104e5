"""The pages' template and style."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined

_HERE = files("qkvnorm_lens._html")


def source(name: str) -> str:
    """A file beside this one."""
    return (_HERE / name).read_text(encoding="utf-8")


def style() -> str:
    """What all pages look like."""
    return source("page.css")


def environment() -> Environment:
    """Templates in which everything is escaped that does not say that it is markup."""
    return Environment(
        autoescape=True,
        loader=FunctionLoader(source),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
