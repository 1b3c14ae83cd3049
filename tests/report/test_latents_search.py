"""The search of the pages of latents, their contexts, what is said of tokens, and the address, in chromium."""

import json
import re

import pytest

from prolu import SAE, LanguageModel, SAEConfig, load_blocks
from prolu.activations.token_texts import PART
from prolu.report.latents import browser, firings
from prolu.report.latents.browser import PageSource, write_browser
from prolu.report.latents.firings import HeldOutText
from prolu.training.starting_weights import initial_weights
from support.browsers import IN_A_BROWSER, LAPTOP, PHONE, WIDE, chromium, fits, opened

try:
    from axe_playwright_python.sync_playwright import Axe
except ImportError:
    Axe = None

__all__ = ["chromium", "opened"]
pytestmark = [*IN_A_BROWSER, pytest.mark.skipif(Axe is None, reason="needs prolu[browser] (pip): make test-browser")]

N_LATENTS, WIDTH, BEFORE, CTX = 300, 48, 30, 64
STORY = (
    "Lily had a red ball.\n  The ball went up \u65e5\u672c and 12 <b>balls</b> & \U0001f469 said:\n\n "
    "where is my ball? Tom saw it, a ballad of hisball"
)


@pytest.fixture(scope="module")
def folder(tiny_lm_folder, tmp_path_factory):
    """Pages of latents whose contexts are shorter than a token block."""
    place = tmp_path_factory.mktemp("searched")
    words = STORY.split(" ")
    turned = (f"{i} " + " ".join(words[(5 * i + j * (1 + i % 2)) % len(words)] for j in range(60)) for i in range(200))
    (place / "text.txt").write_text("\n<|endoftext|>\n".join(turned), encoding="utf-8")
    lm = LanguageModel(tiny_lm_folder, "blocks.1.hook_resid_pre")
    text = HeldOutText.read(lm, load_blocks(str(place / "text.txt"), lm.tokenizer, ctx=CTX), 2500, lambda n: None)
    config = SAEConfig(d_in=16, d_sae=N_LATENTS, nonlinearity="topk(6)")
    facts = {"name": "a run", "figures": {}, "config": {}}
    with pytest.MonkeyPatch.context() as patch:
        for module in (firings, browser):
            patch.setattr(module, "WIDTH", WIDTH)
            patch.setattr(module, "BEFORE", BEFORE)
        source = PageSource(SAE(config, initial_weights(config, 0)), text, lm, 6, facts)
        write_browser(place / "features", source, {})
    return place / "features"


class Pages:
    """What the files of the pages say, read with plain Python."""

    def __init__(self, folder):
        def read(name):
            said = (folder / "data" / f"{name}.js").read_text()
            return json.loads(said.removeprefix(f'put("{name}", ').removesuffix(")\n"))

        self.list, self.tokens, self.ids, self.text = (read(name) for name in ("list", "tokens", "ids", "text"))
        self.details = read("details-0") + read("details-1")
        self.parts = dict(zip(self.ids["parts"][::2], self.ids["parts"][1::2], strict=True))
        self.top = ["" if t < 0 else self.tokens[t].strip().lower() for t in self.list["token"]]

    def token_at(self, position):
        place = self.text["tokens"][position]
        is_part = self.tokens[place] == PART and self.ids["of"][place] == -1
        return "" if is_part else self.tokens[place]

    def id_at(self, position):
        return self.parts.get(position, self.ids["of"][self.text["tokens"][position]])

    def examples(self, i):
        return [*self.details[i]["top"], *(e for band in self.details[i]["bands"] for e in band)]

    def texts(self, i):
        """Each context, once for each place where one begins: what is before it in its block, itself, and the rest."""

        def text(*places):
            return "".join(map(self.token_at, range(*places)))

        starts = sorted({e[1] for e in self.examples(i)})
        blocks = [s - s % CTX for s in starts]
        return [(text(b, s), text(s, s + WIDTH), text(s + WIDTH, b + CTX)) for s, b in zip(starts, blocks, strict=True)]

    def promoted(self, i):
        return [self.tokens[place] for place, _ in self.details[i]["promoted"]]

    def ranked(self, in_text, in_token, word=None):
        """All latents that are found, with the reason, in the order that the documentation promises."""
        found = []
        for i in range(N_LATENTS):
            kinds = [in_text(*text) for text in self.texts(i)]
            of_contexts = min(kinds, default=3)
            of_tokens = min(map(in_token, self.promoted(i)), default=3)
            n = kinds.count(of_contexts)
            if word and self.top[i] == word:
                found.append((0, i, "top token"))
            elif word and self.top[i].startswith(word):
                found.append((1, i, "begins with"))
            elif of_contexts < 3 and of_contexts <= of_tokens:
                how = ("in", "starts words,", "inside words,")[of_contexts]
                found.append((2 + 2 * of_contexts, i, f"{how} {n} context{'s' * (n > 1)}"))
            elif of_tokens < 3:
                how = ("promotes it", "starts a promoted token", "inside a promoted token")[of_tokens]
                found.append((3 + 2 * of_tokens, i, how))
        return [(i, why) for _, i, why in sorted(found, key=lambda f: (f[0], -self.list["max"][f[1]], f[1]))]


@pytest.fixture(scope="module")
def pages(folder):
    return Pages(folder)


def shown_rows(page):
    rows = page.locator("#visible .row").all()
    return [(int(row.get_attribute("data-id")), row.locator(".match").inner_text()) for row in rows]


def search(page, query):
    page.locator("#query").fill(query)
    page.wait_for_selector("#rows[aria-busy='false']")


def count(page):
    return int(re.search(r"([\d,]+) (of|latents)", page.locator("#count").inner_text())[1].replace(",", ""))


def kind_of(word, before, text, after):
    """How well a word stands in a text: 0 as a whole word, 1 at the start of one, 2 inside one, 3 not at all."""
    whole, start, end = (before + text + after).lower(), len(before), len(before) + len(text)
    best = 3
    for found in re.finditer(f"(?={re.escape(word)})", whole):
        if start <= found.start() <= end - len(word):
            opens = not re.match(r"\w", word) or not re.search(r"\w\Z", whole[: found.start()])
            closes = not re.search(r"\w\Z", word) or not re.match(r"\w", whole[found.start() + len(word) :])
            best = min(best, 2 if not opens else 0 if closes else 1)
    return best


def words_of(query):
    return lambda *text: max(kind_of(word, *text) for word in query.lower().split())


def word_in(query):
    return lambda token: kind_of(query.lower(), "", token, "")


def phrase(part):
    return (
        lambda before, text, after: 0 if part in text else 3,
        lambda token: 0 if part in token else 3,
        None,
    )


def regex(pattern, flags=0):
    return (
        lambda before, text, after: 0 if re.search(pattern, text, flags) else 3,
        lambda token: 0 if re.search(pattern, token, flags) else 3,
        None,
    )


QUERIES = {
    **{
        query: (words_of(query), word_in(query), query.lower())
        for query in ("ball", "BA", "red tom", "a", "ad", "all? t", "l", "\u65e5", "\u672c", "ball?", "his ba")
    },
    **{f'"{part}"': phrase(part) for part in ("ball went", "Ball went", "<b>b", "all")},
    r"/l{2}\s+\w+ u/": regex(r"l{2}\s+\w+ u"),
    r"/TOM|LILY/i": regex("tom|lily", re.IGNORECASE),
    r"/^ /": regex("^ "),
}


def test_queries_rank_as_a_plain_computation_does(folder, pages, opened):
    page = opened(folder / "index.html")
    kinds = set()
    for query, (in_text, in_token, word) in QUERIES.items():
        search(page, query)
        expected = pages.ranked(in_text, in_token, word)
        shown = shown_rows(page)
        assert len(shown) >= min(20, len(expected)), query
        assert shown == expected[: len(shown)], query
        assert count(page) == len(expected), query
        kinds |= {re.sub(r"\d+", "N", why) for _, why in expected}
    of_contexts = {"in N contexts", "starts words, N contexts", "inside words, N contexts"}
    assert kinds >= {"top token", "begins with", "promotes it", "inside a promoted token"} | of_contexts
    page.locator("#where").select_option("promoted")
    search(page, "ball")
    assert {why for _, why in shown_rows(page)} <= {f"{w} promoted token" for w in ("starts a", "inside a")} | {
        "promotes it"
    }
    assert count(page) == sum(any("ball" in token.lower() for token in pages.promoted(i)) for i in range(N_LATENTS))


def test_what_is_marked_is_what_the_reason_counts(folder, pages, opened):
    """Whole words are marked where the latent is found by them, and else the starts of words, or what is inside."""
    page = opened(folder / "index.html")
    found = [(q, i, how) for q in ("ball", "BA", "ad", "a") for i, how in pages.ranked(*QUERIES[q])[:40:13]]
    for query, i, how in found:
        page.goto(f"{(folder / 'index.html').as_uri()}#latent={i}&query={query}")
        page.wait_for_function(f"document.querySelector('#detail h2')?.textContent === 'Latent {i}'")
        page.locator(".example").first.wait_for()
        kinds = [kind_of(query.lower(), *text) for text in pages.texts(i)]
        best = min(kinds)
        starts = [e[1] for e in pages.examples(i)]
        of_start = dict(zip(sorted(set(starts)), kinds, strict=True))
        marked = [start for start in starts if best < 3 and of_start[start] == best]
        assert page.locator(".example.found").count() == len(marked), (query, i, how)


ENDLESS = r"/(.|\s|\w)*#@!/"
NO_WORKERS = (
    "delete window.Worker",
    "window.Worker = class { constructor() { setTimeout(() => this.onerror(new Event('error')), 20) } terminate() {} }",
)


def test_a_regular_expression_that_takes_too_long_is_stopped(folder, opened):
    page = opened(folder / "index.html", hash_="#query=ball")
    before = shown_rows(page)
    page.locator("#query").fill(ENDLESS)
    page.wait_for_function("document.querySelector('#count').textContent === 'searching…'")
    assert shown_rows(page) == before  # which stays until there is an answer, and the page can be used
    page.wait_for_selector("#rows[aria-busy='false']")
    assert page.locator("#count").inner_text() == "This regular expression takes too long and was stopped."
    assert shown_rows(page) == []
    page.locator("#query").fill(ENDLESS)  # typed on while the first is still running
    search(page, "/ball/")
    assert count(page) > 0
    again = opened(folder / "index.html", hash_="#latent=12&query=%2F(.%7C%5Cs%7C%5Cw)*%23%40!%2F")
    assert again.locator("#detail h2").inner_text() == "Latent 12"
    assert "too long" in again.locator("#count").inner_text()


@pytest.mark.parametrize("script", NO_WORKERS)
def test_without_workers_only_simple_regular_expressions_are_run(folder, pages, chromium, script):
    page = chromium.new_page(viewport=WIDE)
    page.add_init_script(script)
    page.goto((folder / "index.html").as_uri())
    page.wait_for_selector("body[data-ready]")
    for endless in (ENDLESS, "/" + "a?" * 30 + "/", "/" + "(a|a)" * 30 + "/", r"/\w+.*.*.*#/", "/(a+){9}/"):
        search(page, endless)
        assert page.locator("#count").inner_text().startswith("This browser cannot stop a regular expression")
    for query in (r"/l{2}\s+\w+ u/", r"/TOM|LILY/i"):
        search(page, query)
        expected = pages.ranked(*QUERIES[query])
        assert count(page) == len(expected)
        assert shown_rows(page)[:20] == expected[:20]
    search(page, "/(?:[*+?|{]|\\*\\+){2}/")
    assert "no repeated group" in page.locator("#count").inner_text()
    search(page, "/[*+?|{(]\\*/")  # signs that repeat nothing
    assert page.locator("#count").inner_text().startswith("0 of")
    page.close()


def test_a_wrong_regular_expression_gets_a_plain_sentence(folder, opened):
    page = opened(folder / "index.html")  # which fails the test if an exception is thrown
    for query in ("/(/", "/[b-a]/", "/a**/"):
        search(page, query)
        assert page.locator("#count").inner_text().startswith("This is no regular expression: ")
        assert shown_rows(page) == []
    search(page, "/(")  # not closed yet: words
    assert "regular" not in page.locator("#count").inner_text()
    search(page, "ball")
    assert count(page) > 0


def test_a_number_goes_to_its_latent(folder, opened):
    page = opened(folder / "index.html")
    search(page, "257")
    page.wait_for_function("document.querySelector('#detail h2').textContent === 'Latent 257'")
    assert shown_rows(page)[0] == (257, "its number")
    assert "latent=257" in page.url
    search(page, "99999")
    assert "There is no latent 99,999: the last is 299." in page.locator("#count").inner_text()
    phone = opened(folder / "index.html", viewport=PHONE)
    search(phone, "12")
    assert not phone.locator("#detail").is_visible()
    assert shown_rows(phone)[:2][0] == (12, "its number")  # and what contains 12 follows
    assert len(shown_rows(phone)) > 1
    phone.keyboard.press("Enter")
    phone.wait_for_function("document.querySelector('#detail h2')?.textContent === 'Latent 12'")


def strongest(pages):
    return max(range(N_LATENTS), key=lambda i: pages.list["max"][i])


def visible_text(text):
    """What a context shows, without the signs for line ends and parts, and with spaces for dots."""
    return text.replace(PART, "").replace("\u21b5", "").replace("\u00b7", " ").replace("\u00a0", " ")


def test_contexts_are_short_and_open_with_their_line_ends(folder, pages, opened):
    latent = strongest(pages)
    page = opened(folder / "index.html", hash_=f"#{latent}")
    page.locator(".example").first.wait_for()
    assert page.locator(".example").count() == len(pages.examples(latent))
    checked = 0
    for example, (position, start, width, _) in zip(
        page.locator(".example").all(), pages.details[latent]["top"], strict=False
    ):
        button, words = example.locator(".more"), example.locator(".text")
        assert button.get_attribute("aria-expanded") == "false"
        assert words.locator("[data-at]").count() < width == WIDTH
        peak = words.locator(".peak")
        peak.scroll_into_view_if_needed()
        assert peak.is_visible()
        assert peak.get_attribute("data-at") == str(position)
        assert "\n" not in words.inner_text()
        button.focus()
        page.keyboard.press("Enter")
        assert button.get_attribute("aria-expanded") == "true"
        assert button.get_attribute("aria-controls") == words.get_attribute("id")
        assert words.evaluate("e => getComputedStyle(e).whiteSpace") in ("pre-wrap", "break-spaces")
        whole = "".join(map(pages.token_at, range(start, start + width)))
        assert visible_text(words.text_content()) == whole
        lines = [line.strip() for line in visible_text(words.inner_text()).split("\n")]
        assert lines == [line.strip() for line in whole.split("\n")]
        assert words.locator("[data-at]").count() == WIDTH
        checked += whole.count("\n") > 0 and "\u65e5" in whole
        button.click()
        assert words.locator("[data-at]").count() < WIDTH
    assert checked > 0


def test_what_is_searched_is_marked_and_in_sight(folder, pages, opened):
    page = opened(folder / "index.html", hash_='#query="ball went"')
    page.locator(".example").first.wait_for()
    i, _ = pages.ranked(*QUERIES['"ball went"'])[0]
    assert page.locator("#detail h2").inner_text() == f"Latent {i}"
    opened_ones = page.locator(".example.found").all()
    n = sum("ball went" in "".join(map(pages.token_at, range(e[1], e[1] + WIDTH))) for e in pages.examples(i))
    assert len(opened_ones) == n > 0
    for example in opened_ones:
        hit = "".join(example.locator(".hit").all_text_contents())
        assert " ball went" in hit
        assert example.locator(".hit").first.evaluate("e => getComputedStyle(e).outlineStyle") == "dashed"
    assert page.locator(".example:not(.found) .hit").count() == 0


def tip_lines(page):
    page.wait_for_selector("#tip:not([hidden])")
    return page.locator("#tip").inner_text().split("\n")


def test_a_token_tells_what_is_known_of_it(folder, pages, opened):
    """By pointer and by keyboard; the logit effect where it is among the largest, and nothing elsewhere."""
    page, known, unknown = opened(folder / "index.html"), 0, 0
    for latent in sorted(range(N_LATENTS), key=lambda i: -pages.list["max"][i])[:40]:
        detail = pages.details[latent]
        effects = {pages.ids["of"][place]: value for place, value in detail["promoted"] + detail["suppressed"]}
        position, start, _, pairs = detail["top"][0]
        places = range(max(start, position - 16), min(start + WIDTH, position + 9))
        with_effect = [at for at in places if pages.id_at(at) in effects]
        if not with_effect and unknown:
            continue
        at = (with_effect or [position])[0]
        page.goto(f"{(folder / 'index.html').as_uri()}#{latent}")
        page.wait_for_function(f"document.querySelector('#detail h2')?.textContent === 'Latent {latent}'")
        token = page.locator(".example").first.locator(f"[data-at='{at}']")
        token.hover()
        lines = tip_lines(page)
        value = dict(zip(pairs[::2], pairs[1::2], strict=True)).get(at - start, 0)
        assert lines[0].endswith(f", id {pages.id_at(at)}")
        assert lines[1] == f"position {at % CTX} of token block {at // CTX}"
        assert lines[2] == (
            f"activation {float(f'{value:.3g}'):g}" if at % CTX else "the first position, which is left out"
        )
        if with_effect:
            assert lines[3] == f"logit effect {effects[pages.id_at(at)]:+.2f}"
            known += 1
        else:
            assert len(lines) == 3
            unknown += 1
        if known and unknown:
            break
    assert known
    assert unknown


def test_tokens_are_reached_by_the_keyboard(folder, pages, opened):
    latent = strongest(pages)
    page = opened(folder / "index.html", hash_=f"#{latent}")
    position = pages.details[latent]["top"][0][0]
    first = page.locator(".example").first
    assert first.locator("[tabindex='0']").count() == 1  # one stop for Tab, however long the context
    first.locator("[tabindex='0']").focus()
    assert tip_lines(page)[1] == f"position {position % CTX} of token block {position // CTX}"
    page.keyboard.press("ArrowLeft")
    assert tip_lines(page)[1] == f"position {(position - 1) % CTX} of token block {position // CTX}"
    focused = "document.activeElement.getAttribute('aria-describedby')"
    assert page.evaluate(focused) == "tip"
    assert first.locator("[tabindex='0']").get_attribute("data-at") == str(position - 1)
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.keyboard.press("ArrowRight")
    assert tip_lines(page)[1] == f"position {position % CTX} of token block {position // CTX}"
    page.keyboard.press("Tab")
    assert page.locator("#tip").is_hidden()
    assert page.evaluate("document.activeElement.className") == "more"


def test_parts_of_a_character_are_called_by_it(folder, pages, opened):
    page = opened(folder / "index.html")
    for latent in range(N_LATENTS):
        for n, (position, *_) in enumerate(pages.details[latent]["top"]):
            if position in pages.parts and pages.token_at(position) == "":
                page.goto(f"{(folder / 'index.html').as_uri()}#{latent}")
                page.wait_for_function(f"document.querySelector('#detail h2')?.textContent === 'Latent {latent}'")
                page.locator(".example").nth(n).locator(".peak").hover()
                assert re.fullmatch(
                    f'a part of "[\u65e5\u672c\U0001f469]", id {pages.id_at(position)}', tip_lines(page)[0]
                )
                return
    raise AssertionError("no latent is strongest on a part of a character")


def test_latents_that_are_active_together_are_linked(folder, pages, opened):
    latent = next(i for i in range(N_LATENTS) if len(pages.details[i]["together"]) == 5)
    page = opened(folder / "index.html", hash_=f"#{latent}")
    page.locator(".together li").first.wait_for()
    rows = page.locator(".together li").all()
    for row, (other, jaccard, share) in zip(rows, pages.details[latent]["together"], strict=True):
        assert row.locator("a").inner_text().startswith(f"{other} ")
        shown, shown_share = row.locator(".value").all_inner_texts()
        assert float(shown) == pytest.approx(jaccard, abs=0.0051)
        assert float(shown_share.strip("%")) == pytest.approx(100 * share, rel=0.06)
    other = pages.details[latent]["together"][0][0]
    rows[0].locator("a").click()
    page.wait_for_function(f"document.querySelector('#detail h2').textContent === 'Latent {other}'")
    page.go_back()
    page.wait_for_function(f"document.querySelector('#detail h2').textContent === 'Latent {latent}'")


def test_the_address_holds_all_that_is_chosen_and_back_goes_back(folder, opened):
    page = opened(folder / "index.html")
    page.keyboard.press("/")
    page.keyboard.type("ball")
    page.wait_for_selector("#visible .match")
    first = shown_rows(page)[0][0]
    page.wait_for_function(f"document.querySelector('#detail h2')?.textContent === 'Latent {first}'")
    by_match = shown_rows(page)
    page.locator("#visible .row").nth(3).click()
    page.locator("#where").select_option("examples")
    page.locator("#band").select_option("alive")
    page.locator("#head button", has_text="density").click()
    page.wait_for_function("document.querySelector('[aria-sort]').textContent === 'density ↓'")
    wanted = {"latent": str(by_match[3][0]), "query": "ball", "where": "examples", "band": "alive", "sort": "density"}
    words = "Object.fromEntries(new URLSearchParams(location.hash.slice(1)))"
    assert page.evaluate(words) == wanted
    again = opened(folder / "index.html", hash_=page.url[page.url.index("#") :])
    assert shown_rows(again) == shown_rows(page)
    assert again.locator("#query").input_value() == "ball"
    assert again.locator("#where").input_value() == "examples"
    assert again.locator("#band").input_value() == "alive"
    assert again.locator("#detail h2").inner_text() == f"Latent {by_match[3][0]}"
    for name in ("sort", "band", "where", "latent"):
        page.go_back()
        del wanted[name]
        page.wait_for_function(f"JSON.stringify({words}) === '{json.dumps(wanted, separators=(',', ':'))}'")
    page.wait_for_function(f"document.querySelector('#detail h2')?.textContent === 'Latent {first}'")
    assert shown_rows(page) == by_match
    page.go_back()  # all letters are one step
    page.wait_for_function("document.querySelector('#query').value === ''")
    assert page.locator("#visible .match").count() == 0
    assert "#" not in page.url


def test_an_address_with_what_the_page_does_not_have_is_read_as_far_as_it_goes(folder, opened):
    page = opened(
        folder / "index.html",
        hash_="#latent=12&sort=nothing&band=<b>&where=x&query=%3Cimg+src%3Dx+onerror%3Dalert(1)%3E",
    )
    assert page.locator("#detail h2").inner_text() == "Latent 12"
    assert page.locator("#band").input_value() == "all"
    assert count(page) == 0
    assert page.locator("main img").count() == 0


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [WIDE, LAPTOP, PHONE])
def test_a_search_and_an_open_context_are_accessible(folder, opened, size, dark):
    page = opened(folder / "index.html", viewport=size, dark=dark, hash_="#query=ball")
    assert fits(page)
    page.wait_for_selector("#visible .match")
    assert violations(page) == []
    page.locator("#visible .row").first.click()
    page.locator(".example .more").first.click()
    page.locator(".example [tabindex='0']").first.focus()
    page.wait_for_selector("#tip:not([hidden])")
    assert fits(page)
    assert violations(page) == []


def violations(page):
    assert Axe is not None
    found = Axe().run(page).response["violations"]
    return [(rule["id"], [node["html"][:200] for node in rule["nodes"]][:5]) for rule in found]
