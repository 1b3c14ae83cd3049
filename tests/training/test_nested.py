"""Nested (Matryoshka) losses: what they train, how they are named and scored. The gradients are in `test_baselines`."""

from dataclasses import replace

import pytest
import torch

from prolu import SAE, HeldOut, RunConfig, Trainer, evaluate
from prolu.evaluation.comparison.frontiers import family
from prolu.evaluation.comparison.prefixes import with_prefix
from prolu.evaluation.comparison.styles import DASHES, look, marker_of
from prolu.evaluation.scoring import PREFIX_FIGURES, score_prefix
from prolu.report.page_data import DASHES as PAGE_DASHES
from prolu.report.page_data import SYMBOLS
from prolu.report.writer import write_report
from prolu.sae.scaling import normalise
from prolu.studies.records import check_records
from prolu.training.nested_prefixes import prefixes_now
from prolu.training.steps.cuda import CudaStep
from prolu.training.trainer_stack import TrainerStack, stack_key
from support.steps import relative
from support.sweeps import contents, sweep
from support.synthetic import sparse_activations

D_IN, BATCH, STEPS = 13, 30, 20
PREFIXES = (3, 11, 30)
BASE = RunConfig(d_sae=37, n_tokens=STEPS * BATCH, lr=1e-2, coeff=0.01, step="dense", matryoshka=PREFIXES)
FAMILIES = [
    ("relu", "l1"), ("prolu_relu", "sqrt_l1"), ("prolu_ste", "l1"), ("gated", "l1"), ("jumprelu", "l0"),
    ("topk(5)", "none"), ("batchtopk(5)", "none"),
]  # fmt: skip


def batch(seed):
    return normalise(sparse_activations(BATCH, D_IN, seed=seed))[0]


def trained(config, kind):
    config = replace(config, step="dense" if kind in ("gpu", "stacked") else kind)
    trainer = Trainer(config, D_IN, BATCH, dtype=torch.float64)
    if kind == "gpu":
        trainer.steps = {"dense": CudaStep(trainer.state.weights, BATCH)}
    step = TrainerStack([trainer]).step if kind == "stacked" else trainer.step
    for n in range(STEPS):
        step(batch(n))
    return trainer


@pytest.mark.parametrize("kind", ["sparse", "sparse_torch", "stacked", "gpu"])
@pytest.mark.parametrize(("nonlinearity", "penalty"), FAMILIES)
def test_twenty_updates_are_those_of_the_dense_step(nonlinearity, penalty, kind):
    config = replace(BASE, nonlinearity=nonlinearity, penalty=penalty, aux_dead_tokens=2 * BATCH)
    wanted = trained(config, "dense").state.weights
    for ours, theirs in zip(trained(config, kind).state.weights.tensors(), wanted.tensors(), strict=True):
        assert relative(ours, theirs) < 1e-9


def test_a_prefix_reconstructs_better_than_that_of_a_plain_sae():
    x = torch.cat([batch(n) for n in range(200, 220)])

    def mse_of_prefix(matryoshka, n):
        config = replace(BASE, nonlinearity="relu", n_tokens=300 * BATCH, matryoshka=matryoshka, init_seed=1)
        trainer = Trainer(config, D_IN, BATCH, dtype=torch.float64)
        for step in range(300):
            trainer.step(batch(step))
        sae = trainer.sae()
        latents = sae.encode_normalised(x).detach()
        latents[:, n:] = 0
        return (x - sae.decode_normalised(latents)).square().mean().item()

    assert mse_of_prefix(PREFIXES, 11) < 0.9 * mse_of_prefix((), 11)


@pytest.mark.parametrize("prefixes", [(0, 3), (3, 3), (5, 3), (37,), (3, 50), (-1,)])
def test_prefixes_must_ascend_within_the_sae(prefixes):
    with pytest.raises(ValueError, match=r"matryoshka .*: must be ascending numbers of"):
        replace(BASE, matryoshka=prefixes)


def test_names_and_records():
    plain = replace(BASE, matryoshka=(), nonlinearity="batchtopk(5)", penalty="none")
    nested = replace(plain, matryoshka=PREFIXES)
    assert "matryoshka" not in plain.describe()
    assert nested.family == family(nested.describe()) == "batchtopk, matryoshka"
    assert nested.run_id == f"{plain.run_id}-nested3.11.30"
    assert RunConfig.recorded(nested.describe() | {"matryoshka": list(PREFIXES)}).matryoshka == PREFIXES
    assert stack_key(Trainer(plain, D_IN, BATCH)) != stack_key(Trainer(nested, D_IN, BATCH))


def test_scores_of_prefixes(tiny_stream, tmp_path):
    run = RunConfig(
        d_sae=40, n_tokens=1920, coeff=0.02, nonlinearity="batchtopk(4)", penalty="none", matryoshka=(8, 20)
    )
    results = sweep([run], tiny_stream, tmp_path / "a")
    (record,) = results.records
    assert [each["d_sae"] for each in record["prefixes"]] == [8, 20]
    sae = results.runs[0].load()
    held_out = HeldOut(tiny_stream.lm, tiny_stream.blocks, record["eval_tokens"])
    figures = evaluate(sae, held_out)
    assert score_prefix(sae, held_out, 40) == {name: figures[name] for name in PREFIX_FIGURES}
    acts = held_out.acts
    for each in record["prefixes"]:
        latents = sae.encode(acts)
        latents[..., each["d_sae"] :] = 0
        recon = sae.decode(latents).detach()
        assert each["l0"] == pytest.approx((latents > 0).sum(-1).double().mean().item(), rel=1e-9)
        assert each["degradation"] == pytest.approx(held_out.spliced_ce(recon) - held_out.ce_clean, abs=1e-6)
    assert record["prefixes"][0]["l0"] < record["prefixes"][1]["l0"] < record["l0"]
    before = contents(tmp_path / "a")
    sweep([run], tiny_stream, tmp_path / "a")
    assert contents(tmp_path / "a") == before
    assert isinstance(SAE.load(results.runs[0].folder), SAE)


def test_the_report_has_a_figure_for_each_prefix(tiny_stream, tmp_path, capsys):
    runs = [
        RunConfig(d_sae=40, n_tokens=1920, nonlinearity=f"batchtopk({k})", matryoshka=nested)
        for k in (2, 4)
        for nested in ((), (8, 20))
    ]
    results = sweep(runs, tiny_stream, tmp_path / "a")
    drawn = write_report([results])
    assert {file.name for file in (tmp_path / "a/figures").glob("*first*.svg")} == {
        "degradation-against-l0-first-8.svg",
        "degradation-against-l0-first-20.svg",
    }
    page = drawn.page.read_text()
    assert "The first 20 latents alone: CE increase against sparsity" in page
    shorter = with_prefix(results.records, 8)
    assert [r["l0"] for r in shorter] == [r["prefixes"][0]["l0"] for r in results.records if "prefixes" in r]
    assert {family(r) for r in shorter} == {"batchtopk, matryoshka"}


@pytest.mark.parametrize(
    "prefixes",
    ["<script>", [8], [{"d_sae": "8", "l0": 1.0, "degradation": 1.0}], [{"d_sae": 8, "l0": 1.0}],
     [{"d_sae": 8, "l0": None, "degradation": 1.0}], [{"d_sae": 8, "l0": 1.0, "degradation": "x"}]],
)  # fmt: skip
def test_prefixes_that_a_stranger_wrote_are_checked(tmp_path, prefixes):
    with pytest.raises(ValueError, match=r"line 1: prefixes is .*, but must be a list of scores"):
        check_records(tmp_path / "results.jsonl", [{"prefixes": prefixes}])


def test_a_nested_loss_looks_different_in_figures():
    plain = replace(BASE, matryoshka=()).describe()
    nested = BASE.describe()
    assert look(plain) != look(nested)
    # By its line; the marker is that of the nonlinearity, which is the same.
    assert DASHES[look(plain)] != DASHES[look(nested)]
    assert PAGE_DASHES[look(plain)] != PAGE_DASHES[look(nested)]
    assert marker_of(plain["nonlinearity"]) == marker_of(nested["nonlinearity"]) in SYMBOLS


DRAWN = replace(BASE, matryoshka=(), matryoshka_drawn=5)


def test_drawn_prefixes_follow_their_distribution():
    n_draws = 4000
    config = replace(BASE, matryoshka=(), matryoshka_drawn=1)
    counts = torch.zeros(BASE.d_sae + 1)
    for n in range(n_draws):
        (prefix,) = prefixes_now(config, n)
        counts[prefix] += 1
    n = torch.arange(1, BASE.d_sae, dtype=torch.float64)
    wanted = n_draws * ((n + 1).sqrt() - n.sqrt()) / (BASE.d_sae**0.5 - 1)
    assert counts[0] == counts[BASE.d_sae] == 0
    chi_square = ((counts[1:-1] - wanted) ** 2 / wanted).sum()
    assert chi_square < 70  # 35 degrees of freedom: above it once in 2,500 times


def test_drawn_prefixes_are_those_of_the_update():
    drawn = [prefixes_now(DRAWN, n) for n in range(50)]
    assert all(len(set(some)) == 5 and list(some) == sorted(some) for some in drawn)
    assert len(set(drawn)) > 40
    assert drawn == [prefixes_now(replace(DRAWN, nonlinearity="relu"), n) for n in range(50)]
    assert drawn != [prefixes_now(replace(DRAWN, init_seed=1), n) for n in range(50)]


@pytest.mark.parametrize("kind", ["sparse", "sparse_torch", "gpu"])
@pytest.mark.parametrize(("nonlinearity", "penalty"), FAMILIES)
def test_twenty_updates_with_drawn_prefixes(nonlinearity, penalty, kind):
    config = replace(DRAWN, nonlinearity=nonlinearity, penalty=penalty, aux_dead_tokens=2 * BATCH)
    wanted = trained(config, "dense").state.weights
    for ours, theirs in zip(trained(config, kind).state.weights.tensors(), wanted.tensors(), strict=True):
        assert relative(ours, theirs) < 1e-9


def test_an_update_with_drawn_prefixes_is_that_with_the_same_prefixes_given():
    trainer = Trainer(DRAWN, D_IN, BATCH, dtype=torch.float64)
    for n in range(3):
        given = Trainer(replace(BASE, matryoshka=prefixes_now(DRAWN, n)), D_IN, BATCH, dtype=torch.float64)
        given.restore_(trainer.whole_state(), trainer.state.counters())
        for one in (trainer, given):
            one.step(batch(n))
        for ours, theirs in zip(trainer.state.weights.tensors(), given.state.weights.tensors(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_study_with_drawn_prefixes_is_scored_and_resumed(tiny_stream, tmp_path):
    run = RunConfig(d_sae=40, n_tokens=1920, nonlinearity="batchtopk(4)", matryoshka_drawn=3)
    assert run.family == "batchtopk, drawn matryoshka"
    assert run.run_id.endswith("-drawn3")
    (record,) = sweep([run], tiny_stream, tmp_path / "a").records
    assert [each["d_sae"] for each in record["prefixes"]] == [2, 5, 10, 20]
    assert look(record) == "nested"
    before = contents(tmp_path / "a")
    sweep([run], tiny_stream, tmp_path / "a")
    assert contents(tmp_path / "a") == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"matryoshka_drawn": 37}, "0 or more, and less than d_sae"),
        ({"matryoshka_drawn": -1}, "0 or more, and less than d_sae"),
        ({"matryoshka": (3,)}, "0 where matryoshka has prefixes"),
        ({"step": "stacked"}, "0 with step 'stacked'"),
    ],
)
def test_drawn_prefixes_that_cannot_be(change, words):
    with pytest.raises(ValueError, match=f"matryoshka_drawn .*: must be {words}"):
        replace(DRAWN, **change)
