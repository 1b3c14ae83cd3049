"""What a stream reads: a text through a language model or a store of its activations, or rows as they are."""

from typing import Any, NamedTuple

import torch

from prolu.activations.harvesting import ActivationSource, Harvest, describe_activations
from prolu.activations.held_windows import ReadAhead, reads_ahead
from prolu.activations.language_model import LanguageModel
from prolu.activations.rows import ROWS_PER_PASS, ActivationRows, RowSource
from prolu.activations.token_blocks import TokenBlocks
from prolu.runtime.mesh import Mesh


class Inputs(NamedTuple):
    """The activations that a stream divides into windows and batches."""

    source: ActivationSource
    """Where the activations of blocks are read."""
    facts: dict[str, Any]
    """Everything that decides the activations, for a study's config.json."""
    hook: str
    """The hook at which they are read; empty for rows."""
    d_in: int
    """Their width."""
    tokens_per_pass: int
    """The number of tokens, or rows, that are read at once."""

    @classmethod
    def of(
        cls,
        lm: LanguageModel | None,
        blocks: TokenBlocks | ActivationRows,
        source: ActivationSource | None,
        *,
        hook_out: str,
        acts_dtype: str,
    ) -> "Inputs":
        """Return what a stream reads; its arguments are those of `ActivationStream`.

        Raises:
            ValueError: rows are given with a language model, or a text without one; `hook_out` is the hook itself; or
                the source has other activations.
        """
        if isinstance(blocks, ActivationRows):
            if lm is not None or hook_out:
                raise ValueError("blocks: rows come from no language model; leave lm and hook_out out")
            rows = source or RowSource(blocks)
            facts = blocks.describe() | {"acts_dtype": rows.dtype}
            found = cls(rows, facts, "", blocks.d_in, ROWS_PER_PASS)
        elif lm is None:
            raise ValueError("lm None: token blocks need a language model that reads them")
        else:
            if hook_out == lm.hook:
                raise ValueError(f"hook_out {hook_out!r}: is the hook itself; leave it out to train SAEs")
            hooks = (lm.hook, hook_out) if hook_out else (lm.hook,)
            activations = source or Harvest(lm, blocks, hooks, acts_dtype)
            facts = describe_activations(lm, blocks) | {"hook": lm.hook, "acts_dtype": activations.dtype}
            found = cls(activations, facts, lm.hook, lm.d_in, lm.batch_tokens)
        if source is not None:
            source.check(found.facts)
        return found

    def reads_ahead(self, wanted: ReadAhead, device: torch.device, mesh: Mesh) -> bool:
        """Return whether a thread fills the next window while one is trained on.

        Raises:
            ValueError: it is `on` where reading ahead is not possible.
        """
        harvest = self.source if isinstance(self.source, Harvest) else None
        return reads_ahead(
            wanted,
            # A language model on another device does not count: other code may use it at the same time, which is not
            # known here.
            pays=device.type != "cpu" and harvest is None,
            n_hooks=1 if harvest is None else len(harvest.hooks),
            n_ranks=mesh.n_ranks,
        )
