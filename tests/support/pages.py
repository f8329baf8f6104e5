"""Pages read as a browser reads them, and words that want to harm one."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

from hooks import CollapseReport

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "\"'><svg onload=window.hacked=1>",
    "{{ 7*7 }}{% raw %}",
    "<!--<script>",
    "\u202egnp.exe",
    "a\u200bb\u2028c\x00",
    "שלום",
    "&lt;b&gt;",
    "]]>",
    "' onmouseover='window.hacked=1",
    "\\u003cscript\\u003e",
    "",
    "\n\t\r",
)


VOID = {"meta", "link", "br", "img", "input", "hr"}


def hostile(report: CollapseReport) -> CollapseReport:
    """The same report of other words."""
    tokens = tuple(
        tuple(HOSTILE[(i + j) % len(HOSTILE)] for i in range(len(prompt)))
        for j, prompt in enumerate(report.tokens)
    )
    return replace(report, tokens=tokens, model={**report.model, "name": HOSTILE[0]})


class Reader(HTMLParser):
    """What a browser makes of a page: elements, attributes, and the text of each script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def shape(reader: Reader) -> list[tuple[str, tuple[str, ...]]]:
    """Elements and the names of their attributes: what text must not change."""
    return [(tag, tuple(sorted(attributes))) for tag, attributes in reader.elements]
