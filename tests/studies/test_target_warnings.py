"""Tests that runs which cannot reach their target L0, or did not, say so."""

from prolu import RunConfig, grid, run_sweep


def test_short_runs_with_a_target_are_warned_and_say_how_far_off_they_ended(tiny_stream, tmp_path, caplog):
    runs = grid(
        RunConfig(d_sae=32, n_tokens=10 * tiny_stream.batch_size, coeff=0.01),
        nonlinearity=["relu", "topk"], target_l0=[2.0],
    )  # fmt: skip
    run_sweep(runs, tiny_stream, tmp_path / "study", eval_tokens=320, progress=False)
    # The target of topk is its k, which no run misses.
    assert "1 of 2 runs have fewer than 200 steps (10)" in caplog.text
    assert f"{runs[0].run_id}: its L0 is" in caplog.text
    assert f"{runs[1].run_id}: its L0 is" not in caplog.text
