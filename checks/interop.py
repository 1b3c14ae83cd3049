"""Check that exported and imported SAEs compute what the originals do, with the code of the other libraries.

    python checks/interop.py [--json FILE]

`make interop` runs this. It makes the environment `.venv-peers` if it does not exist, and runs in it. Ten SAEs of
128 -> 512 are trained on the built-in model and exported; we and the other library then encode and decode 200,000
held-out activations, in one process, with one batch size and one number of threads. Then the same for SAEs that the
code of SAELens, dictionary_learning and sparsify made and saved. The last line is a summary; the exit code is 1 if a
check has failed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch
from torch import Tensor

import prolu
from peer_saes import Autoencoder, as_dictionary_learning, as_saelens, peer_saes
from peers import ENVIRONMENT, environment
from prolu.activations.builtin import HOOK, MODEL_DIR
from prolu.activations.language_model import LanguageModel
from prolu.interop import export_files, import_sae, write_folder
from prolu.interop.formats.common_form import encoder_form_of
from prolu.sae.scaling import normalise

N_ACTS = 200_000
BATCH = 4096
THREADS = 2
SHARED = {"d_sae": 512, "n_tokens": 200_000, "lr": 4e-3}
RUNS = [
    prolu.RunConfig(nonlinearity="prolu_relu", coeff=0.006, **SHARED),
    prolu.RunConfig(nonlinearity="prolu_ste", coeff=0.006, **SHARED),
    prolu.RunConfig(nonlinearity="relu", coeff=0.006, **SHARED),
    prolu.RunConfig(nonlinearity="gated", coeff=0.01, **SHARED),
    prolu.RunConfig(nonlinearity="jumprelu", penalty="l0", coeff=1e-3, **SHARED),
    prolu.RunConfig(nonlinearity="thresholded", coeff=0.006, **SHARED),
    prolu.RunConfig(nonlinearity="topk(24)", penalty="none", **SHARED),
    prolu.RunConfig(nonlinearity="batchtopk(24)", penalty="none", **SHARED),
    prolu.RunConfig(nonlinearity="batchtopk(24)", penalty="none", matryoshka=(64, 128, 256), **SHARED),
    prolu.RunConfig(nonlinearity="prolu_ste", coeff=0.006, matryoshka=(64, 128, 256), **SHARED),
]


class Check(NamedTuple):
    """One comparison over all activations."""

    name: str
    """What is compared."""
    active: int
    """The number of active latents, summed over tokens."""
    gates: int
    """The number of latents that are active on one side only, summed over tokens."""
    margin: float
    """The largest distance of one of these latents from its threshold, relative to the largest latent."""
    apart: float
    """The largest difference of all other latents, relative to the largest latent."""
    recon_apart: float
    """The largest difference of reconstructions, relative to the largest value, on tokens without such a latent."""
    allowed: float
    """The limit of the three above."""
    gates_may_differ: bool
    """Whether both round differently, so that a latent at its very threshold may be active on one side only."""

    @property
    def passed(self) -> bool:
        """Whether all differences are within their limits."""
        # Reconstructions are float32 sums in another order, so they may always differ by 1e-6.
        gates = self.gates == 0 or (self.gates_may_differ and self.margin <= self.allowed)
        return gates and self.apart <= self.allowed and self.recon_apart <= max(self.allowed, 1e-6)


def compare(
    name: str, sae: prolu.SAE, theirs: Autoencoder, acts: Tensor, allowed: float, *, gates_may_differ: bool = False
) -> Check:
    """Compare an SAE of ours with another implementation of it, on the same batches."""
    active = gates = 0
    apart = recon_apart = margin = largest = recon_largest = 0.0
    for x in acts.split(BATCH):
        a = sae.encode(x)
        a_out = sae(x)
        b, b_out = theirs(x)
        other = (a > 0) != (b > 0)
        rows = other.any(1)
        active += int((a > 0).sum())
        gates += int(other.sum())
        largest = max(largest, b.max().item())
        recon_largest = max(recon_largest, b_out.abs().max().item())
        apart = max(apart, torch.where(other, 0, a - b).abs().max().item())
        recon_apart = max(recon_apart, (a_out - b_out)[~rows].abs().max().item())
        if rows.any():
            margin = max(margin, margins(sae, x[rows])[other[rows]].max().item())
    return Check(
        name, active, gates, margin / largest, apart / largest, recon_apart / recon_largest, allowed, gates_may_differ
    )


def margins(sae: prolu.SAE, acts: Tensor) -> Tensor:
    """Return how far each latent is from becoming active or inactive, [n, d_sae], in fp64."""
    form = encoder_form_of(sae)
    x = normalise(acts)[0] if sae.config.normalisation == "per_token" else acts
    m = (x.double() - form.b_dec.double()) @ form.W_enc.double()
    own = {name: t.double() for name, t in form.own.items()}
    if form.architecture == "gated":
        return torch.minimum((m + own["b_gate"]).abs(), (own["r_mag"].exp() * m + own["b_mag"]).abs())
    pre = m + own["b_enc"]
    if form.k is not None:
        return (pre - pre.topk(form.k, dim=-1).values[:, -1:]).abs()
    return (pre - torch.relu(own["threshold"]) if "threshold" in own else pre).abs()


def as_ours(sae: prolu.SAE) -> Autoencoder:
    """Return an SAE of ours as a function of raw activations."""
    return lambda x: (sae.encode(x), sae(x))


def exports(run: Path, folder: Path, acts: Tensor) -> list[Check]:
    """Compare one of our SAEs with what the others load, and with what importing its exports gives back."""
    sae = prolu.SAE.load(run)
    nonlinearity = sae.config.nonlinearity
    name = f"nested {nonlinearity}" if "nested" in run.name else nonlinearity
    allowed = 0.0 if nonlinearity.startswith("prolu") else 1e-6
    write_folder(folder / "saelens", export_files(run, "saelens"))
    write_folder(folder / "prolu", export_files(run, "prolu"))
    write_folder(folder / "dl", export_files(run, "dictionary_learning", inputs_normalised=True))
    # A loaded SAE subtracts the mean over the dimensions, which SAELens leaves to the language model. The activations
    # here are centred already, and doing it twice rounds twice: so both sides get them as they are.
    uncentred = prolu.SAE(sae.config, sae.weights)
    # dictionary_learning scales nothing, so both sides get activations that are scaled already.
    inside = prolu.SAE(replace(sae.config, normalisation="none"), sae.weights)
    prepared = normalise(acts)[0]
    its = as_dictionary_learning(folder / "dl")
    # This class does not subtract b_dec: its biases contain b_dec W_enc, and are rounded otherwise than ours.
    folds = json.loads((folder / "dl" / "config.json").read_text())["trainer"]["dict_class"] == "JumpReluAutoEncoder"
    found = [
        compare(f"SAELens loads {name}", uncentred, as_saelens(folder / "saelens"), acts, allowed),
        compare(f"dictionary_learning loads {name}", inside, its, prepared, 1e-5, gates_may_differ=folds),
    ]
    for way in ("prolu", "saelens", "dl"):
        same = compare(f"{name} by way of {way}", sae, as_ours(import_sae(folder / way)[0]), acts, 0.0)
        found.append(same._replace(apart=max(same.apart, same.recon_apart)))  # reconstructions to the bit too
    return found


def examples(run: Path, folder: Path, acts: Tensor) -> None:
    """Run the examples with the other libraries' code in `docs/howto/interop.md`."""
    shown = re.findall(
        r"^```py\n(.*?)^```$", (ROOT / "docs" / "howto" / "interop.md").read_text(), flags=re.DOTALL | re.MULTILINE
    )
    write_folder(folder / "theirs" / "saelens", export_files(run, "saelens"))
    write_folder(folder / "theirs" / "dl", export_files(run, "dictionary_learning", inputs_normalised=True))
    os.chdir(folder)
    expected = prolu.SAE.load(run)(acts[:1000])
    for example in shown:
        names = {"activations": acts[:1000]}
        exec(example, names)
        torch.testing.assert_close(names["reconstructions"], expected, rtol=1e-4, atol=1e-4)
    assert len(shown) == 2


def imports(folder: Path, acts: Tensor) -> list[Check]:
    """Compare imports of SAEs that the other libraries made and saved."""
    found = []
    for peer in peer_saes(folder, acts):
        ours, _ = import_sae(peer.folder)
        may_differ = peer.rounds_otherwise
        found.append(compare(f"of {peer.name}", ours, peer.compute, acts, peer.allowed, gates_may_differ=may_differ))
    return found


def activations_by_their_advice(run: Path, folder: Path, tokens: Tensor) -> list[Check]:
    """Check that a model which SAELens loads as an exported SAE advises has the same activations at the hook."""
    from sae_lens import SAE, HookedSAETransformer

    write_folder(folder / "advice", export_files(run, "saelens"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        metadata = SAE.load_from_disk(folder / "advice").cfg.metadata
    assert any("from_pretrained_no_processing" in str(w.message) for w in said), "SAELens gives no advice any more"
    # TransformerLens accepts only names that it knows. It finds this folder `gpt2` before it asks the hub.
    (folder / "gpt2").mkdir()
    for file in MODEL_DIR.iterdir():
        (folder / "gpt2" / file.name).write_bytes(file.read_bytes())
    config = json.loads((MODEL_DIR / "config.json").read_text())
    (folder / "gpt2" / "config.json").write_text(json.dumps(config | {"n_ctx": config["n_positions"]}))
    os.chdir(folder)
    kwargs = metadata.model_from_pretrained_kwargs
    advised, plain = (
        HookedSAETransformer.from_pretrained_no_processing("gpt2", device="cpu", **given) for given in (kwargs, {})
    )
    ours = LanguageModel("builtin", HOOK).activations(tokens.numpy())

    def at(model: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            return model.run_with_cache(tokens, names_filter=metadata.hook_name)[1][metadata.hook_name]

    apart, without = ((ours - at(model)).norm() / ours.norm() for model in (advised, plain))
    assert without > 1e-3, "the model's mean is 0 without the advice too, so the check shows nothing"
    return [Check("activations by its advice", tokens.numel(), 0, 0.0, apart.item(), 0.0, 1e-5, False)]


def main() -> int:
    """Run again in the peers' environment, compare, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if Path(sys.prefix).resolve() != ENVIRONMENT.resolve():
        return subprocess.run([environment(), *sys.argv], check=False).returncode
    if options.json:
        options.json = options.json.resolve()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    lm = LanguageModel("builtin", HOOK)
    blocks = prolu.load_blocks("builtin", lm.tokenizer, max_train_tokens=3_000_000)
    acts = lm.activations(blocks.held_out[: -(-N_ACTS // blocks.ctx)]).flatten(0, 1)[:N_ACTS]
    assert len(acts) == N_ACTS, f"the text has only {len(acts)} held-out tokens"
    tokens = torch.from_numpy(blocks.held_out[:64].astype("int64"))
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        folder = Path(place)
        stream = prolu.ActivationStream(lm, blocks, 512)
        with torch.enable_grad():
            study = prolu.run_sweep(RUNS, stream, folder / "study", eval_tokens=4096, progress=False)
        checks = [c for run in study.runs for c in exports(run.folder, folder / "out" / run.folder.name, acts)]
        examples(study.runs[1].folder, folder, acts)
        checks += activations_by_their_advice(study.runs[0].folder, folder, tokens)
        checks += imports(folder / "peers", acts)
    for c in checks:
        print(
            f"{'ok  ' if c.passed else 'FAIL'} {c.name:46} active {c.active:>11,}  "
            f"gates {c.gates} (within {c.margin:.0e})  latents {c.apart:.1e}  reconstructions {c.recon_apart:.1e}"
        )
    if options.json:
        options.json.write_text(json.dumps([c._asdict() | {"passed": c.passed} for c in checks], indent=1))
    failed = sum(not c.passed for c in checks)
    gates = sum(c.gates for c in checks if not c.gates_may_differ)
    print(
        f"interop: {len(checks)} comparisons on {N_ACTS:,} held-out activations, {failed} failed; {gates} gates differ "
        f"where none may, {sum(c.gates for c in checks) - gates} at a rounding's distance elsewhere"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
