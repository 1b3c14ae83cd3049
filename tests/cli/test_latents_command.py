"""`prolu latents`: what it prints of a text, the page that it writes, and which requests it refuses."""

import json

import pytest

from prolu import SAE, LanguageModel, latents_on
from prolu.cli.entry_point import main
from support.sweeps import HOOK

TRAIN = ["--d-sae", "24", "--n-tokens", "1280", "--batch-size", "64", "--eval-tokens", "640", "--nonlinearity", "topk"]


@pytest.fixture(scope="module")
def run(tiny_lm_folder, stories_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "one"
    source = ["--lm", str(tiny_lm_folder), "--data", str(stories_file), "--hook", HOOK, "--ctx", "32"]
    assert main(["train", *source, *TRAIN, "--target-l0", "4", "--latent-pages", "none", "--out", str(out)]) == 0
    (weights,) = out.glob("*/sae.safetensors")
    return weights.parent


def test_it_prints_what_python_gives(run, capsys):
    sae = SAE.load(run)
    found = latents_on(LanguageModel(sae.lm, sae.hook), sae, ["a red ball", "Tom"], top=3)
    capsys.readouterr()
    assert main(["latents", str(run), "--text", "a red ball", "Tom", "--top", "3", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["text"], line["name"]) for line in lines] == [(token.text, token.name) for token in found.tokens]
    for i, line in enumerate(lines):
        assert [tuple(pair) for pair in line["latents"]] == found.strongest_of(i)
    assert main(["latents", str(run), "--text", "a red ball", "Tom", "--top", "3"]) == 0
    printed = capsys.readouterr().out
    latent, value = found.strongest_of(0)[0]
    assert f"{latent} {value:#.3g}" in printed
    assert f"prolu report {run.parent} --latent-pages {run.name}" in " ".join(printed.split())


def test_a_page_stands_alone_and_escapes(run, tmp_path, capsys):
    file = tmp_path / "text.py"
    file.write_text("</script><b>bold\n", encoding="utf-8")
    page = tmp_path / "page.html"
    assert main(["latents", str(run), "--file", str(file), "--out", str(page)]) == 0
    html = page.read_text()
    assert html.count("</script>") == 1
    assert "<b>bold" not in html
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")
    assert str(page) in capsys.readouterr().out


def test_pages_of_one_run_are_made_on_demand(run, tmp_path, capsys):
    assert main(["report", str(run.parent), "--latent-pages", "nonsense"]) == 2
    assert f"choose frontier, all, none, or one of {run.name}" in capsys.readouterr().err
    assert not (run / "features").exists()
    assert main(["report", str(run.parent), "--latent-pages", run.name, "--latent-tokens", "320"]) == 0
    assert (run / "features/index.html").is_file()
    page = tmp_path / "page.html"
    assert main(["latents", str(run), "--text", "a ball", "--out", str(page)]) == 0
    link = json.loads(page.read_text().partition('"link":')[2].partition(',"')[0])
    assert (page.parent / link).resolve() == (run / "features/index.html").resolve()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "text: give a text with --text"),
        (["--text", ""], "text 0: has no tokens"),
        (["--text", "a", "--top", "0"], "top 0"),
        (["--text", "a", "--latents", "24"], "latent 24: this SAE has the latents 0-23"),
        (["--text", "a", "--ctx", "1"], "ctx 1: "),
        (["--text", "a", "--json", "--out", "x.html"], "json: not with --out"),
        (["--text", "a", "--out", "."], "out '.': a folder"),
        (["--file", "missing.txt"], "file 'missing.txt': cannot be read (No such file or directory)"),
        (["--text", "a", "--hook", "nowhere"], "hook 'nowhere'"),
    ],
)
def test_wrong_requests_write_nothing(run, args, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["latents", str(run), *args]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_text_is_refused(run, tmp_path, capsys):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    assert main(["latents", str(run), "--file", str(tmp_path / "image.png")]) == 2
    assert "not a text in UTF-8" in capsys.readouterr().err
