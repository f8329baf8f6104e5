"""The report's page and the views in the system's Chromium: `make browser`.

Wants Debian's package: ``apt-get install -y chromium`` (or CHROMIUM=/path/to/it).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import hooks
from qkvnorm_lens import plots
from qkvnorm_lens.page.report import write_html
from tests.support import models
from tests.support.pages import HOSTILE, hostile

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

TABS = ("overview", "heads", "rows", "attention", "text", "rates", "method")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    )
    if path is None:
        pytest.fail(
            "no Chromium: apt-get install -y chromium (or CHROMIUM=/path/to/it)", pytrace=False
        )
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("no playwright: pip install 'qkvnorm-lens[browser]'", pytrace=False)
    with sync_playwright() as driver:
        # A container's root has no sandbox of Chromium's.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report() -> hooks.CollapseReport:
    return hooks.collapse_probe(
        models.tiny_gpt2(), models.tokens(3, 20), sigmas=[0.05, 0.1, 0.2, 0.4], draws=3
    )


@pytest.fixture(scope="module")
def page_file(report: hooks.CollapseReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_html(report, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def hostile_file(report: hooks.CollapseReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_html(hostile(report), tmp_path_factory.mktemp("page") / "hostile.html")


@contextmanager
def opened(browser: Browser, path: Path, **options: Any) -> Iterator[Page]:
    """The page; at the end it has said nothing on the console and asked for nothing."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    try:
        yield page
        assert said == []
        assert asked == [path.as_uri()]
    finally:
        context.close()


def choose(page: Page, tab: str) -> None:
    page.click(f".tabs button[data-tab={tab}]")


def test_everything_is_drawn(
    chromium: Browser, page_file: Path, report: hooks.CollapseReport
) -> None:
    frame = report.to_frame("model")
    shown = int((frame[["loose", "strict"]] >= 1e-4).to_numpy().sum())
    assert shown >= 4
    with opened(chromium, page_file) as page:
        seen = page.locator("#overview svg.curve")
        assert seen.is_visible()
        box = seen.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) > 200
        assert page.locator("#overview svg.curve circle").count() == shown
        choose(page, "heads")
        assert page.locator("#heads svg.map rect").count() == 8
        choose(page, "rows")
        assert page.locator("#rows .strip").count() > 4
        assert page.locator("#rows .tok.top").count() > 8
        choose(page, "attention")
        canvas = page.locator("#attention .circuits canvas").first
        canvas.wait_for(state="visible")
        page.wait_for_timeout(500)
        painted = canvas.evaluate(
            """c => { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
                      return d.some(x => x !== 0); }"""
        )
        assert painted


def test_tabs_show_one_section(chromium: Browser, page_file: Path) -> None:
    with opened(chromium, page_file) as page:
        assert page.locator(".tabs button").count() == len(TABS)
        for tab in TABS:
            choose(page, tab)
            assert page.locator("section:visible").evaluate_all("s => s.map(x => x.id)") == [tab]
            selected = page.locator(".tabs button[aria-selected=true]")
            assert selected.evaluate_all("b => b.map(x => x.dataset.tab)") == [tab]
        page.locator(".tabs button[data-tab=overview]").click()
        page.keyboard.press("ArrowRight")
        assert page.locator("section:visible").get_attribute("id") == "heads"
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert page.locator("section:visible").get_attribute("id") == "method"


@pytest.mark.parametrize(("tab", "column"), [("heads", 1), ("heads", 3), ("rows", 0), ("rates", 1)])
def test_a_click_sorts_by_number(chromium: Browser, page_file: Path, tab: str, column: int) -> None:
    with opened(chromium, page_file) as page:
        choose(page, tab)
        values = f"""() => Array.from(document.querySelectorAll('#{tab} tbody tr'))
            .map(r => r.cells[{column}].dataset.value)"""
        before = page.evaluate(values)
        button = page.locator(f"#{tab} th").nth(column).locator("button")
        for up in (True, False):
            button.click()
            after = page.evaluate(values)
            assert sorted(after) == sorted(before)
            numbers = [float(v) for v in after if v]
            assert numbers == sorted(numbers, reverse=not up)
            assert all(after[: len(numbers)])  # what is no number comes last
        head = page.locator(f"#{tab} th").nth(column)
        assert head.get_attribute("aria-sort") == "descending"


def test_words_sort_too(chromium: Browser, page_file: Path) -> None:
    with opened(chromium, page_file) as page:
        choose(page, "heads")
        page.locator("#heads th").first.locator("button").click()
        names = page.evaluate(
            """() => Array.from(document.querySelectorAll('#heads tbody tr'))
                .map(r => r.cells[0].textContent)"""
        )
        assert names == [f"L{layer}H{head}" for layer in range(2) for head in range(4)]


def test_hostile_tokens_do_nothing(
    chromium: Browser, hostile_file: Path, report: hooks.CollapseReport, tmp_path: Path
) -> None:
    files = [
        hostile_file,
        plots.attention(hostile(report)).save(tmp_path / "attention.html"),
        plots.fragile_text(hostile(report)).save(tmp_path / "text.html"),
    ]
    for path in files:
        with opened(chromium, path) as page:
            for tab in TABS if path == hostile_file else ():
                choose(page, tab)
                page.wait_for_timeout(100)
            page.wait_for_timeout(300)
            assert page.evaluate("() => typeof window.hacked") == "undefined"
            assert page.locator("img, iframe, svg[onload], [onerror], [onmouseover]").count() == 0
            words = page.evaluate("() => document.body.textContent")
            assert "<img src=x onerror=window.hacked=1>" in words
            assert "{{ 7*7 }}" in words
            assert "\u202e" not in words
            assert "\u200b" not in words


def test_a_notebooks_frame_is_shut_in(chromium: Browser, report: Any, tmp_path: Path) -> None:
    """As a notebook shows it: the frame draws, loads nothing and can't reach the page around it."""
    path = tmp_path / "notebook.html"
    view = plots.attention(hostile(report), 2)
    path.write_text(
        f"<!doctype html><meta charset=utf-8><body>{view._repr_html_()}</body>", encoding="utf-8"
    )
    context = chromium.new_context()
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("canvas").first.wait_for(state="attached")
    assert frame.locator(".strip").count() == 2
    assert page.evaluate("() => typeof window.hacked") == "undefined"
    assert {url for url in asked if not url.startswith("about:")} == {path.as_uri()}
    context.close()


@pytest.mark.parametrize("width", [800, 1280])
def test_nothing_is_wider_than_the_window(
    chromium: Browser, page_file: Path, hostile_file: Path, width: int
) -> None:
    for path in (page_file, hostile_file):
        with opened(chromium, path) as page:
            page.set_viewport_size({"width": width, "height": 900})
            for tab in TABS:
                choose(page, tab)
                page.wait_for_timeout(150)
                wide = page.evaluate("() => document.documentElement.scrollWidth")
                assert wide <= width, tab


def _contrast(page: Page, selector: str) -> float:
    """WCAG contrast of an element's text with what stands behind it."""
    found: float = page.evaluate(
        """(selector) => {
            const shade = (text) => {
                const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(Number).map((v) => {
                    v /= 255;
                    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
                });
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            let at = document.querySelector(selector);
            const ink = shade(getComputedStyle(at).color);
            let back = "rgba(0, 0, 0, 0)";
            while (at && /, 0\\)$/.test(back)) {
                back = getComputedStyle(at).backgroundColor;
                at = at.parentElement;
            }
            const [a, b] = [ink, shade(back)].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05);
        }""",
        selector,
    )
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(chromium: Browser, page_file: Path, scheme: str) -> None:
    with opened(chromium, page_file, color_scheme=scheme) as page:
        ground = "() => getComputedStyle(document.body).backgroundColor"
        colours = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}
        other = {"light": "dark", "dark": "light"}[scheme]
        for now in (scheme, other, scheme):
            assert page.evaluate(ground) == colours[now]
            for selector in ("h1", ".lead", ".soft", ".tile span", ".tabs button", "figcaption"):
                assert _contrast(page, selector) >= 4.5, (now, selector)
            page.click(".theme")


def test_without_scripts_all_of_it_shows(chromium: Browser, page_file: Path) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    for tab in TABS:
        assert page.locator(f"section#{tab}").is_visible()
    context.close()


def test_hostile_words_are_all_there() -> None:
    """Guards the other tests: the words that they look for are among those that are written."""
    assert "<img src=x onerror=window.hacked=1>" in HOSTILE
    assert any("{{ 7*7 }}" in word for word in HOSTILE)
    assert any("\u202e" in word for word in HOSTILE)
