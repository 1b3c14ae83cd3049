"""What an export remembers of the SAE it was made of, so that importing it gives back the bits.

The other library's config carries, under `prolu`, our config, the provenance, and what must be done to inputs. A small
file beside, which the others do not read, has the nonlinearity's own parameters. They are believed only where exporting
them again gives what is there: whoever changed that is right.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from prolu.interop.formats.checked_reading import read_safetensors
from prolu.interop.formats.common_form import Plain, plain_of
from prolu.sae.autoencoder import SAE, SAEConfig
from prolu.sae.nonlinearities import GeneralisedProLU, nonlinearity_named
from prolu.sae.weights import Weights

MARK, OWN_FILE = "prolu", "prolu.safetensors"

CENTRED = "centred (their mean over d_model removed)"


def scaled(d_in: int) -> str:
    """The per-token scaling, in words."""
    return f"scaled per token to norm sqrt({d_in})"


def mark(sae: SAE, made: Mapping[str, Any], unsaid: list[str]) -> dict[str, Any]:
    """What goes into the other library's config."""
    return {"sae": asdict(sae.config), "provenance": dict(made), "inputs_must_be": unsaid}


def own_file(sae: SAE) -> dict[str, bytes]:
    """The file beside, by name."""
    own = {name: t.detach().contiguous().cpu() for name, t in sae.weights.own.items()}
    return {OWN_FILE: save(own)}


def check_inputs(library: str, unsaid: list[str], *, inputs_normalised: bool) -> None:
    """Raises ValueError if a format cannot say what must be done to inputs, unless it was asked to be recorded."""
    if unsaid and not inputs_normalised:
        raise ValueError(
            f"format {library!r}: it cannot say that inputs must be {' and '.join(unsaid)} first; --inputs-normalised "
            "exports all the same, and records that they must"
        )
    if inputs_normalised and not unsaid:
        raise ValueError(f"inputs_normalised: {library!r} says all that must be done to inputs; leave it out")


def prepared(file: Path, marked: Any, d_in: int) -> tuple[bool, bool]:
    """Whether an export recorded that inputs must be scaled per token, and that they must be centred.

    It counts also where the SAE is not remembered: the weights are of such inputs whatever became of the rest.

    Raises:
        ValueError: it says something else.
    """
    said = marked.get("inputs_must_be", []) if isinstance(marked, dict) else []
    known = [scaled(d_in), CENTRED]
    if not isinstance(said, list) or any(one not in known for one in said):
        supported = " and ".join(map(repr, known))
        raise ValueError(f"{file}: {MARK}.inputs_must_be is {said!r}, supported is a list of {supported}")
    return known[0] in said, known[1] in said


def remembered(
    folder: Path, marked: Any, plain: Plain, as_written: Callable[[Plain], Plain] = lambda plain: plain
) -> tuple[SAE, dict[str, Any]] | None:
    """The SAE that was exported, and its provenance; None if there is no memory of it, or it does not fit.

    Args:
        folder: of the export.
        marked: what the config has under `prolu`.
        plain: the SAE as the format's own files have it.
        as_written: what that format's export does to an SAE.
    """
    config = _config(marked)
    if config is None or (config.d_in, config.d_sae) != (plain.d_in, plain.d_sae):
        return None
    for own in _candidates(folder, config, plain):
        sae = SAE(config, Weights(plain.W_enc.T.contiguous(), plain.W_dec.contiguous(), plain.b_dec, own))
        if as_written(plain_of(sae)).equals(plain):
            made = marked.get("provenance")
            return sae, made if isinstance(made, dict) else {}
    return None


def _config(marked: Any) -> SAEConfig | None:
    facts = marked.get("sae") if isinstance(marked, dict) else None
    known = {field.name: field.type for field in fields(SAEConfig)}
    if not isinstance(facts, dict) or {name: type(value) for name, value in facts.items()} != known:
        return None
    try:
        return SAEConfig(**facts)
    except ValueError:
        return None


def _candidates(folder: Path, config: SAEConfig, plain: Plain) -> list[dict[str, Tensor]]:
    """Own parameters that may be meant: those beside; else ProLU's b = -threshold, and those of the same names."""
    nonlinearity = nonlinearity_named(config.nonlinearity)
    names, found = set(nonlinearity.parameter_names), []
    if (folder / OWN_FILE).is_file():
        found.append(read_safetensors(folder / OWN_FILE))
    if isinstance(nonlinearity, GeneralisedProLU) and "threshold" in plain.own:
        found.append({"b_enc": -plain.own["threshold"]})
    found.append(plain.own)
    shape, dtype = (config.d_sae,), plain.W_dec.dtype
    return [
        own
        for own in found
        if own.keys() == names
        and all(t.shape == shape and t.dtype == dtype and t.isfinite().all() for t in own.values())
    ]
