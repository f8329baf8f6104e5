"""The documentation: what it shows runs, what it names exists, and nothing public is left out.

Blocks of ```python in a page run one behind the other in one namespace; a block of ```text right
behind one is what it prints. A page that begins with `<!-- slow -->` runs with the slow tests, and
`<!-- not run: why -->` keeps one block from running.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

import qkvnorm_lens
from qkvnorm_lens.cli import build_parser
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
OURS = sorted(p for folder in ("concepts", "how-to", "errors") for p in (DOCS / folder).glob("*"))
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "tutorials/README.md", ROOT / "CONTRIBUTING.md"]

_FENCE = re.compile(
    r"(?P<skip><!-- not run: .+? -->\n)?^```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.M | re.S
)


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _blocks(page: Path) -> list[re.Match[str]]:
    return list(_FENCE.finditer(page.read_text()))


def _runnable() -> Iterator[Any]:
    for page in [DOCS / "index.md", *OURS]:
        if not any(b["kind"] == "python" and not b["skip"] for b in _blocks(page)):
            continue
        text = page.read_text()
        marks = [pytest.mark.slow] if text.startswith("<!-- slow -->") else []
        if '"gpt2"' in text:
            marks += [pytest.mark.slow, pytest.mark.real_model]
        yield pytest.param(page, id=_name(page), marks=marks)


@pytest.mark.parametrize("page", list(_runnable()))
def test_the_code_of_a_page_runs_and_prints_what_it_shows(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if request.node.get_closest_marker("real_model"):
        request.getfixturevalue("gpt2_hub")  # "gpt2" is a random model with the real tokenizer
    monkeypatch.chdir(tmp_path)
    text, space = page.read_text(), {"__name__": "page"}
    blocks = _blocks(page)
    for block, behind in zip(blocks, [*blocks[1:], None], strict=True):
        if block["kind"] != "python" or block["skip"]:
            continue
        # Numbered as in the page, so that a traceback leads there.
        code = "\n" * text.count("\n", 0, block.start("body")) + block["body"]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), space)
        shown = behind is not None and behind["kind"] == "text"
        if shown and not text[block.end() : behind.start()].strip():
            assert printed.getvalue() == behind["body"]


def test_every_output_stands_behind_the_code_that_prints_it() -> None:
    for page in [DOCS / "index.md", *OURS]:
        kinds = [(b["kind"], bool(b["skip"])) for b in _blocks(page)]
        for before, (kind, _) in zip([("", False), *kinds], kinds, strict=False):
            assert kind in ("python", "sh", "text"), _name(page)
            assert kind != "text" or before == ("python", False), _name(page)


@pytest.mark.parametrize("page", [DOCS / "index.md", *OURS, *PAGES[-1:]], ids=_name)
def test_commands_exist(page: Path) -> None:
    """Each `qkvnorm-lens ...` parses, and each `make ...` has a target."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for block in _blocks(page):
        if block["kind"] != "sh":
            continue
        for line in block["body"].replace("\\\n", " ").splitlines():
            words = shlex.split(line.rpartition("| ")[2], comments=True)
            words = words[: words.index(">")] if ">" in words else words
            if words[:1] == ["qkvnorm-lens"]:
                build_parser().parse_args(words[1:])
            elif words[:1] == ["make"]:
                assert words[1] in targets


def test_every_command_and_experiment_is_listed() -> None:
    from qkvnorm_lens.cli.command import COMMANDS
    from qkvnorm_lens.experiments.core.registry import NAMES

    for page, names in (("api/command-line.md", COMMANDS), ("how-to/reproduce.md", NAMES)):
        rows = [x.split("|")[1] for x in (DOCS / page).read_text().splitlines() if x[:1] == "|"]
        assert set(names) <= {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}


# -- what is public and what is refused -----------------------------------------------------------


def _api_names() -> set[str]:
    pages = (DOCS / "api").glob("*.md")
    return {name for page in pages for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)}


@pytest.mark.parametrize(
    "package",
    [
        "hooks",
        "qkvnorm_lens",
        "qkvnorm_lens.plots",
        "qkvnorm_lens.theory",
        "qkvnorm_lens.experiments",
    ],
)
def test_every_public_name_is_on_an_api_page(package: str) -> None:
    """By the name of its package, or by the shorter one of the package above."""
    shown = _api_names()
    for name in importlib.import_module(package).__all__:
        homes = (package, package.rpartition(".")[0])
        assert name.startswith("__") or {f"{home}.{name}" for home in homes} & shown, name


def test_api_pages_name_what_exists_and_each_once() -> None:
    named = re.findall(
        r"^::: (\S+)", "\n".join(p.read_text() for p in (DOCS / "api").glob("*.md")), re.M
    )
    assert sorted(named) == sorted(set(named))
    for path in named:
        module, attributes = path, []
        while not _is_module(module):
            module, _, last = module.rpartition(".")
            attributes.insert(0, last)
        found: Any = importlib.import_module(module)
        for attribute in attributes:
            found = getattr(found, attribute)


def _is_module(path: str) -> bool:
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError:
        return False


def _refusals() -> dict[str, str]:
    """Each check by which a model is refused, as a pattern with .+ for what varies, and where."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "hooks").rglob("*.py")) + sorted(
        (ROOT / "qkvnorm_lens").rglob("*.py")
    ):
        tree = ast.parse(path.read_text())
        assigned = _assigned(tree)
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and call.args and path.name != "errors.py":
                for pattern in _checks(call, assigned):
                    found.setdefault(pattern, f"{path.name}:{call.lineno}")
    return found


_REFUSE = ("UnsupportedModelError", "Unpredicted", "undecided", "_compare")


def _checks(call: ast.Call, assigned: dict[str, list[ast.expr]]) -> Iterator[str]:
    """The first argument of a call that refuses, as far as it can be read from the source."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    # A private _refuse takes the check first where it refuses for more than one.
    takes_check = name in _REFUSE or (name == "_refuse" and isinstance(call.func, ast.Attribute))
    if takes_check:
        first = call.args[0]
        values = assigned.get(first.id, []) if isinstance(first, ast.Name) else [first]
        for value in values:
            pattern = _pattern(value)
            if pattern is None or not re.sub(r"\.\+", "", pattern).strip(":\\ ").strip():
                continue
            if not pattern.endswith("not\\ verifiable"):
                yield pattern + (re.escape(": not verifiable") if name == "undecided" else "")


def _assigned(tree: ast.Module) -> dict[str, list[ast.expr]]:
    out: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    out.setdefault(target.id, []).append(node.value)
    return out


def _pattern(value: ast.expr) -> str | None:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return re.escape(value.value)
    if isinstance(value, ast.JoinedStr):
        parts = [p.value if isinstance(p, ast.Constant) else None for p in value.values]
        return "".join(".+" if p is None else re.escape(str(p)) for p in parts)
    return None


def test_every_refusal_has_its_page() -> None:
    """The checks stand as code in the second paragraph of a page, as a user sees them."""
    shown = set()
    for page in (DOCS / "errors").glob("*.md"):
        shown |= set(re.findall(r"`([^`\n]+)`", page.read_text().split("\n\n")[1]))
    refusals = _refusals()
    assert len(refusals) > 30
    missing = {
        pattern: where
        for pattern, where in refusals.items()
        if not any(re.fullmatch(pattern, check) for check in shown)
    }
    assert missing == {}


def test_every_error_page_is_in_the_index() -> None:
    index = (DOCS / "errors/index.md").read_text()
    pages = {p.name for p in (DOCS / "errors").glob("*.md")} - {"index.md"}
    assert pages == set(re.findall(r"\]\(([\w-]+\.md)\)", index))


# -- links and navigation -------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=_name)
def test_links_resolve_in_the_repository(page: Path) -> None:
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = unquote(link).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        if anchor:
            assert anchor in _anchors(path), link


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", t).strip().lower().replace(" ", "-") for t in titles}


def _navigation() -> list[str]:
    def leaves(node: Any) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        for child in node.values() if isinstance(node, dict) else node:
            if not isinstance(node, str):
                yield from leaves(child)

    return list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))


def test_every_page_is_in_the_navigation_once() -> None:
    listed = _navigation()
    assert len(listed) == len(set(listed))
    pages = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")}
    outside = {"readme.md", "contributing.md", "changelog.md", "tutorials/index.md"}
    outside |= {f"tutorials/{p.stem}.md" for p in (ROOT / "tutorials").glob("*.ipynb")}
    assert set(listed) == pages | outside


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    settings = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=settings)
    assert done.returncode == 0, done.stderr
    pages = {page: page.read_text() for page in tmp_path.rglob("*.html")}
    assert len(pages) > len(_navigation())  # and the page of errors
    formulas = [
        text.count("<math") for page, text in pages.items() if page.parent.name == "tutorials"
    ]
    assert sum(formulas) > 50
    for page, text in pages.items():
        fetched = re.findall(r"<(?:script|img|link|iframe|source)\b[^>]*>", text)
        assert not [tag for tag in fetched if re.search(r"(?:src|href)=.?(?:https?:)?//", tag)], (
            page
        )
        assert not re.search(r":(?:func|class|meth|mod|attr):", text), page  # roles left over


# -- citation -------------------------------------------------------------------------------------


def test_the_citation_file_is_complete() -> None:
    """The fields that version 1.2.0 of the format requires, and the four papers."""
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cff["cff-version"] == "1.2.0"
    assert cff["type"] == "software"
    assert cff["message"]
    assert cff["title"] == "qkvnorm-lens"
    assert cff["authors"] == [{"name": "The qkvnorm-lens authors"}]
    assert cff["version"] == qkvnorm_lens.__version__
    assert cff["license"] == "MIT"
    papers = {re.sub(r"\D*(\d+\.\d+)$", r"\1", r["identifiers"][0]["value"]) for r in _papers(cff)}
    assert papers == {"2406.17837", "2402.05969", "2405.18781", "2410.07799"}


def _papers(cff: dict[str, Any]) -> list[dict[str, Any]]:
    for paper in cff["references"]:
        assert paper["type"] in ("article", "conference-paper")
        assert paper["title"]
        assert 2024 <= paper["year"] <= date.today().year
        assert all(person["family-names"] and person["given-names"] for person in paper["authors"])
    return list(cff["references"])


def test_the_readers_of_docstrings_make_links_of_roles() -> None:
    """What the site's griffe extension does to a docstring, on a package of two names."""
    griffe = pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("roles", DOCS / "_build_support/roles.py")
    assert spec
    assert spec.loader
    roles = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(roles)
    source = (
        '"""See :func:`act`, :func:`absent`."""\n'
        "def act(q, k):\n"
        '    """w_* over w_t.\n\n        a_* = 1\n\n    Args:\n        q, k: vectors.\n'
        '    Columns:\n        x, y: numbers.\n    """\n'
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with griffe.temporary_visited_module(
            source, module_name="mod", extensions=griffe.load_extensions(roles.Roles)
        ) as module:
            roles.Roles().on_package(pkg=module)
            assert module.docstring.value == "See [`act`][mod.act], `absent`."
            lines = module["act"].docstring.value.splitlines()
    assert lines[0] == r"w_\* over w_t."
    assert lines[2] == "    a_* = 1"
    assert lines[4:7] == ["Args:", "    q: vectors.", "    k: see ``q``."]
    assert lines[7:10] == ["__Columns__", "", "- ``x, y``: numbers."]
