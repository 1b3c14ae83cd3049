"""Training steps are tested on two threads: sums must not depend on which thread made which part."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(2)
