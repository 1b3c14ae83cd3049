"""Decoder rows refitted after training: the gain of each latent with which all of them reconstruct best.

A penalty on magnitudes makes latents smaller than is best for the reconstruction (suppression). A gain per latent
corrects this on average, and leaves the encoder, and so which latents are active, as it is. So the improvement shows
how much an SAE lost by suppression; if another nonlinearity is still better, that has another cause.
"""

from dataclasses import replace

import torch
from torch import Tensor

from prolu.sae.autoencoder import SAE

MOST_LATENTS = 16_384
"""The largest number of latents whose gains are found: the equations are a matrix [d_sae, d_sae] in fp64."""


class GainRefit:
    """The gains g of an SAE's latents, gathered from activations batch by batch.

    They minimise

        sum over tokens of |y - b - sum_i g_i f_i W_dec[i]|^2  +  s^2 * sum_i (g_i - 1)^2

    where y is what the SAE is to give (its input x, or a transcoder's target), b its output without latents, and s^2
    the mean over tokens and dimensions of its squared error as it is. So a gain differs from 1 only as far as the
    tokens support it: the second term is a prior with mean 1 and standard deviation 1. Without it a latent that was
    active on a few tokens, with tiny values, gets a gain of thousands, which fits these tokens and no others. With
    G = sum over tokens of f f^T, the equations are

        (G * (W_dec W_dec^T) + s^2 I) g = sum over tokens of f * ((y - b) W_dec^T) + s^2

    where * is entry by entry. All is in the space in which the SAE works, and in fp64.
    """

    def __init__(self, sae: SAE):
        self._sae = sae
        self._rows = sae.W_dec.detach().double()
        d_sae = len(self._rows)
        self._gram = torch.zeros(d_sae, d_sae, dtype=torch.float64, device=self._rows.device)
        self._right = torch.zeros(d_sae, dtype=torch.float64, device=self._rows.device)
        self._squared_error = torch.zeros((), dtype=torch.float64, device=self._rows.device)
        self._n_entries = 0

    @torch.no_grad()
    def add_(self, x: Tensor, target: Tensor | None = None) -> None:
        """Take more tokens into account.

        Args:
            x: activations in the space in which the SAE works, [n, d_in].
            target: a transcoder's targets in that space, [n, d_out]; None for an SAE, whose target is x.
        """
        latents = self._sae.encode_normalised(x)
        left = (x if target is None else target) - self._sae.reconstruct_normalised(torch.zeros_like(latents), x)
        wide = latents.double()
        wide_left = left.double()
        self._gram += wide.T @ wide
        self._right += (wide * (wide_left @ self._rows.T)).sum(0)
        self._squared_error += (wide_left - wide @ self._rows).square().sum()
        self._n_entries += left.numel()

    def gains(self) -> Tensor:
        """Return the gain of each latent, [d_sae], fp64; 1 for latents that were active on none of the tokens."""
        prior = self._squared_error / max(1, self._n_entries)
        equations = self._gram * (self._rows @ self._rows.T)
        gains = torch.ones_like(self._right)
        active = equations.diagonal() > 0
        if bool(active.any()):
            used = equations[active][:, active]
            # The last term is for SAEs whose error is 0, since their equations may be singular.
            used.diagonal().add_(prior + 1e-12 * used.diagonal().max())
            gains[active] = torch.cholesky_solve((self._right[active] + prior)[:, None], torch.linalg.cholesky(used))[
                :, 0
            ]
        return gains

    def refitted(self) -> SAE:
        """Return the SAE with each decoder row times its gain; encoder and biases are as they were."""
        weights = self._sae.weights
        decoder = self._rows * self.gains()[:, None]
        return SAE(self._sae.config, replace(weights, decoder=decoder.to(weights.decoder.dtype)))
