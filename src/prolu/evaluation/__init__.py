"""What one SAE costs a language model on held-out text, and how families of SAEs compare.

- `held_out`: the scores of one SAE; the only place where an SAE and a language model meet.
- `metrics`, `predictions`, `document_sums`, `latents`: the sums behind the scores.
- `splicing`: an SAE in place of a model's activations.
- `comparison`: frontiers, verdicts with intervals, claims and figures.
"""

from prolu.evaluation.held_out import HeldOut, Scores, evaluate, probe, score

__all__ = ["HeldOut", "Scores", "evaluate", "probe", "score"]
