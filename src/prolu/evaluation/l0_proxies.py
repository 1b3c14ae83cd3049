"""Proxies, without labels, of whether an SAE has the right L0: how decoder rows point to each other and to the input.

An SAE whose L0 is too low mixes several true features into one latent, since this lowers its error, and one whose L0 is
far too high mixes them too. Mixed decoder rows have parts in common. Both figures measure that, and both were lowest at
the true L0 in the toy models of Chanin and Garriga-Alonso 2025, "Sparse but Wrong: Incorrect L0 Leads to Incorrect
Features in Sparse Autoencoders" (arXiv 2508.16560v3, equations 4 and 59).
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prolu.sae.autoencoder import SAE
from prolu.sae.scaling import normalise

ROWS_PER_PASS = 1024
"""The number of decoder rows whose products are computed at once, so that no d_sae x d_sae matrix is ever made."""

PROXY_TOKENS = 1024
"""The number of held-out tokens that are projected on the decoder. Their projections are held together, [1024, d_sae]:
67 MB for 16,384 latents in float32."""


@torch.no_grad()
def l0_proxies(sae: SAE, acts: Float[Tensor, "n ctx d_in"], *, first_too: bool = False) -> dict[str, float]:
    """Return the proxies of an SAE by the names that results.jsonl has.

    - `decoder_cosine`: `decoder_pairwise_cosine`.
    - `decoder_projection_half`, `decoder_projection_quarter`: `nth_decoder_projections` at n = d_sae // 2, which the
      paper found best, and at n = d_sae // 4. Both are nan for a transcoder, whose decoder is not of its input's space.

    Args:
        sae: the SAE.
        acts: held-out activations as the language model has them.
        first_too: whether position 0 of each block is used, where BOS stands in text.
    """
    ns = (sae.d_sae // 2, sae.d_sae // 4)
    if sae.is_transcoder:
        projections = [torch.nan] * len(ns)
    else:
        projections = nth_decoder_projections(sae, acts, ns, first_too=first_too)
    return {
        "decoder_cosine": decoder_pairwise_cosine(sae.W_dec),
        "decoder_projection_half": projections[0],
        "decoder_projection_quarter": projections[1],
    }


@torch.no_grad()
def decoder_pairwise_cosine(decoder: Float[Tensor, "d_sae d_out"]) -> float:
    """Return c_dec, the mean of |cos(W_dec[i], W_dec[j])| over all pairs i < j of decoder rows, from 0 to 1.

    Rows of d_out independent normal numbers have Gamma(d_out / 2) / (sqrt(pi) Gamma((d_out + 1) / 2)), which is nearly
    sqrt(2 / (pi d_out)). All rows count, those of dead latents too, as in the paper. A row of zeros has the cosine 0
    with every other. With a single latent there is no pair, and the result is nan.
    """
    n = len(decoder)
    if n < 2:
        return torch.nan
    rows = torch.nn.functional.normalize(decoder.float(), dim=1)
    total = 0.0
    for start in range(0, n, ROWS_PER_PASS):
        some = rows[start : start + ROWS_PER_PASS]
        # Each pair once: these rows with each other, above the diagonal, and with all rows that come after them.
        among = (some @ some.T).triu(diagonal=1)
        after = some @ rows[start + ROWS_PER_PASS :].T
        # float64 over the row sums: in float32, a sum of 10^8 cosines would drop the last digits of what is added.
        for products in (among, after):
            total += products.abs().sum(1).sum(dtype=torch.float64).item()
    return total / (n * (n - 1) / 2)


@torch.no_grad()
def nth_decoder_projections(
    sae: SAE, acts: Float[Tensor, "n ctx d_in"], ns: Sequence[int], *, first_too: bool = False
) -> list[float]:
    """Return s_n, the n-th decoder projection, for each n, in units of the SAE's input.

    With z = (x - b_dec) . W_dec[i] / ||W_dec[i]|| for b tokens x and all latents i, sorted in descending order, s_n is
    the one at index n b, counted from 0: so n of d_sae projections are above it on average. It should be small where n
    is well above the number of features in a token, up to d_sae / 2, for then it belongs to latents that have nothing
    to do with the input.

    The paper's decoder rows have norm 1; dividing by the norm makes it the same for SAEs of other libraries.

    Args:
        sae: the SAE.
        acts: activations as the language model has them. Of their tokens 1,024 are used, spread evenly, without
            position 0 of each block, where BOS stands.
        ns: the values of n, each at least 0 and less than d_sae.
        first_too: whether position 0 is used too.
    """
    flat = acts[:, 0 if first_too else 1 :].flatten(0, 1)
    n_used = min(PROXY_TOKENS, len(flat))
    flat = flat[torch.arange(n_used) * len(flat) // n_used].to(sae.W_dec)
    x = normalise(flat)[0] if sae.config.normalisation == "per_token" else flat
    z = (x - sae.b_dec) @ torch.nn.functional.normalize(sae.W_dec, dim=1).T
    # numpy counts from the smallest. It finds several places in one pass, and torch's kthvalue takes 2.7 times as long.
    places = [z.numel() - 1 - n * len(z) for n in ns]
    return np.partition(z.float().flatten().cpu().numpy(), places)[places].tolist()
