"""The report's page and the views in the system's Chromium: `make browser`.

Wants Debian's package: ``apt-get install -y chromium`` (or CHROMIUM=/path/to/it).
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

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
        seen = page.locator("#overview svg.curve:visible")
        assert seen.is_visible()
        box = seen.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) > 200
        assert page.locator("#overview svg.curve:visible circle").count() == shown
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


WIDTHS, SCHEMES = (390, 768, 1280), ("light", "dark")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off(
    chromium: Browser, page_file: Path, hostile_file: Path, width: int, scheme: str
) -> None:
    """What does not fit scrolls in its own box, and says so; text can be read everywhere."""
    for path in (page_file, hostile_file):
        with opened(chromium, path, color_scheme=scheme) as page:
            page.set_viewport_size({"width": width, "height": 900})
            for tab in TABS:
                choose(page, tab)
                page.wait_for_timeout(150)
                wide = page.evaluate("() => document.documentElement.scrollWidth")
                assert wide <= width, tab
                assert page.evaluate(CUT_OFF) == [], tab
                assert page.evaluate(PALE) == [], tab


@pytest.mark.parametrize("width", WIDTHS)
def test_views_stand_alone(chromium: Browser, report: Any, tmp_path: Path, width: int) -> None:
    for view in (plots.attention(report, 4), plots.fragile_text(report)):
        path = view.save(tmp_path / "view.html")
        for scheme in SCHEMES:
            with opened(chromium, path, color_scheme=scheme) as page:
                page.set_viewport_size({"width": width, "height": 900})
                assert page.evaluate("() => document.documentElement.scrollWidth") <= width
                assert page.evaluate(PALE) == []


# Visible elements with text that end beyond the window and beyond every box that scrolls.
CUT_OFF = """() => {
    const scrolls = (e) => e && (e.dataset && "more" in e.dataset ||
        e.classList.contains("circuits") || scrolls(e.parentElement));
    return Array.from(document.querySelectorAll("main *")).filter((e) => {
        const box = e.getBoundingClientRect();
        const shown = box.width && box.height && !scrolls(e);
        return shown && (box.right > innerWidth + 1 || box.left < -1);
    }).map((e) => e.outerHTML.slice(0, 80));
}"""

# Texts whose contrast with what is behind them is below 4.5 (WCAG AA), by class and contrast.
PALE = """() => {
    const rgba = (text) => {
        const [r, g, b, a] = text.match(/[\\d.]+/g).map(Number);
        return [r, g, b, a === undefined ? 1 : a];
    };
    const over = (top, below) => [0, 1, 2].map((i) => top[3] * top[i] + (1 - top[3]) * below[i]);
    const ground = (e) => {
        if (!e) return [255, 255, 255];
        const own = rgba(getComputedStyle(e).backgroundColor);
        return own[3] === 1 ? own : over(own, ground(e.parentElement));
    };
    const shade = (c) => {
        const [r, g, b] = c.slice(0, 3).map((v) => v / 255).map(
            (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const found = new Set();
    const walk = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const e = walk.currentNode.parentElement;
        if (!walk.currentNode.data.trim() || !e.getClientRects().length) continue;
        if (e.closest("svg.map, .circuits, script, style")) continue;
        const style = getComputedStyle(e), back = ground(e);
        const ink = rgba(e.closest("svg") ? style.fill : style.color);
        const [a, b] = [shade(over(ink, back)), shade(back)].sort((x, y) => y - x);
        const ratio = (a + 0.05) / (b + 0.05);
        if (ratio < 4.5) found.add(`${e.tagName}.${e.className}: ${ratio.toFixed(2)}`);
    }
    return Array.from(found);
}"""


def test_what_scrolls_says_so(chromium: Browser, page_file: Path) -> None:
    with opened(chromium, page_file) as page:
        choose(page, "rows")
        box = page.locator("#rows .wide.tall")
        cue = page.locator("#rows .cue")
        assert box.get_attribute("data-more") == "below"
        assert cue.is_visible()
        assert "rows: the table scrolls" in cue.inner_text()
        box.evaluate("e => e.scrollTo(0, e.scrollHeight)")
        page.wait_for_timeout(100)
        assert box.get_attribute("data-more") == ""
        box.focus()  # by keyboard, too
        page.keyboard.press("Home")
        page.wait_for_timeout(200)
        assert box.evaluate("e => e.scrollTop") == 0
        choose(page, "heads")
        page.wait_for_timeout(100)
        assert page.locator("#heads .wide.tall").get_attribute("tabindex") is None  # it fits
        assert not page.locator("#heads .cue").is_visible()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_curve_fits_the_window(chromium: Browser, page_file: Path, width: int) -> None:
    with opened(chromium, page_file) as page:
        page.set_viewport_size({"width": width, "height": 900})
        seen = page.locator("#overview svg.curve:visible")
        assert seen.count() == 1
        box = seen.bounding_box()
        assert box is not None
        assert 0 <= box["x"] < box["x"] + box["width"] <= width
        small = seen.evaluate(
            """e => Math.min(...Array.from(e.querySelectorAll("text")).map(t => {
                const size = parseFloat(getComputedStyle(t).fontSize);
                return size * e.getBoundingClientRect().width / e.viewBox.baseVal.width; }))"""
        )
        assert small > 10  # pixels
        lines = seen.locator("path.line")
        for i in range(lines.count()):  # a good part of each curve's box is seen
            line = lines.nth(i).bounding_box()
            assert line is not None
            assert line["x"] + line["width"] > box["x"] + box["width"] / 2


def test_a_tree_for_those_who_listen(chromium: Browser, page_file: Path) -> None:
    """Pictures have names, tables heads, the tabs name what they control."""
    with opened(chromium, page_file) as page:
        assert (
            page.evaluate(
                """() => Array.from(document.querySelectorAll("svg")).filter(
                e => !e.getAttribute("aria-label") && !e.closest("[aria-hidden]")).length"""
            )
            == 0
        )
        assert page.locator("h1").count() == 1
        levels = page.evaluate(
            "() => Array.from(document.querySelectorAll('main h1, main h2')).map(e => e.tagName)"
        )
        assert levels[0] == "H1"
        assert page.locator("table thead th:not([scope=col])").count() == 0
        for tab in TABS:
            button = page.locator(f".tabs button[data-tab={tab}]")
            assert page.locator(f"section#{button.get_attribute('aria-controls')}").count() == 1
        for region in page.locator("[role=region]").all():
            assert region.get_attribute("aria-label")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_views_have_the_pages_colours(chromium: Browser, page_file: Path, scheme: str) -> None:
    """As painted: circuitsvis knows no dark, its picture is turned round as a whole."""
    with opened(chromium, page_file, color_scheme=scheme) as page:
        choose(page, "attention")
        view = page.locator("#attention .circuits").first
        view.locator("canvas").first.wait_for(state="visible")
        page.wait_for_timeout(500)
        with Image.open(io.BytesIO(view.screenshot())) as picture:
            pixels = np.asarray(picture.convert("L"), float)
        assert np.median(pixels) > 200 if scheme == "light" else np.median(pixels) < 80


def test_light_and_dark(chromium: Browser, page_file: Path) -> None:
    ground = "() => getComputedStyle(document.body).backgroundColor"
    colours = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}
    for scheme, other in (SCHEMES, SCHEMES[::-1]):
        with opened(chromium, page_file, color_scheme=scheme) as page:
            for now in (scheme, other, scheme):
                assert page.evaluate(ground) == colours[now]
                assert page.evaluate(PALE) == []
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
