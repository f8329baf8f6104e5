"""The style that all pages share."""

from importlib.resources import files


def style() -> str:
    """The style sheet of the report's page and of the attention views."""
    return (files("qkvnorm_lens.plots.html") / "page.css").read_text(encoding="utf-8")
