"""The sparse autoencoder: initialise, encode, decode, save, load."""

import hashlib
import json
import math
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from prolu.runtime.checks import at_least_1
from prolu.runtime.files import read_json_object, write_atomically
from prolu.runtime.hub import MAIN, HubError, fetch, place_of
from prolu.sae.nonlinearities import activate, nonlinearity_named
from prolu.sae.scaling import normalise
from prolu.sae.weights import Weights

WEIGHTS_FILE, CONFIG_FILE = "sae.safetensors", "config.json"


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """What an SAE computes."""

    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of latents."""
    nonlinearity: str = "prolu_ste"
    """relu, prolu_relu, prolu_ste, gated, jumprelu, or with arguments, as in topk(32) (see `nonlinearities`)."""
    normalisation: str = "per_token"
    """per_token: inputs are scaled to norm sqrt(d_in) first and the output scaled back; none: not."""

    def __post_init__(self):
        for name in ("d_in", "d_sae"):
            at_least_1(name, getattr(self, name))
        nonlinearity_named(self.nonlinearity)
        if self.normalisation not in ("per_token", "none"):
            raise ValueError(f"normalisation {self.normalisation!r}: choose per_token or none")


class SAE(torch.nn.Module):
    """x_hat = f W_dec + b_dec with f = nonlinearity((x - b_dec) W_enc, b_enc, ...).

    `encode` and `forward` take activations as they come from the language model, of any leading shape;
    the per-token scaling is inside. Methods ending in `_normalised` work on scaled activations.
    Differentiable throughout; the nonlinearity brings its own (synthetic) gradient.
    """

    def __init__(self, config: SAEConfig, weights: Weights):
        super().__init__()
        self.config = config
        self.W_enc = torch.nn.Parameter(weights.encoder.T)
        self.W_dec = torch.nn.Parameter(weights.decoder)
        self.b_dec = torch.nn.Parameter(weights.b_dec)
        self._nonlinearity = nonlinearity_named(config.nonlinearity)
        for name in self._nonlinearity.parameter_names:
            self.register_parameter(name, torch.nn.Parameter(weights.own[name]))

    @property
    def weights(self) -> Weights:
        """The tensors themselves, latent-major, outside autograd; writing to them changes the SAE."""
        own = {name: getattr(self, name).data for name in self._nonlinearity.parameter_names}
        return Weights(self.W_enc.data.T, self.W_dec.data, self.b_dec.data, own)

    def encode(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latents of raw activations."""
        return self.encode_normalised(self._scaled(acts)[0])

    def encode_normalised(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latents of activations already in normalised space."""
        own = {name: getattr(self, name) for name in self._nonlinearity.parameter_names}
        return activate(self._nonlinearity, (x - self.b_dec) @ self.W_enc, own)

    def decode(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction in normalised space."""
        return latents @ self.W_dec + self.b_dec

    def forward(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction of raw activations, in their own scale."""
        x, scale_back = self._scaled(acts)
        return self.decode(self.encode_normalised(x)) * scale_back

    def _scaled(self, acts: Tensor) -> tuple[Tensor, Tensor | float]:
        if acts.shape[-1:] != (self.config.d_in,):
            raise ValueError(f"acts of shape {tuple(acts.shape)}: the last dimension must be d_in = {self.config.d_in}")
        if torch.promote_types(acts.dtype, self.W_enc.dtype) != self.W_enc.dtype or not acts.is_floating_point():
            raise ValueError(f"acts are {acts.dtype}, the SAE is {self.W_enc.dtype}: convert one to the other")
        if acts.device != self.W_enc.device:
            raise ValueError(f"acts are on {acts.device}, the SAE on {self.W_enc.device}: move one to the other")
        if self.config.normalisation == "none":
            return acts, 1.0
        x, norms = normalise(acts)
        return x, (norms / math.sqrt(self.config.d_in))[..., None]

    def files(self, provenance: dict[str, Any] | None = None) -> dict[str, bytes]:
        """What `save` writes, by name."""
        tensors = {name: t.detach().contiguous().cpu() for name, t in self.state_dict().items()}
        facts = {"sae": asdict(self.config), "provenance": provenance or {}}
        return {WEIGHTS_FILE: save(tensors), CONFIG_FILE: (json.dumps(facts, indent=1) + "\n").encode()}

    def save(self, folder: str | Path, provenance: dict[str, Any] | None = None) -> None:
        """Writes `sae.safetensors` and `config.json`; `provenance` (model, hook, run) goes into the latter."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files(provenance).items():
            write_atomically(folder / name, content)

    @classmethod
    def load(cls, folder: str | Path) -> "SAE":
        """Reads what `save` wrote.

        Raises:
            ValueError: something missing, malformed, of the wrong shape, or not finite.
        """
        config = read_config(Path(folder) / CONFIG_FILE)
        file = Path(folder) / WEIGHTS_FILE
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError, struct.error) as problem:
            raise ValueError(f"{file}: not a readable safetensors file ({problem})") from None
        own_names = nonlinearity_named(config.nonlinearity).parameter_names
        shapes = {
            "W_enc": (config.d_in, config.d_sae),
            "W_dec": (config.d_sae, config.d_in),
            "b_dec": (config.d_in,),
        }
        shapes |= dict.fromkeys(own_names, (config.d_sae,))
        if tensors.keys() != shapes.keys():
            raise ValueError(f"{file}: holds {sorted(tensors)}, needs {sorted(shapes)}")
        for name, shape in shapes.items():
            tensor = tensors[name]
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise ValueError(f"{file}: {name} is {tensor.dtype} {tuple(tensor.shape)}, needs floats {shape}")
            if not tensor.isfinite().all():
                raise ValueError(f"{file}: {name} holds values that are not finite")
        own = {name: tensors[name] for name in own_names}
        return cls(config, Weights(tensors["W_enc"].T.contiguous(), tensors["W_dec"], tensors["b_dec"], own))

    @classmethod
    def from_hub(cls, place: str, revision: str = MAIN) -> "SAE":
        """Loads one SAE from the Hugging Face hub: `SAE.from_hub("user/repo/RUN_ID")`; downloaded once, into its cache.

        Raises:
            ValueError: no such place, no access, or no SAE of ours there.
            ConnectionError: the hub does not answer.
        """
        where = place_of(place)
        folder = fetch(where, revision, (CONFIG_FILE, WEIGHTS_FILE))
        if not (folder / WEIGHTS_FILE).is_file():
            raise HubError(f"{where}: no SAE there (no {WEIGHTS_FILE}); name its folder, as in user/repo/RUN_ID")
        return cls.load(folder)


def weights_digest(folder: str | Path) -> str:
    """SHA-256 of the weights that `SAE.save` wrote.

    Raises:
        ValueError: none there.
        OSError: it cannot be read.
    """
    file = Path(folder) / WEIGHTS_FILE
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{file}: no such file; a saved SAE has {CONFIG_FILE} and {WEIGHTS_FILE}") from None


def read_config(file: Path) -> SAEConfig:
    """The config in a file that `SAE.save` wrote.

    Raises:
        ValueError: no such file, or not such a config.
    """
    facts = _read_facts(file)["sae"]
    known = {field.name: field.type for field in fields(SAEConfig)}
    if not isinstance(facts, dict) or facts.keys() != known.keys():
        raise ValueError(f"{file}: 'sae' needs the fields {', '.join(known)} and no others")
    for name, value in facts.items():
        if type(value) is not known[name]:
            raise ValueError(f"{file}: {name} is {value!r}, needs {getattr(known[name], '__name__', known[name])}")
    try:
        return SAEConfig(**facts)
    except ValueError as problem:
        raise ValueError(f"{file}: {problem}") from None


def read_provenance(folder: str | Path) -> dict[str, Any]:
    """What `SAE.save` was told of where an SAE comes from.

    Raises:
        ValueError: no SAE in that folder.
    """
    made = _read_facts(Path(folder) / CONFIG_FILE).get("provenance", {})
    return made if isinstance(made, dict) else {}


def _read_facts(file: Path) -> dict[str, Any]:
    facts = read_json_object(file, "saved SAE")
    if "sae" not in facts:
        raise ValueError(f"{file}: not an SAE's config (no 'sae')")
    return facts
