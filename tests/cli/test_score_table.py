"""The scores of several SAEs in one table, which is never wider than the terminal."""

import json

import pytest

from prolu import RunConfig, run_sweep
from prolu.cli.entry_point import main
from prolu.cli.score_table import score_table

LONG = "prolu_relu-sqrt_l1-0.0102-lr0.005-d512-s0"
FIGURES = {"l0": 12.5, "degradation": -1.23456e-05, "encoder_decoder_cosine": 0.5, "mse_no_bos": 1234567.0}


def cells_of(lines):
    """Return the numbers of all tables by SAE and figure, SAEs counted from the left and on from table to table."""
    found, at, n = {}, 0, 0
    for line in lines:
        if line.startswith("--"):
            at += n
        elif line and not line.startswith(" "):
            figure, *values = line.split()
            n = len(values)
            found |= {(at + i, figure): value for i, value in enumerate(values)}
    return found


@pytest.mark.parametrize("width", [36, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("n", [2, 3, 7])
@pytest.mark.parametrize("name", ["a", LONG, "x" * 90])
def test_every_number_is_there_and_no_line_is_too_long(width, n, name):
    scores = [(f"{name}{i}", {k: v * (i + 1) for k, v in FIGURES.items()}) for i in range(n)]
    lines = score_table(scores, width)
    assert max(map(len, lines)) <= width
    cells = cells_of(lines)
    assert cells == {(i, figure): f"{v:.6g}" for i, (_, found) in enumerate(scores) for figure, v in found.items()}
    heads = [line for line in lines if line.startswith(" ")]
    text = "".join("".join(heads).split())
    assert len(text) == sum(len(name) for name, _ in scores)  # no letter of a name is lost where it is broken


def test_names_are_above_their_numbers_and_a_figure_may_be_missing():
    lines = score_table([("one", {"l0": 1.0}), ("two", {"l0": 2.0, "kl": 0.5})], 80)
    assert lines[0].split() == ["one", "two"]
    assert lines[2].split() == ["l0", "1", "2"]
    assert lines[3].split() == ["kl", "0.5"]
    assert lines[3].index("0.5") + 3 == lines[0].index("two") + 3


def test_a_table_needs_no_more_than_ascii():
    assert "\n".join(score_table([("a", {"l0": 1.0}), ("b", {"l0": 2.0})], 80)).isascii()


def test_a_name_cannot_command_the_terminal():
    lines = score_table([("a\x1b[31m", {"l0": 1.0}), ("b", {"l0": 1.0})], 80)
    assert not any("\x1b" in line for line in lines)


def test_eval_prints_one_table_and_json_as_before(tiny_stream, tmp_path, monkeypatch, capsys):
    runs = [RunConfig(d_sae=40, n_tokens=3840, coeff=0.02, nonlinearity=n) for n in ("relu", "prolu_ste")]
    study = run_sweep(runs, tiny_stream, tmp_path / "study", eval_tokens=640, progress=False)
    folders = [str(run.folder) for run in study.runs]
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    assert main(["eval", *folders, "--eval-tokens", "640"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    cells = cells_of(lines)
    for i, record in enumerate(study.records):
        for figure in ("l0", "degradation", "mse", "dead_fraction"):
            assert cells[i, figure] == f"{record[figure]:.6g}"
    assert main(["eval", *folders, "--eval-tokens", "640", "--json"]) == 0
    for line, record in zip(capsys.readouterr().out.splitlines(), study.records, strict=True):
        assert json.loads(line) == {name: record[name] for name in json.loads(line)}
    assert main(["eval", folders[0], "--eval-tokens", "640"]) == 0
    assert f"{'l0':24} {study.records[0]['l0']:.6g}" in capsys.readouterr().out.splitlines()
