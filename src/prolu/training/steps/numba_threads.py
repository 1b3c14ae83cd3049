"""The threads of the numba kernels: as many as PyTorch has, since a run's config holds PyTorch's number."""

import torch
from numba import get_num_threads, set_num_threads


def _start_numba() -> int:
    """Start numba's threads, and return how many they are."""
    # numba shares OpenMP with PyTorch, and sets OpenMP's number of threads when it starts its own. PyTorch's number
    # must survive that: it decides the rounding of sums, and it stands in the study's config.
    n_torch = torch.get_num_threads()
    n_numba = get_num_threads()
    torch.set_num_threads(n_torch)
    return n_numba


MOST_THREADS = _start_numba()
"""The number of threads that numba was started with, which cannot be exceeded later."""


def use_torchs_threads() -> None:
    """Give the kernels of this thread as many threads as PyTorch has, or as numba was started with."""
    # At every step, because numba keeps a number for each thread that calls it.
    set_num_threads(min(torch.get_num_threads(), MOST_THREADS))
