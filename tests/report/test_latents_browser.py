"""The page of the latents on a text, and the pages of latents, in chromium."""

import pytest

from prolu import SAE, SAEConfig, latents_on
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
