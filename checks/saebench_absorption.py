"""Compare SAEBench's absorption of first letters with ours, at the same words, activations and SAEs.

    python checks/saebench_absorption.py [--lm FOLDER --hook HOOK] [--json FILE]

The words are the single tokens of a language model, whose activations at them stand in for the model in SAEBench's
code. Without --lm both are made up: each letter has a direction, and groups of words have directions of their own. SAEs
are trained on these activations. This makes the environment `.venv-saebench` if it does not exist, and runs SAEBench's
own code there, from probes to figures. Then our code takes over from its results step by step: first only the count of
what is absorbed, at last everything. The exit code is 1 if the count differs from SAEBench's on any word, given the
same probe and the same latents. `docs/howto/saebench.md` explains the other differences.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import prolu
from prolu.evaluation.absorption import absorption_at, figures_with, latents_of, ranked_latents, written_at
from prolu.evaluation.first_letters import LETTERS, LetterTask, f1, letter_words, task_of
from prolu.runtime.rng import keyed_generator
from saebench_core import environment

ROOT = Path(__file__).parent.parent
WORD_TOLERANCE = 1e-4
"""The largest difference of the absorption of one word, given the same probe and latents of the letter: both sides
compute in float32."""
D_SAE = 1024
RUNS = [
    prolu.RunConfig(nonlinearity="prolu_relu", coeff=0.01, d_sae=D_SAE, n_tokens=200_000, lr=3e-3),
    prolu.RunConfig(nonlinearity="topk(16)", penalty="none", d_sae=D_SAE, n_tokens=200_000, lr=3e-3),
]
FIGURES = ("absorption_fraction", "absorption_full", "absorption_splits", "absorption_letters")


def words_of(lm: prolu.LanguageModel) -> tuple[list[str], Tensor]:
    """Return the words of a language model, with a space before where the token has one, and activations at them."""
    found = letter_words(lm.tokenizer)
    places = {text: i for i, text in enumerate(lm.tokenizer.batch_decode([[i] for i in found.ids.tolist()]))}
    ids = found.ids[list(places.values())]
    blocks = torch.stack([torch.full_like(ids, lm.bos), ids], 1)
    return list(places), lm.activations(blocks)[:, 1].float().cpu()


def made_up(per_letter: int = 150, n_groups: int = 10, d_in: int = 256) -> tuple[list[str], Tensor]:
    """Return words and activations: directions of the letter, of the word's group in most words, and of the word."""
    g = keyed_generator("made-up words")
    of_letter, of_group = torch.randn(26, d_in, generator=g), torch.randn(26, n_groups, d_in, generator=g)
    words, acts = [], []
    for letter in range(26):
        for i in range(per_letter):
            words.append(LETTERS[letter] + LETTERS[i // 26] + LETTERS[i % 26])
            group = int(torch.randint(2 * n_groups, (), generator=g))
            row = of_letter[letter] * (0.7 + 0.6 * torch.rand((), generator=g))
            if group < n_groups:
                row = row + of_group[letter, group]
            acts.append(4 * row + 2 * torch.randn(d_in, generator=g))
    return words, torch.stack(acts)


def theirs(work: Path, words: list[str], acts: Tensor, folders: list[Path]) -> dict[str, Any]:
    """Return what SAEBench finds for the SAEs in these folders, and the probes that it fitted."""
    (work / "words.json").write_text(json.dumps(words))
    save_file({"acts": acts.contiguous()}, work / "acts.safetensors")
    script = ROOT / "tests" / "support" / "saebench_absorption_reference.py"
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}
    subprocess.run([environment(), script, *folders], cwd=work, check=True, timeout=3000, env=os.environ | offline)
    return json.loads((work / "answers.json").read_text()) | {"probes": load_file(work / "probes.safetensors")}


def compare(work: Path, words: list[str], acts: Tensor) -> dict[str, Any]:
    """Return the figures of both sides for each SAE, step by step, and how far they differ given the same."""
    stream = prolu.ActivationStream.from_rows(acts, batch_size=256, name="words")
    study = prolu.run_sweep(RUNS, stream, work / "study", eval_tokens=350, max_epochs=100, progress=False)
    said = theirs(work, words, acts, [run.folder.resolve() for run in study.runs])
    letters = torch.tensor([LETTERS.index(word.strip()[0].lower()) for word in words])
    tested = set(said["test_words"])
    is_test = torch.tensor([word in tested for word in words])
    probes = {
        letter: torch.cat([said["probes"]["weights"][letter], said["probes"]["biases"][letter, None]])
        for letter in range(26)
    }
    found: dict[str, Any] = {"versions": said["versions"], "n_words": len(words), "saes": {}}
    for run in study.runs:
        answers = {LETTERS.index(letter): answer for letter, answer in said["saes"][run.folder.name].items()}
        task = LetterTask(acts, letters, is_test, {letter: probes[letter] for letter in answers})
        own_task = task_of(acts, letters, is_test, sorted(answers))
        scaled = said["saes"][f"{run.folder.name}-scaled"].values()
        found["saes"][run.folder.name] = {"steps": {"SAEBench, latents as scaled": means(list(scaled))}}
        found["saes"][run.folder.name]["steps"] |= steps(run.load(), task, own_task, answers)
        found["saes"][run.folder.name] |= differences(run.load(), task, own_task, answers, words)
    return found


def means(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Return SAEBench's figures of an SAE by our names: its means over letters."""
    n = len(answers)
    values = [sum(answer[name] for answer in answers) / n for name in ("fraction", "full")]
    return dict(zip(FIGURES, [*values, sum(len(answer["own"]) for answer in answers) / n, n], strict=True))


def steps(sae: prolu.SAE, task: LetterTask, own_task: LetterTask, answers: dict[int, Any]) -> dict[str, Any]:
    """Return the figures from SAEBench's to ours, with one more part of our code in each step."""
    written = written_at(sae, task)
    latents = written.latents

    def chosen(of: LetterTask, ranked: dict[int, list[int]]) -> dict[int, list[int]]:
        return {letter: latents_of(latents, of, letter, ranked[letter]) for letter in of.probes}

    return {
        "SAEBench": means(list(answers.values())),
        "our counting": figures_with(written, task, {letter: answer["own"] for letter, answer in answers.items()}),
        "+ our split": figures_with(
            written, task, chosen(task, {letter: answer["ranked"] for letter, answer in answers.items()})
        ),
        "+ our ranking": figures_with(written, task, chosen(task, ranked_latents(latents, task))),
        "+ our probes": figures_with(written, own_task, chosen(own_task, ranked_latents(latents, own_task))),
    }


def differences(
    sae: prolu.SAE, task: LetterTask, own_task: LetterTask, answers: dict[int, Any], words: list[str]
) -> dict[str, float]:
    """Return how far the parts of the code differ, given the same."""
    written = written_at(sae, task)
    of_words = [0.0]
    of_probes = [0.0]
    n_words = 0
    for letter, answer in answers.items():
        rows, fraction, full = absorption_at(written, task, letter, answer["own"])
        names = [words[row] for row in rows.tolist()]
        assert sorted(names) == sorted(answer["words"]), f"other words of {LETTERS[letter]} are recognised"
        n_words += len(names)
        for name, *figures in zip(names, fraction.tolist(), full.tolist(), strict=True):
            of_words += [abs(ours - value) for ours, value in zip(figures, answer["words"][name], strict=True)]
        scores = task.acts[task.is_test] @ task.probes[letter][:-1] + task.probes[letter][-1]
        of_probes.append(abs(f1(scores > 0, (task.letters == letter)[task.is_test]) - answer["probe_f1"]))
    same_own = [latents_of(written.latents, task, letter, a["ranked"]) == a["own"] for letter, a in answers.items()]
    ranked = ranked_latents(written.latents, task)
    cosines = [
        torch.cosine_similarity(probe[:-1], task.probes[letter][:-1], dim=0).item()
        for letter, probe in own_task.probes.items()
    ]
    return {
        "n_words": n_words,
        "largest_of_a_word": max(of_words),
        "largest_of_a_probe_f1": max(of_probes),
        "letters_with_the_same_split": sum(same_own),
        "letters_with_the_same_first_latent": sum(ranked[letter][0] == a["ranked"][0] for letter, a in answers.items()),
        "mean_cosine_of_probes": sum(cosines) / len(cosines),
        "n_letters": len(answers),
    }


def main() -> int:
    """Print a table for each SAE, and a summary; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", help="a language model, as --lm of prolu takes it, whose tokens are whole words")
    parser.add_argument("--hook", default="blocks.9.hook_resid_post")
    parser.add_argument("--json", type=Path)
    request = parser.parse_args()
    words, acts = made_up() if request.lm is None else words_of(prolu.LanguageModel(request.lm, request.hook))
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), words, acts)
    for name, said in found["saes"].items():
        print(f"{name:34}" + "".join(f"{figure.removeprefix('absorption_'):>12}" for figure in FIGURES))
        for step, figures in said["steps"].items():
            print(f"  {step:32}" + "".join(f"{figures[figure]:12.4f}" for figure in FIGURES))
        for difference in list(said)[1:]:
            print(f"  {difference.replace('_', ' ')}: {said[difference]:.6g}")
    if request.json:
        request.json.write_text(json.dumps(found, indent=1) + "\n")
    worst = max(said["largest_of_a_word"] for said in found["saes"].values())
    n = sum(said["n_words"] for said in found["saes"].values())
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    print(f"saebench_absorption: {n} words counted, at most {worst:.1g} from SAEBench's count ({versions})")
    return int(worst > WORD_TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
