"""Check that SAEs imported by their names in SAELens's registry compute what SAELens loads under these names.

    python checks/saelens_registry.py

`make interop` runs this, in the environment of `checks/interop.py`. SAELens's own `from_pretrained` runs offline: it
finds SAEs with random weights in a cache in the hub's layout, as their repositories have them. The exit code is 1 if a
latent of an imported SAE differs, or if a wrong name is not refused.
"""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import torch
from safetensors.torch import save_file
from torch import Tensor

import prolu
from peer_saes import K
from peers import ENVIRONMENT, environment
from prolu.interop import write_folder
from prolu.interop.saelens_registry import import_registered

D_SAE = 2048
N_ACTS = 10_000
COMMIT = "0" * 40


class Registered(NamedTuple):
    """An SAE of the registry, with random weights in place of its own."""

    name: str
    """Its release and its id."""
    d_in: int
    """The width of its language model's activations."""
    write: Callable[[Path, dict[str, Tensor]], None]
    """Writes its files as its repository has them."""
    centred: bool | None
    """Whether its activations are centred; None where that is not known."""


def before_version_6(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write an SAE as the first versions of SAELens did."""
    config = {
        "model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8,
        "hook_point_head_index": None, "dataset_path": "Skylion007/openwebtext", "context_size": 128, "d_in": 768,
        "d_sae": D_SAE, "dtype": "torch.float32", "device": "mps", "l1_coefficient": 8e-05, "expansion_factor": 32,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(weights | {"scaling_factor": torch.ones(D_SAE)}, folder / "sae_weights.safetensors")


def of_dictionary_learning(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write a TopK SAE as dictionary_learning does, whose loader transposes the matrices."""
    there = {
        "encoder.weight": weights["W_enc"].T.contiguous(), "decoder.weight": weights["W_dec"].T.contiguous(),
        "encoder.bias": weights["b_enc"], "b_dec": weights["b_dec"], "k": torch.tensor(K),
    }  # fmt: skip
    torch.save(there, folder / "ae.pt")
    trainer = {"dict_class": "AutoEncoderTopK", "activation_dim": 512, "dict_size": D_SAE, "k": K, "layer": 3}
    config = {"trainer": trainer | {"lm_name": "EleutherAI/pythia-70m-deduped"}, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(config))


TOPK = "sae_bench_pythia70m_sweep_topk_ctx128_0730/blocks.3.hook_resid_post__trainer_0"
SAES = [
    Registered("gpt2-small-res-jb/blocks.8.hook_resid_pre", 768, before_version_6, centred=True),
    Registered(TOPK, 512, of_dictionary_learning, centred=None),
]
REFUSED = {
    "gpt2-small-res-jp/blocks.8.hook_resid_pre": "gpt2-small-res-jb",
    "gpt2-small-res-jb/blocks.8.hook_resid": "blocks.8.hook_resid_pre",
    "gpt2-small-res-jb/blocks.9.hook_resid_pre": "HF_HUB_OFFLINE",
}
"""Names that cannot be imported here, with what the error message must mention."""


def in_the_cache(sae: Registered) -> None:
    """Put the files of an SAE into the hub's cache, where its repository's last commit would lie."""
    from sae_lens.loading.pretrained_saes_directory import get_repo_id_and_folder_name

    repo, folder = get_repo_id_and_folder_name(*sae.name.split("/", 1))
    cached = Path(os.environ["HF_HOME"]) / "hub" / f"models--{repo.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    there = cached / "snapshots" / COMMIT / folder
    there.mkdir(parents=True)
    # That the repository has no such file is in the cache too.
    missing = cached / ".no_exist" / COMMIT / folder / "sparsity.safetensors"
    missing.parent.mkdir(parents=True)
    missing.touch()
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (sae.d_in, D_SAE), "W_dec": (D_SAE, sae.d_in), "b_enc": (D_SAE,), "b_dec": (sae.d_in,)}
    sae.write(there, {name: torch.randn(shape, generator=g) / sae.d_in**0.5 for name, shape in shapes.items()})


def imported(sae: Registered, out: Path) -> bool:
    """Import an SAE by its name, save and compare it with SAELens's, print, and return whether all agrees."""
    import sae_lens

    acts = torch.randn(N_ACTS, sae.d_in, generator=torch.Generator().manual_seed(1))
    read, provenance = import_registered(f"saelens:{sae.name}")
    write_folder(out, read.files(provenance))
    saved = prolu.SAE.load(out)
    # An SAE of centred activations subtracts the mean over the dimensions, which SAELens leaves to the language model.
    ours = prolu.SAE(saved.config, saved.weights).encode(acts)
    theirs = sae_lens.SAE.from_pretrained(*sae.name.split("/", 1)).encode(acts)
    n_apart = int((ours != theirs).sum())
    said = {name: provenance["origin"][name] for name in ("name", "sae_lens")}
    ok = n_apart == 0 and bool(theirs.any())
    ok &= said == {"name": f"saelens:{sae.name}", "sae_lens": sae_lens.__version__}
    ok &= provenance.get("centred") == sae.centred
    print(
        f"{'ok  ' if ok else 'FAIL'} {sae.name}: active {int((theirs > 0).sum()):,}, latents that differ "
        f"{n_apart}; {provenance['lm']} at {provenance['hook']}, centred {provenance.get('centred')}"
    )
    return ok


def refused(name: str, mentioned: str) -> bool:
    """Try to import by a wrong name, print the refusal, and return whether it is as it should be."""
    said = "nothing refused"
    try:
        import_registered(f"saelens:{name}")
    except (ValueError, ConnectionError) as problem:
        said = str(problem)
    ok = mentioned in said and "\n" not in said
    print(f"{'ok  ' if ok else 'FAIL'} {said}")
    return ok


def main() -> int:
    """Run again in the peers' environment with an empty cache, compare, print, and return the exit code."""
    if Path(sys.prefix).resolve() != ENVIRONMENT.resolve():
        with tempfile.TemporaryDirectory() as home:
            offline = {"HF_HOME": home, "HF_HUB_OFFLINE": "1"}
            return subprocess.run([environment(), *sys.argv], check=False, env=os.environ | offline).returncode
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        for sae in SAES:
            in_the_cache(sae)
        passed = [imported(sae, Path(place) / str(n)) for n, sae in enumerate(SAES)]
        passed += [refused(name, mentioned) for name, mentioned in REFUSED.items()]
    print(f"SAELens's registry: {len(passed)} checks, {passed.count(False)} failed")
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
