"""Sparse data with known features, for tests."""

import torch


def sparse_activations(n, d_in, n_features=None, n_active=4, seed=0, dtype=torch.float64):
    """Sums of a few random unit directions with positive weights and a little noise, norm sqrt(d_in)."""
    g = torch.Generator().manual_seed(seed)
    n_features = n_features or 4 * d_in
    features = torch.nn.functional.normalize(torch.randn(n_features, d_in, generator=g, dtype=dtype), dim=1)
    which = torch.randint(n_features, (n, n_active), generator=g)
    weights = torch.rand(n, n_active, 1, generator=g, dtype=dtype) + 0.5
    x = (features[which] * weights).sum(1) + 0.01 * torch.randn(n, d_in, generator=g, dtype=dtype)
    return x * (d_in**0.5 / x.norm(dim=1, keepdim=True))
