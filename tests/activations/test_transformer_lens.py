"""TransformerLens, with its default processing, reads and splices the same numbers.

It folds LayerNorms into what reads them and centres all that writes to the residual stream; prolu runs the model as
it is and removes the mean of what it reads. Both are right only if they agree. Both run in float32, as users do.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from prolu import LanguageModel
from prolu.activations.hooks import SITES
from support.models import write_tokenizer

pytestmark = pytest.mark.slow  # makes an environment once (minutes), starts its Python

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-transformer-lens"
PACKAGE = "transformer-lens==3.9.0"  # the last release with HookedTransformer
TOLERANCE = 1e-5

N_LAYERS = 3
HOOKS = [f"blocks.{layer}.hook_{site}" for layer in range(N_LAYERS) for site in SITES]
SPLICES = ["noise", "zeros", "low_rank"]


@pytest.fixture(scope="module")
def their_python():
    """The Python of an environment that holds TransformerLens, which brings pins of its own; made once."""
    python, made = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed"
    if not made.exists() or made.read_text() != PACKAGE:
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        pip = [python, "-m", "pip"]
        name = PACKAGE.partition("==")[0]
        asked = subprocess.run([*pip, "index", "versions", name, "--retries", "1"], capture_output=True, check=False)
        if asked.returncode != 0:
            pytest.skip(f"PyPI does not answer, and {ENVIRONMENT.name} is not made yet")
        constraints = ["--constraint", ROOT / "constraints.txt"]
        subprocess.run([*pip, "install", "--quiet", *constraints, PACKAGE], check=True, timeout=1800)
        made.write_text(PACKAGE)
    return python


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A random GPT-2 in the hub's layout, in which every bias and every LayerNorm does something."""
    folder = tmp_path_factory.mktemp("hub") / "gpt2"
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_positions=64, n_embd=16, n_layer=N_LAYERS, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.4,
        n_ctx=64,  # the hub's GPT-2 has it too, and TransformerLens reads the context from it
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(mean=0.2, std=0.4)
            elif ".ln_" in name:
                parameter.normal_(mean=1.0, std=0.4)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def both(their_python, gpt2_folder, tmp_path_factory):
    """What each computes, by the same keys; also `raw/HOOK`, the activations as the model has them."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 300, (6, 40), generator=g)
    tokens[:, 0] = 0  # BOS
    ours, splices = {}, {}
    for hook in HOOKS:
        lm = LanguageModel(gpt2_folder, hook)
        acts, restart = lm.activations(tokens), lm.restart_points(tokens)
        ours |= {hook: acts, f"raw/{hook}": lm._read(tokens, [lm._site])[0], "clean": lm.cross_entropy(tokens)}
        for name in SPLICES:
            splice = splices[f"{hook}/{name}"] = replacement(name, acts, g)
            ours[f"{hook}/{name}"] = lm.cross_entropy(tokens, splice, restart)
    folder = tmp_path_factory.mktemp("transformer-lens")
    save_file(splices | {"tokens": tokens}, folder / "questions.safetensors")
    script = Path(__file__).parents[1] / "support" / "transformer_lens_reference.py"
    command = [their_python, script, folder / "questions.safetensors", folder / "answers.safetensors"]
    subprocess.run(command, cwd=gpt2_folder.parent, check=True, timeout=600)
    return ours, load_file(folder / "answers.safetensors")


def replacement(name, acts, generator):
    if name == "zeros":
        return torch.zeros_like(acts)
    if name == "noise":  # with a mean over d_model, which no reader may see
        return acts + acts.std() * (torch.randn(acts.shape, generator=generator) + 1)
    u, s, vt = torch.linalg.svd(acts.flatten(0, 1), full_matrices=False)
    return (u[:, :2] * s[:2] @ vt[:2]).view_as(acts)


def relative(ours, theirs, dim=None):
    return ((ours - theirs).norm(dim=dim) / theirs.norm(dim=dim)).max()


@pytest.mark.parametrize("hook", HOOKS)
def test_activations(both, hook):
    ours, theirs = (side[hook] for side in both)
    assert ours.dtype == theirs.dtype == torch.float32
    assert relative(ours, theirs) < TOLERANCE
    assert relative(ours, theirs, dim=-1) < TOLERANCE  # of every token
    assert relative(both[0][f"raw/{hook}"], theirs) > 0.1, "this model does not show whether the mean is removed"


def test_clean_cross_entropy(both):
    ours, theirs = (side["clean"] for side in both)
    assert relative(ours, theirs) < TOLERANCE
    assert (ours / theirs - 1).abs().max() < TOLERANCE


@pytest.mark.parametrize("splice", SPLICES)
@pytest.mark.parametrize("hook", HOOKS)
def test_spliced_cross_entropy(both, hook, splice):
    ours, theirs = (side[f"{hook}/{splice}"] for side in both)
    assert relative(ours, theirs) < TOLERANCE
    assert (ours / theirs - 1).abs().max() < TOLERANCE
    assert relative(both[0]["clean"], theirs) > 0.01, "this splice changes too little to show anything"
