"""SAEs by their names in SAELens's registry, which SAELens itself finds, downloads and converts.

The registry is part of SAELens: some 170 releases of 15 kinds, for which it has a loader each. So that none of them has
to be written and kept here, SAELens loads the SAE and saves it in its own format, and this library imports that folder.
"""

import tempfile
import warnings
from collections.abc import Collection
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from prolu.interop.exchange import import_sae
from prolu.runtime.files import first_line
from prolu.runtime.hub import errors_as_sentences, place_of
from prolu.sae.autoencoder import SAE

IN_REGISTRY = "saelens:"
"""What the name of an SAE in SAELens's registry begins with."""

N_NEAR = 5
"""The number of names that an error message lists."""


def import_registered(name: str) -> tuple[SAE, dict[str, Any]]:
    """Return an SAE of SAELens's registry, and its provenance.

    The weights are those that `sae_lens.SAE.from_pretrained(RELEASE, SAE_ID)` gives, and what SAELens downloads stays
    in the hub's cache. Under `origin`, the provenance has the name and SAELens's version too.

    Args:
        name: saelens:RELEASE/SAE_ID, as in saelens:gpt2-small-res-jb/blocks.8.hook_resid_pre.

    Raises:
        ValueError: SAELens is not installed, its registry has no such SAE, the hub refuses, or the SAE computes
            something that ours cannot.
        ConnectionError: The hub does not answer.
    """
    sae_lens = _sae_lens(name)
    release, sae_id, repo = _looked_up(name)
    with tempfile.TemporaryDirectory() as folder:
        # SAELens warns how the language model should be loaded; the provenance records this, so the warning is not
        # shown.
        with errors_as_sentences(place_of(repo)), warnings.catch_warnings(action="ignore"):
            theirs = sae_lens.SAE.from_pretrained(release, sae_id)
            for parameter in theirs.parameters():
                # Some of its loaders transpose matrices without copying them, and safetensors saves no such views.
                parameter.data = parameter.data.contiguous()
            theirs.save_model(folder)
        try:
            sae, made = import_sae(folder, "saelens")
        except ValueError as problem:
            # The temporary folder no longer exists when the user reads the message, so the SAE's name takes its place.
            raise ValueError(str(problem).replace(folder, name)) from None
    origin = made.get("origin", {"format": "saelens", "architecture": sae.config.nonlinearity})
    sae.provenance = made | {"origin": origin | {"name": name, "sae_lens": sae_lens.__version__}}
    return sae, dict(sae.provenance)


def _sae_lens(name: str) -> ModuleType:
    try:
        import sae_lens  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as problem:
        if problem.name != "sae_lens":
            raise ValueError(f"{name}: SAELens cannot be imported ({first_line(problem)})") from None
        raise ValueError(f"{name}: needs SAELens, which is not installed; pip install 'prolu[saelens]'") from None
    return sae_lens


def _looked_up(name: str) -> tuple[str, str, str]:
    """Return the release, the id and the repository on the hub of a registered SAE.

    Raises:
        ValueError: There is none of that name.
    """
    from sae_lens.loading.pretrained_saes_directory import (  # pyright: ignore[reportMissingImports]
        get_pretrained_saes_directory,
    )

    release, _, sae_id = name.removeprefix(IN_REGISTRY).partition("/")
    registry = get_pretrained_saes_directory()
    if release not in registry:
        raise ValueError(
            f"release {release!r}: not one of the {len(registry)} in SAELens's registry; {_near(release, registry)}"
        )
    known = registry[release].saes_map
    if sae_id not in known:
        raise ValueError(f"SAE {sae_id!r}: not one of the {len(known)} of release {release}; {_near(sae_id, known)}")
    return release, sae_id, registry[release].repo_id


def _near(name: str, known: Collection[str]) -> str:
    """Return in words which names are like one that is not known."""
    return f"near it are {', '.join(get_close_matches(name, known, N_NEAR, cutoff=0.0))}"
