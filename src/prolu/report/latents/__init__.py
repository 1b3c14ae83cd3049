"""Pages of latents: what makes each latent active, and what it promotes."""
