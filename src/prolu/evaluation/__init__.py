"""What replacing a language model's activations by an SAE's reconstruction costs it, and how families of SAEs compare.

- `held_out`: text or rows to score on, with all that does not depend on an SAE.
- `scoring`: the scores of one SAE; the only place where an SAE and a language model meet.
- `metrics`: sparsity, reconstruction and cross-entropy, as sums over tokens.
- `predictions`: the KL divergence from the language model's clean predictions.
- `document_sums`: the same sums for each held-out document.
- `l0_proxies`: decoder cosines and projections, which are lowest near the right L0.
- `latents`: figures of each latent, and how latents respond to the scale of the input.
- `latents_on_text`: which latents are active on each token of a text.
- `truth`: how an SAE stands to features that are known by construction.
- `agreement`: whether the latents of one SAE are found again in another.
- `probes`: how well single latents tell what is known of a token; `python_labels`: what is known of Python source.
- `splicing`: an SAE in place of a model's activations in any forward pass, with its latents edited.
- `edits`: the usual edits of latents.
- `attribution`: what each latent contributes to a logit difference.
- `first_letters`: words, activations at them, and probes for their first letters.
- `absorption`: how much of first letters other latents have taken from the latents for them.
- `comparison`: frontiers, verdicts with intervals, claims and figures.
"""

from prolu.evaluation.held_out import HeldOut
from prolu.evaluation.scoring import Scores, evaluate, probe, score

__all__ = ["HeldOut", "Scores", "evaluate", "probe", "score"]
