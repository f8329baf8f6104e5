"""What the site shows from outside docs/: README and the like, results, tutorials, as they are.

Links in the pages are those that work in the repository; here they are turned to the site's. What
the site does not have, a source file say, is named there without a link.
"""

from __future__ import annotations

import importlib.util
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tutorials/README.md": "tutorials/index.md",
}
NOTEBOOKS = {
    path.relative_to(ROOT).as_posix(): f"tutorials/{path.stem}.md"
    for path in sorted((ROOT / "tutorials").glob("*.ipynb"))
}
_HOME = {target: source for source, target in (PAGES | NOTEBOOKS).items()}
SHOWN = ("figure.png", "table.csv", "about.json")
_LINK = re.compile(
    r"(?P<image>!?)\[(?P<words>[^\]\n]*(?:\n[^\]\n]+)?)\]\((?!#|[a-z]+:)(?P<to>[^)\s]+)\)"
)


def on_files(files: Files, config: Any) -> Files:
    """Add them to the files of the site."""
    shown = {target: ROOT / source for source, target in PAGES.items()}
    for path in sorted((ROOT / "results").rglob("*")):
        if path.name in SHOWN and "parts" not in path.parts:
            shown[path.relative_to(ROOT).as_posix()] = path
    for target, path in shown.items():
        files.append(File.generated(config, target, abs_src_path=str(path)))
    tutorials = _beside("tutorials")
    for source, target in NOTEBOOKS.items():
        text, pictures = tutorials.page(ROOT / source)
        files.append(File.generated(config, target, content=text))
        for name, data in pictures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=data))
    return files


def _beside(name: str) -> Any:
    """The module of that name in this folder, which is on nobody's path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Turn links that leave docs/ to where the site has their targets."""
    uri = page.file.src_uri
    here = posixpath.dirname(_HOME.get(uri, f"docs/{uri}"))
    folder = posixpath.dirname(uri)

    def turned(link: re.Match[str]) -> str:
        path, mark, anchor = link["to"].partition("#")
        target = posixpath.normpath(posixpath.join(here, path))
        on_site = (PAGES | NOTEBOOKS).get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(on_site) is not None:
            to = posixpath.relpath(on_site, folder or ".")
            return f"{link['image']}[{link['words']}]({to}{mark}{anchor})"
        elsewhere = not link["image"] and not target.startswith("docs/")
        return link["words"] if elsewhere and (ROOT / target).exists() else link[0]

    return _LINK.sub(turned, markdown)
