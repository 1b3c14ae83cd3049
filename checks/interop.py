"""SAEs of ours in the code of SAELens and dictionary_learning, and of these and sparsify in ours: `make interop`.

    python checks/interop.py [--json FILE]

Makes `.venv-peers` if it is not there, and runs in it. Eight SAEs of 128 -> 512 are trained on the built-in model and
exported; both sides encode and decode 200,000 held-out activations in one process, with one batch size and as many
threads. Then the reverse: SAEs that their own code made and saved. Ends with one line; exit code 1 if a check failed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch
from torch import Tensor

import prolu
from peers import ENVIRONMENT, environment
from prolu.activations.builtin import HOOK, MODEL_DIR
from prolu.activations.language_model import LanguageModel
from prolu.interop import export_files, import_sae, write_folder
from prolu.interop.formats.common_form import common_form_of
from prolu.sae.scaling import normalise

N_ACTS, BATCH, THREADS = 200_000, 4096, 2
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
]

Both = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Latents and reconstruction of raw activations."""


class Check(NamedTuple):
    """One comparison over all activations."""

    name: str
    on: int
    """Latents on, all tokens together."""
    gates: int
    """Latents on at one side only, of all tokens."""
    margin: float
    """The farthest that one of these is from going on or off, over the largest latent."""
    apart: float
    """Largest difference of the other latents over the largest latent."""
    recon_apart: float
    """The same of reconstructions, tokens with such a latent left out."""
    allowed: float
    """Of all three."""
    gates_may_differ: bool
    """Whether the two sides round differently, so that a latent at its very threshold may be on at one only."""

    @property
    def passed(self) -> bool:
        """Whether it is as it should be: reconstructions are float32 sums in another order, 1e-6 at most."""
        gates = self.gates == 0 or (self.gates_may_differ and self.margin <= self.allowed)
        return gates and self.apart <= self.allowed and self.recon_apart <= max(self.allowed, 1e-6)


def compare(
    name: str, sae: prolu.SAE, theirs: Both, acts: Tensor, allowed: float, *, gates_may_differ: bool = False
) -> Check:
    """Ours and theirs on the same batches."""
    on = gates = 0
    apart = recon_apart = margin = largest = recon_largest = 0.0
    for x in acts.split(BATCH):
        (a, b), (a_out, b_out) = zip((sae.encode(x), sae(x)), theirs(x), strict=True)
        other = (a > 0) != (b > 0)
        on, gates, rows = on + int((a > 0).sum()), gates + int(other.sum()), other.any(1)
        largest, recon_largest = max(largest, b.max().item()), max(recon_largest, b_out.abs().max().item())
        apart = max(apart, torch.where(other, 0, a - b).abs().max().item())
        recon_apart = max(recon_apart, (a_out - b_out)[~rows].abs().max().item())
        if rows.any():
            margin = max(margin, margins(sae, x[rows])[other[rows]].max().item())
    return Check(
        name, on, gates, margin / largest, apart / largest, recon_apart / recon_largest, allowed, gates_may_differ
    )


def margins(sae: prolu.SAE, acts: Tensor) -> Tensor:
    """How far each latent is from going on or off, [n, d_sae], in fp64."""
    form, x = common_form_of(sae), normalise(acts)[0] if sae.config.normalisation == "per_token" else acts
    m = (x.double() - form.b_dec.double()) @ form.W_enc.double()
    own = {name: t.double() for name, t in form.own.items()}
    if form.architecture == "gated":
        return torch.minimum((m + own["b_gate"]).abs(), (own["r_mag"].exp() * m + own["b_mag"]).abs())
    pre = m + own["b_enc"]
    if form.k is not None:
        return (pre - pre.topk(form.k, dim=-1).values[:, -1:]).abs()
    return (pre - torch.relu(own["threshold"]) if "threshold" in own else pre).abs()


def as_ours(sae: prolu.SAE) -> Both:
    """Raw activations in, raw reconstructions out."""
    return lambda x: (sae.encode(x), sae(x))


def as_saelens(folder: Path) -> Both:
    """Through its own loading function."""
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    return lambda x: ((f := sae.encode(x)), sae.decode(f))


def as_dictionary_learning(folder: Path) -> Both:
    """Through its own loading function."""
    from dictionary_learning.utils import load_dictionary

    dictionary, _ = load_dictionary(str(folder), "cpu")
    return lambda x: ((f := dictionary.encode(x)), dictionary.decode(f))


def exports(run: Path, folder: Path, acts: Tensor) -> list[Check]:
    """One of our SAEs in their code, and what comes back of it."""
    sae, code = prolu.SAE.load(run), prolu.SAE.load(run).config.nonlinearity
    allowed = 0.0 if code.startswith("prolu") else 1e-6
    write_folder(folder / "saelens", export_files(run, "saelens"))
    write_folder(folder / "prolu", export_files(run, "prolu"))
    write_folder(folder / "dl", export_files(run, "dictionary_learning", inputs_normalised=True))
    inside = prolu.SAE(replace(sae.config, normalisation="none"), sae.weights)
    prepared, its = normalise(acts)[0], as_dictionary_learning(folder / "dl")
    folds = json.loads((folder / "dl" / "config.json").read_text())["trainer"]["dict_class"] == "JumpReluAutoEncoder"
    found = [
        compare(f"SAELens loads {code}", sae, as_saelens(folder / "saelens"), acts, allowed),
        compare(f"dictionary_learning loads {code}", inside, its, prepared, 1e-5, gates_may_differ=folds),
    ]
    for name in ("prolu", "saelens", "dl"):
        same = compare(f"{code} by way of {name}", sae, as_ours(import_sae(folder / name)[0]), acts, 0.0)
        found.append(same._replace(apart=max(same.apart, same.recon_apart)))  # these to the bit too
    return found


def examples(run: Path, folder: Path, acts: Tensor) -> None:
    """Runs what `docs/howto/interop.md` shows of the others."""
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


def of_saelens(folder: Path, acts: Tensor) -> list[Check]:
    """SAEs that SAELens made and saved; untied, rescaled and gated ones round otherwise there, ties are shared here."""
    from sae_lens import SAE

    shared = {"d_in": acts.shape[1], "d_sae": 512, "dtype": "float32", "device": "cpu", "reshape_activations": "none"}
    found = []
    for name, more in {
        "standard": {}, "jumprelu": {}, "gated": {}, "topk": {"k": 24},
        "topk rescaled": {"k": 24, "rescale_acts_by_decoder_norm": True},
        "jumprelu untied": {"apply_b_dec_to_input": False}, "gated untied": {"apply_b_dec_to_input": False},
        "standard scaled": {"normalize_activations": "constant_norm_rescale"},
    }.items():  # fmt: skip
        usual = {"apply_b_dec_to_input": True, "normalize_activations": "none", "architecture": name.split()[0]}
        sae = SAE.from_dict(shared | usual | more)
        _randomise(sae, 1.0 if "scaled" in name else acts.norm(dim=1).median().item() / acts.shape[1] ** 0.5)
        sae.save_model(folder / name)
        ours, theirs = import_sae(folder / name)[0], as_saelens(folder / name)
        free = name not in ("standard", "jumprelu", "standard scaled")
        found.append(compare(f"of SAELens: {name}", ours, theirs, acts, 1e-6, gates_may_differ=free))
    return found


def of_dictionary_learning(folder: Path, acts: Tensor) -> list[Check]:
    """SAEs of dictionary_learning's classes, saved as its trainers do."""
    from dictionary_learning import dictionary as dl
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    d, n = acts.shape[1], 512
    made = [dl.AutoEncoder(d, n), dl.AutoEncoderNew(d, n), dl.GatedAutoEncoder(d, n), dl.JumpReluAutoEncoder(d, n)]
    made += [AutoEncoderTopK(d, n, 24), BatchTopKSAE(d, n, 24), MatryoshkaBatchTopKSAE(d, n, 24, [128, 384])]
    found = []
    for sae in made:
        name = type(sae).__name__
        _randomise(sae, acts.norm(dim=1).median().item() / d**0.5)
        if hasattr(sae, "threshold") and sae.threshold.dim() == 0:
            sae.threshold.fill_(0.5)
        (folder / name).mkdir(parents=True)
        torch.save(sae.state_dict(), folder / name / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": d, "dict_size": n, "layer": 1, "lm_name": "x"}
        config = {"trainer": trainer | ({"k": 24} if "TopK" in name else {}), "buffer": {"ctx_len": 128}}
        (folder / name / "config.json").write_text(json.dumps(config))
        ours, theirs = import_sae(folder / name)[0], as_dictionary_learning(folder / name)
        found.append(compare(f"of dictionary_learning: {name}", ours, theirs, acts, 1e-5, gates_may_differ=True))
    return found


def of_sparsify(folder: Path, acts: Tensor) -> list[Check]:
    """An SAE that sparsify made and saved."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(acts.shape[1], SparseCoderConfig(num_latents=512, k=24, multi_topk=True))
    _randomise(coder, acts.norm(dim=1).median().item() / acts.shape[1] ** 0.5)
    coder.save_to_disk(folder / "layers.1")
    loaded = SparseCoder.load_from_disk(folder / "layers.1")

    def theirs(x: Tensor) -> tuple[Tensor, Tensor]:
        values, places, pre = loaded.encode(x)
        return torch.zeros_like(pre).scatter_(-1, places, values), loaded.decode(values, places)

    ours = import_sae(folder / "layers.1")[0]
    return [compare("of sparsify: topk", ours, theirs, acts, 1e-6, gates_may_differ=True)]


@torch.no_grad()
def _randomise(sae: torch.nn.Module, scale: float) -> None:
    """Weights and biases that do something, thresholds above 0; a decoder's rows keep their norms."""
    g = torch.Generator().manual_seed(0)
    for name, p in sae.named_parameters():
        if name in ("W_enc", "encoder.weight"):
            p.copy_(torch.randn(p.shape, generator=g) / p.shape[0] ** 0.5 / scale)
        elif name == "threshold":
            p.copy_(torch.rand(p.shape, generator=g) + 0.5)
        elif p.dim() == 1:
            p.add_(0.1 * (scale if "dec" in name or name == "bias" else 1) * torch.randn(p.shape, generator=g))


def activations_by_their_advice(run: Path, folder: Path, tokens: Tensor) -> list[Check]:
    """The language model loaded as an exported SAE says, in SAELens's class: the same activations at the hook."""
    from sae_lens import SAE, HookedSAETransformer

    write_folder(folder / "advice", export_files(run, "saelens"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        metadata = SAE.load_from_disk(folder / "advice").cfg.metadata
    assert any("from_pretrained_no_processing" in str(w.message) for w in said), "SAELens gives no advice any more"
    # TransformerLens takes only names that it knows, and finds the folder `gpt2` where it runs before it asks the hub.
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
    assert without > 1e-3, "a model whose mean is 0 anyway shows nothing"
    return [Check("activations by its advice", tokens.numel(), 0, 0.0, apart.item(), 0.0, 1e-5, False)]


def main() -> int:
    """Goes into the peers' environment, compares, says; returns the exit code."""
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
        folder, stream = Path(place), prolu.ActivationStream(lm, blocks, 512)
        with torch.enable_grad():
            study = prolu.run_sweep(RUNS, stream, folder / "study", eval_tokens=4096, progress=False)
        checks = [c for run in study.runs for c in exports(run.folder, folder / "out" / run.folder.name, acts)]
        examples(study.runs[1].folder, folder, acts)
        checks += activations_by_their_advice(study.runs[0].folder, folder, tokens)
        checks += of_saelens(folder / "saelens", acts) + of_dictionary_learning(folder / "dl", acts)
        checks += of_sparsify(folder / "sparsify", acts)
    for c in checks:
        print(
            f"{'ok  ' if c.passed else 'FAIL'} {c.name:46} on {c.on:>11,}  gates {c.gates} (within {c.margin:.0e})  "
            f"latents {c.apart:.1e}  reconstructions {c.recon_apart:.1e}"
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
