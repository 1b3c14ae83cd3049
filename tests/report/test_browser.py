"""The report and the pages of latents in a browser (Debian's chromium), opened from the disk."""

import json
import math
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from prolu import SAE, LanguageModel, RunConfig, SAEConfig, load_blocks
from prolu.evaluation.comparison.wording import LOWER
from prolu.report.latents.browser import PageSource, write_browser
from prolu.report.latents.firings import HeldOutText
from prolu.report.server import StudyServer
from prolu.report.writer import write_report
from prolu.training.starting_weights import initial_weights

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
try:
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = Axe = None
MISSING = [name for name, there in (("prolu[browser] (pip)", Axe), ("chromium (apt)", CHROMIUM)) if not there]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}: make test-browser"),
]

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
FAMILIES = [("relu", "l1"), ("prolu_relu", "l1"), ("prolu_ste", "sqrt_l1"), ("topk", "none"), ("mine<b>", "l0")]
TARGETS, SEEDS = (8, 16, 32), (0, 1, 2)
N_RUNS = len(FAMILIES) * len(TARGETS) * len(SEEDS)
WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


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
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def background(page):
    return sum(map(int, page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(", ")))


# ---- the report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A study of 45 runs that nobody trained, one of which has a page; one more failed."""
    folder = tmp_path_factory.mktemp("studies") / "forty-five"
    records = []
    for k, (nonlinearity, penalty) in enumerate(FAMILIES):
        for target in TARGETS:
            for seed in SEEDS:
                l0, lost = target * (1 + 0.02 * seed), (1 - 0.1 * k) * (1 + 0.03 * seed) / math.sqrt(target)
                records.append({
                    "run_id": f"r{k}-{target}-{seed}", "nonlinearity": nonlinearity, "penalty": penalty, "coeff": 0.01,
                    "target_l0": target, "init_seed": seed, "d_sae": 64, "n_tokens": 1000, "eval_tokens": 640, "l0": l0,
                    "degradation": lost, "recovered": 1 - lost / 5, "mse": lost / 4, "fvu": lost / 5, "l1": l0 / 2,
                    "sqrt_l1": l0 / 1.5, "dead_fraction": 0.01 * k, "converged": (k, target) != (0, 8),
                    "density_histogram": [0] * 8 + [60, 4, 0],
                })  # fmt: skip
    for r in records:
        (folder / r["run_id"]).mkdir(parents=True)
        curve = [{"step": s, "tokens": 10 * s, "l0": r["l0"] + 9 / s, "mse": 1 / s, "dead": s} for s in range(1, 30)]
        (folder / r["run_id"] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
    (folder / "r2-16-1" / "sae.safetensors").touch()
    (folder / "r1-8-0" / "features").mkdir()
    (folder / "r1-8-0" / "features" / "index.html").write_text("<!doctype html><title>latents</title>")
    (folder / "broken").mkdir()
    (folder / "broken" / "failure.json").write_text(json.dumps({"step": 1, "reason": "the loss is not <i>finite</i>"}))
    stream = {"lm": "tiny", "hook": "h", "data": "<script>alert(1)</script>", "seed": 0}
    (folder / "config.json").write_text(json.dumps({"stream": stream, "runs": [{}] * (N_RUNS + 1)}))
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return write_report([folder]).page


def visible_rows(page):
    return page.locator(".runs tbody tr:visible")


def drawn(page, plot="plane-0"):
    """Points with lines that a figure shows."""
    return page.evaluate(
        f"document.getElementById('{plot}').data.filter(t => t.mode === 'lines+markers').map(t => t.x.length)"
    )


def test_the_verdicts_fit_their_box(report, opened):
    page = opened(report)
    width, room = page.evaluate(
        "(box => [box.scrollWidth, box.clientWidth])(document.querySelector('#verdicts > .scroll'))"
    )
    assert width <= room


def test_one_sae_has_no_figures_of_one_point(report, opened, tmp_path):
    record = json.loads((report.parent / "results.jsonl").read_text().splitlines()[0])
    folder = tmp_path / "one"
    shutil.copytree(report.parent / record["run_id"], folder / record["run_id"])
    (folder / "config.json").write_text(json.dumps({"stream": {"lm": "tiny", "hook": "h", "data": "x"}, "runs": [{}]}))
    (folder / "results.jsonl").write_text(json.dumps(record) + "\n")
    page = opened(write_report([folder]).page)
    assert page.locator("[id^=plane]").count() == 0
    assert not page.locator("#filters").is_visible()
    assert page.locator("#curve-0 .main-svg").count() > 0
    assert fits(page)


def test_filters(report, opened):
    page = opened(report)
    assert visible_rows(page).count() == N_RUNS
    assert drawn(page) == [3] * 5
    bars = "document.getElementById('plane-0').data.filter(t => t.error_y?.visible && t.error_x?.visible).length"
    assert page.evaluate(bars) == 5
    page.locator(".chip", has_text="topk").click()
    assert page.locator(".chip", has_text="topk").get_attribute("aria-pressed") == "false"
    assert visible_rows(page).count() == N_RUNS - 9
    assert drawn(page) == [3] * 4
    assert len(page.evaluate("document.getElementById('curve-0').data")) == N_RUNS - 9
    page.locator("#converged").check()
    assert visible_rows(page).count() == N_RUNS - 12
    assert sorted(drawn(page)) == [2, 3, 3, 3]
    page.locator("#seed").select_option("1")
    assert visible_rows(page).count() == (N_RUNS - 12) / 3
    assert page.evaluate(bars) == 0
    assert "of 45 runs" in page.locator("#shown").inner_text()
    page.locator("#all").click()
    assert visible_rows(page).count() == N_RUNS / 3 - 1
    page.locator("#all").click()
    assert visible_rows(page).count() == 0
    page.locator(".chip").first.focus()
    page.keyboard.press("Enter")
    assert visible_rows(page).count() == 2


def place_of(page, trace, i):
    """Where a point of the first figure is in the window."""
    page.locator("#plane-0").scroll_into_view_if_needed()
    return page.evaluate(
        """([name, i]) => {
        const plot = document.getElementById("plane-0"), trace = plot.data.filter((t) => t.mode === "lines+markers")[name];
        const box = plot.querySelector(".nsewdrag").getBoundingClientRect(), { xaxis, yaxis } = plot._fullLayout;
        return [box.x + xaxis.l2p(Math.log10(trace.x[i])), box.y + yaxis.l2p(trace.y[i])];
    }""",
        [trace, i],
    )


def test_hover_shows_a_runs_numbers(report, opened):
    page = opened(report)
    page.locator("#seed").select_option("0")
    page.mouse.move(*place_of(page, 0, 1))
    label = page.locator("#plane-0 .hovertext").first
    label.wait_for()
    shown = label.text_content()
    assert "relu + l1" in shown
    assert "target L0 16, seed 0" in shown
    assert "r0-16-0" in shown


def panel_of(page):
    """The text of the panel of a run, once it is open."""
    page.wait_for_selector("#run[open]")
    return page.locator("#run").inner_text()


def test_a_click_on_a_mean_lists_its_runs_and_leads_to_each(report, opened):
    page = opened(report)
    x, y = place_of(page, 1, 2)
    page.mouse.click(x + 4, y)  # the point of the middle seed lies on the mean
    assert "prolu_relu + l1, target L0 32" in panel_of(page)
    assert page.locator("#run tbody tr").count() == 3
    page.locator("#run a", has_text="seed 2").click()
    page.wait_for_function("document.querySelector('#run-title').textContent === 'r1-32-2'")
    assert page.url.endswith("#run=r1-32-2")
    page.go_back()
    page.wait_for_selector("#run:not([open])", state="attached")
    assert "#" not in page.url


def test_the_panel_of_a_run(report, opened):
    page = opened(report)
    page.locator(".runs tr", has_text="r2-16-1").locator("td").nth(4).click()
    shown = panel_of(page)
    assert shown.index("init_seed") < shown.index("settings with their defaults")
    for fact in ("prolu_ste + sqrt_l1, target L0 16, seed 1", "penalty", "d_sae", "--latent-pages r2-16-1"):
        assert fact in shown
    assert f'prolu.SAE.load("{report.parent}/r2-16-1")' in shown
    lengths = "[...document.querySelectorAll('#run .plot')].map((plot) => plot.data[0].y.length)"
    assert page.evaluate(lengths) == [29, 29, 29, 11]  # L0, MSE, dead latents; the histogram
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#run .copy").first.click()
    page.locator("#run .copy", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()").endswith('/r2-16-1")')
    page.locator("#run a", has_text="seed 2").click()
    page.wait_for_function("document.querySelector('#run-title').textContent === 'r2-16-2'")
    page.keyboard.press("Escape")
    page.wait_for_selector("#run:not([open])", state="attached")
    page.locator(".runs a.open", has_text="r1-8-0").focus()
    page.keyboard.press("Enter")
    assert "Pages of its latents" in panel_of(page)
    page.locator("#run a", has_text="Pages of its latents").click()
    page.wait_for_url("**/r1-8-0/features/index.html")
    page.go_back()
    page.wait_for_selector("body[data-ready]")
    assert "r1-8-0" in panel_of(page)  # the address kept it


def test_a_name_full_of_markup_stays_text_in_the_panel(report, opened):
    page = opened(report, hash_="#run=r4-8-0")
    assert "mine<b> + l0" in panel_of(page)
    assert page.locator("#run dd", has_text="mine<b>").count() == 1


def test_figures_by_keyboard(report, opened):
    page = opened(report)
    page.locator("#plane-0").focus()
    assert "arrow keys" in page.locator("#plane-0").get_attribute("aria-label")
    for key in ("ArrowRight", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert page.locator("#spoken").text_content().startswith("prolu_relu + l1, target L0 16, 3 seeds")
    page.locator("#plane-0 .hovertext").first.wait_for()
    page.keyboard.press("Enter")
    assert "prolu_relu + l1, target L0 16" in panel_of(page)
    assert page.evaluate("document.activeElement.id") == "run-title"
    page.keyboard.press("Escape")
    page.wait_for_selector("#run:not([open])", state="attached")
    assert page.evaluate("document.activeElement.id") == "plane-0"


def test_the_address_keeps_filters_and_the_open_run(report, opened):
    page = opened(report)
    page.locator(".chip", has_text="topk").click()
    page.locator("#converged").check()
    page.locator("#seed").select_option("1")
    page.locator(".runs a.open", has_text="r2-8-1").click()
    panel_of(page)
    rows = (N_RUNS - 12) / 3
    again = opened(report, hash_="#" + page.url.partition("#")[2])
    assert "r2-8-1" in panel_of(again)
    assert visible_rows(again).count() == rows
    assert again.locator("#converged").is_checked()
    assert again.locator("#seed").input_value() == "1"
    assert again.locator(".chip[aria-pressed=false]").all_inner_texts() == ["topk"]
    again.keyboard.press("Escape")
    again.wait_for_function("!location.hash.includes('run=')")
    assert visible_rows(again).count() == rows
    page.go_back()
    page.wait_for_selector("#run:not([open])", state="attached")
    assert visible_rows(page).count() == rows
    page.locator("nav a", has_text="Runs").click()
    assert visible_rows(page).count() == rows
    odd = opened(report, hash_="#family=none+such&run=none&seed=99")
    assert visible_rows(odd).count() == 0
    assert not odd.locator("#run").is_visible()


def test_tables(report, opened):
    page = opened(report)
    column = page.locator(".runs thead th", has_text="CE increase")
    lost = "[...document.querySelectorAll('.runs tbody tr')].map(r => Number(r.cells[5].textContent))"
    for way in (1, -1):
        column.click()
        values = page.evaluate(lost)
        assert values == sorted(values, reverse=way < 0)
        assert column.get_attribute("aria-sort") == ("ascending" if way > 0 else "descending")
    page.locator(".runs thead button", has_text="family").focus()
    page.keyboard.press("Enter")
    names = page.evaluate("[...document.querySelectorAll('.runs tbody tr')].map(r => r.cells[1].textContent)")
    assert names == sorted(names)
    assert names[0] == "mine<b> + l0"
    assert "the loss is not <i>finite</i>" in page.locator("#failures").inner_text()
    assert "<script>alert(1)</script>" in page.locator(".facts").inner_text()
    verdicts = page.locator(".verdicts tbody")
    assert LOWER in verdicts.inner_text()
    assert verdicts.locator("td.verdict.good").count() > 5
    assert verdicts.locator("svg .bar").count() > 5
    page.locator(".runs a.pages").click()
    page.wait_for_url("**/r1-8-0/features/index.html")


def test_dark_and_light(report, opened):
    page = opened(report, dark=True)
    colours = "document.getElementById('plane-0').data.filter((t) => t.line).map((t) => t.line.color)"
    assert background(page) < 150
    assert "#d0d3d6" in page.evaluate(colours)
    page.locator(".theme").click()
    assert background(page) > 600
    assert "#444444" in page.evaluate(colours)
    assert background(opened(report)) > 600


@pytest.mark.parametrize("seed", ["all", "0"])
@pytest.mark.parametrize("dark", [False, True])
def test_no_line_shows_through_a_hollow_marker(report, opened, dark, seed):
    page = opened(report, dark=dark)
    page.locator("#seed").select_option(seed)
    colours = page.evaluate("""() => [...document.querySelectorAll('#plane-0 .trace')].map((trace) => ({
        line: trace.querySelector('.lines path') !== null,
        fills: [...trace.querySelectorAll('.points path')].map((path) => getComputedStyle(path))
            .map((style) => [style.fill, style.fillOpacity, style.opacity]) }))""")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    places = [i for i, trace in enumerate(colours) if [paper, "1", "1"] in trace["fills"]]
    assert len(places) == 1, "one family has a point that had not converged"
    assert sum(fill[0] == paper for fill in colours[places[0]]["fills"]) == 1
    # Lines are drawn before: a marker hides those of its own family and of the others.
    assert max(i for i, trace in enumerate(colours) if trace["line"] and not trace["fills"]) < places[0]


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_the_report_without_scrolling_sideways(report, opened, dark):
    page = opened(report, viewport=PHONE, dark=dark)
    assert fits(page)
    for plot in ("plane-0", "plane-3", "curve-0"):
        assert page.locator(f"#{plot} .main-svg").first.bounding_box()["width"] <= 390


# ---- the report of a study in training


def wait_until(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_watch_follows_a_study_that_is_killed_and_resumed(tiny_lm_folder, chromium, tmp_path):
    out, text = tmp_path / "runs" / "a <b>", tmp_path / "text.txt"
    text.write_text("\n".join(f"{i} Lily and Tom saw a red ball in the park on day {i}." for i in range(3000)))
    command = f"sweep grid --lm {tiny_lm_folder} --hook blocks.1.hook_resid_pre --data {text} --ctx 32 --nonlinearity relu topk"
    command += " --target-l0 4 --d-sae 16 --init-seeds 0 1 --n-tokens 40000 --batch-size 32 --window-tokens 2048"
    command += " --eval-tokens 512 --latent-pages none --checkpoint-minutes 0.01 --threads 1 --max-epochs 100 --out"
    train = [sys.executable, "-m", "prolu", *command.split(), str(out)]
    server = StudyServer(out, 0)
    thread = threading.Thread(target=server.serve)
    thread.start()
    page, complaints = chromium.new_page(viewport=WIDE), []
    page.on("pageerror", lambda problem: complaints.append(str(problem)))
    try:
        page.goto(server.address)
        assert "There is no folder" in page.locator("main").inner_text()
        with subprocess.Popen(train, stderr=subprocess.DEVNULL) as training:
            wait_until(lambda: len(list(out.glob("checkpoints/step-*/checkpoint.json"))) == 2)
            training.kill()
        page.locator("#progress tbody tr").nth(3).wait_for(timeout=60_000)
        before = page.locator("#progress progress").first.get_attribute("value")
        page.locator(".chip", has_text="topk").click()
        assert page.locator("#progress tbody tr:visible").count() == 2
        page.locator("#progress a.open").first.click()
        assert "in the last checkpoint" in panel_of(page)
        page.keyboard.press("Escape")
        done = subprocess.run(train, check=True, capture_output=True, text=True)
        assert "resumed" in (out / "log.jsonl").read_text(), done.stderr
        page.locator("#table tbody tr").nth(3).wait_for(timeout=60_000, state="attached")
        assert int(before) < 100
        assert "All runs have ended" in page.locator("#progress").inner_text()
        assert visible_rows(page).count() == 2  # the filter was kept
        assert "family=relu" in page.url
        assert drawn(page) == [1]
        page.locator("#table a.open").first.click()
        assert f'prolu.SAE.load("{out}/relu' in panel_of(page)
    finally:
        page.close()
        server.close()
        thread.join()
    assert complaints == []


# ---- latents

N_LATENTS = 16_384
TRAP = 'Lily said <img src=x onerror=alert(1)> & "red" ball\'s </script> up\n  and up'


@pytest.fixture(scope="module")
def latents(tiny_lm_folder, tmp_path_factory):
    """Pages of 16,384 latents of an untrained SAE, on text that is full of markup."""
    folder = tmp_path_factory.mktemp("latents")
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(f"{i} {TRAP * 6}" for i in range(60)))
    lm = LanguageModel(tiny_lm_folder, "blocks.1.hook_resid_pre")
    text = HeldOutText.read(lm, load_blocks(str(folder / "text.txt"), lm.tokenizer, ctx=32), 1200, lambda n: None)
    weights = initial_weights(SAEConfig(d_in=16, d_sae=N_LATENTS, nonlinearity="relu"), 0, initial_bias=-0.09)
    sae = SAE(SAEConfig(d_in=16, d_sae=N_LATENTS, nonlinearity="relu"), weights)
    facts = {"name": "a run <b>", "figures": {"L0": 12.5}, "config": {"run": RunConfig().run_id}}
    write_browser(folder / "features", PageSource(sae, text, lm, 5, facts), {})
    return folder / "features" / "index.html"


def ids(page):
    return [int(n) for n in page.locator("#visible .row > span:first-child").all_inner_texts()]


def chosen(page):
    return page.locator("#detail h2").inner_text()


def test_the_first_view_takes_less_than_two_seconds(latents, opened):
    opened(latents)  # the browser itself is warm now; the page is read anew
    started = time.monotonic()
    page = opened(latents)
    page.locator(".example").first.wait_for()
    assert time.monotonic() - started < 2
    assert page.locator("#count").inner_text() == "16,384 latents"
    assert page.locator("#visible .row").count() < 100
    assert "a run <b>" in page.locator("h1").inner_text()


def test_examples_show_the_text_and_its_values(latents, opened):
    page = opened(latents)
    example = page.locator(".example").first
    peak, value = example.locator(".peak"), example.locator(".value").inner_text()
    assert "active" in peak.get_attribute("class")
    peak.hover()
    assert f"activation {value}" in page.locator("#tip").inner_text().split("\n")
    highest = page.locator("#detail dl div", has_text="max").locator("dd").inner_text()
    assert value == highest
    shown = page.locator(".example .text").all_inner_texts()
    assert any("onerror" in text and "<" in text for text in shown)
    assert page.locator(".example img").count() == 0
    assert page.locator(".text .ws", has_text="↵").count() > 0
    assert page.locator(".panels > div:not(.chart) .pairs li").count() == 10 + 10 + 8
    assert page.locator(".histogram .bar").count() > 3


def test_the_list_sorts_and_filters(latents, opened):
    page = opened(latents)
    page.locator("#head button", has_text="latent").click()
    page.wait_for_function("document.querySelector('#visible .row').dataset.id === '0'")
    assert ids(page)[:4] == [0, 1, 2, 3]
    page.locator("#head button", has_text="density").click()
    density = [float(t.strip("%<")) for t in page.locator("#visible .row > span:nth-child(3)").all_inner_texts()]
    assert density == sorted(density, reverse=True)
    page.locator("#band").select_option(label="dead in this sample")
    assert page.locator("#visible .row:not(.dead)").count() == 0
    n_dead = int(page.locator("#count").inner_text().split()[0].replace(",", ""))
    page.locator("#band").select_option(label="alive")
    n_alive = int(page.locator("#count").inner_text().split()[0].replace(",", ""))
    assert n_dead + n_alive == N_LATENTS
    assert 0 < n_dead < N_LATENTS
    page.locator("#rows").evaluate("e => e.scrollTop = 200000")
    page.wait_for_function("Number(document.querySelector('#visible .row').getAttribute('aria-rowindex')) > 6000")


def test_search_by_token_and_number(latents, opened):
    page = opened(latents)
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"
    page.keyboard.type("oner")
    page.wait_for_function("document.querySelector('#count').textContent.includes(' of ')")
    page.locator("#query").fill("Lily")
    page.locator("#where").select_option("promoted")
    page.wait_for_function("document.querySelector('#count').textContent.includes(' of ')")
    for i in ids(page)[:3]:
        page.locator(f"#visible .row[data-id='{i}']").click()
        page.wait_for_function(f"document.querySelector('#detail h2')?.textContent === 'Latent {i}'")
        assert "Lily" in page.locator(".panels > div:not(.chart) ul").first.inner_text()
    page.locator("#where").select_option("examples")
    page.wait_for_function("document.querySelector('#count').textContent.includes(' of ')")
    page.locator("#visible .row").first.click()
    assert "Lily" in " ".join(page.locator(".text .active").all_inner_texts())
    page.locator("#query").fill("#1638")
    page.wait_for_function("document.querySelectorAll('#visible .row').length === 5")
    assert sorted(ids(page)) == [1638, 16380, 16381, 16382, 16383]
    page.locator("#query").fill("12345")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#detail h2').textContent === 'Latent 12345'")


def test_the_address_names_the_latent(latents, opened):
    page = opened(latents, hash_="#777")
    page.wait_for_function("document.querySelector('#detail h2')?.textContent === 'Latent 777'")
    assert page.locator(".row[aria-selected=true]").get_attribute("data-id") == "777"
    link = page.locator(".near a").first
    other = link.get_attribute("href").strip("#")
    link.click()
    page.wait_for_function(f"document.querySelector('#detail h2').textContent === 'Latent {other}'")
    page.go_back()
    page.wait_for_function("document.querySelector('#detail h2').textContent === 'Latent 777'")
    place = int(page.locator(".row[aria-selected=true]").get_attribute("aria-rowindex"))
    page.keyboard.press("j")
    page.keyboard.press("ArrowDown")
    page.wait_for_function(
        f"document.querySelector('.row[aria-selected=true]').getAttribute('aria-rowindex') === '{place + 2}'"
    )
    page.keyboard.press("k")
    page.wait_for_function(
        f"document.querySelector('.row[aria-selected=true]').getAttribute('aria-rowindex') === '{place + 1}'"
    )
    now = page.locator(".row[aria-selected=true]").get_attribute("data-id")
    assert page.url.endswith(f"#{now}")
    page.wait_for_function(f"document.querySelector('#detail h2').textContent === 'Latent {now}'")


def test_a_transcoder_says_where_it_reads_and_writes(tiny_lm_folder, opened, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"{i} {TRAP * 6}" for i in range(20)))
    lm = LanguageModel(tiny_lm_folder, "transformer.h.1.mlp.c_fc.output")
    text = HeldOutText.read(lm, load_blocks(str(tmp_path / "text.txt"), lm.tokenizer, ctx=32), 600, lambda n: None)
    config = SAEConfig(d_in=64, d_sae=40, d_out=16, skip=True, nonlinearity="relu")
    hooks = {"hook": lm.hook, "hook_out": "blocks.1.hook_mlp_out"}
    facts = {"name": "one", "figures": {"L0": 12.5}, "config": {}}
    source = PageSource(SAE(config, initial_weights(config, 0), hooks), text, lm.at(hooks["hook_out"]), 5, facts)
    write_browser(tmp_path / "features", source, {})
    page = opened(tmp_path / "features" / "index.html")
    page.locator(".example").first.wait_for()
    notes = page.locator("#notes").text_content()
    assert f"skip transcoder. Its latents read the activations at {lm.hook}" in notes
    assert "write at blocks.1.hook_mlp_out" in notes
    assert page.locator("#head span", has_text="cos").count() == 0
    assert page.locator("#detail dt", has_text="cos").count() == 0
    assert page.locator(".panels > div:not(.chart) .pairs li").count() == 10 + 10 + 8


def test_latents_in_the_dark(latents, opened):
    page = opened(latents, dark=True)
    assert background(page) < 150
    page.locator(".theme").click()
    assert background(page) > 600
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert background(page) > 600  # remembered


def test_a_phone_shows_the_list_then_the_latent(latents, opened):
    page = opened(latents, viewport=PHONE)
    assert fits(page)
    assert not page.locator("#detail").is_visible()
    page.locator("#visible .row").nth(2).click()
    page.locator(".example").first.wait_for()
    assert fits(page)
    assert not page.locator("#list").is_visible()
    page.locator(".tolist").click()
    page.wait_for_selector("#list", state="visible")
    assert not page.locator("#detail").is_visible()


def test_a_folder_that_is_not_whole_says_so(latents, chromium, tmp_path):
    shutil.copytree(latents.parent, tmp_path / "features")
    (tmp_path / "features" / "data" / "details-0.js").unlink()
    page = chromium.new_page()
    page.goto(f"{(tmp_path / 'features' / 'index.html').as_uri()}#3")
    page.wait_for_function("document.querySelector('#detail').textContent.includes('details-0.js cannot be read')")
    page.close()


def test_untrained_latents_are_sparse(latents):
    """Else the figures above would say little."""
    found = json.loads(
        (latents.parent / "data" / "list.js").read_text().removeprefix('put("list", ').removesuffix(")\n")
    )
    assert 0 < torch.tensor(found["density"]).mean() < 0.2


# ---- accessibility


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation, built."""
    out = tmp_path_factory.mktemp("site")
    docs = Path(__file__).parents[2] / "docs"
    subprocess.run([sys.executable, "-m", "sphinx", "-q", "-b", "html", docs, out], check=True, capture_output=True)
    return out


def violations(page):
    """What axe-core finds wrong: each rule with the places that break it."""
    assert Axe is not None
    found = Axe().run(page).response["violations"]
    return [(rule["id"], [node["html"][:200] for node in rule["nodes"]][:5]) for rule in found]


@pytest.mark.parametrize("dark", [False, True])
def test_the_report_is_accessible(report, opened, dark):
    page = opened(report, dark=dark)
    for details in page.locator("details").all():
        details.evaluate("(element) => { element.open = true; }")
    assert violations(page) == []
    assert violations(opened(report, hash_="#run=r2-16-1", dark=dark)) == []
    assert violations(opened(report, hash_="#run=r2-16-1&run=r2-16-0", viewport=PHONE, dark=dark)) == []


@pytest.mark.parametrize("dark", [False, True])
def test_pages_of_latents_are_accessible(latents, opened, dark):
    page = opened(latents, dark=dark)
    page.locator(".example").first.wait_for()
    assert violations(page) == []


@pytest.mark.parametrize("name", ["guide/quickstart.html", "reference/report.html"])
def test_the_documentation_is_accessible(site, chromium, name):
    page = chromium.new_page(viewport=WIDE)
    page.goto((site / name).as_uri())
    assert violations(page) == []
    page.close()
