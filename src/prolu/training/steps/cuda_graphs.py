"""CUDA graphs: work that is repeated on the same buffers is captured once, and from then on started by one call.

A graph holds the addresses of its tensors, and every Python number as a constant. What changes from one update to the
next must therefore be in tensors that never move.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class CudaGraphs:
    """The graphs of one SAE's update, which may have several parts with a graph each.

    The first update runs as it is, which compiles what it needs; nothing can be compiled while a graph is captured.
    The second is captured, part by part, and later ones are replayed.
    """

    def __init__(self, pool: Any):
        """Args:
        pool: the memory that the graphs of several SAEs share, of `torch.cuda.graph_pool_handle`, since they are
            replayed one after the other; None where nothing is captured.
        """
        self._pool = pool
        self._updates = 0
        self._parts: dict[str, tuple[Callable[[], object], Any]] = {}
        self._retired: list[Callable[[], object]] = []

    def begin(self) -> None:
        """Begin an update; all its parts are run, captured or replayed together."""
        self._updates += 1

    def run(self, part: str, function: Callable[[], Result]) -> Result:
        """Return what the function returns: tensors that the part overwrites in the next update.

        Args:
            part: the name of the part, which is the same function in every update.
            function: starts work on the GPU, without waiting for it. It may read what earlier parts returned.
        """
        if self._pool is None or self._updates < 2:
            return function()
        if part not in self._parts:
            self._parts[part] = self._capture(function)
        replay, result = self._parts[part]
        replay()
        return result

    def forget(self) -> None:
        """Run the next update as it is, and capture the one after it, because sizes of tensors have changed."""
        # The results' memory is free now. The graphs themselves are kept: PyTorch gives up a pool with its last graph.
        self._retired += [replay for replay, _ in self._parts.values()]
        self._parts.clear()
        self._updates = 0

    def _capture(self, function: Callable[[], Result]) -> tuple[Callable[[], object], Result]:
        """Return what replays the function, and its result, which every replay overwrites."""
        graph = torch.cuda.CUDAGraph()
        # A thread that reads activations ahead may allocate and wait meanwhile, which the other modes forbid it.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result
