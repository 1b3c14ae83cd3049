"""The method: what a sparse autoencoder is, from its nonlinearity to its weights on the disk.

- `autoencoder`: the SAE itself: encode, decode, save, load.
- `weights`: the tensors of one SAE, one row per latent.
- `scaling`: activations scaled to a fixed norm before they are encoded.
- `penalties`: the sparsity penalties l1, sqrt_l1 and l0.
- `nonlinearities`: ReLU, ProLU, Gated, JumpReLU, TopK and BatchTopK, one file each.
"""

from prolu.sae.autoencoder import SAE, SAEConfig, read_config, read_provenance, weights_digest

__all__ = ["SAE", "SAEConfig", "read_config", "read_provenance", "weights_digest"]
