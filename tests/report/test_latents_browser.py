"""The page of the latents on a text, and the pages of latents, in chromium."""

import numpy as np
import pytest

from prolu import SAE, SAEConfig, latents_on
from prolu.activations.rows import rows_of_arrays
from prolu.report.latents.browser import PageSource, write_browser
from prolu.report.latents.firings import HeldOutText
from prolu.report.latents.row_examples import RowExamples
from prolu.report.latents.text_page import write_text_page
from prolu.training.starting_weights import initial_weights
from support.browsers import IN_A_BROWSER, LAPTOP, PHONE, WIDE, background, chromium, fits, opened

__all__ = ["chromium", "opened"]
pytestmark = IN_A_BROWSER

TEXTS = [
    "where is my ball?\n<img src=x onerror=alert(1)> 日本\n" + "Tom saw it in the tree. " * 12,
    "</script>\u202eLily",
]


# ---- the latents on a text


@pytest.fixture(scope="module")
def found(tiny_lm):
    config = SAEConfig(d_in=16, d_sae=60, nonlinearity="topk(4)")
    sae = SAE(config, initial_weights(config, 3), {"hook": tiny_lm.hook, "ctx": 32, "centred": True})
    return latents_on(tiny_lm, sae, TEXTS, top=3)


@pytest.fixture(scope="module")
def text_page(found, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_text_page(found, folder / "page.html", name="<b>one", pages=folder / "a run#" / "index.html")
    return folder / "page.html"


def test_the_whole_text_is_there(found, text_page, opened):
    page = opened(text_page)
    assert page.locator("#texts .token").count() == len(found.tokens)
    first, second = page.locator("#texts .text").all_inner_texts()
    shown = first.replace("▫", "").replace("¦", "").replace("↵\n", "\n").replace("\u00a0", " ")
    assert shown.strip() == TEXTS[0].strip()
    assert "</script>\\u202eLily" in second.replace("▫", "")
    assert page.locator("#texts img").count() == 0
    assert page.locator(".cut").count() == sum(token.begins_block for token in found.tokens) - len(TEXTS)
    assert "<b>one" in page.locator("h1").inner_text()


def test_a_latent_shades_the_text(found, text_page, opened):
    page = opened(text_page)
    row = found.strongest[1]
    page.locator(f"#latents button:text-is('{row.latent}')").click()
    assert page.url.endswith(f"#{row.latent}")
    assert page.locator("#texts .active").count() == row.n_tokens
    column = found.latents[:, row.latent]
    at = int(column.argmax())
    token = page.locator(f"#texts [data-i='{at}']")
    assert "peak" in token.get_attribute("class")
    assert token.evaluate("e => getComputedStyle(e).textDecorationLine") == "underline"  # not by colour alone
    token.hover()
    tip = page.locator("#tip").inner_text()
    assert f"id {found.tokens[at].token_id}" in tip
    assert f"latent {row.latent}: {row.largest:.3g}" in tip
    weak = int((column + (column <= 0) * 99).argmin())
    style = "e => Number(e.style.getPropertyValue('--strength'))"
    assert page.locator(f"#texts [data-i='{weak}']").evaluate(style) <= token.evaluate(style) == 1
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.locator("#texts .active").count() == row.n_tokens
    page.keyboard.press("Escape")
    assert "#" not in page.url


def test_a_token_lists_its_latents(found, text_page, opened):
    page = opened(text_page)
    page.locator("#texts [data-i='2']").hover()
    for latent, value in found.strongest_of(2):
        assert f"latent {latent}: {value:.3g}" in page.locator("#tip").inner_text()
    page.locator("#texts [data-i='2']").click()
    listed = [int(text) for text in page.locator("#latents button").all_inner_texts()]
    assert listed[:3] == [latent for latent, _ in found.strongest_of(2)]
    page.locator("#clear").click()
    assert page.locator("#latents tr").count() == len(found.strongest)
    link = page.locator("#latents a").first.get_attribute("href")
    assert link == f"a%20run%23/index.html#{found.strongest[0].latent}"


@pytest.mark.parametrize("size", [WIDE, LAPTOP, PHONE])
@pytest.mark.parametrize("dark", [False, True])
def test_the_text_fits_every_window(text_page, opened, size, dark):
    page = opened(text_page, viewport=size, dark=dark)
    assert fits(page)
    assert (background(page) < 150) == dark
    if size != PHONE:  # where both do not fit beside one another
        box = page.locator("#latents tr").first.bounding_box()
        assert box["y"] < 300


# ---- pages of rows


@pytest.fixture(scope="module")
def row_pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    draw = np.random.default_rng(0)
    rows = rows_of_arrays(draw.normal(size=(900, 8)), draw.normal(size=(160, 8)))
    np.save(folder / "images.npy", draw.random((40, 8, 8)))
    (folder / "labels.txt").write_text("".join(f"kind {i % 5} <img src=x onerror=alert(1)>\n" for i in range(160)))
    examples = RowExamples.open(folder / "labels.txt", folder / "images.npy", rows)
    config = SAEConfig(d_in=8, d_sae=24, nonlinearity="topk(3)")
    text = HeldOutText.of_rows(rows, 160, lambda n: None)
    facts = {"name": "of rows", "figures": {"L0": 3.0}, "config": {}}
    source = PageSource(SAE(config, initial_weights(config, 0)), text, examples, 6, facts)
    write_browser(folder / "features", source, {})
    return folder / "features" / "index.html"


@pytest.mark.parametrize("size", [WIDE, LAPTOP, PHONE])
def test_rows_are_shown_by_their_images_and_labels(row_pages, opened, size):
    page = opened(row_pages, viewport=size, hash_="#3")
    card = page.locator(".card").first
    card.wait_for()
    assert fits(page)
    for image in page.locator(".card img").all()[:4]:
        image.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('.card img').naturalWidth === 8")
    assert page.locator(".card .patch").count() == page.locator(".card").count()  # four parts make a square
    assert "kind" in card.locator("figcaption").inner_text()
    assert page.locator(".card figcaption img").count() == 0
    card.hover()
    assert page.locator("#tip").inner_text().startswith("row ")
    if size == LAPTOP:
        page.evaluate("document.querySelector('#detail').scrollTop = 0")
        box = page.locator(".card").first.bounding_box()
        assert box["y"] + box["height"] < 768


def test_rows_are_found_by_their_labels(row_pages, opened):
    page = opened(row_pages)
    assert not page.locator("#where").is_visible()
    page.locator("#query").fill("kind 3")
    page.wait_for_function("/^[0-9]+ (of|latents)/.test(document.querySelector('#count').textContent)")
    page.locator("#visible .row").first.click()
    page.locator(".card").first.wait_for()
    assert any("kind 3" in text for text in page.locator(".card figcaption").all_inner_texts())
