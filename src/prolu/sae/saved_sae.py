"""The two files of a saved SAE: its config, its weights, and how they are read and checked."""

import hashlib
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from prolu.runtime.checks import at_least_1, check_type, one_of
from prolu.runtime.files import read_json_object
from prolu.sae.choices import NORMALISATIONS
from prolu.sae.nonlinearities import nonlinearity_named
from prolu.sae.weights import Weights

WEIGHTS_FILE = "sae.safetensors"
"""The file with the tensors of a saved SAE."""

CONFIG_FILE = "config.json"
"""The file that says what a saved SAE computes, and where it comes from."""

NAMED_RUNS = 6
"""The number of runs that a message lists at most."""


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """What an SAE computes: its shape, its nonlinearity and the scaling of its input."""

    d_in: int
    """The width of the activations."""
    d_sae: int
    """The number of latents."""
    nonlinearity: str = "prolu_ste"
    """The activation function: relu, prolu_relu, prolu_ste, gated, jumprelu, jumprelu_plain, jumprelu_ste, thresholded,
    or one with arguments, as in topk(32), batchtopk(32), jumprelu(0.03), prolu(0.5,1,0)."""
    normalisation: str = "per_token"
    """How activations are scaled: per_token scales each to norm sqrt(d_in) before it is encoded, and its reconstruction
    back; none leaves both as they are. The target of a transcoder is scaled by the factor of its input."""
    d_out: int | None = None
    """The width of the activations that a transcoder writes. None for an SAE, which writes what it reads."""
    skip: bool = False
    """Whether a transcoder has a skip connection: x W_skip is added to its output."""

    def __post_init__(self):
        at_least_1("d_in", self.d_in)
        at_least_1("d_sae", self.d_sae)
        nonlinearity_named(self.nonlinearity).check_width(self.d_sae)
        one_of("normalisation", self.normalisation, NORMALISATIONS)
        if self.d_out is not None:
            at_least_1("d_out", self.d_out)
        elif self.skip:
            raise ValueError("skip True: only a transcoder has a skip connection; name the hook_out that it writes at")

    @property
    def is_transcoder(self) -> bool:
        """Whether the output is an activation of another hook than the input."""
        return self.d_out is not None

    @property
    def width_out(self) -> int:
        """The width of the output: d_out of a transcoder, d_in of an SAE."""
        return self.d_in if self.d_out is None else self.d_out

    def describe(self) -> dict[str, Any]:
        """Return the fields as they are saved: those that only transcoders have are left out for an SAE."""
        return {name: value for name, value in asdict(self).items() if self.is_transcoder or name not in OF_TRANSCODERS}


OF_TRANSCODERS = {"d_out", "skip"}
"""The fields of a config that only transcoders have."""


def read_weights(file: Path, config: SAEConfig) -> Weights:
    """Return the weights that `SAE.save` wrote for a config.

    Raises:
        ValueError: The file is missing or malformed, or a tensor is missing, of the wrong shape, or not finite.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError, struct.error) as problem:
        raise ValueError(f"{file}: not a readable safetensors file ({problem})") from None
    # Which tensors the file must hold depends on the nonlinearity, so the config was read first.
    own_names = nonlinearity_named(config.nonlinearity).parameter_names
    shapes = {
        "W_enc": (config.d_in, config.d_sae),
        "W_dec": (config.d_sae, config.width_out),
        "b_dec": (config.d_in,),
    }
    if config.is_transcoder:
        shapes["b_out"] = (config.width_out,)
    if config.skip:
        shapes["W_skip"] = (config.d_in, config.width_out)
    shapes |= dict.fromkeys(own_names, (config.d_sae,))
    if tensors.keys() != shapes.keys():
        raise ValueError(f"{file}: holds the tensors {sorted(tensors)}, and must hold {sorted(shapes)}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{file}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, and must be floats of {shape}"
            )
        # A single NaN would reach every reconstruction, and scores of NaN explain nothing.
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: {name} holds values that are not finite")
    own = {name: tensors[name] for name in own_names}
    # The file has W_enc in its public shape; in memory it lies latent by latent.
    return Weights(
        tensors["W_enc"].T.contiguous(),
        tensors["W_dec"],
        tensors["b_dec"],
        own,
        b_out=tensors.get("b_out"),
        skip=tensors.get("W_skip"),
    )


def weights_digest(folder: str | Path) -> str:
    """Return the SHA-256 digest, in hexadecimal, of the file of weights that `SAE.save` wrote.

    Raises:
        ValueError: There is no such file.
        OSError: The file cannot be read.
    """
    file = Path(folder) / WEIGHTS_FILE
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{file}: no such file; a saved SAE has {CONFIG_FILE} and {WEIGHTS_FILE}") from None


def read_config(file: Path) -> SAEConfig:
    """Return the config in a file that `SAE.save` wrote.

    Raises:
        ValueError: There is no such file, or it does not hold such a config.
    """
    facts = _read_facts(file)["sae"]
    known = {field.name: field.type for field in fields(SAEConfig)}
    always = [name for name in known if name not in OF_TRANSCODERS]
    # All of them, defaults too: a file without one was not written by `save`, and a default would be a guess.
    if not isinstance(facts, dict) or facts.keys() not in (known.keys(), set(always)):
        raise ValueError(
            f"{file}: 'sae' must have the fields {', '.join(always)}, for a transcoder also "
            f"{' and '.join(sorted(OF_TRANSCODERS))}, and no others"
        )
    try:
        for name, value in facts.items():
            check_type(name, value, known[name])
        return SAEConfig(**facts)
    except ValueError as problem:
        raise ValueError(f"{file}: {problem}") from None


def read_provenance(folder: str | Path) -> dict[str, Any]:
    """Return the `provenance` that `SAE.save` wrote; an empty dictionary if there is none.

    Raises:
        ValueError: There is no SAE in that folder.
    """
    provenance = _read_facts(Path(folder) / CONFIG_FILE).get("provenance", {})
    return provenance if isinstance(provenance, dict) else {}


def _read_facts(file: Path) -> dict[str, Any]:
    facts = read_json_object(file, "saved SAE")
    if "sae" in facts:
        return facts
    if not {"stream", "runs"} <= facts.keys():
        raise ValueError(f"{file}: must be the config of an SAE, which has an entry 'sae'")
    runs = sorted(str(path.parent) for path in file.parent.glob(f"*/{WEIGHTS_FILE}"))
    more = [f"and {len(runs) - NAMED_RUNS} more"] if len(runs) > NAMED_RUNS else []
    which = f"its runs are {', '.join([*runs[:NAMED_RUNS], *more])}" if runs else "none of its runs has finished yet"
    raise ValueError(f"{file.parent}: this is a study, and not one SAE; {which}")
