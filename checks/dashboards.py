"""Run the recipes of `docs/howto/dashboards.md` with the real SAEDashboard and delphi, and check what they find.

    python checks/dashboards.py

The commands and examples of the page are run as they stand there, but for the layer, with the built-in model as `gpt2`
and a folder of Python source as `my_text`. The environments `.venv-dashboards` and `.venv-delphi` are made if they do
not exist. The exit code is 1 if a latent's largest activation in SAEDashboard's files, or any activation in delphi's
cache, is not the one that our SAE has on the same tokens.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch

import prolu
from prolu.activations.builtin import HOOK, MODEL_DIR
from prolu.activations.builtin.corpus import stdlib_documents
from support.environments import PACKAGES_HERE, ROOT, python_with

PAGE = (ROOT / "docs" / "howto" / "dashboards.md").read_text()
RUN = prolu.RunConfig(nonlinearity="prolu_ste", coeff=0.006, d_sae=512, n_tokens=200_000, lr=4e-3)
MODULE = "transformer.h.1"
"""The module whose output is read at the hook of the built-in model."""
ROUNDED = 1e-3
"""The last digit of activations in SAEDashboard's files."""
APART = 1e-5
"""The largest difference of activations in delphi's cache, relative to the largest of all."""

SAVED = """
import torch
torch.save(tokens, "tokens.pt")
"""
"""Saves the tokens of SAEDashboard's page."""

COMPARED = f"""
ours = sae.encode(lm.activations(tokens.numpy())).as_subclass(torch.Tensor)
held = cache.cache
theirs = torch.zeros_like(ours)
theirs[tuple(held.latent_locations[module].T)] = held.latent_activations[module]
apart = ((ours - theirs).abs().max() / ours.max()).item()
examples = sum(len(data.activation_data.activations) for buffer in latents.buffers for data in buffer)
expected = int((ours[..., :16] > 1e-5).sum())
print(f"delphi: {{len(held.latent_activations[module]):,}} activations in its cache, apart {{apart:.0e}}; "
      f"its data set has {{examples:,}} of the first 16 latents, ours {{expected:,}}")
raise SystemExit(int(not apart <= {APART} or examples != expected or not examples))
"""
"""Compares delphi's cache with our latents on the same tokens. delphi leaves out what is not above 1e-5."""


def blocks(*languages: str) -> list[str]:
    """Return the page's blocks in these languages; "" stands for commands."""
    found = re.findall(r"^```(\S*)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def packages(pattern: str) -> list[str]:
    """Return what a line of the page installs with pip."""
    (line,) = re.findall(rf"pip install ({pattern}.*)", PAGE)
    return shlex.split(line)


def environments() -> tuple[Path, Path]:
    """Return the Pythons of the two environments, with the packages that the page names."""
    dashboards = python_with(".venv-dashboards", packages("sae-dashboard"), without=["torchvision"])
    without_dependencies = packages("--no-deps")
    delphi = python_with(".venv-delphi", packages("asyncer"), imports_from=[PACKAGES_HERE, ROOT / "src"])
    pip = [delphi, "-m", "pip", "install", "--quiet", *without_dependencies]
    subprocess.run(pip, check=True)
    return dashboards, delphi


def stand_ins(work: Path, dashboards: Path) -> None:
    """Write what the page takes for granted: a model `gpt2`, a text `my_text`, an environment and a run."""
    shutil.copytree(MODEL_DIR, work / "gpt2")
    for name, change in {
        # The context length is under this name in the config of the hub's GPT-2 too, where TransformerLens reads it.
        "config.json": {"n_ctx": 128},
        # The name of the class in transformers before version 5, which SAEDashboard needs.
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }.items():
        file = work / "gpt2" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    (work / "my_text").mkdir()
    lines = [json.dumps({"text": text}) for _, text in stdlib_documents()[:300]]
    (work / "my_text" / "train.jsonl").write_text("\n".join(lines) + "\n")
    (work / "dashboards").symlink_to(dashboards.parents[1])
    os.chdir(work)
    lm = prolu.LanguageModel("gpt2", HOOK)
    blocks = prolu.load_blocks("my_text", lm.tokenizer, ctx=128, max_train_tokens=500_000)
    prolu.run_sweep([RUN], prolu.ActivationStream(lm, blocks, 512), "runs/gpt2", eval_tokens=4096, progress=False)


def here(code: str) -> str:
    """Return code of the page as it is run here: with the run that was trained, and its layer."""
    (run,) = (path.parent.name for path in Path("runs/gpt2").glob("*/sae.safetensors"))
    return code.replace("RUN", run).replace("blocks.6.hook_resid_pre", HOOK).replace("transformer.h.5", MODULE)


def run_commands() -> None:
    """Run the page's commands, apart from those that make environments."""
    for line in re.sub(r"\\\n *", "", blocks("")[0]).splitlines():
        command = shlex.split(here(line))
        if command[0] == "prolu":
            subprocess.run([sys.executable, "-m", *command], check=True)
        elif "neuronpedia-runner" in command[0]:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def largest_activations(tokens: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Return the largest activation of each latent of our SAE on the tokens that count."""
    (run,) = Path("runs/gpt2").glob("*/sae.safetensors")
    acts = prolu.LanguageModel("gpt2", HOOK).activations(tokens.numpy())
    return prolu.SAE.load(run.parent).encode(acts).as_subclass(torch.Tensor)[counted].amax(0)


def check_files() -> bool:
    """Compare the largest activation of each latent in Neuronpedia's files with ours, and return whether all agree."""
    (file,) = Path("neuronpedia").glob("*/batch-0.json")
    tokens = torch.load(file.with_name("tokens_256.pt"), weights_only=True)
    # It leaves out special tokens, of which this model has one.
    largest = largest_activations(tokens, tokens != 0)
    features = json.loads(file.read_text())["features"]
    assert [one["feature_index"] for one in features] == list(range(64))
    shown = [max((max(example["values"]) for example in one["activations"]), default=0.0) for one in features]
    return _agree("Neuronpedia's file", torch.tensor(shown), largest[:64])


def check_page() -> bool:
    """Compare the largest activation of each latent on the page with ours, and return whether all agree."""
    tokens = torch.load("tokens.pt", weights_only=True)
    largest = largest_activations(tokens, torch.ones_like(tokens, dtype=torch.bool))
    (shown,) = re.findall(r'"AGGDATA": (\{.*?\}), "DASHBOARD_DATA"', Path("latents.html").read_text())
    return _agree("SAEDashboard's page", torch.tensor(json.loads(shown)["max"]), largest[:16])


def _agree(name: str, shown: torch.Tensor, ours: torch.Tensor) -> bool:
    apart = (shown - ours).abs().max().item()
    active = int((ours > 0).sum())
    print(f"{name}: {len(shown)} latents, {active} of them active, largest activations apart {apart:.0e}")
    return active > len(shown) / 2 and apart <= ROUNDED


def main() -> int:
    """Run the recipes, print what was found, and return the exit code."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="disabled")
    dashboards, delphi = environments()
    with tempfile.TemporaryDirectory() as place:
        stand_ins(Path(place), dashboards)
        run_commands()
        ok = check_files()
        page, cache = blocks("py")
        subprocess.run([dashboards, "-c", here(page) + SAVED], check=True, stdout=subprocess.DEVNULL)
        ok &= check_page()
        ok &= subprocess.run([delphi, "-c", here(cache) + COMPARED], check=False).returncode == 0
        os.chdir(ROOT)
    return int(not ok)


if __name__ == "__main__":
    sys.exit(main())
