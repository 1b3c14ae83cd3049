"""Check that exported transcoders compute what ours do, with the code of SAELens and of circuit-tracer.

    python checks/interop_transcoders.py [--json FILE]

`make interop` runs this after `checks/interop.py`, in the same environment. Transcoders of an MLP of the built-in model
are trained and exported; we and the other library then encode and decode 200,000 held-out activations. The exit code is
1 if a check has failed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

import prolu
from interop import N_ACTS, THREADS, Check, compare
from peer_saes import Autoencoder
from peers import ENVIRONMENT, environment
from prolu.interop import export_files, write_folder

READ = "transformer.h.2.mlp.input"
WRITE = "blocks.2.hook_mlp_out"
SHARED = {"d_sae": 512, "n_tokens": 200_000, "lr": 4e-3, "normalisation": "none"}
FAMILIES = [
    {"nonlinearity": "relu", "coeff": 0.006},
    {"nonlinearity": "prolu_relu", "coeff": 0.006},
    {"nonlinearity": "jumprelu", "coeff": 1e-3},
    {"nonlinearity": "batchtopk(24)"},
]
RUNS = [prolu.RunConfig(**SHARED, **family, skip=skip) for family in FAMILIES for skip in (False, True)]


def as_saelens(folder: Path) -> Autoencoder:
    """Return the transcoder that SAELens's own function loads."""
    from sae_lens import SAE

    transcoder = SAE.load_from_disk(folder)
    return lambda x: (transcoder.encode(x), transcoder(x))


def as_circuit_tracer(folder: Path) -> Autoencoder:
    """Return the transcoder that circuit-tracer's own function loads."""
    from circuit_tracer.transcoder.single_layer_transcoder import load_relu_transcoder

    # JSON, which is YAML too.
    config = json.loads((folder / "config.yaml").read_text())
    assert (config["feature_input_hook"], config["feature_output_hook"]) == ("mlp.hook_in", "hook_mlp_out")
    (file,) = folder.glob("layer_*.safetensors")
    assert file.name == "layer_2.safetensors"
    device = torch.device("cpu")
    # It loads a JumpReLU too, where the file has thresholds.
    transcoder = load_relu_transcoder(str(file), 2, device, lazy_encoder=False, lazy_decoder=False)
    return lambda x: ((f := transcoder.encode(x)), transcoder.decode(f, x))


def exports(run: Path, folder: Path, acts: Tensor) -> list[Check]:
    """Compare one of our transcoders with what the others load."""
    # The activations are centred already, as the export says that they must be.
    saved = prolu.SAE.load(run)
    ours = prolu.SAE(saved.config, saved.weights)
    name = saved.config.nonlinearity + (" with skip" if saved.config.skip else "")
    found = []
    loaders = {"SAELens": ("saelens", as_saelens), "circuit-tracer": ("circuit_tracer", as_circuit_tracer)}
    for library, (format, load) in loaders.items():
        write_folder(folder / format, export_files(run, format, inputs_normalised=True))
        # Their biases contain b_dec W_enc, and are rounded otherwise than ours.
        found.append(compare(f"{library} loads {name}", ours, load(folder / format), acts, 1e-5, gates_may_differ=True))
    return found


def main() -> int:
    """Run again in the peers' environment, compare, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if Path(sys.prefix).resolve() != ENVIRONMENT.resolve():
        return subprocess.run([environment(), *sys.argv], check=False).returncode
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    lm = prolu.LanguageModel("builtin", READ)
    blocks = prolu.load_blocks("builtin", lm.tokenizer, max_train_tokens=3_000_000)
    acts = lm.activations(blocks.held_out[: -(-N_ACTS // blocks.ctx)]).flatten(0, 1)[:N_ACTS]
    assert len(acts) == N_ACTS, f"the text has only {len(acts)} held-out tokens"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        stream = prolu.ActivationStream(lm, blocks, 512, hook_out=WRITE)
        study = prolu.run_sweep(RUNS, stream, folder / "study", eval_tokens=4096, progress=False)
        with torch.no_grad():
            checks = [c for run in study.runs for c in exports(run.folder, folder / run.folder.name, acts)]
    for c in checks:
        print(
            f"{'ok  ' if c.passed else 'FAIL'} {c.name:46} active {c.active:>11,}  "
            f"gates {c.gates} (within {c.margin:.0e})  latents {c.apart:.1e}  outputs {c.recon_apart:.1e}"
        )
    if options.json:
        options.json.write_text(json.dumps([c._asdict() | {"passed": c.passed} for c in checks], indent=1))
    failed = sum(not c.passed for c in checks)
    print(f"transcoders: {len(checks)} comparisons on {N_ACTS:,} held-out activations, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
