"""Sparse probing: how well single latents of an SAE tell what is known of a token.

A probe is a logistic regression on the k latents of an SAE whose means differ most between tokens with a label and
tokens without it (Gurnee et al. 2023, "Finding Neurons in a Haystack", arXiv 2305.01610; SAEBench's sparse probing). If
one latent is enough, the SAE has a latent for that concept; if all latents together are hardly better, it is not split
over several.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prolu.activations.builtin.corpus import stdlib_documents
from prolu.activations.documents import is_held_out
from prolu.activations.language_model import LanguageModel
from prolu.activations.tokenizers import bos_token_id
from prolu.evaluation.python_labels import LABELS, python_labels
from prolu.runtime.rng import keyed_generator
from prolu.sae.autoencoder import SAE

PER_CLASS = 2048
"""The largest number of tokens of either class that a probe is fitted on, and again that it is tested on."""

FEWEST = 100
"""The least number of tokens of either class for which a label is probed."""

KS = (1, 5)
"""The numbers of latents of the sparse probes, beside that on all latents."""

RIDGE = 1e-3
"""The weight of half the squared norm of a probe's coefficients, beside its mean loss in nats. Inputs are divided by
their standard deviation."""

BLOCKS_PER_PASS = 64
"""The number of token blocks whose activations are held at once while those of the chosen tokens are taken."""


class ProbeTask(NamedTuple):
    """The tokens on which one label is probed, as many with it as without."""

    acts: Float[Tensor, "n d_in"]
    """The language model's activations on the tokens."""
    labels: Bool[Tensor, " n"]
    """Whether each token has the label."""
    is_test: Bool[Tensor, " n"]
    """Whether a probe is tested on the token. Tokens of one text are all in one part."""


def held_out_modules(n_characters: int = 2_000_000) -> list[str]:
    """Return modules of Python's standard library that `builtin` never trains on, up to this many characters."""
    texts = [source for path, source in stdlib_documents() if is_held_out(path)]
    lengths = np.cumsum([len(text) for text in texts])
    return texts[: int(np.searchsorted(lengths, n_characters)) + 1]


class LabelledText(NamedTuple):
    """Python source as token blocks, with what is known of each token behind BOS, block after block."""

    blocks: Int[np.ndarray, "n_blocks ctx"]
    """The token ids; the first of each block is BOS."""
    labels: Int[np.ndarray, "n_tokens n_labels"]
    """1 for a token that is of the label, 0 for one that is not, -1 for one that is in part; labels as in `LABELS`."""
    is_test: Bool[np.ndarray, " n_tokens"]
    """Whether a probe is tested on the token."""

    def chosen(self) -> dict[str, np.ndarray]:
        """Return, for each label that can be probed, the places of the tokens that its probes use.

        Raises:
            ValueError: no label has enough tokens.
        """
        found = {name: _balanced(self.labels[:, i], self.is_test, name) for i, name in enumerate(LABELS)}
        enough = {name: places for name, places in found.items() if places is not None}
        if not enough:
            raise ValueError(f"sources: no label has {FEWEST} tokens with it and {FEWEST} without it; give more text")
        return enough


def labelled_python(tokenizer: Any, sources: Iterable[str], ctx: int = 128) -> LabelledText:
    """Return Python sources as token blocks that begin with BOS, as in training, with the labels of their tokens.

    Every second text is for testing.

    Args:
        tokenizer: the fast tokenizer of the language model.
        sources: Python sources. Those that Python's tokenizer does not take are left out.
        ctx: the length of a token block.

    Raises:
        ValueError: none of the sources fills a token block.
    """
    blocks: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    for source in sources:
        found = python_labels(source)
        if found is None:
            continue
        tokens = tokenizer(source, add_special_tokens=False, return_offsets_mapping=True)
        n = len(tokens["input_ids"]) // (ctx - 1) * (ctx - 1)
        if not n:
            continue
        ids = np.asarray(tokens["input_ids"][:n]).reshape(-1, ctx - 1)
        blocks.append(np.pad(ids, ((0, 0), (1, 0)), constant_values=bos_token_id(tokenizer)))
        of_tokens = found.of_tokens(np.asarray(tokens["offset_mapping"][:n]))
        labels.append(np.stack([of_tokens[name] for name in LABELS], axis=1))
        parts.append(np.full(n, len(parts) % 2 == 1))
    if not blocks:
        raise ValueError("sources: none is Python source of at least one token block")
    return LabelledText(np.concatenate(blocks), np.concatenate(labels), np.concatenate(parts))


def python_tasks(lm: LanguageModel, sources: Iterable[str], ctx: int = 128) -> dict[str, ProbeTask]:
    """Return what probes of Python source need: activations with the labels of `prolu.evaluation.python_labels`.

    Each text is cut into token blocks that begin with BOS, as in training. Every second text is for testing. The labels
    with fewer than 100 tokens in some part are left out.

    Args:
        lm: the language model at the hook of the SAEs.
        sources: Python sources that were not trained on. Those that Python's tokenizer does not take are left out.
        ctx: the length of a token block.

    Raises:
        ValueError: no label has enough tokens.
    """
    text = labelled_python(lm.tokenizer, sources, ctx)
    return tasks_of(lm, text, text.chosen())


def tasks_of(lm: LanguageModel, text: LabelledText, chosen: Mapping[str, np.ndarray]) -> dict[str, ProbeTask]:
    """Return the tasks of labelled text; `chosen` has the places of the tokens of each, as `LabelledText.chosen` does.

    Only the activations of these tokens are kept.
    """
    needed = np.unique(np.concatenate(list(chosen.values())))
    n_behind_bos = text.blocks.shape[1] - 1
    acts: list[Tensor] = []
    for start in range(0, len(text.blocks), BLOCKS_PER_PASS):
        part = text.blocks[start : start + BLOCKS_PER_PASS]
        first = start * n_behind_bos
        inside = needed[(needed >= first) & (needed < first + len(part) * n_behind_bos)]
        if len(inside):
            acts.append(lm.activations(part)[:, 1:].flatten(0, 1)[torch.from_numpy(inside - first)].cpu())
    at_needed = torch.cat(acts)
    tasks = {}
    for name, places in chosen.items():
        rows = torch.from_numpy(np.searchsorted(needed, places))
        labels = torch.from_numpy(text.labels[places, LABELS.index(name)] == 1)
        tasks[name] = ProbeTask(at_needed[rows], labels, torch.from_numpy(text.is_test[places]))
    return tasks


def _balanced(labels: np.ndarray, is_test: np.ndarray, name: str) -> np.ndarray | None:
    """Return places of tokens, as many with a label as without it in both parts; None if there are too few."""
    chosen = []
    for part in (False, True):
        places = [np.flatnonzero((labels == value) & (is_test == part)) for value in (0, 1)]
        n = min(PER_CLASS, *map(len, places))
        if n < FEWEST:
            return None
        for value, some in enumerate(places):
            drawn = torch.randperm(len(some), generator=keyed_generator("probe", name, part, value))[:n]
            chosen.append(some[drawn.numpy()])
    return np.concatenate(chosen)


def probe_figures(sae: SAE, tasks: Mapping[str, ProbeTask], ks: Sequence[int] = KS) -> dict[str, float]:
    """Return the accuracies of probes on the tokens for testing, by name, from 0 to 1; 0.5 is chance.

    - `probe_string_1`, `probe_string_5`: on the 1 and 5 latents whose means differ most between the two classes of the
      tokens for fitting, in units of their standard deviation over these; likewise for every label and k.
    - `probe_string_all`: on all latents.
    - `probe_string_acts`: on the activations themselves, which does not depend on the SAE.
    - `probe_mean_1` and so on: the means over all labels.

    Args:
        sae: the SAE.
        tasks: as `python_tasks` returns them.
        ks: the numbers of latents.
    """
    return latent_figures(sae, tasks, ks) | activation_figures(tasks)


@torch.no_grad()
def latent_figures(sae: SAE, tasks: Mapping[str, ProbeTask], ks: Sequence[int] = KS) -> dict[str, float]:
    """Return those of `probe_figures` that depend on the SAE."""
    figures: dict[str, float] = {}
    for name, task in tasks.items():
        latents = sae.encode(task.acts.to(sae.W_dec)).float().cpu()
        fit = ~task.is_test
        spread = latents[fit].std(0)
        difference = latents[fit & task.labels].mean(0) - latents[fit & ~task.labels].mean(0)
        # A latent that is the same on all tokens for fitting tells nothing; it comes last.
        order = torch.where(spread > 0, difference.abs() / spread, -1).argsort(descending=True, stable=True)
        inputs = {str(k): latents[:, order[:k]] for k in ks} | {"all": latents}
        for kind, x in inputs.items():
            figures[f"probe_{name}_{kind}"] = probe_accuracy(x, task.labels, task.is_test)
    return figures | {f"probe_mean_{kind}": _mean(figures, tasks, kind) for kind in (*map(str, ks), "all")}


def activation_figures(tasks: Mapping[str, ProbeTask]) -> dict[str, float]:
    """Return those of `probe_figures` that are of the activations alone, and so the same for every SAE at a hook."""
    figures = {
        f"probe_{name}_acts": probe_accuracy(task.acts.float().cpu(), task.labels, task.is_test)
        for name, task in tasks.items()
    }
    return figures | {"probe_mean_acts": _mean(figures, tasks, "acts")}


def _mean(figures: Mapping[str, float], tasks: Iterable[str], kind: str) -> float:
    return fmean(figures[f"probe_{name}_{kind}"] for name in tasks)


def probe_accuracy(x: Float[Tensor, "n d"], labels: Bool[Tensor, " n"], is_test: Bool[Tensor, " n"]) -> float:
    """Return the fraction of the tokens for testing that a logistic regression on the others gets right."""
    mean = x[~is_test].mean(0)
    spread = x[~is_test].std(0)
    x = (x - mean) / torch.where(spread > 0, spread, 1)
    weights = fitted_probe(x[~is_test], labels[~is_test])
    guesses = x[is_test] @ weights[:-1] + weights[-1] > 0
    return (guesses == labels[is_test]).double().mean().item()


def fitted_probe(
    x: Float[Tensor, "n d"], labels: Bool[Tensor, " n"], *, weight_with: float = 1.0
) -> Float[Tensor, " d_plus_1"]:
    """Return the coefficients w of a logistic regression and, last, its intercept c.

    They minimise mean log(1 + exp(-s (w . x + c))) + RIDGE / 2 ||w||^2, with s = 1 for tokens with the label and -1 for
    the others. The loss of a token with the label is multiplied by `weight_with`.
    """
    weights = torch.zeros(x.shape[1] + 1, requires_grad=True)
    target = labels.float()
    weight = torch.tensor(weight_with)
    optimiser = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = x @ weights[:-1] + weights[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)
        value = value + RIDGE / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return weights.detach()
