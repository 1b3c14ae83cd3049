"""Use ProLU in a module of your own and train it with plain autograd: python examples/own_module.py."""

import torch

import prolu


class Autoencoder(torch.nn.Module):
    """An SAE: f = ProLU(W (x - c), b), x_hat = V f + c."""

    def __init__(self, d_in: int, d_sae: int):
        super().__init__()
        self.encoder = torch.nn.Linear(d_in, d_sae, bias=False)  # ProLU has the bias b, which only moves the gate
        self.decoder = torch.nn.Linear(d_sae, d_in)
        self.activation = prolu.ProLU(d_sae, gradient="ste")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the reconstruction and the latents."""
        latents = self.activation(self.encoder(x - self.decoder.bias))
        return self.decoder(latents), latents


if __name__ == "__main__":
    torch.manual_seed(0)
    model = Autoencoder(32, 128)
    x = torch.randn(256, 8) @ torch.randn(8, 32)  # of rank 8, so that few latents are enough
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(151):
        recon, latents = model(x)
        loss = (recon - x).square().mean() + 0.01 * latents.sum(-1).mean()
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.3f}, L0 {(latents > 0).sum(-1).float().mean():.1f}")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
