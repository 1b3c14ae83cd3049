"""Pages of latents of rows that come from no language model: numbers, labels and images stand for the rows."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from prolu.activations.row_files import open_rows
from prolu.cli.entry_point import main
from prolu.studies.results import Results
from support.commands import flags

SMALL = {"d_sae": 16, "n_tokens": 2560, "batch_size": 64, "eval_tokens": 100, "window_tokens": 1024, "threads": 1}
N_ROWS, N_HELD_OUT = 2000, 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of which four belong to each image; those that are held out lie in a file of their own."""
    place = tmp_path_factory.mktemp("rows")
    draw = np.random.default_rng(0)
    (place / "rows").mkdir()
    np.save(place / "rows/train.npy", draw.normal(size=(N_ROWS, 8)).astype(np.float32))
    np.save(place / "rows/held_out.npy", draw.normal(size=(N_HELD_OUT, 8)).astype(np.float32))
    images = draw.integers(0, 256, size=(N_HELD_OUT // 4, 6, 6)).astype(np.uint8)
    np.save(place / "images.npy", images)
    (place / "pngs").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(place / f"pngs/{i:04}.png")
    (place / "labels.txt").write_text("".join(f"kind {i % 7} <b>\n" for i in range(N_HELD_OUT)), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def study(folder):
    out = folder / "study"
    shown = {"labels": folder / "labels.txt", "images": folder / "images.npy"}
    rows = {"activations": folder / "rows", "nonlinearity": "topk", "target_l0": 3}
    assert main(["train", *flags(**SMALL, **rows, **shown, out=out)]) == 0
    return out


def read_data(folder, name):
    return json.loads((folder / "data" / f"{name}.js").read_text().removeprefix(f'put("{name}", ').removesuffix(")\n"))


def test_examples_are_the_rows_on_which_encode_is_largest(study, folder):
    run = Results.load(study).runs[0]
    pages = run.folder / "features"
    rows = np.load(folder / "rows/held_out.npy")
    plain = run.load().encode(rows).detach().numpy()
    columns, tokens, text = (read_data(pages, name) for name in ("list", "tokens", "text"))
    # Position 0 is a row like any other, and no BOS.
    assert sorted(text["rows"]) == list(range(N_HELD_OUT))
    assert columns["density"] == pytest.approx((plain > 0).mean(0), rel=1e-3)
    assert columns["max"] == pytest.approx(plain.max(0), rel=1e-3)
    seen = set()
    for i, latent in enumerate(read_data(pages, "details-0")):
        best = np.sort(plain[:, i][plain[:, i] > 0])[::-1][:15]
        assert [pairs[1] for *_, pairs in latent["top"]] == pytest.approx(best, rel=1e-3)
        for position, *_, pairs in [*latent["top"], *(e for band in latent["bands"] for e in band)]:
            row = text["rows"][position]
            assert pairs == [0, pytest.approx(plain[row, i], rel=1e-3)]
            assert tokens[text["tokens"][position]] == f"kind {row % 7} <b>"
            seen.add(row // 4)
        assert latent["promoted"] == []
    images = np.load(folder / "images.npy")
    assert {int(file.stem) for file in (pages / "data/images").iterdir()} == seen
    for number in seen:
        with Image.open(io.BytesIO((pages / f"data/images/{number}.png").read_bytes())) as image:
            assert np.array_equal(np.asarray(image), images[number])
    assert "<b>" not in (pages / "index.html").read_text()


def test_pages_are_made_anew_for_other_images_and_kept_for_the_same(study, folder):
    run = Results.load(study).runs[0]
    with_pngs = ["report", str(study), "--images", str(folder / "pngs")]
    assert main(with_pngs) == 0
    file = run.folder / "features/data/images/0.png"
    assert file.read_bytes() == (folder / "pngs/0000.png").read_bytes()
    before = file.stat().st_mtime_ns
    assert main(with_pngs) == 0
    assert file.stat().st_mtime_ns == before
    assert re.search(r'"labels":false,"images":true,"per_image":4', (run.folder / "features/index.html").read_text())


def test_rows_that_are_drawn_from_one_file_have_its_numbers(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32))
    assert main(["train", *flags(**SMALL, activations=tmp_path / "x.npy", out=tmp_path / "one", max_epochs=9)]) == 0
    run = Results.load(tmp_path / "one").runs[0]
    text = read_data(run.folder / "features", "text")
    rows = open_rows(str(tmp_path / "x.npy"), 1, 1)
    assert np.array_equal(np.load(tmp_path / "x.npy")[text["rows"]], rows.held_out[np.arange(50)][:, 0])
    assert read_data(run.folder / "features", "tokens")[0] == f"row {text['rows'][0]}"


@pytest.mark.parametrize(
    ("content", "flag", "said"),
    [
        (b"one\ntwo\n", "--labels", "has 2 lines, and there are 240 rows"),
        (b"\xff\xfe", "--labels", "not a text in UTF-8"),
        (b"x", "--images", "must be a folder of PNGs or a .npy file"),
    ],
)
def test_what_does_not_fit_the_rows_is_refused(study, tmp_path, content, flag, said, capsys):
    (tmp_path / "file").write_bytes(content)
    page = study / "report.html"
    before = page.stat().st_mtime_ns
    assert main(["report", str(study), flag, str(tmp_path / "file")]) == 2
    assert said in capsys.readouterr().err
    assert page.stat().st_mtime_ns == before


def test_images_that_are_none_or_too_few_are_refused(study, tmp_path, capsys):
    np.save(tmp_path / "seven.npy", np.zeros((7, 4, 4)))
    np.save(tmp_path / "flat.npy", np.zeros((240, 4)))
    (tmp_path / "pngs").mkdir()
    (tmp_path / "pngs/a.png").write_bytes(b"<svg onload=alert(1)>")
    for name, said in (
        ("seven.npy", "has 7 images; there are 240 rows"),
        ("flat.npy", "must be [n, h, w]"),
        ("pngs", "not a PNG"),
        ("missing.npy", "missing.npy"),
    ):
        assert main(["report", str(study), "--images", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err


def test_labels_are_for_rows_only(tiny_lm_folder, stories_file, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("a\n")
    source = ["--lm", str(tiny_lm_folder), "--data", str(stories_file), "--hook", "blocks.1.hook_resid_pre"]
    command = ["train", *source, "--ctx", "32", *flags(**SMALL), "--out", str(tmp_path / "text")]
    assert main([*command, "--labels", str(tmp_path / "labels.txt")]) == 2
    assert "labels and images: only for rows" in capsys.readouterr().err
    assert not (tmp_path / "text").exists()
