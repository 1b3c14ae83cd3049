"""In which direction do the synthetic gradients push ProLU's biases? Measured on trained SAEs, a line per run.

    python benchmarks/bias_forces.py RUN... --rows rows.npy

RUN is the folder of a run (ReLU or ProLU under L1 or Sqrt(L1)), rows.npy activations [n, d_in] at its hook. With delta,
the loss's derivative with respect to a latent, taken where the latent is active (gate g),

    delta = (2 / d_in) (x_hat - x) . w_dec + coeff dP/df,

ProLU_ReLU's gradient of the bias is E[g delta], and ProLU_STE's E[g m delta]; a positive one lowers the bias. Printed
are the share of latents where it is positive, and its median over latents relative to E[g |delta|] (times the mean of m
where the latent is active). Latents that are active on fewer than 100 rows are left out.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import prolu


def penalty_slopes(latents: Tensor, penalty: str) -> Tensor:
    """Return dP/df of L1 or Sqrt(L1)."""
    return torch.ones_like(latents) if penalty == "l1" else 0.5 / (latents + 1e-6).sqrt()


def forces(folder: Path, rows: Tensor) -> dict[str, Tensor]:
    """Return E[g delta] and E[g m delta] of each latent that is active often enough, relative to E[g |delta|]."""
    run = json.loads((folder / "config.json").read_text())["provenance"]["run"]
    sae = prolu.SAE.load(folder)
    is_relu = run["nonlinearity"] == "relu"
    scale = sae.d_in**0.5 / rows.norm(dim=1, keepdim=True) if run["normalisation"] == "per_token" else torch.ones(1)
    names = ("n", "delta", "m_delta", "abs_delta", "m")
    sums = {name: torch.zeros(sae.d_sae, dtype=torch.float64) for name in names}
    with torch.no_grad():
        for x in (rows * scale).split(8192):
            m = (x - sae.b_dec) @ sae.W_enc
            f = sae.encode_normalised(x)
            error = sae.decode_normalised(f) - x
            delta = 2 / sae.d_in * error @ sae.W_dec.T + run["coeff"] * penalty_slopes(f, run["penalty"])
            delta = torch.where(f > 0, delta, 0).double()
            m = torch.where(f > 0, f if is_relu else m, 0).double()
            parts = ((f > 0), delta, delta * m, delta.abs(), m)
            for name, part in zip(names, parts, strict=True):
                sums[name] += part.sum(0)
    often = sums["n"] >= 100
    sums = {name: total[often] for name, total in sums.items()}
    return {
        "E[g delta]": sums["delta"] / sums["abs_delta"],
        "E[g m delta]": sums["m_delta"] / sums["abs_delta"] / (sums["m"] / sums["n"]),
    }


def main() -> None:
    """Print a line per run and gradient."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--rows", type=Path, required=True)
    options = parser.parse_args()
    rows = torch.from_numpy(np.load(options.rows)).float()
    for folder in options.runs:
        print(folder)
        for name, values in forces(folder, rows).items():
            up = (values > 0).double().mean()
            print(f"  {name:12} positive in {up:.0%} of {len(values):,} latents, median {values.median():+.3f}")


if __name__ == "__main__":
    main()
