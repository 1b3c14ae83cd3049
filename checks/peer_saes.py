"""SAEs with random weights that other libraries' own code makes and saves, for `checks/interop.py`."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

D_SAE = 512
K = 24

Autoencoder = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function from raw activations to their latents and reconstruction."""


class PeerSAE(NamedTuple):
    """An SAE that another library saved, and that library's own code to compute it."""

    name: str
    """The library and the kind of SAE."""
    folder: Path
    """The folder that the library wrote."""
    compute: Autoencoder
    """The SAE, loaded by the library."""
    allowed: float
    """The largest relative difference of latents that ours may have."""
    rounds_otherwise: bool
    """Whether the library rounds differently from ours, so that a latent at its threshold may be active in one only."""


def peer_saes(folder: Path, acts: Tensor) -> Iterator[PeerSAE]:
    """Yield SAEs of SAELens, dictionary_learning and sparsify whose weights suit these activations."""
    yield from _of_saelens(folder / "saelens", acts)
    yield from _of_dictionary_learning(folder / "dictionary_learning", acts)
    yield _of_sparsify(folder / "sparsify", acts)


def as_saelens(folder: Path) -> Autoencoder:
    """Return the SAE that SAELens's own function loads."""
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    return lambda x: ((f := sae.encode(x)), sae.decode(f))


def as_dictionary_learning(folder: Path) -> Autoencoder:
    """Return the SAE that dictionary_learning's own function loads."""
    from dictionary_learning.utils import load_dictionary

    dictionary, _ = load_dictionary(str(folder), "cpu")
    return lambda x: ((f := dictionary.encode(x)), dictionary.decode(f))


def _of_saelens(folder: Path, acts: Tensor) -> Iterator[PeerSAE]:
    from sae_lens import SAE

    d_in = acts.shape[1]
    shared = {"d_in": d_in, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "reshape_activations": "none"}
    for name, more in {
        "standard": {}, "jumprelu": {}, "gated": {}, "topk": {"k": K},
        "topk rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
        "jumprelu untied": {"apply_b_dec_to_input": False}, "gated untied": {"apply_b_dec_to_input": False},
        "standard scaled": {"normalize_activations": "constant_norm_rescale"},
    }.items():  # fmt: skip
        usual = {"apply_b_dec_to_input": True, "normalize_activations": "none", "architecture": name.split()[0]}
        sae = SAE.from_dict(shared | usual | more)
        _randomise(sae, 1.0 if "scaled" in name else _scale(acts))
        sae.save_model(folder / name)
        # The others are rounded in another way there, and where latents of a TopK tie, we keep all of them.
        rounds_otherwise = name not in ("standard", "jumprelu", "standard scaled")
        yield PeerSAE(f"SAELens: {name}", folder / name, as_saelens(folder / name), 1e-6, rounds_otherwise)


def _of_dictionary_learning(folder: Path, acts: Tensor) -> Iterator[PeerSAE]:
    """Yield an SAE of each class, saved as the library's trainers save it."""
    from dictionary_learning import dictionary as dl
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    d = acts.shape[1]
    n = D_SAE
    made = [dl.AutoEncoder(d, n), dl.AutoEncoderNew(d, n), dl.GatedAutoEncoder(d, n), dl.JumpReluAutoEncoder(d, n)]
    made += [AutoEncoderTopK(d, n, K), BatchTopKSAE(d, n, K), MatryoshkaBatchTopKSAE(d, n, K, [128, 384])]
    for sae in made:
        name = type(sae).__name__
        _randomise(sae, _scale(acts))
        if hasattr(sae, "threshold") and sae.threshold.dim() == 0:
            sae.threshold.fill_(0.5)
        (folder / name).mkdir(parents=True)
        torch.save(sae.state_dict(), folder / name / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": d, "dict_size": n, "layer": 1, "lm_name": "x"}
        config = {"trainer": trainer | ({"k": K} if "TopK" in name else {}), "buffer": {"ctx_len": 128}}
        (folder / name / "config.json").write_text(json.dumps(config))
        compute = as_dictionary_learning(folder / name)
        yield PeerSAE(f"dictionary_learning: {name}", folder / name, compute, 1e-5, rounds_otherwise=True)


def _of_sparsify(folder: Path, acts: Tensor) -> PeerSAE:
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(acts.shape[1], SparseCoderConfig(num_latents=D_SAE, k=K, multi_topk=True))
    _randomise(coder, _scale(acts))
    coder.save_to_disk(folder / "layers.1")
    loaded = SparseCoder.load_from_disk(folder / "layers.1")

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        values, places, pre = loaded.encode(x)
        return torch.zeros_like(pre).scatter_(-1, places, values), loaded.decode(values, places)

    return PeerSAE("sparsify: topk", folder / "layers.1", compute, 1e-6, rounds_otherwise=True)


def _scale(acts: Tensor) -> float:
    """Return the median size of a coordinate, for which the weights are made."""
    return acts.norm(dim=1).median().item() / acts.shape[1] ** 0.5


@torch.no_grad()
def _randomise(sae: torch.nn.Module, scale: float) -> None:
    """Set random weights and biases, and thresholds above 0. The decoder's rows are left alone and keep their norms."""
    g = torch.Generator().manual_seed(0)
    for name, p in sae.named_parameters():
        if name in ("W_enc", "encoder.weight"):
            p.copy_(torch.randn(p.shape, generator=g) / p.shape[0] ** 0.5 / scale)
        elif name == "threshold":
            p.copy_(torch.rand(p.shape, generator=g) + 0.5)
        elif p.dim() == 1:
            p.add_(0.1 * (scale if "dec" in name or name == "bias" else 1) * torch.randn(p.shape, generator=g))
