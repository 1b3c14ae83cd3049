"""The k-th largest entry without sorting, in Triton's interpreter, against torch.topk."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from prolu.sae.nonlinearities import Selection
from prolu.training.steps.selection_triton import bound_of_batch, bound_of_rows

g = torch.Generator().manual_seed(0)
SHAPES = [(1, 1, 1, 1), (1, 3, 5, 2), (2, 7, 97, 96), (3, 5, 2048, 32), (1, 4, 5000, 64), (2, 3, 40000, 3)]
for n_saes, batch, d_sae, k in SHAPES:
    m = torch.randn(n_saes, batch, d_sae, generator=g) * torch.logspace(-30, 20, d_sae)
    threshold = torch.randn(n_saes, d_sae, generator=g)
    m[0, 0] = threshold[0]  # a row without a positive entry
    m[-1, -1] = m[-1, -1].round()  # ties
    threshold[-1, ::3] = torch.inf  # latents that take no part
    above = m - threshold[:, None]
    expected = torch.stack([Selection(k).bound(a) for a in above])
    assert torch.equal(bound_of_rows(m, threshold, k), expected), (n_saes, batch, d_sae, k)
    for n in {1, k * batch, batch * d_sae}:
        best = above.flatten(1).topk(n).values[:, -1].clamp(min=0)
        assert torch.equal(bound_of_batch(m, threshold, n).flatten(), best), (n_saes, batch, d_sae, n)
"""


def test_the_bounds_are_those_of_topk_to_the_bit():
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    # In a process of its own, because Triton reads the variable when it is imported.
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=600, env=os.environ | {"TRITON_INTERPRET": "1"})
