"""Resampling: who is dead, who is drawn, what is written, and that what was dead fires again."""

import pytest
import torch

from prolu import ActivationStream, RunConfig, Trainer, run_sweep
from prolu.training.moments import Moments
from prolu.training.resampling import Resampler, Resampling
from prolu.training.schedule import Schedule
from prolu.training.steps.cpu_bf16 import bf16_products
from support.steps import random_weights
from support.synthetic import sparse_activations


def resampler_of(dead, *, seed=0, reconstruct=torch.zeros_like, **choices):
    return Resampler(Resampling(**choices), dead, reconstruct, torch.Generator().manual_seed(seed))


def state_with_moments(d_in=8, d_sae=20):
    weights, first = random_weights(d_in, d_sae), random_weights(d_in, d_sae)
    return weights, first, first.map(lambda t: t.square() + 0.1)


def mask(*dead, n=20):
    out = torch.zeros(n, dtype=torch.bool)
    out[list(dead)] = True
    return out


def test_the_papers_schedule_step_by_step():
    schedule = RunConfig(
        n_tokens=400_000_000, warmup_fraction=2000 / 97_656, decay_start_fraction=75_000 / 97_656,
        decay_end_fraction=95_000 / 97_656, resample_fractions=(25_000 / 97_656, 50_000 / 97_656),
        resample_count_fraction=12_500 / 97_656,
    )  # fmt: skip
    resampling, schedule = schedule.resampling(4096), schedule.schedule(4096)
    assert resampling.steps == (25_000, 50_000)
    assert resampling.count_steps == 12_500
    assert schedule == Schedule(
        warmup_steps=2000, restart_steps=(25_000, 50_000), decay_start_step=75_000, decay_end_step=95_000, floor=0.1
    )
    for t in range(97_656):
        start = max(s for s in (0, 25_000, 50_000) if s <= t)
        expected = min(1, (t + 1 - start) / 2000)
        if t > 75_000:
            expected = max(1 - (t - 75_000) / 20_000, 0.1)
        assert schedule.factor(t) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("second_moment", ["mean", "zero"])
def test_what_is_written_is_exactly_what_the_method_says(second_moment):
    weights, first, second = state_with_moments()
    before = [w.map(torch.clone) for w in (weights, first, second)]
    dead, living = [3, 11], [i for i in range(20) if i not in (3, 11)]
    x = sparse_activations(50, 8)
    chosen = resampler_of(mask(*dead), encoder_norm=0.2, second_moment=second_moment)
    chosen.offer(x, x.norm(dim=1))
    assert chosen.finish_(weights, Moments(first, second), {"b_enc": 0.0}) == (2, 2)
    unit = x / x.norm(dim=1, keepdim=True)
    mean_norm = before[0].encoder[living].norm(dim=1).mean()
    for latent in dead:
        row = weights.decoder[latent]
        assert ((unit - row).norm(dim=1) < 1e-12).any()
        torch.testing.assert_close(weights.encoder[latent], row * 0.2 * mean_norm)
        assert weights.own["b_enc"][latent] == 0
        assert not first.encoder[latent].any()
        assert not first.decoder[latent].any()
        assert first.own["b_enc"][latent] == 0
    for name in ("encoder", "decoder"):
        expected = getattr(before[2], name)[living].mean() if second_moment == "mean" else 0
        assert (getattr(second, name)[dead] - expected).abs().max() < 1e-15
    expected = before[2].own["b_enc"][living].mean() if second_moment == "mean" else 0
    assert (second.own["b_enc"][dead] - expected).abs().max() < 1e-15
    for now, then in zip((weights, first, second), before, strict=True):
        assert torch.equal(now.encoder[living], then.encoder[living])
        assert torch.equal(now.decoder[living], then.decoder[living])
        assert torch.equal(now.own["b_enc"][living], then.own["b_enc"][living])
        assert torch.equal(now.b_dec, then.b_dec)


def test_none_dead_changes_nothing():
    weights, first, second = state_with_moments()
    before = weights.map(torch.clone)
    none = resampler_of(mask())
    none.offer(sparse_activations(50, 8), torch.ones(50))
    assert none.finish_(weights, Moments(first, second), {"b_enc": 0.0}) == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(weights.tensors(), before.tensors(), strict=True))


def test_all_dead_takes_all_columns_for_the_norm_and_no_second_moment():
    weights, first, second = state_with_moments()
    norm, x = weights.encoder.norm(dim=1).mean(), sparse_activations(50, 8)
    every = resampler_of(torch.ones(20, dtype=torch.bool), encoder_norm=0.5)
    every.offer(x, x.norm(dim=1))
    assert every.finish_(weights, Moments(first, second), {"b_enc": 0.0}) == (20, 20)
    torch.testing.assert_close(weights.encoder.norm(dim=1), torch.full((20,), 0.5, dtype=torch.float64) * norm)
    assert not any(moment.any() for moment in (second.encoder, second.decoder, second.own["b_enc"]))


def test_more_dead_than_candidates_leaves_the_rest_dead():
    weights, first, second = state_with_moments()
    before = weights.map(torch.clone)
    scarce = resampler_of(mask(*range(10)), n_candidates=4)
    x = sparse_activations(50, 8)
    scarce.offer(x[:3], x[:3].norm(dim=1))
    scarce.offer(x[3:], x[3:].norm(dim=1))
    assert scarce.finish_(weights, Moments(first, second), {"b_enc": 0.0}) == (10, 4)
    assert torch.equal(weights.encoder[4:], before.encoder[4:])
    assert not torch.equal(weights.encoder[:4], before.encoder[:4])


def test_large_raw_norms_and_perfect_reconstructions_are_never_drawn():
    x = torch.eye(8, dtype=torch.float64)
    norms = torch.tensor([1, 1, 1, 1, 2500, 9000, 1, 1.0])
    weights, first, second = state_with_moments()
    perfect_on_three = lambda acts: torch.where(acts[:, 3:4] > 0, acts, 0)  # noqa: E731
    chosen = resampler_of(torch.ones(20, dtype=torch.bool), reconstruct=perfect_on_three, max_raw_norm=2500)
    chosen.offer(x, norms)
    assert chosen.finish_(weights, Moments(first, second), {"b_enc": 0.0}) == (20, 5)
    assert {int(row.argmax()) for row in weights.decoder[:5]} == {0, 1, 2, 6, 7}


def test_with_an_exponent_of_0_perfect_reconstructions_are_drawn_like_all_others():
    weights, first, second = state_with_moments()
    chosen = resampler_of(torch.ones(20, dtype=torch.bool), reconstruct=lambda acts: acts, exponent=0.0)
    chosen.offer(torch.eye(8, dtype=torch.float64), torch.ones(8))
    assert chosen.finish_(weights, Moments(first, second), {"b_enc": 0.0}) == (20, 8)
    assert weights.decoder.isfinite().all()


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_the_draw_follows_the_loss_to_its_power(exponent):
    """One draw, 4,000 times, from losses 1, 4 and 9: a chi-square of 13.8 has 2 degrees of freedom's p of 0.001."""
    x = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 3]], dtype=torch.float64)
    counts = torch.zeros(3)
    for seed in range(4000):
        weights, first, second = state_with_moments(3, 4)
        one = resampler_of(mask(2, n=4), seed=seed, exponent=exponent)
        one.offer(x, x.norm(dim=1))
        one.finish_(weights, Moments(first, second), {"b_enc": 0.0})
        counts[weights.decoder[2].argmax()] += 1
    share = x.square().sum(1) ** exponent
    expected = 4000 * share / share.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 13.8


def test_chunks_do_not_change_the_draw():
    x, ends = sparse_activations(64, 8), []
    for size in (64, 16):
        weights, first, second = state_with_moments()
        part = resampler_of(mask(1, 5, 7))
        for chunk in x.split(size):
            part.offer(chunk, chunk.norm(dim=1))
        part.finish_(weights, Moments(first, second), {"b_enc": 0.0})
        ends.append(weights)
    assert torch.equal(ends[0].decoder, ends[1].decoder)


def planted():
    """A trainer whose first ten latents can never fire by themselves, and resamples after 60 of 200 steps."""
    config = RunConfig(
        d_sae=40, n_tokens=200 * 64, coeff=0.003, lr=3e-3, resample_fractions=(0.3,), resample_count_fraction=0.2,
        resample_candidates=500, resample_encoder_norm=0.2,
    )  # fmt: skip
    trainer = Trainer(config, 8, 64)
    trainer.state.weights.own["b_enc"][:10] = -1e3
    return trainer


def test_planted_dead_latents_come_back_and_fire():
    ends = []
    for _ in range(2):
        trainer, report = planted(), None
        for step in range(200):
            if trainer.resamples_now:
                assert step == 60
                fresh, reborn = sparse_activations(600, 8, seed=999, dtype=torch.float32), trainer.resampler()
                reborn.offer(fresh, fresh.norm(dim=1))
                report = trainer.resample_(reborn)
                assert trainer.state.fired[:10].sum() == 0
            if step == 48:  # counted from step 60 - 40 = 20 on
                assert trainer.state.fired.max() <= 28 * 64
            trainer.step(sparse_activations(64, 8, seed=step, dtype=torch.float32))
        assert report is not None
        assert report.n_dead == report.n_reborn >= 10
        assert (trainer.state.last_fired[:10] > 190).sum() >= 8
        ends.append(trainer.state.weights)
    assert all(torch.equal(a, b) for a, b in zip(ends[0].tensors(), ends[1].tensors(), strict=True))


def test_fresh_activations_come_from_no_position(tiny_stream):
    some = torch.cat([batch.acts for batch in tiny_stream.fresh(100, "resample", 3)])
    more = torch.cat([batch.acts for batch in tiny_stream.fresh(3000, "resample", 3)])
    other = torch.cat([batch.acts for batch in tiny_stream.fresh(100, "resample", 4)])
    assert len(some) >= 100
    assert torch.equal(more[: len(some)], some)
    assert not torch.equal(other, some)
    everything = torch.cat([batch.acts for batch in tiny_stream.fresh(10**9, "resample", 3)])
    assert len(everything) == tiny_stream.blocks.train.size


def test_a_run_that_resamples_is_the_same_alone_and_in_a_sweep(tiny_lm, tiny_blocks, tmp_path):
    def run(candidates):
        return RunConfig(
            d_sae=48, n_tokens=40 * 64, coeff=0.5 / candidates, lr=1e-2, resample_fractions=(0.5,),
            resample_count_fraction=0.25, resample_dead_below=0.2, resample_candidates=candidates,
        )  # fmt: skip

    def stream():
        return ActivationStream(tiny_lm, tiny_blocks, batch_size=64, window_tokens=2048)

    together = run_sweep([run(300), run(700)], stream(), tmp_path / "both", eval_tokens=320, progress=False)
    alone = run_sweep([run(300)], stream(), tmp_path / "one", eval_tokens=320, progress=False)
    first, again = together.runs[0].record, alone.runs[0].record
    assert first["resampled"] == again["resampled"]
    assert first["resampled"][0]["step"] == 20
    assert first["resampled"][0]["n_reborn"] > 0
    pairs = zip(together.runs[0].load().weights.tensors(), alone.runs[0].load().weights.tensors(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resample_fractions", (0.5, 1.5)),
        ("resample_count_fraction", 0.0),
        ("resample_dead_below", -1.0),
    ],
)
def test_a_wrong_choice_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        RunConfig(**{field: value})


def test_bf16_trains_close_to_fp32():
    x, w = sparse_activations(64, 16, dtype=torch.float32), torch.randn(16, 64)
    in_fp32 = x @ w
    with bf16_products():
        is_rounded = not torch.equal(x @ w, in_fp32)  # not every CPU multiplies so small matrices in bf16
    ends = []
    for precision in ("fp32", "bf16"):
        trainer = Trainer(RunConfig(d_sae=64, n_tokens=150 * 64, coeff=0.01, lr=3e-3, precision=precision), 16, 64)
        for step in range(150):
            report = trainer.step(sparse_activations(64, 16, seed=step, dtype=torch.float32))
        ends.append(report.stats.mse.item())
    # A CPU that leaves this product in fp32 may still round others of the step, of other shapes.
    assert ends[0] != ends[1] or not is_rounded
    assert ends[1] == pytest.approx(ends[0], rel=0.05)
