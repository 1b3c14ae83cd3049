"""Activations on their way to the device that trains: through pinned memory, on a copy stream of their own."""

import torch
from torch import Tensor

N_SLOTS = 2
"""Pinned buffers: one is filled while the other travels."""


class Transfer:
    """`transfer(piece)` is the piece on the device, ready for whatever is queued there next.

    To a GPU, a piece in ordinary memory is copied into a pinned buffer and sent by a stream of its own: the call
    returns at once, so the next piece is read, or computed, while this one travels. Elsewhere a plain copy, or none.
    """

    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)
        self._is_gpu = self.device.type == "cuda"
        self._slots: list[tuple[Tensor, torch.cuda.Event] | None] = [None] * N_SLOTS
        self._next, self._stream = 0, torch.cuda.Stream(self.device) if self._is_gpu else None

    def __call__(self, piece: Tensor) -> Tensor:
        """The piece there; the one given may be overwritten as soon as this returns."""
        if not self._is_gpu or piece.is_cuda:
            return piece.to(self.device)
        pinned, sent = self._slot(piece)
        pinned.copy_(piece)
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            there = pinned.to(self.device, non_blocking=True)
            sent.record(self._stream)
        here = torch.cuda.current_stream(self.device)
        here.wait_stream(self._stream)
        there.record_stream(here)
        return there

    def _slot(self, piece: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """A pinned buffer whose last content has arrived; buffers live for ever and grow with the largest piece."""
        self._next = (self._next + 1) % N_SLOTS
        held = self._slots[self._next]
        if held is not None:
            held[1].synchronize()
        if held is None or held[0].numel() < piece.numel() or held[0].dtype != piece.dtype:
            held = torch.empty(piece.numel(), dtype=piece.dtype, pin_memory=True), torch.cuda.Event()
            self._slots[self._next] = held
        return held[0][: piece.numel()].view(piece.shape), held[1]
