"""Other metrics and standings on the terminal, on the page, and as CSV."""

import csv
import io
import json
import math
import re

import pytest
from rich.console import Console

from prolu import Results, standings
from prolu.cli.entry_point import main
from prolu.evaluation.comparison.metric_catalog import METRICS
from prolu.evaluation.comparison.standing_wording import shown_p_best, shown_rank, shown_value_interval
from prolu.report import writer
from prolu.report.html_tables import table_of_verdicts, tables_of_standings
from prolu.report.terminal import print_summary


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Three families with three seeds at two target L0s; the second family is better by a tenth in everything."""
    monkeypatch.setattr(writer, "save_figure", lambda figure, *files: None)
    folder = tmp_path / "study"
    records = [
        {
            "run_id": f"{name}-{l0}-{seed}", "nonlinearity": name, "penalty": "l1", "coeff": 0.1, "target_l0": l0,
            "l0": float(l0), "degradation": level * (1 + 0.01 * seed) / l0, "recovered": 1 - 0.2 * level - 0.001 * seed,
            "mse": level / l0, "l1": l0 / 2, "sqrt_l1": 2.0, "fvu": level / l0 * 2, "dead_fraction": 0.1 * level,
            "n_tokens": 100, "eval_tokens": 64, "init_seed": seed, "converged": True,
        }
        for name, level in (("relu", 1.0), ("prolu_ste", 0.9), ("prolu_relu", 1.1))
        for l0 in (8, 32)
        for seed in (0, 1, 2)
    ]  # fmt: skip
    folder.mkdir()
    stream = {"lm": "tiny", "hook": "h", "data": "text", "seed": 0}
    (folder / "config.json").write_text(json.dumps({"stream": stream, "runs": [{}] * len(records)}))
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def printed(drawn, width):
    out = io.StringIO()
    print_summary(drawn, console=Console(file=out, width=width, color_system=None))
    return out.getvalue()


def rows_of(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_terminal_has_a_table_of_verdicts_for_each_metric_and_families_by_metrics(study):
    drawn = writer.write_report([study], metrics=["recovered", "fvu"])
    text = printed(drawn, 100)
    assert "loss recovered at equal L0, higher is better" in text
    assert "FVU at equal L0" in text
    verdict = next(v for v in drawn.comparison.others if v.metric == "recovered" and v.challenger == "prolu_ste + l1")
    assert (verdict.verdict, verdict.is_better) == ("higher", True)
    assert f"+{verdict.change:.3g}" in text
    for s in standings(Results.load(study), ["degradation", "recovered", "fvu"]):
        assert re.search(
            rf" {re.escape(s.family)} .*{s.value:.3g}[ *]+{re.escape(shown_value_interval(s))} +{shown_p_best(s)}",
            text,
        )
        assert s.is_best == (s.family == "prolu_ste + l1")
    assert "* has the best value. Best is the probability" in text
    assert "Families at L0" not in printed(writer.write_report([study]), 100)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_no_line_is_wider_than_the_terminal(study, width):
    text = printed(writer.write_report([study], metrics=["recovered", "fvu", "mse", "l1", "dead_fraction"]), width)
    shown = [line for line in text.splitlines() if not line.startswith(("report:", "python:"))]
    assert max(map(len, shown)) <= width
    tables = text.split("Families at L0", 1)[1]
    for words in ("loss recovered", "FVU", "MSE", "L1", "dead latents"):
        assert len(re.findall(rf"\bfamily .*\b{words}\b", tables)) == 2  # once for each L0


def test_the_page_has_them_too(study):
    page = writer.write_report([study], metrics=["recovered"]).page.read_text()
    text = re.sub(r"<[^>]*>|\s+", " ", page.split("<main>")[1].split("<script>")[0])
    assert "loss recovered at equal L0, higher is better" in text
    assert "Families side by side in several metrics" in text
    assert "at L0 8" in text
    usual = writer.write_report([study]).page.read_text()
    assert "loss recovered at equal L0" not in usual
    for words in ("CE increase", "FVU", "dead latents"):
        assert re.search(rf'<th scope="colgroup" colspan="3" class="n">{words}', usual)


def test_the_files_have_every_verdict_and_standing(study):
    drawn = writer.write_report([study], metrics=["recovered"])
    verdicts = rows_of(study / "verdicts.csv")
    assert len(verdicts) == len(drawn.comparison.verdicts) + len(drawn.comparison.others)
    for row, v in zip(verdicts, [*drawn.comparison.verdicts, *drawn.comparison.others], strict=True):
        assert (row["metric"], row["challenger"], row["baseline"], row["verdict"]) == (
            v.metric, v.challenger, v.baseline, v.verdict,
        )  # fmt: skip
        assert [float(row[name]) for name in ("l0", "change", "low", "high")] == [v.l0, v.change, v.low, v.high]
    rows = rows_of(study / "standings.csv")
    assert len(rows) == 2 * 3 * 2
    for row, s in zip(rows, drawn.comparison.standings, strict=True):
        assert (row["metric"], row["family"], float(row["p_best"])) == (s.metric, s.family, s.p_best)
        assert float(row["value"]) == s.value


def test_a_family_without_a_value_has_no_row_and_its_reason_is_in_the_file(study):
    records = [json.loads(line) for line in (study / "results.jsonl").read_text().splitlines()]
    some = [r for r in records if (r["nonlinearity"], r["l0"]) != ("prolu_ste", 32.0)]
    (study / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    drawn = writer.write_report([study], metrics=["fvu"])
    at_8, at_32 = tables_of_standings(drawn.comparison.standings)
    assert [name for name, _ in at_8.rows] == ["relu + l1", "prolu_ste + l1", "prolu_relu + l1"]
    assert [name for name, _ in at_32.rows] == ["relu + l1", "prolu_relu + l1"]
    (row,) = {r["reason"] for r in rows_of(study / "standings.csv") if not r["value"]}
    assert row.startswith("no run of prolu_ste + l1 within a factor of 1.5 of L0 32")


def test_where_higher_is_better_a_higher_value_is_drawn_as_good(study):
    drawn = writer.write_report([study], metrics=["recovered", "l1"])
    by_metric = {}
    for v in drawn.comparison.others:
        by_metric.setdefault(v.metric, []).append(v)
    table = table_of_verdicts(by_metric["recovered"])
    kinds = {group.challenger: {row.kind for row in group.rows} for group in table.groups}
    assert kinds == {"prolu_ste + l1": {"good"}, "prolu_relu + l1": {"bad"}}
    assert float(table.end) >= max(abs(v.high) for v in by_metric["recovered"])
    l1 = table_of_verdicts(by_metric["l1"])
    assert {row.kind for group in l1.groups for row in group.rows} == {"open"}


def test_the_command_takes_metrics_and_refuses_others_before_anything_is_written(study, capsys):
    assert main(["report", str(study), "--metrics", "fvu", "recovered", "--latent-pages", "none"]) == 0
    assert "FVU at equal L0" in capsys.readouterr().out
    (study / "report.html").unlink()
    before = sorted(study.rglob("*"))
    for name, words in (("fuv", "choose one of l0, l1"), ("l0", "families are compared at an equal L0")):
        assert main(["report", str(study), "--metrics", name, "--latent-pages", "none"]) == 2
        assert words in capsys.readouterr().err
    assert sorted(study.rglob("*")) == before


def test_probabilities_and_ranks_in_words(study):
    some = standings(Results.load(study), ["degradation"])[0]
    for p, words in ((0.005, "<1%"), (0.011, "1%"), (0.5, "50%"), (0.989, "99%"), (0.995, ">99%"), (math.nan, "")):
        assert shown_p_best(some._replace(p_best=p)) == words
    assert shown_rank(some._replace(best_rank=1, worst_rank=1)) == "rank 1"
    assert shown_rank(some._replace(best_rank=1, worst_rank=3)) == "rank 1 to 3"
    assert shown_rank(some._replace(best_rank=0, worst_rank=0)) == ""
    assert all(metric.better in ("lower", "higher", "neither") for metric in METRICS.values())
