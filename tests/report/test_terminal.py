"""What the commands print of a study: every number that the engine has, and no line wider than the terminal."""

import io
import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import prolu
from prolu import Results, RunConfig
from prolu.cli.entry_point import main
from prolu.evaluation.comparison.claims import Claim, FamilyComparison, compare_families, prolu_against_relu
from prolu.evaluation.comparison.verdicts import Verdict
from prolu.evaluation.comparison.wording import percent, shown_interval
from prolu.report import writer
from prolu.report.console import lines_of
from prolu.report.estimate import print_estimate
from prolu.report.terminal import print_summary
from prolu.studies.cost import Estimate
from prolu.studies.rates import Rates
from prolu.studies.recipes import RECIPES
from prolu.studies.results import records_of
from support.made_studies import SCORED_ON, power_law

WIDTHS = (60, 72, 80, 100, 120)
PLACES = ("report:", "latents:", "weights:", "python:")
"""How lines begin whose path or command is copied as one: the terminal breaks them."""

SHAPES = {
    "paper": ["relu + l1", "prolu_relu + l1", "prolu_ste + l1", "relu + sqrt_l1", "prolu_relu + sqrt_l1"],
    "long names": ["relu + l1", "prolu(0.25,0.5,0.125) + sqrt_l1", "saelens: jumprelu with a name of its own + none"],
    "marked up": ["relu + l1", "[bold]mine[/bold] + l1", "\x1b[31mred + l1"],
    "no baseline": ["gated + l1", "jumprelu(1) + l0"],
}


def study_of(families, folder, seeds=(0,), level=0.1, spread=0.05):
    records = []
    for i, name in enumerate(families):
        records += power_law(name, 8.0 * (1 - level * i), seeds, spread=spread)
    for i, r in enumerate(records):
        r |= {
            "run_id": f"run-{i}", "recovered": 0.95, "dead_fraction": i / 1000, "sqrt_l1": 1.0, "eval_tokens": 640,
            "fvu": 0.1, "n_tokens": 2_560_000, "d_sae": 512, "converged": [True, True, False][i % 3],
        }  # fmt: skip
    results = Results(Path(folder), records)
    stream = SCORED_ON["stream"] | {"lm": "builtin", "seed": 0}
    results.__dict__["_config"] = SCORED_ON | {"stream": stream, "runs": [{}] * len(records)}
    return results


def drawn(*studies, comparison=None):
    compared = comparison or compare_families(studies)
    return writer.DrawnReport(studies[0].folder / "report.html", list(studies), records_of(studies), compared)


def printed(report, width, **options):
    out = io.StringIO()
    print_summary(report, console=Console(file=out, width=width, color_system=None), **options)
    return out.getvalue()


def body(text):
    return [line for line in text.splitlines() if not line.startswith(PLACES)]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("all_verdicts", [False, True])
def test_no_line_is_wider_than_the_terminal(width, shape, seeds, all_verdicts):
    text = printed(drawn(study_of(SHAPES[shape], "runs/demo", seeds)), width, all_verdicts=all_verdicts)
    assert max(map(len, body(text))) <= width
    assert "\x1b" not in text
    if shape == "marked up":
        assert "[bold]mine[/bold] + l1" in text


@pytest.mark.parametrize("width", WIDTHS)
def test_a_run_is_one_line_with_its_numbers(width):
    study = study_of(SHAPES["paper"], "runs/demo")
    lines = body(printed(drawn(study), width))
    for r in study.records:
        (line,) = [one for one in lines if re.search(rf"\b{r['degradation']:.3f}\b", one) and "95.0%" in one]
        assert re.search(rf"\b{r['l0']:.1f}( \u25cb)?  ", line)
        assert ("\u25cb" in line) == (r["converged"] is False)
        # Under 80 columns the figures are left out that not every comparison needs.
        assert (f"{r['mse']:.4f}" in line and f"{r['coeff']:.3g}" in line) == (width >= 80)
    assert sum("family" in line for line in lines) == (3 if width < 80 else 2)


def test_pooled_studies_are_told_apart(tmp_path):
    pair = [study_of(SHAPES["paper"], tmp_path / name) for name in ("first", "a-rather-long-name-of-a-study")]
    pair[1].config["stream"]["seed"] = 1
    for width in WIDTHS:
        lines = body(printed(drawn(*pair), width))
        assert max(map(len, lines)) <= width
        # A line per run: texts are broken only where leaving figures out is not enough, as under 80 columns here.
        assert sum(" first " in line for line in lines) == len(pair[0].records)
        whole = sum(" a-rather-long-name-of-a-study " in line for line in lines)
        assert whole == (len(pair[1].records) if width >= 80 else 0)


def test_changes_are_those_of_the_engine_and_say_that_one_seed_tests_nothing():
    study = study_of(SHAPES["paper"], "runs/demo")
    report = drawn(study)
    text = printed(report, 80)
    assert "One seed: differences are not findings." in text
    counts = Counter(claim.verdict for claim in report.comparison.paper)
    assert counts == {"not tested": 3, "does not hold (one seed)": 1}
    assert f"paper's claims: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())} (see the report)" in text
    for challenger in dict.fromkeys(v.challenger for v in report.comparison.verdicts):
        (line,) = [one for one in text.splitlines() if one.startswith(f" {challenger} ") and " to " in one]
        for baseline in ("relu + l1", "relu + sqrt_l1"):
            changes = [
                v.change for v in report.comparison.verdicts if (v.challenger, v.baseline) == (challenger, baseline)
            ]
            for end in {min(changes, default=None), max(changes, default=None)} - {None}:
                assert percent(end) in line
    # All of it fits on one screen of a tall terminal, whatever the number of comparisons.
    assert len(text.splitlines()) <= len(study.records) + 22


def test_why_families_are_not_compared_is_said_once():
    nan = math.nan
    none = Verdict(
        "prolu_ste + l1", "relu + l1", nan, nan, nan, nan, "not tested", 0, 0, "", reason="no run of relu + l1"
    )
    pairs = [none, none._replace(baseline="relu + sqrt_l1"), none._replace(challenger="topk")]
    text = printed(drawn(study_of(SHAPES["paper"], "a"), comparison=FamilyComparison(pairs, [], [])), 120)
    text = " ".join(text.split())
    assert text.count("no run of relu + l1") == 1
    for v in pairs:
        assert f"{v.challenger} with {v.baseline}" in text


@pytest.mark.parametrize("all_verdicts", [False, True])
def test_intervals_are_printed_where_there_are_any(all_verdicts):
    study = study_of(SHAPES["paper"], "runs/seeds", (0, 1, 2))
    report = drawn(study)
    text = printed(report, 80, all_verdicts=all_verdicts)
    tested = [v for v in report.comparison.verdicts if v.is_tested]
    assert tested
    for v in tested:
        assert re.search(rf"{re.escape(percent(v.change))}  {re.escape(shown_interval(v))} +{v.verdict}\n", text)
        assert f" {v.challenger} against {v.baseline}\n" in text
    assert "One seed" not in text
    assert "95% intervals over init seeds" in text.replace("\n ", " ")
    for claim in [*report.comparison.against_relu, *report.comparison.paper]:
        assert f"{claim.verdict}: {claim.statement}" in " ".join(text.split())
        assert (claim.evidence in " ".join(text.split())) == all_verdicts
    assert ("hypervolume" in text) == all_verdicts


def test_all_verdicts_of_one_seed_are_printed_on_demand():
    less = Verdict("prolu_ste + l1", "relu + l1", 20, -0.3, -0.4, -0.2, "lower", 3, 99, "init seeds")
    nan = math.nan
    none = less._replace(l0=nan, change=nan, low=nan, high=nan, verdict="not tested", reason="one seed")
    compared = FamilyComparison([less, none], prolu_against_relu([less]), [])
    text = printed(drawn(study_of(SHAPES["paper"], "a"), comparison=compared), 140)
    assert "-40.0% to -20.0%" in text
    one_seed = less._replace(low=nan, high=nan, verdict="not tested", reason="one seed", n_seeds=1)
    compared = FamilyComparison([one_seed], prolu_against_relu([one_seed]), [])
    assert "not tested (one seed)" in printed(
        drawn(study_of(SHAPES["paper"], "a"), comparison=compared), 140, all_verdicts=True
    )


def test_a_study_without_prolu_hears_nothing_of_the_papers_claims():
    claims = [Claim("it holds", "not tested", "one seed.")]
    for families, is_said in ((["relu + l1", "topk + none"], False), (["relu + l1", "prolu_ste + l1"], True)):
        study = study_of(families, "a")
        report = drawn(study, comparison=compare_families([study])._replace(paper=claims))
        assert ("claims" in printed(report, 80)) == is_said


@pytest.fixture
def one_sae(tmp_path):
    """A study of one run, with the densities of its five latents."""
    study = study_of(["topk + none"], tmp_path / "study")
    record = study.records[0] | {"converged": False, "dead_fraction": 0.2, "fvu": 0.125}
    single = replace(study, records=[record])
    single.__dict__["_config"] = study.config | {"runs": [{}]}
    folder = single.runs[0].folder
    folder.mkdir(parents=True)
    save_file({"density": torch.tensor([0.0, 0.01, 0.02, 0.04, 0.08])}, folder / "latents.safetensors")
    (single.folder / "config.json").write_text(json.dumps(single.config))
    (single.folder / "results.jsonl").write_text(json.dumps(record) + "\n")
    return single


@pytest.mark.parametrize("width", WIDTHS)
def test_one_sae_gets_a_headline_and_no_claims(one_sae, width):
    text = printed(drawn(one_sae), width)
    lines = body(text)
    assert max(map(len, lines)) <= width
    record = one_sae.records[0]
    head = " ".join(text.split("\n\n")[0].split())
    assert head.endswith("one SAE, topk, builtin blocks.1, 2.56M tokens, not converged when training ended")
    # The quartiles of 1%, 2%, 4% and 8%, interpolated linearly by hand.
    found = {"L0": f"{record['l0']:.1f}", "CE increase": f"{record['degradation']:.3f}", "recovered": "95.0%"}
    found |= {"FVU": "0.125", "dead": "20.0%", "density": "1.75%, 3.00%, 5.00%"}
    for name, value in found.items():
        assert any(re.match(rf" {name} +{re.escape(value)}  ", line) for line in lines), name
    folder = one_sae.runs[0].folder
    assert f"weights:  {folder / 'sae.safetensors'}\n" in text
    assert f'python:   prolu.SAE.load("{folder}")\n' in text
    for word in ("claims", "against", "SAEs", "Families", "frontier"):
        assert word not in text


def test_the_page_of_one_sae_has_its_headline_and_no_claims(one_sae, monkeypatch):
    monkeypatch.setattr(writer, "save_figure", lambda figure, *_: None)
    page = writer.write_report([one_sae]).page.read_text()
    for text in ("1.75%, 3.00%, 5.00%", "0.125", "run-0/sae.safetensors", 'href="#headline"', "1 of 1 SAE finished"):
        assert text in page
    for text in ('id="verdicts"', 'href="#verdicts"', "claims (Taggart", "Families in numbers"):
        assert text not in page
    assert '"planes":[]' in page.replace(" ", "")  # a figure would have one point
    assert 'id="plane-' not in page
    two = study_of(SHAPES["paper"], one_sae.folder)
    page = writer.write_report([two]).page.read_text()
    assert 'id="verdicts"' in page
    assert 'id="headline"' not in page


def test_a_damaged_file_of_latents_is_refused_before_anything_is_written(one_sae, capsys):
    (one_sae.runs[0].folder / "latents.safetensors").write_bytes(b"\x00" * 20)
    before = sorted(one_sae.folder.rglob("*"))
    assert main(["report", str(one_sae.folder), "--latent-pages", "none"]) == 2
    assert "latents.safetensors: not a readable file of latents" in capsys.readouterr().err
    assert sorted(one_sae.folder.rglob("*")) == before
    (one_sae.runs[0].folder / "latents.safetensors").unlink()
    assert "density" not in printed(drawn(one_sae), 80)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("recipe", ["demo", "comparison", "experiment2"])
def test_an_estimate_fits_the_terminal(width, recipe):
    runs = RECIPES[recipe].runs_at(768)
    sizes = dict.fromkeys(Estimate._fields, 123_456_789_012) | {"n_hooks": 2, "rates": Rates(1e11, 0.123, 0.0456)}
    out = io.StringIO()
    print_estimate(runs, Estimate(**sizes), Console(file=out, width=width, color_system=None))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0] == f"{len(runs)} runs at each of 2 hooks"
    for run in runs:
        asked = f"{run.coeff:.3g}" if run.target_l0 is None else f"{run.target_l0:g}"
        assert re.search(rf"(^|\s){re.escape(asked)}(,|\s|$)", out.getvalue())


def test_the_line_of_python_can_be_run(tmp_path, one_sae):
    for converged, dead in ((True, False), (False, False), (None, False), (False, True)):
        study = study_of(SHAPES["paper"], one_sae.folder)
        for r in study.records:
            r.update({"converged": converged} | ({"l0": 0.0} if dead else {}))
        (study.folder / "config.json").write_text(json.dumps(study.config))
        (study.folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in study.records))
        text = printed(drawn(study, comparison=FamilyComparison([], [], [])), 80)
        (line,) = [line for line in text.splitlines() if line.startswith("python:")]
        expression = line.removeprefix("python:").strip().removesuffix(".load()")
        run = eval(expression, {"prolu": prolu})
        assert run.record["run_id"].startswith("run-")


def test_sentences_break_between_words():
    text = "prolu_relu + sqrt_l1 has a lower CE increase than relu + sqrt_l1 " + "x" * 50
    for width in (20, 40, 60):
        lines = lines_of(text, width)
        assert all(len(line) <= width for line in lines)
        assert "".join("".join(lines).split()) == "".join(text.split())
    assert set(" ".join(lines_of(text, 60)).split()) == set(text.split())


def test_a_circle_only_where_it_can_be_written():
    study = study_of(SHAPES["paper"], "a")
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_summary(drawn(study), console=Console(file=file, width=80, color_system=None))
    file.flush()
    assert " o " in file.buffer.getvalue().decode("ascii")


def test_the_command_has_an_option_for_all_verdicts(one_sae, monkeypatch, capsys):
    monkeypatch.setattr(writer, "save_figure", lambda figure, *_: None)
    study = study_of(SHAPES["paper"], one_sae.folder)
    for r in study.records:
        (study.folder / r["run_id"]).mkdir(exist_ok=True)
    (study.folder / "config.json").write_text(json.dumps(study.config))
    (study.folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in study.records))
    monkeypatch.setenv("COLUMNS", "80")
    command = ["report", str(study.folder), "--latent-pages", "none"]
    assert main(command) == 0
    short = capsys.readouterr().out
    assert main([*command, "--verdicts"]) == 0
    assert "hypervolume" in capsys.readouterr().out
    assert "hypervolume" not in short
    assert RunConfig().nonlinearity in short
