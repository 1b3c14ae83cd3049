"""One of our SAEs as SAEBench takes it: raw activations in, raw reconstructions out, and a `cfg` that describes it.

Nothing of SAEBench is imported here. Written against sae-bench 0.6.0.
"""

import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.activations.hooks import centre
from prolu.sae.autoencoder import SAE, read_provenance
from prolu.sae.scaling import normalise

NORM_TOLERANCE = 1e-5
"""SAEBench's own, of a row of W_dec."""


@dataclass(kw_only=True)
class SAEBenchConfig:
    """What SAEBench, and SAELens inside it, ask of an SAE's config; they add fields of their own to it."""

    model_name: str
    """As TransformerLens knows it."""
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int
    architecture: str
    """Our name of the nonlinearity."""
    dtype: str
    device: str
    dataset_path: str
    training_tokens: int
    hook_head_index: int | None = None
    prepend_bos: bool = True
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    """None on their side: `SAEBenchSAE` scales inside."""
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields above, for their result files."""
        return asdict(self)


class SAEBenchSAE(torch.nn.Module):
    """f = SAE.encode(x - mean x), x_hat = decode(f) in the model's own scale and with the mean put back.

    The mean over d_in is taken off where the SAE was trained without it: in LayerNorm models, whose readers remove it.
    SAEBench calls `encode` and `decode` apart, and latents do not say how long the activations were: `decode` puts
    back what the last `encode` took off, so latents, changed or not, are decoded before others are encoded.
    """

    def __init__(self, sae: SAE, cfg: SAEBenchConfig, *, centred: bool):
        """Args: `centred` says whether the mean is taken off.

        Raises:
            ValueError: rows of W_dec that are not of norm 1, on which their scores by latent rely.
        """
        super().__init__()
        norms = sae.W_dec.detach().norm(dim=1)
        if (norms - 1).abs().max() > NORM_TOLERANCE:
            raise ValueError(f"W_dec: rows have norms {norms.min():.6g} to {norms.max():.6g}, SAEBench needs 1")
        self.sae, self.cfg, self._centred = sae, cfg, centred
        self._taken_off: tuple[Tensor | float, Tensor | float] = 1.0, 0.0

    @classmethod
    def load(cls, run: str | Path, model_name: str = "", *, device: str = "cpu") -> "SAEBenchSAE":
        """Reads a run's folder.

        Args:
            run: the folder.
            model_name: as TransformerLens knows it; empty: the name of the model that the SAE was trained on.
            device: where it computes.

        Raises:
            ValueError: no SAE there, or its config does not say what SAEBench must know.
        """
        sae, made = SAE.load(run).to(device), read_provenance(run)
        if missing := {"lm", "hook", "ctx", "data", "centred"} - made.keys():
            raise ValueError(f"{run}: its config does not say {', '.join(sorted(missing))}")
        named = re.fullmatch(r"blocks\.(\d+)\.hook_\w+", made["hook"])
        if named is None:
            raise ValueError(f"{run}: hook {made['hook']!r} has no name in SAEBench; it needs blocks.L.hook_SITE")
        cfg = SAEBenchConfig(
            model_name=model_name or made["lm"],
            d_in=sae.config.d_in,
            d_sae=sae.config.d_sae,
            hook_layer=int(named[1]),
            hook_name=made["hook"],
            context_size=made["ctx"],
            architecture=sae.config.nonlinearity,
            dtype=str(sae.W_dec.dtype).removeprefix("torch."),
            device=device,
            dataset_path=made["data"],
            training_tokens=made.get("run", {}).get("n_tokens", 0),
        )
        return cls(sae, cfg, centred=made["centred"])

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """Encoder."""
        return self.sae.W_enc

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """Decoder, rows of norm 1."""
        return self.sae.W_dec

    @property
    def b_dec(self) -> Float[Tensor, " d_in"]:
        """Decoder bias."""
        return self.sae.b_dec

    @property
    def b_enc(self) -> Float[Tensor, " d_sae"]:
        """Encoder bias; Gated SAEs have none, and SAEBench asks these for `b_mag`."""
        return self.sae.get_parameter("b_enc")

    @property
    def b_mag(self) -> Float[Tensor, " d_sae"]:
        """Bias of a Gated SAE's magnitudes; no other has one."""
        return self.sae.get_parameter("b_mag")

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.sae.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Its number format."""
        return self.sae.W_dec.dtype

    def encode(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latents of raw activations, in the space that the SAE was trained in."""
        acts, mean, scale = acts.to(self.dtype), 0.0, 1.0
        if self._centred:
            mean = acts.mean(-1, keepdim=True)
            acts = centre(acts)
        if self.sae.config.normalisation == "per_token":
            acts, norms = normalise(acts)
            scale = (norms / math.sqrt(self.cfg.d_in))[..., None]
        self._taken_off = scale, mean
        return self.sae.encode_normalised(acts)

    def decode(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Their reconstruction as raw activations, by the scale and mean of the last `encode`.

        Raises:
            ValueError: the last `encode` was of other tokens than so many.
        """
        scale, mean = self._taken_off
        for taken in (scale, mean):
            if isinstance(taken, Tensor) and taken.shape[:-1] != latents.shape[:-1]:
                raise ValueError(
                    f"latents of shape {tuple(latents.shape)}: the last encode was of {tuple(taken.shape[:-1])} tokens"
                )
        return self.sae.decode(latents) * scale + mean

    def forward(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction of raw activations."""
        return self.decode(self.encode(acts))
