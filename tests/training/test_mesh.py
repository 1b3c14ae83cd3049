"""One SAE on several processes: what the mesh accepts, and that it trains what one process trains."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from prolu.runtime.mesh import ALONE, MeshShape, bytes_per_step, mesh_of
from prolu.training.config import RunConfig
from prolu.training.mesh_parts import check_mesh
from prolu.training.trainer import Trainer
from support.mesh_cases import CASES
from support.mesh_worker import BATCH, D_IN, D_SAE, Case, largest_difference, on_mesh, start
from support.models import write_model, write_stories

MESHES = ["data=2,latent=2", *(pytest.param(m, marks=pytest.mark.slow) for m in ("latent=2", "data=2", "latent=3"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return on_mesh("", tmp_path_factory.mktemp("alone") / "out", CASES)


@pytest.mark.parametrize("mesh", MESHES)
def test_trains_what_one_process_trains(mesh, alone, tmp_path):
    """Fifty updates in fp64 with a resampling in their middle; one update in fp32. Counters and curves too."""
    found = on_mesh(mesh, tmp_path / "out", CASES)
    for case in CASES:
        (state, facts), (reference, theirs) = found[case.name], alone[case.name]
        bound = 1e-5 if case.dtype == "float32" else 1e-10
        assert largest_difference(state, reference) <= bound, case.name
        assert torch.equal(state["last_fired"], reference["last_fired"])
        assert facts["resampled"] == theirs["resampled"]
        assert case.n_steps == 1 or 5 < facts["resampled"][0]["n_reborn"] < D_SAE
        assert facts["line"]["dead"] == theirs["line"]["dead"]
        for ours, one in zip(facts["seen"], theirs["seen"], strict=True):
            assert ours == pytest.approx(one, rel=100 * bound, abs=1e-12), case.name


@pytest.mark.parametrize("mesh", ["data=2,latent=2"])
def test_sends_what_the_formula_says(mesh, tmp_path):
    case = Case("bytes", {"nonlinearity": "prolu_ste", "step": "sparse", "resample_fractions": ()}, "float32", 10)
    (_, facts) = on_mesh(mesh, tmp_path / "out", [case])["bytes"]
    expected = bytes_per_step(MeshShape.parse(mesh), BATCH, D_IN, D_SAE, n_own=1)
    sent = {k: v for k, v in facts["sent"].items() if k != "curve"}
    assert sent == {purpose: 10 * n for purpose, n in expected.items()}


def test_alone_nothing_is_sent():
    assert ALONE.n_ranks == 1
    assert ALONE.is_first
    t = torch.ones(3)
    assert ALONE.sum_over_all_(t, "x") is t
    assert ALONE.whole(t) is t
    assert not ALONE.bytes_sent


@pytest.mark.parametrize("text", ["latent=0", "latent", "latent=2,latent=2", "rows=2", "latent=2,", "2x2", "data=-1"])
def test_a_mesh_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"mesh '.*': write data=D,latent=L"):
        MeshShape.parse(text)


def test_shapes():
    assert MeshShape.parse("latent=4") == (1, 4)
    assert MeshShape.parse("data=2,latent=4") == (2, 4)
    assert MeshShape.parse("latent=4,data=2") == (2, 4)


def test_a_mesh_of_another_size_than_was_started_is_refused(monkeypatch):
    with pytest.raises(
        ValueError, match="mesh 'latent=2': needs 2 processes, and 1 was started; start them with torchrun"
    ):
        mesh_of("latent=2", "cpu", 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="mesh: 4 processes were started; say how they share the SAE"):
        mesh_of("", "cpu", 2)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="mesh 'latent=2': 2 ranks on this machine, which has 1 GPUs"):
        mesh_of("latent=2", "cuda", 2)


def test_a_gpu_that_is_not_there_is_refused_by_its_own_flag(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda': PyTorch finds no CUDA GPU on this machine; choose cpu"):
        mesh_of("", "cuda", 2)


class Of(type(ALONE)):
    """A mesh of which only the shape is looked at."""

    def __init__(self, n_data: int, n_latent: int):
        self.n_data, self.n_latent, self.rank, self.data_rank, self.latent_rank = n_data, n_latent, 0, 0, 0


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="d_sae 100: not divisible by the mesh's latent=3"):
        Trainer(RunConfig(d_sae=100, n_tokens=640), 8, 64, mesh=Of(1, 3))
    with pytest.raises(ValueError, match="batch_size 64: not divisible by the mesh's data=3"):
        Trainer(RunConfig(d_sae=99, n_tokens=640), 8, 64, mesh=Of(3, 1))
    topk = RunConfig(d_sae=64, n_tokens=640, nonlinearity="topk(4)", penalty="none", step="sparse")
    with pytest.raises(ValueError, match=r"step 'sparse': topk\(4\) on several ranks needs the dense step"):
        check_mesh(topk, 64, Of(1, 2))
    check_mesh(topk, 64, Of(2, 1))
    nested = RunConfig(d_sae=64, n_tokens=640, matryoshka=(16, 32))
    with pytest.raises(ValueError, match=r"mesh: the latents of a nested loss .* cannot be divided among 2 ranks"):
        check_mesh(nested, 64, Of(1, 2))
    check_mesh(nested, 64, Of(2, 1))
    with pytest.raises(ValueError, match="refit_tokens 5: must be 0 on a mesh of 2 ranks"):
        check_mesh(RunConfig(d_sae=64, n_tokens=640, refit_tokens=5), 64, Of(2, 1))


@pytest.mark.parametrize("mesh", MESHES)
def test_the_stream_is_the_same_for_every_mesh(mesh, tmp_path):
    """To the bit: a rank's rows are its part of the whole batch's, and fresh activations are everybody's."""
    (tmp_path / "lm").mkdir()
    write_model(tmp_path / "lm")
    write_stories(tmp_path / "stories.txt")
    start("", tmp_path / "alone", "stream", str(tmp_path))
    start(mesh, tmp_path / "mesh", "stream", str(tmp_path))
    whole, shape = load_file(tmp_path / "alone" / "0"), MeshShape.parse(mesh)
    assert len(whole) > 8
    for rank in range(math.prod(shape)):
        part = load_file(tmp_path / "mesh" / str(rank))
        for name, batch in whole.items():
            rows = batch if name.startswith("fresh") else batch.chunk(shape.data)[rank // shape.latent]
            assert torch.equal(part[name], rows), (rank, name)


@pytest.mark.slow
@pytest.mark.parametrize("second", ["", "latent=2"])
def test_a_state_goes_on_where_the_mesh_is_another(second, alone, tmp_path):
    """What 4 ranks save, 1 or 2 take up to the bit, and end where one process ends."""
    cases = [case for case in CASES if case.dtype == "float64"]
    on_mesh("data=2,latent=2", tmp_path / "first", [replace(case, n_steps=20) for case in cases])
    rest = [replace(case, start=str(tmp_path / "first" / case.name)) for case in cases]
    found = on_mesh(second, tmp_path / "second", rest)
    for case in cases:
        assert largest_difference(found[case.name][0], alone[case.name][0]) <= 1e-10, case.name
