"""Debian's chromium as fixtures: pages are opened from the disk, and none may complain or ask for the network."""

import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None
MISSING = [name for name, there in (("playwright (pip)", sync_playwright), ("chromium (apt)", CHROMIUM)) if not there]

IN_A_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}: make test-browser"),
]
"""The `pytestmark` of a file of tests in a browser."""

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
WIDE, LAPTOP, PHONE = ({"width": w, "height": h} for w, h in ((1440, 900), (1024, 768), (390, 844)))


@pytest.fixture(scope="module")
def chromium():
    assert sync_playwright is not None
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Opens pages; at the end none may have complained."""
    pages, complaints = [], []

    def open_page(file, *, hash_="", viewport=WIDE, dark=False):
        page = chromium.new_page(viewport=viewport, color_scheme="dark" if dark else "light")
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda problem: complaints.append(str(problem)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}") or dialog.dismiss())
        page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
        page.goto(f"{file.as_uri()}{hash_}")
        page.wait_for_selector("body[data-ready]")
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []


def fits(page):
    """Whether a page is no wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def background(page):
    """How light a page is, from 0 to 765."""
    return sum(map(int, page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(", ")))
