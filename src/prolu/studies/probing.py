"""What `prolu probe` measures of the latents of a study: probes of its Python source, absorption of first letters."""

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch

from prolu.activations.documents import Documents, is_held_out
from prolu.activations.language_model import LanguageModel
from prolu.activations.text_rows import SplitRows
from prolu.activations.token_blocks import LATER_FACTS, holds_blocks
from prolu.evaluation.absorption import absorption_figures
from prolu.evaluation.first_letters import letter_task
from prolu.evaluation.probes import activation_figures, labelled_python, latent_figures, tasks_of
from prolu.evaluation.python_labels import is_python
from prolu.sae.autoencoder import SAE
from prolu.studies.added_figures import Measure

LOOKED_AT = 20
"""How many characters of held-out text are searched for each character of Python source that is wanted. If less than a
twentieth of a text is Python, the language model has learnt little of it, and the text may have gigabytes."""


def held_out_texts(stream: Mapping[str, Any]) -> Iterator[str]:
    """Yield the held-out documents of the text of a study as they are written.

    Args:
        stream: the `stream` part of a study's config.json.

    Raises:
        ValueError: the text cannot be read, or is already tokenised.
    """
    source = stream["data"]
    facts = LATER_FACTS | dict(stream)
    if isinstance(source, str) and holds_blocks(source):
        raise ValueError(f"data {source!r}: holds token ids without the text; name a text with --data")
    rows = SplitRows(source, facts["eval_split"] or facts["split"], facts["data_config"])
    for document in Documents(rows, facts["text_column"]):
        if not isinstance(document.content, str):
            raise ValueError(f"data {source!r}: holds token ids without the text; name a text with --data")
        # Rows of a split for evaluation are held out, all of them.
        if facts["eval_split"] or is_held_out(document.key, facts["held_out_fraction"]):
            yield document.content


def python_sources(stream: Mapping[str, Any], n_characters: int) -> list[str]:
    """Return the held-out documents of a study that are Python source, up to this many characters.

    Raises:
        ValueError: the text cannot be read, or none of it is Python source.
    """
    found: list[str] = []
    n_read = 0
    n_found = 0
    for text in held_out_texts(stream):
        n_read += len(text)
        if is_python(text):
            found.append(text)
            n_found += len(text)
        if n_found >= n_characters or n_read >= LOOKED_AT * n_characters:
            break
    if not found:
        raise ValueError(
            f"data {stream['data']!r}: none of its held-out documents is Python source, whose labels are known; "
            "--data builtin probes on Python's standard library"
        )
    return found


def python_probes(stream: Mapping[str, Any], lm: LanguageModel, n_characters: int) -> Measure:
    """Return the probes of a study's SAEs on the held-out Python source of its text.

    Args:
        stream: the `stream` part of the study's config.json.
        lm: its language model at its hook.
        n_characters: the number of characters of Python source to probe on.

    Raises:
        ValueError: there is no Python source in the text, or too little of it.
    """
    try:
        text = labelled_python(lm.tokenizer, python_sources(stream, n_characters), stream["ctx"])
        chosen = text.chosen()
    except ValueError as problem:
        raise ValueError(f"probes: {problem}") from None
    digest = hashlib.sha256(text.blocks.astype("<i8").tobytes()).hexdigest()

    # The language model runs only once a run turns out to need it.
    @cache
    def measured() -> tuple[dict[str, Any], dict[str, float]]:
        tasks = tasks_of(lm, text, chosen)
        return tasks, activation_figures(tasks)

    def figures_of(sae: SAE) -> dict[str, float]:
        tasks, of_activations = measured()
        return latent_figures(sae, tasks) | of_activations

    return Measure("probe_text", digest, figures_of)


def letter_absorption(lm: LanguageModel) -> Measure:
    """Return the absorption of first letters in a study's SAEs.

    Args:
        lm: the study's language model at its hook.

    Raises:
        ValueError: its tokenizer has too few words, or probes recognise too few letters in its activations.
    """
    task = letter_task(lm)
    parts = (task.letters, task.is_test, *(torch.tensor([letter]) for letter in task.probes))
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
    return Measure("absorption_words", digest, partial(absorption_figures, task=task))
