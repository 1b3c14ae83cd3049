"""Activations on their way to another device. What needs a GPU is skipped without one; `benchmarks/gpu.py` runs it."""

import pytest
import torch

from prolu import ActivationStream, RunConfig, run_sweep
from prolu.activations.transfer import Transfer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_on_the_cpu_nothing_is_copied():
    piece = torch.randn(3, 4, 5)
    assert Transfer("cpu")(piece) is piece


def test_a_stream_for_a_device_asks_for_every_piece_there(tiny_lm, tiny_blocks, monkeypatch):
    seen = []
    monkeypatch.setattr(Transfer, "__call__", lambda self, piece: seen.append(len(piece)) or piece)
    stream = ActivationStream(tiny_lm, tiny_blocks, batch_size=64, window_tokens=2048)
    stream[0], stream[1]
    assert sum(seen) == 2048 // tiny_blocks.ctx
    assert stream.describe()["device"] == "cpu"


@needs_gpu
def test_pieces_arrive_whole_however_fast_their_memory_is_used_again():
    transfer, piece = Transfer("cuda"), torch.empty(64, 128, 96)
    there = []
    for i in range(20):
        piece.fill_(i)
        there.append(transfer(piece[: 64 - i]))
    for i, arrived in enumerate(there):
        assert arrived.is_cuda
        assert (arrived == i).all()


@needs_gpu
def test_a_sweep_on_a_gpu_agrees_with_the_cpus(tiny_lm, tiny_blocks, tmp_path):
    found = {}
    for device in ("cpu", "cuda"):
        stream = ActivationStream(tiny_lm, tiny_blocks, batch_size=64, window_tokens=2048, device=device)
        run = RunConfig(d_sae=48, n_tokens=64 * 60, coeff=0.02, lr=3e-3)
        found[device] = run_sweep([run], stream, tmp_path / device, eval_tokens=640, progress=False).records[0]
    for name in ("l0", "mse", "degradation"):
        assert found["cuda"][name] == pytest.approx(found["cpu"][name], rel=0.02)


class OnAGPU(torch.Tensor):
    """A piece that lies on GPU 1, as far as it tells, and notes where it is sent."""

    is_cuda = True
    device = torch.device("cuda:1")

    def to(self, device):
        return self if device == self.device else torch.zeros(3)


@pytest.mark.parametrize(("there", "is_copied"), [("cuda:0", True), ("cuda:1", False), ("cpu", True)])
def test_a_piece_on_another_gpu_is_copied(there, is_copied):
    piece = torch.ones(3).as_subclass(OnAGPU)
    assert (Transfer(there)(piece) is piece) is not is_copied


def test_a_gpu_without_a_number_is_that_of_the_thread_that_asks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert Transfer("cuda").device == torch.device("cuda:1")
