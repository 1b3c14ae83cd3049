"""The method: what a sparse autoencoder is, from its nonlinearity to its weights on the disk.

- `autoencoder`: the SAE itself: encode, decode, save, load.
- `saved_sae`: the files of a saved SAE, and how they are read.
- `latents`: what `encode` returns, which knows the scale of each row.
- `weights`: the tensors of one SAE, one row per latent.
- `scaling`: activations centred and scaled to a fixed norm before they are encoded.
- `choices`: names that configs choose from.
- `penalties`: the sparsity penalties, one class each.
- `calls`: names with arguments in brackets, of nonlinearities and penalties.
- `nonlinearities`: ReLU, ProLU, Gated, JumpReLU, TopK and BatchTopK, one file each.
"""

from typing import TYPE_CHECKING

from prolu.runtime.late_import import names_of

if TYPE_CHECKING:
    from prolu.sae.autoencoder import *  # noqa: F403
    from prolu.sae.autoencoder import __all__ as __all__

__getattr__ = names_of("prolu.sae.autoencoder")
