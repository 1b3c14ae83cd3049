"""The sparse autoencoder: initialise, encode, decode, save, load."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from prolu.runtime.files import json_text, write_atomically
from prolu.runtime.hub import MAIN, HubError, fetch, place_of
from prolu.runtime.names import shown
from prolu.runtime.notebooks import html_facts
from prolu.sae.latents import Latents, RowScale
from prolu.sae.nonlinearities import activate, nonlinearity_named
from prolu.sae.saved_sae import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    SAEConfig,
    read_config,
    read_provenance,
    read_weights,
    weights_digest,
)
from prolu.sae.scaling import centre, normalise
from prolu.sae.weights import Weights

__all__ = ["SAE", "SAEConfig", "read_config", "read_provenance", "weights_digest"]

Activations = Float[Tensor, "*batch d_in"] | np.ndarray | Sequence[Any]
"""What an SAE encodes: a tensor, an array, or nested lists of numbers."""

Codes = Float[Tensor, "*batch d_sae"] | np.ndarray | Sequence[Any]
"""What an SAE decodes."""


class SAE(torch.nn.Module):
    """A sparse autoencoder: x_hat = f W_dec + b_dec with f = nonlinearity((x - b_dec) W_enc, b_enc, ...).

    Activations are [..., d_in] and latents [..., d_sae], with any leading dimensions; W_enc is [d_in, d_sae] and W_dec
    [d_sae, d_in].

    A transcoder (`config.is_transcoder`) reads x at one hook and writes y at another one, of width d_out:

        y_hat = f W_dec + b_out        or, as a skip transcoder,        y_hat = f W_dec + b_out + x W_skip

    With `normalisation="per_token"`, x in these equations is c x with c = sqrt(d_in) / norm(x), and y_hat is that of
    c y: it is divided by c again. So the output follows from the input alone, and is proportional to it.

    `encode`, `decode` and `forward` are about activations as they come from the language model: `encode` centres them,
    if the SAE was trained on centred ones, and scales them, and `decode` takes its reconstruction back to where the
    activations came from. Methods whose names end in `_normalised` work on activations that have been centred and
    scaled already. All of them are differentiable; the nonlinearity brings its own gradient, which may be synthetic.
    """

    def __init__(self, config: SAEConfig, weights: Weights, provenance: Mapping[str, Any] | None = None):
        super().__init__()
        self.config = config
        self.provenance: dict[str, Any] = dict(provenance or {})
        """Where the SAE comes from: `lm`, `hook`, `centred` and more, as far as it is known."""
        # A view: the memory stays latent-major, as the kernels of training need it.
        self.W_enc = torch.nn.Parameter(weights.encoder.T)
        self.W_dec = torch.nn.Parameter(weights.decoder)
        self.b_dec = torch.nn.Parameter(weights.b_dec)
        if weights.b_out is not None:
            self.b_out = torch.nn.Parameter(weights.b_out)
        if weights.skip is not None:
            self.W_skip = torch.nn.Parameter(weights.skip)
        self._nonlinearity = nonlinearity_named(config.nonlinearity)
        # By their own names, which are thus the names in the saved file.
        for name in self._nonlinearity.parameter_names:
            self.register_parameter(name, torch.nn.Parameter(weights.own[name]))

    @property
    def weights(self) -> Weights:
        """The SAE's own tensors, one row per latent, outside autograd. Writing to them changes the SAE."""
        own = {name: getattr(self, name).data for name in self._nonlinearity.parameter_names}
        b_out = self.b_out.data if self.is_transcoder else None
        skip = self.W_skip.data if self.config.skip else None
        return Weights(self.W_enc.data.T, self.W_dec.data, self.b_dec.data, own, b_out, skip)

    @property
    def is_transcoder(self) -> bool:
        """Whether the SAE is a transcoder, which writes at another hook than it reads at."""
        return self.config.is_transcoder

    @property
    def d_out(self) -> int:
        """The width of the output: d_in, unless the SAE is a transcoder."""
        return self.config.width_out

    @property
    def d_in(self) -> int:
        """The width of the activations."""
        return self.config.d_in

    @property
    def d_sae(self) -> int:
        """The number of latents."""
        return self.config.d_sae

    @property
    def lm(self) -> str:
        """The language model that the SAE was trained on, by name or folder; empty if it is not known."""
        return self._known("lm")

    @property
    def hook(self) -> str:
        """The hook that the SAE was trained at; empty if it is not known."""
        return self._known("hook")

    @property
    def hook_out(self) -> str:
        """The hook that a transcoder writes at; empty if it is not known. That of an SAE is `hook`."""
        return self._known("hook_out") if self.is_transcoder else self.hook

    def _known(self, name: str) -> str:
        # From a file that somebody else may have written.
        value = self.provenance.get(name)
        return shown(value) if isinstance(value, str) else ""

    @property
    def centred(self) -> bool:
        """Whether the SAE was trained on activations without their mean over d_in, as in models with LayerNorms."""
        return self.provenance.get("centred") is True

    @property
    def device(self) -> torch.device:
        """The device that the weights are on."""
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the weights."""
        return self.W_enc.dtype

    def extra_repr(self) -> str:
        """Return what the SAE is and where it comes from, on one line."""
        to_hook = f" to {self.hook_out}" if self.is_transcoder else ""
        place = f", {self.hook}{to_hook} of {self.lm}" if self.hook else ""
        widths = f"{self.d_in} -> {self.d_sae}" + (f" -> {self.d_out}" if self.is_transcoder else "")
        return f"{self.config.nonlinearity}, {widths}{place}"

    def _repr_html_(self) -> str:
        kind = "transcoder" if self.is_transcoder else "SAE"
        facts = {"nonlinearity": self.config.nonlinearity, "d_in": f"{self.d_in:,}", "d_sae": f"{self.d_sae:,}"}
        facts |= {"d_out": f"{self.d_out:,}"} if self.is_transcoder else {}
        facts |= {"language model": self.lm, "hook": self.hook}
        facts |= {"hook it writes at": self.hook_out} if self.is_transcoder else {}
        facts |= {"activations are scaled": self.config.normalisation, "and centred": "yes" if self.centred else "no"}
        facts |= {"weights": f"{self.dtype} on {self.device}".removeprefix("torch.")}
        return html_facts(f"{kind}: {self.extra_repr()}", {name: value for name, value in facts.items() if value})

    def encode(self, acts: Activations) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents f of activations as they come from the language model.

        The result is a `Latents`, a tensor that keeps the scale and mean of each row for `decode`.

        Args:
            acts: a tensor, a NumPy array or nested lists of numbers, [..., d_in].

        Raises:
            ValueError: the shape, number format or device is not the SAE's.
        """
        x, row_scale = self._scaled(acts)
        return Latents.of(self.encode_normalised(x), row_scale)

    def encode_normalised(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents f of activations that have been centred and scaled already."""
        own = {name: getattr(self, name) for name in self._nonlinearity.parameter_names}
        return activate(self._nonlinearity, (x - self.b_dec) @ self.W_enc, own)

    def decode(
        self, latents: Codes, *, like: Tensor | np.ndarray | Sequence[Any] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """Return the reconstruction of activations as they come from the language model: of x, for `encode(x)`.

        A transcoder returns its output y_hat instead.

        Args:
            latents: what `encode` returned, edited or not; or any tensor, array or lists, together with `like`.
            like: the activations x whose scale and mean each row gets; needed only for latents that `encode` did not
                return, or that an operation has taken out of their rows, and only by an SAE that scales its input, or
                a skip transcoder.

        Raises:
            ValueError: the scale of the rows is not known, or is that of other rows.
        """
        plain = self._as_tensor("latents", latents).as_subclass(Tensor)
        if plain.shape[-1:] != (self.d_sae,):
            raise ValueError(f"latents of shape {tuple(plain.shape)}: the last dimension must be d_sae = {self.d_sae}")
        recon = self.decode_normalised(plain)
        if like is not None:
            return self._scaled(like)[1].restore(recon)
        if isinstance(latents, Latents) and hasattr(latents, "row_scale"):
            return latents.row_scale.restore(recon)
        # A transcoder adds no mean of its input to its output.
        if self.config.normalisation == "none" and not self.config.skip and (self.is_transcoder or not self.centred):
            return recon
        raise ValueError(
            "latents: a plain tensor does not know the scale of its rows, which this SAE took from its input; pass "
            "what `encode` returned, or like=acts, or use decode_normalised"
        )

    def decode_normalised(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """Return the reconstruction f W_dec + b_dec, still centred and scaled.

        Of a transcoder it is f W_dec + b_out: what a skip connection adds depends on x (`reconstruct_normalised`).
        """
        return latents @ self.W_dec + (self.b_out if self.is_transcoder else self.b_dec)

    def skip_normalised(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"] | float:
        """Return what a skip connection adds to the output, x W_skip, still centred and scaled; 0.0 without one."""
        return x @ self.W_skip if self.config.skip else 0.0

    def reconstruct_normalised(
        self, latents: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        """Return the whole output for the latents of x, still centred and scaled: with the skip connection's part."""
        recon = self.decode_normalised(latents)
        return recon + self.skip_normalised(x) if self.config.skip else recon

    def forward(self, acts: Activations) -> Float[Tensor, "*batch d_out"]:
        """Return the reconstruction of activations as they come from the language model; a transcoder's output."""
        x, row_scale = self._scaled(acts)
        return row_scale.restore(self.decode_normalised(self.encode_normalised(x)))

    def _scaled(self, acts: Activations) -> tuple[Tensor, RowScale]:
        """Return activations in the space that the SAE works in, and what takes a reconstruction back."""
        acts = self._checked(acts)
        offset: Tensor | float = 0.0
        scale: Tensor | float = 1.0
        if self.centred:
            # The target of a transcoder is centred too, and its mean is not that of the input.
            offset = 0.0 if self.is_transcoder else acts.mean(-1, keepdim=True)
            acts = centre(acts)
        if self.config.normalisation == "per_token":
            acts, norms = normalise(acts)
            scale = (norms / math.sqrt(self.d_in))[..., None]
        if self.config.skip:
            offset = self.skip_normalised(acts) * scale
        return acts, RowScale(scale, offset)

    def _checked(self, acts: Any) -> Tensor:
        acts = self._as_tensor("acts", acts)
        if acts.shape[-1:] != (self.d_in,):
            raise ValueError(f"acts of shape {tuple(acts.shape)}: the last dimension must be d_in = {self.d_in}")
        # A lower precision is promoted in the matmul without a loss; a higher one would be lost without a word.
        if not acts.is_floating_point() or torch.promote_types(acts.dtype, self.dtype) != self.dtype:
            raise ValueError(f"acts are {acts.dtype}, the SAE is {self.dtype}: convert one to the other")
        if acts.device != self.device:
            raise ValueError(f"acts are on {acts.device}, the SAE on {self.device}: move one to the other")
        return acts

    def _as_tensor(self, name: str, values: Any) -> Tensor:
        if isinstance(values, Tensor):
            return values
        try:
            if isinstance(values, np.ndarray):
                return torch.from_numpy(np.ascontiguousarray(values))
            # Numbers in lists have no format of their own.
            return torch.from_numpy(np.asarray(values, dtype=np.float64)).to(self.W_enc)
        except (ValueError, TypeError):
            raise ValueError(f"{name}: must be a tensor, an array of numbers, or lists of one length") from None

    def files(self, provenance: dict[str, Any] | None = None) -> dict[str, bytes]:
        """Return what `save` writes: the content of each file, by name."""
        # safetensors stores no strides, and W_enc is a transposed view.
        tensors = {name: t.detach().contiguous().cpu() for name, t in self.state_dict().items()}
        facts = {"sae": self.config.describe(), "provenance": self.provenance | (provenance or {})}
        return {WEIGHTS_FILE: save(tensors), CONFIG_FILE: (json_text(facts, indent=1) + "\n").encode()}

    def save(self, folder: str | Path, provenance: dict[str, Any] | None = None) -> None:
        """Write `sae.safetensors` and `config.json` into a folder, which is created if need be.

        Args:
            folder: where the files are written.
            provenance: where the SAE comes from (model, hook, run), for `config.json`, besides what it knows itself.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files(provenance).items():
            write_atomically(folder / name, content)

    @classmethod
    def load(cls, folder: str | Path) -> "SAE":
        """Return the SAE that `save` wrote.

        Raises:
            ValueError: A file is missing or malformed, or a tensor is missing, of the wrong shape, or not finite.
        """
        config = read_config(Path(folder) / CONFIG_FILE)
        return cls(config, read_weights(Path(folder) / WEIGHTS_FILE, config), read_provenance(folder))

    @classmethod
    def from_hub(cls, place: str, revision: str = MAIN) -> "SAE":
        """Return one SAE from the Hugging Face hub, as in `SAE.from_hub("user/repo/RUN_ID")`.

        It is downloaded once, into the cache of huggingface_hub.

        Args:
            place: the repository, and the SAE's folder in it.
            revision: a branch, a tag or a commit of the repository.

        Raises:
            ValueError: There is no such place, no access to it, or no SAE that `save` wrote.
            ConnectionError: The hub does not answer.
        """
        where = place_of(place)
        folder = fetch(where, revision, (CONFIG_FILE, WEIGHTS_FILE))
        if not (folder / WEIGHTS_FILE).is_file():
            raise HubError(f"{where}: no SAE there (no {WEIGHTS_FILE}); name its folder, as in user/repo/RUN_ID")
        return cls.load(folder)
