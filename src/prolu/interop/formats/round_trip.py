"""What an export carries along, so that importing it again gives back the same SAE to the bit.

An export in another library's format loses what that format has no place for: which nonlinearity the SAE had (a ProLU
becomes a JumpReLU), that nonlinearity's own parameters, where the SAE comes from, and sometimes how activations must be
prepared before they are given to it. Therefore every export carries

- a *record* under the key `prolu` of the other library's config: our config, the provenance, and the preparation that
  the format cannot describe;
- a *parameters file*, `prolu.safetensors`, beside the other library's files: the nonlinearity's own parameters.

The other library ignores both. Somebody may have changed the SAE since, with the other library's own tools, and then
the record is out of date. So an import rebuilds the original from them, exports it once more in memory, and uses the
record only if the result equals, to the bit, what the folder holds now. No flag or digest has to be kept, and a changed
SAE is read like any other of that format.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from prolu.interop.formats.checked_reading import read_safetensors
from prolu.interop.formats.common_form import CommonForm, common_form_of, sae_with
from prolu.sae.autoencoder import SAE
from prolu.sae.nonlinearities import GeneralisedProLU, nonlinearity_named
from prolu.sae.saved_sae import SAEConfig

RECORD_KEY = "prolu"
"""The key of the other library's config under which an export puts its record."""

PARAMETERS_FILE = "prolu.safetensors"
"""The file with the nonlinearity's own parameters. No other library reads it."""

CENTRED = "centred (their mean over d_model removed)"
"""The preparation of activations of a LayerNorm model, as the record words it."""


def scaled(d_in: int) -> str:
    """Return the per-token scaling, as the record words it."""
    return f"scaled per token to norm sqrt({d_in})"


def record_of(sae: SAE, provenance: Mapping[str, Any], undescribed: list[str]) -> dict[str, Any]:
    """Return the record that goes into the other library's config.

    Args:
        sae: The exported SAE.
        provenance: Where it comes from.
        undescribed: The preparation of inputs that the format cannot describe.
    """
    return {"sae": sae.config.describe(), "provenance": dict(provenance), "inputs_must_be": undescribed}


def parameters_file(sae: SAE) -> dict[str, bytes]:
    """Return the parameters file, by its name."""
    own = {name: t.detach().contiguous().cpu() for name, t in sae.weights.own.items()}
    return {PARAMETERS_FILE: save(own)}


def recorded_preparation(file: Path, record: Any, d_in: int) -> tuple[bool, bool]:
    """Say whether a record requires that inputs be scaled per token, and that they be centred.

    This holds even if the rest of the record is out of date: weights that somebody has changed still belong to
    activations that were prepared in this way.

    Args:
        file: The config that holds the record, for the message.
        record: The value under `RECORD_KEY`, if there is one.
        d_in: The width of the activations.

    Raises:
        ValueError: The record requires something else.
    """
    required = record.get("inputs_must_be", []) if isinstance(record, dict) else []
    known = [scaled(d_in), CENTRED]
    if not isinstance(required, list) or any(one not in known for one in required):
        supported = " and ".join(map(repr, known))
        raise ValueError(f"{file}: {RECORD_KEY}.inputs_must_be is {required!r}, supported is a list of {supported}")
    return scaled(d_in) in required, CENTRED in required


def restored(
    folder: Path, record: Any, form: CommonForm, as_written: Callable[[CommonForm], CommonForm] = lambda form: form
) -> tuple[SAE, dict[str, Any]] | None:
    """Return the SAE that was exported and its provenance, or None if there is no record or it does not fit.

    Args:
        folder: The folder of the export.
        record: The value under `RECORD_KEY` of its config, if there is one.
        form: The SAE as the format's own files hold it.
        as_written: What exporting to this format does to the common form of an SAE.
    """
    config = _config_in(record)
    if config is None or (config.d_in, config.d_sae) != (form.d_in, form.d_sae):
        return None
    for own in _possible_parameters(folder, config, form):
        sae = sae_with(config, form, own)
        if as_written(common_form_of(sae)).equals(form):
            provenance = record.get("provenance")
            return sae, provenance if isinstance(provenance, dict) else {}
    return None


def _config_in(record: Any) -> SAEConfig | None:
    """Return the config in a record, or None if there is none that this version understands."""
    facts = record.get("sae") if isinstance(record, dict) else None
    # The types are those of an example's values, since an annotation may be a Literal.
    kinds = {name: type(value) for name, value in SAEConfig(d_in=1, d_sae=1).describe().items()}
    if not isinstance(facts, dict) or {name: type(value) for name, value in facts.items()} != kinds:
        return None
    try:
        return SAEConfig(**facts)
    except ValueError:
        return None


def _possible_parameters(folder: Path, config: SAEConfig, form: CommonForm) -> list[dict[str, Tensor]]:
    """Return what the nonlinearity's own parameters may have been, the best source first."""
    nonlinearity = nonlinearity_named(config.nonlinearity)
    found = []
    if (folder / PARAMETERS_FILE).is_file():
        found.append(read_safetensors(folder / PARAMETERS_FILE))
    # The other library's own saving keeps the record and drops the parameters file. For ProLU the threshold is
    # max(0, -b), so b = -threshold gives the same latents; a positive b is lost, but it does not change any latent.
    if isinstance(nonlinearity, GeneralisedProLU) and "threshold" in form.own:
        found.append({"b_enc": -form.own["threshold"]})
    # Most other nonlinearities have the same parameters in the common form.
    found.append(form.own)
    names = set(nonlinearity.parameter_names)
    return [own for own in found if own.keys() == names and _fits(own, form)]


def _fits(own: dict[str, Tensor], form: CommonForm) -> bool:
    """Say whether parameters have the shape and number format that an SAE with these matrices needs."""
    return all(t.shape == (form.d_sae,) and t.dtype == form.W_dec.dtype and t.isfinite().all() for t in own.values())
