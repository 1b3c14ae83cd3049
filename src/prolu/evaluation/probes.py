"""Sparse probing: how well single latents of an SAE tell what is known of a token.

A probe is a logistic regression on the k latents of an SAE whose means differ most between tokens with a label and
tokens without it (Gurnee et al. 2023, "Finding Neurons in a Haystack", arXiv 2305.01610; SAEBench's sparse probing). If
one latent is enough, the SAE has that concept as a latent; if all together are hardly better than one, it has it whole.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
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
    acts: list[Tensor] = []
    labels: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    for source in sources:
        found = python_labels(source)
        if found is None:
            continue
        tokens = lm.tokenizer(source, add_special_tokens=False, return_offsets_mapping=True)
        n = len(tokens["input_ids"]) // (ctx - 1) * (ctx - 1)
        if not n:
            continue
        ids = np.asarray(tokens["input_ids"][:n]).reshape(-1, ctx - 1)
        blocks = np.pad(ids, ((0, 0), (1, 0)), constant_values=bos_token_id(lm.tokenizer))
        acts.append(lm.activations(blocks)[:, 1:].flatten(0, 1))
        of_tokens = found.of_tokens(np.asarray(tokens["offset_mapping"][:n]))
        labels.append(np.stack([of_tokens[name] for name in LABELS], axis=1))
        parts.append(np.full(n, len(parts) % 2 == 1))
    if not acts:
        raise ValueError("sources: none is Python source of at least one token block")
    all_acts, all_labels, is_test = torch.cat(acts), np.concatenate(labels), np.concatenate(parts)
    tasks = {}
    for place, name in enumerate(LABELS):
        chosen = _balanced(all_labels[:, place], is_test, name)
        if chosen is not None:
            tasks[name] = ProbeTask(
                all_acts[chosen],
                torch.from_numpy(all_labels[chosen, place] == 1),
                torch.from_numpy(is_test[chosen]),
            )
    if not tasks:
        raise ValueError(f"sources: no label has {FEWEST} tokens with it and {FEWEST} without it; give more text")
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


@torch.no_grad()
def probe_figures(sae: SAE, tasks: dict[str, ProbeTask], ks: Sequence[int] = KS) -> dict[str, float]:
    """Return the accuracies of probes on the tokens for testing, by name, from 0 to 1; 0.5 is chance.

    - `probe_string_1`, `probe_string_5`: on the 1 and 5 latents whose means differ most between the two classes of the
      tokens for fitting, in units of their standard deviation over these; likewise for every label and k.
    - `probe_string_all`: on all latents.
    - `probe_string_acts`: on the activations themselves, which no SAE has a part in.

    Args:
        sae: the SAE.
        tasks: as `python_tasks` returns them.
        ks: the numbers of latents.
    """
    figures = {}
    for name, task in tasks.items():
        latents = sae.encode(task.acts.to(sae.W_dec)).float().cpu()
        fit = ~task.is_test
        spread = latents[fit].std(0)
        difference = latents[fit & task.labels].mean(0) - latents[fit & ~task.labels].mean(0)
        # A latent that is the same on all tokens for fitting tells nothing; it comes last.
        order = torch.where(spread > 0, difference.abs() / spread, -1).argsort(descending=True, stable=True)
        inputs = {str(k): latents[:, order[:k]] for k in ks} | {"all": latents, "acts": task.acts.float().cpu()}
        for kind, x in inputs.items():
            figures[f"probe_{name}_{kind}"] = probe_accuracy(x, task.labels, task.is_test)
    return figures


def probe_accuracy(x: Float[Tensor, "n d"], labels: Bool[Tensor, " n"], is_test: Bool[Tensor, " n"]) -> float:
    """Return the fraction of the tokens for testing that a logistic regression on the others gets right."""
    mean = x[~is_test].mean(0)
    spread = x[~is_test].std(0)
    x = (x - mean) / torch.where(spread > 0, spread, 1)
    weights = fitted_probe(x[~is_test], labels[~is_test])
    guesses = x[is_test] @ weights[:-1] + weights[-1] > 0
    return (guesses == labels[is_test]).double().mean().item()


def fitted_probe(x: Float[Tensor, "n d"], labels: Bool[Tensor, " n"]) -> Float[Tensor, " d_plus_1"]:
    """Return the coefficients w of a logistic regression and, last, its intercept c.

    They minimise mean log(1 + exp(-s (w . x + c))) + RIDGE / 2 ||w||^2, with s = 1 for tokens with the label and -1 for
    the others.
    """
    weights = torch.zeros(x.shape[1] + 1, requires_grad=True)
    target = labels.float()
    optimiser = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = x @ weights[:-1] + weights[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        value = value + RIDGE / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return weights.detach()
