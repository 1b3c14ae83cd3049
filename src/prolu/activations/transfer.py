"""Activations copied to the device that trains: to a GPU through pinned memory, on a CUDA stream of their own."""

import torch
from torch import Tensor

from prolu.runtime.devices import numbered

N_SLOTS = 2
"""The number of pinned buffers: one is filled while the other is copied to the GPU."""


class Transfer:
    """Copies activations to a device: `transfer(piece)` returns the piece there, and work queued later sees all of it.

    On its way from the CPU to a GPU, a piece is copied into a pinned buffer and sent on a CUDA stream of its own. The
    call returns at once, so the next piece is read or computed while this one is copied. A piece on another GPU is
    copied by PyTorch, and a piece that is on the device already is returned as it is.

    A transfer belongs to one thread.
    """

    def __init__(self, device: str | torch.device):
        self.device = numbered(device)
        self._is_gpu = self.device.type == "cuda"
        self._slots: list[tuple[Tensor, torch.cuda.Event] | None] = [None] * N_SLOTS
        self._next = 0
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, piece: Tensor) -> Tensor:
        """Return the piece on the device. One from the CPU may be overwritten as soon as it was sent to a GPU."""
        if not self._is_gpu or piece.is_cuda:
            # Between two GPUs, PyTorch makes the current streams of both wait for each other, and the CPU for neither.
            return piece.to(self.device)
        self._stream = self._stream or torch.cuda.Stream(self.device)
        pinned, sent = self._slot(piece)
        pinned.copy_(piece)
        with torch.cuda.stream(self._stream):
            there = pinned.to(self.device, non_blocking=True)
            sent.record(self._stream)
        here = torch.cuda.current_stream(self.device)
        # Work that is queued next on the GPU waits for the copy; the CPU does not.
        here.wait_stream(self._stream)
        # The allocator must not give the memory to another copy while work that is queued here still reads it.
        there.record_stream(here)
        return there

    def _slot(self, piece: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Return a pinned buffer whose last content has arrived, and the event of its next copy."""
        self._next = (self._next + 1) % N_SLOTS
        held = self._slots[self._next]
        if held is not None:
            held[1].synchronize()
        # Pinning memory is slow, so buffers are kept and grow with the largest piece.
        if held is None or held[0].numel() < piece.numel() or held[0].dtype != piece.dtype:
            held = torch.empty(piece.numel(), dtype=piece.dtype, pin_memory=True), torch.cuda.Event()
            self._slots[self._next] = held
        return held[0][: piece.numel()].view(piece.shape), held[1]
