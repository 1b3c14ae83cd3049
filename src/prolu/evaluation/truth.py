"""Scores of an SAE against features that are known by construction: which it finds, and how well it reads them.

A row is x = sum_i c_i v_i + noise, with unit vectors v_i, [n_features, d_in], and codes c of at least 0. Every feature
is matched with at most one latent, and every latent with at most one feature, so that the sum of the cosines of
features and decoder rows is as large as it can be (the Hungarian method). All figures are about the matched pairs. A
feature without a latent, since there are fewer latents than features, counts as one that is never found.

A latent j adds f_j W_dec_j to a reconstruction. So f_j ||W_dec_j|| is compared with the magnitude c_i, in the space of
the rows. Latents of an SAE that scales each row x to norm sqrt(d_in) are multiplied by ||x|| / sqrt(d_in) for this.
"""

import math
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from prolu.runtime.files import first_line, write_atomically
from prolu.sae.autoencoder import SAE

TRUTH_FILE = "truth.safetensors"
"""The file's name in a run's folder."""

FOUND = 0.7
"""The cosine from which on a feature counts as found."""

FEWEST = 10
"""The least number of rows on which a feature and its latent are both active for their magnitudes to be compared."""

RESPONSE_EDGES = tuple(2 ** (n / 2) for n in range(-6, 7))
"""The inner edges of the bins of magnitudes, as multiples of the mean magnitude of the feature: half octaves from 1/8
to 8. The first bin has all below, and the last all above."""

ENTRIES_PER_PASS = 2**22
"""The number of latents computed at once."""


class TruthFigures(NamedTuple):
    """How an SAE stands to each true feature, [n_features] each, and how its latents respond to their magnitudes."""

    latent: Int[Tensor, " n_features"]
    """The latent that is matched with the feature; -1 if none is."""
    cosine: Float[Tensor, " n_features"]
    """The cosine of v_i and W_dec_j, from -1 to 1; 0 without a latent."""
    frequency: Float[Tensor, " n_features"]
    """#{c_i > 0} / n, the fraction of rows on which the feature is active."""
    precision: Float[Tensor, " n_features"]
    """#{c_i > 0 and f_j > 0} / #{f_j > 0}: how often the feature is active where its latent is; 0 for a latent that
    never is."""
    recall: Float[Tensor, " n_features"]
    """#{c_i > 0 and f_j > 0} / #{c_i > 0}: how often the latent is active where its feature is; nan for a feature that
    never is."""
    f1: Float[Tensor, " n_features"]
    """2 #{c_i > 0 and f_j > 0} / (#{f_j > 0} + #{c_i > 0}); nan for a feature that is never active."""
    slope: Float[Tensor, " n_features"]
    """The slope of the line of least squares f_j ||W_dec_j|| = slope c_i + offset, over the rows on which both are
    active; nan with fewer than 10 of these, or one magnitude. 1 if the latent grows as its feature does."""
    suppression: Float[Tensor, " n_features"]
    """1 - sum f_j ||W_dec_j|| / sum c_i over the same rows: the fraction of the magnitude that the latent lacks; nan
    with fewer than 10 of these. Below 0 where the latent takes over what belongs to others."""
    response: Float[Tensor, "n_bins 4"]
    """For each bin of c_i divided by the mean magnitude of feature i, sums over the features that were found and the
    rows on which they are active: of 1, of [f_j > 0], of c_i and of f_j ||W_dec_j||, both as multiples of that mean."""
    n_true: float
    """The mean number of features that are active on a row."""

    @property
    def found(self) -> Tensor:
        """Whether each feature was found: whether its cosine is at least 0.7."""
        return self.cosine >= FOUND

    def summary(self) -> dict[str, float]:
        """Return the figures that are one number, by their names in results.jsonl.

        - `truth_l0`: the mean number of features that are active on a row, with which `l0` can be compared.
        - `truth_cosine`: the mean cosine over all features.
        - `truth_found`: the fraction of the features with a cosine of at least 0.7.
        - `truth_precision`, `truth_recall`, `truth_f1`: means over the features that are ever active.
        - `truth_slope`, `truth_suppression`: means over the features that were found; nan if none was.
        """
        ever = self.frequency > 0
        means = {name: _mean(getattr(self, name)[ever]) for name in ("precision", "recall", "f1")}
        means |= {name: _mean(getattr(self, name)[self.found]) for name in ("slope", "suppression")}
        figures = {"l0": self.n_true, "cosine": _mean(self.cosine), "found": self.found.double().mean().item()}
        return {f"truth_{name}": value for name, value in (figures | means).items()}

    def save(self, folder: Path) -> None:
        """Write the file into a run's folder, which is created if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.contiguous() for name, t in self._asdict().items() if isinstance(t, Tensor)}
        write_atomically(folder / TRUTH_FILE, save(tensors | {"n_true": torch.tensor([self.n_true]).double()}))


def _mean(values: Tensor) -> float:
    """Return the mean of the values that are known; nan if none is."""
    known = values[~values.isnan()]
    return known.double().mean().item() if len(known) else math.nan


def read_truth(folder: Path) -> TruthFigures | None:
    """Read what `TruthFigures.save` wrote into a run's folder, or return None if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / TRUTH_FILE
    if not file.is_file():
        return None
    try:
        tensors = load_file(file)
        n_true = tensors.pop("n_true").item()
        found = TruthFigures(**tensors, n_true=n_true)
    except (OSError, SafetensorError, struct.error, ValueError, TypeError, KeyError) as problem:
        raise ValueError(f"{file}: not a readable file of true features ({first_line(problem)})") from None
    if found.response.shape != (len(RESPONSE_EDGES) + 1, 4):
        raise ValueError(f"{file}: its response has the shape {list(found.response.shape)}")
    return found


def matched_latents(
    decoder: Float[Tensor, "d_sae d_in"], directions: Float[Tensor, "n_features d_in"]
) -> tuple[Int[Tensor, " n_features"], Float[Tensor, " n_features"]]:
    """Return the latent that is matched with each feature, -1 where none is, and the cosine, 0 there."""
    from scipy.optimize import linear_sum_assignment

    unit = torch.nn.functional.normalize(decoder.double(), dim=1).cpu()
    cosines = torch.nn.functional.normalize(directions.double(), dim=1) @ unit.T
    features, latents = linear_sum_assignment(cosines.numpy(), maximize=True)
    latent = torch.full((len(directions),), -1, dtype=torch.int64)
    cosine = torch.zeros(len(directions), dtype=torch.float64)
    latent[features] = torch.from_numpy(latents)
    cosine[features] = cosines[features, latents]
    return latent, cosine


class _Sums:
    """Sums over rows of matched pairs, in float64."""

    def __init__(self, n_features: int, scale: Float[Tensor, " n_features"]):
        self._scale = scale
        self.n_rows = 0
        # Of c > 0, of f > 0, of both; and over the rows with both, of c, f, c c and c f.
        self.of_features = torch.zeros(7, n_features, dtype=torch.float64)
        self.response = torch.zeros(len(RESPONSE_EDGES) + 1, 4, n_features, dtype=torch.float64)

    def update(self, codes: Float[Tensor, "n n_features"], values: Float[Tensor, "n n_features"]) -> None:
        """Add rows: their true codes, and for each feature the value f_j ||W_dec_j|| of its latent."""
        n_features = codes.shape[1]
        self.n_rows += len(codes)
        # Few features are active on a row, so only these entries are looked at, one by one.
        row, feature = torch.nonzero(codes > 0, as_tuple=True)
        c = codes[row, feature].double()
        f = values[row, feature].double()
        both = (f > 0).double()
        c_both = c * both

        def summed(entries: Tensor, places: Tensor, n: int) -> Tensor:
            return torch.bincount(places, entries, minlength=n)

        ones = torch.ones_like(c)
        parts = (ones, both, c_both, f * both, c_both * c, c_both * f)
        on, *others = [summed(part, feature, n_features) for part in parts]
        read = (values > 0).sum(0).double()
        self.of_features += torch.stack([on, read, *others])
        relative = c / self._scale[feature]
        bins = torch.bucketize(relative, torch.tensor(RESPONSE_EDGES, dtype=torch.float64), right=True)
        n_bins = len(self.response)
        for i, part in enumerate((ones, both, relative, f / self._scale[feature])):
            in_bins = summed(part, bins * n_features + feature, n_bins * n_features)
            self.response[:, i] += in_bins.reshape(n_bins, n_features)


@torch.no_grad()
def truth_figures(
    sae: SAE,
    acts: Float[Tensor, "n d_in"],
    codes: Float[Tensor, "n n_features"],
    directions: Float[Tensor, "n_features d_in"],
) -> TruthFigures:
    """Compare the latents of an SAE with the known features of which some rows are made, and return the scores.

    Args:
        sae: the SAE.
        acts: the rows.
        codes: their true codes.
        directions: the unit vectors of the features.
    """
    latent, cosine = matched_latents(sae.W_dec, directions)
    sums = _Sums(len(directions), _mean_magnitudes(codes))
    norms = sae.W_dec.norm(dim=1).cpu()
    chosen = latent.clamp(min=0)
    has_latent = (latent >= 0).float()
    n = max(1, ENTRIES_PER_PASS // sae.config.d_sae)
    for some, true in zip(acts.split(n), codes.split(n), strict=True):
        latents = sae.encode(some.to(sae.W_dec)).float().cpu()
        if sae.config.normalisation == "per_token":
            latents = latents * (some.norm(dim=1, keepdim=True) / math.sqrt(some.shape[1])).cpu()
        sums.update(true, latents[:, chosen] * norms[chosen] * has_latent)
    return _figures(latent, cosine, sums)


def _mean_magnitudes(codes: Float[Tensor, "n n_features"]) -> Float[Tensor, " n_features"]:
    """Return the mean magnitude of each feature where it is active; 1 for one that never is."""
    n_active = (codes > 0).sum(0)
    mean = codes.sum(0, dtype=torch.float64) / n_active.clamp(min=1)
    return torch.where(n_active > 0, mean, 1.0)


def _figures(latent: Tensor, cosine: Tensor, sums: _Sums) -> TruthFigures:
    on, read, both, c, f, c_c, c_f = sums.of_features
    enough = both >= FEWEST
    spread = c_c - c.square() / both.clamp(min=1)
    # A spread this small is a rounding error of equal magnitudes.
    varies = enough & (spread > 1e-9 * c_c)
    slope = torch.where(varies, (c_f - c * f / both.clamp(min=1)) / spread.clamp(min=1e-300), torch.nan)
    is_found = (cosine >= FOUND).double()
    return TruthFigures(
        latent=latent,
        cosine=cosine,
        frequency=on / sums.n_rows,
        precision=torch.where(read > 0, both / read.clamp(min=1), 0.0),
        recall=torch.where(on > 0, both / on.clamp(min=1), torch.nan),
        f1=torch.where(on > 0, 2 * both / (on + read).clamp(min=1), torch.nan),
        slope=slope,
        suppression=torch.where(enough, 1 - f / c.clamp(min=1e-300), torch.nan),
        response=sums.response @ is_found,
        n_true=(on.sum() / sums.n_rows).item(),
    )
