"""An adapter with which SAEBench's evaluations take one of our SAEs.

SAEBench hands an SAE raw activations, takes raw reconstructions from it, and reads a description of it from its
attribute `cfg`. Written against sae-bench 0.6.0, of which nothing is imported here.
"""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.sae.autoencoder import SAE
from prolu.sae.latents import Latents, RowScale

NORM_TOLERANCE = 1e-5
"""How far the norm of a decoder row may be from 1. SAEBench's own check allows the same."""


@dataclass(kw_only=True)
class SAEBenchConfig:
    """The fields that SAEBench, and SAELens inside it, read from an SAE's config.

    It is not frozen, because both add fields of their own to it.
    """

    model_name: str
    """The language model, by the name that TransformerLens gives it."""
    d_in: int
    """The width of the activations."""
    d_sae: int
    """The number of latents."""
    hook_layer: int
    """The block that the hook belongs to."""
    hook_name: str
    """The hook, as blocks.L.hook_SITE."""
    context_size: int
    """The number of tokens in a block of the training text."""
    architecture: str
    """The name that we give the nonlinearity."""
    dtype: str
    """The number format of the weights, for example float32."""
    device: str
    """The device that the SAE computes on."""
    dataset_path: str
    """The training text."""
    training_tokens: int
    """The number of tokens that the SAE was trained on; 0 if that is unknown."""
    hook_head_index: int | None = None
    prepend_bos: bool = True
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    """none, because `SAEBenchSAE` does the scaling itself."""
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields above, which SAEBench writes into its result files."""
        return asdict(self)


class SAEBenchSAE(torch.nn.Module):
    """f = SAE.encode(x - mean x), x_hat = decode(f), scaled back to the size of x and with the mean added again.

    The mean over d_in is subtracted if the SAE was trained on centred activations, as in LayerNorm models. There
    nothing reads the mean of the residual stream, so adding it again changes no output of the model.

    SAEBench calls `encode` and `decode` apart, with latents in between that it may have changed. A token's scale and
    mean cannot be found in its latents, so `encode` keeps them and `decode` uses those of the last `encode`. Therefore
    latents must be decoded before other activations are encoded.

    With `raw_latents` they are multiplied by the scale of their token, so that f W_dec is a part of the raw activation.
    SAEBench's absorption needs that: it compares latents with projections of raw activations.
    """

    def __init__(self, sae: SAE, cfg: SAEBenchConfig, *, raw_latents: bool = False):
        """Wrap an SAE.

        Args:
            sae: The SAE.
            cfg: Its description.
            raw_latents: Whether latents have the size of raw activations. By default they are those of the scaled
                activations that the SAE works on.

        Raises:
            ValueError: A row of W_dec does not have norm 1, on which SAEBench's scores per latent rely; or it is a
                transcoder, which SAEBench does not know.
        """
        super().__init__()
        if sae.is_transcoder:
            raise ValueError("a transcoder: SAEBench scores SAEs only, whose input and output are at one hook")
        norms = sae.W_dec.detach().norm(dim=1)
        if (norms - 1).abs().max() > NORM_TOLERANCE:
            raise ValueError(f"W_dec: rows have norms {norms.min():.6g} to {norms.max():.6g}, SAEBench needs norm 1")
        self.sae = sae
        self.cfg = cfg
        self.raw_latents = raw_latents
        # Those of the tokens of the last `encode`, which `decode` restores.
        self._row_scale = RowScale(1.0, 0.0)

    @classmethod
    def load(
        cls, run: str | Path, model_name: str = "", *, device: str = "cpu", raw_latents: bool = False
    ) -> "SAEBenchSAE":
        """Load the SAE in the folder of a run.

        Args:
            run: The folder.
            model_name: The language model, by the name that TransformerLens gives it. If empty, it is the name of the
                model that the SAE was trained on.
            device: The device to compute on.
            raw_latents: Whether latents have the size of raw activations, as absorption needs it.

        Raises:
            ValueError: There is no SAE in the folder, or its config lacks something that SAEBench must know.
        """
        sae = SAE.load(run).to(device)
        provenance = sae.provenance
        if missing := {"lm", "hook", "ctx", "data", "centred"} - provenance.keys():
            raise ValueError(f"{run}: the provenance in its config lacks {', '.join(sorted(missing))}")
        hook = re.fullmatch(r"blocks\.(\d+)\.hook_\w+", provenance["hook"])
        if hook is None:
            raise ValueError(
                f"{run}: hook {provenance['hook']!r} has no name in SAEBench, which knows blocks.L.hook_SITE"
            )
        cfg = SAEBenchConfig(
            model_name=model_name or provenance["lm"],
            d_in=sae.config.d_in,
            d_sae=sae.config.d_sae,
            hook_layer=int(hook[1]),
            hook_name=provenance["hook"],
            context_size=provenance["ctx"],
            architecture=sae.config.nonlinearity,
            dtype=str(sae.W_dec.dtype).removeprefix("torch."),
            device=device,
            dataset_path=provenance["data"],
            training_tokens=provenance.get("run", {}).get("n_tokens", 0),
        )
        return cls(sae, cfg, raw_latents=raw_latents)

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """The encoder."""
        return self.sae.W_enc

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """The decoder, with rows of norm 1."""
        return self.sae.W_dec

    @property
    def b_dec(self) -> Float[Tensor, " d_in"]:
        """The decoder bias."""
        return self.sae.b_dec

    @property
    def b_enc(self) -> Float[Tensor, " d_sae"]:
        """The encoder bias. A gated SAE has none: there SAEBench asks for `b_mag`."""
        # An AttributeError by name, as `hasattr` expects it.
        return self.sae.get_parameter("b_enc")

    @property
    def b_mag(self) -> Float[Tensor, " d_sae"]:
        """The bias of a gated SAE's magnitudes. No other SAE has one."""
        return self.sae.get_parameter("b_mag")

    @property
    def device(self) -> torch.device:
        """The device that the weights are on."""
        return self.sae.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the weights."""
        return self.sae.W_dec.dtype

    def encode(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents of raw activations."""
        latents = self.sae.encode(acts.to(self.dtype))
        assert isinstance(latents, Latents)
        self._row_scale = latents.row_scale
        # A plain tensor, because SAEBench treats it like the latents of any other SAE.
        return latents.as_subclass(Tensor) * self._latent_scale

    @property
    def _latent_scale(self) -> Tensor | float:
        scale = self._row_scale.scale
        return scale.to(self.dtype) if self.raw_latents and isinstance(scale, Tensor) else 1.0

    def decode(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Return the raw reconstruction of latents, with the scale and the mean of the last `encode`.

        Raises:
            ValueError: The last `encode` was of another number of tokens, so these latents cannot be of its tokens.
        """
        for kept in self._row_scale:
            if isinstance(kept, Tensor) and kept.shape[:-1] != latents.shape[:-1]:
                raise ValueError(
                    f"latents of shape {tuple(latents.shape)}: the last encode was of {tuple(kept.shape[:-1])} tokens"
                )
        return self._row_scale.restore(self.sae.decode_normalised(latents / self._latent_scale))

    def forward(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return the reconstruction of raw activations."""
        return self.decode(self.encode(acts))
