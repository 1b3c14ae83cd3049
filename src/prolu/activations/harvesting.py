"""Raw activations of token blocks, by passes of the language model that all have one shape."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prolu.activations.language_model import DTYPES, LanguageModel
from prolu.activations.token_blocks import TokenBlocks

Piece = Float[Tensor, "n ctx d_in"]


class Harvest:
    """Activations of training blocks at one or several hooks, each block in one pass for all hooks.

    A pass that would be short is filled up with its own blocks again: in passes of one shape, a block's
    activations do not depend on which others share its pass, so that any order of blocks gives the same bits.
    """

    def __init__(self, lm: LanguageModel, blocks: TokenBlocks, hooks: Sequence[str] = (), dtype: str = "fp32"):
        """Args: `hooks` are those of the model by default; activations are rounded to `dtype`.

        Raises:
            ValueError: no such number format, a hook twice, or blocks that the model cannot take.
        """
        self.lm, self.blocks, self.hooks, self.dtype = lm, blocks, tuple(hooks) or (lm.hook,), dtype
        if dtype not in DTYPES:
            raise ValueError(f"acts_dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
        if len(set(self.hooks)) < len(self.hooks):
            raise ValueError(f"hooks {', '.join(self.hooks)}: one is listed twice")
        if blocks.ctx > lm.max_ctx:
            raise ValueError(f"ctx {blocks.ctx}: {lm.name} takes at most {lm.max_ctx} tokens")
        if len(lm.tokenizer) <= int(blocks.train.max()):
            raise ValueError("the blocks hold token ids that the language model's tokenizer does not have")
        self.blocks_per_pass = max(1, lm.batch_tokens // blocks.ctx)
        self._asked = b""
        self._kept: dict[str, list[Piece]] = {}

    def all_hooks(self, chosen: np.ndarray) -> Iterator[list[Piece]]:
        """Activations of these blocks at every hook, pass by pass, in the number format asked for.

        Raises:
            FloatingPointError: they are not finite.
        """
        for start in range(0, len(chosen), self.blocks_per_pass):
            some = chosen[start : start + self.blocks_per_pass]
            tokens = torch.from_numpy(self.blocks.train[np.resize(some, self.blocks_per_pass)].astype(np.int64))
            found = [acts[: len(some)].to(DTYPES[self.dtype]) for acts in self.lm.activations_at(self.hooks, tokens)]
            for hook, acts in zip(self.hooks, found, strict=True):
                if not acts.isfinite().all():
                    raise FloatingPointError(
                        f"activations at {hook} are not finite as {self.dtype}, among blocks "
                        f"{sorted(some.tolist())[:8]}...; try another number format of the language model or of "
                        "its activations"
                    )
            yield found

    def at(self, hook: str, chosen: np.ndarray) -> Iterator[Piece]:
        """The same at one hook; those of the other hooks are kept until they are asked for, of the same blocks."""
        if self.hooks == (hook,):
            yield from (acts for (acts,) in self.all_hooks(chosen))
            return
        if self._asked != chosen.tobytes() or hook not in self._kept:
            self._kept = {}
            passes = list(self.all_hooks(chosen))
            self._kept = {name: [found[i] for found in passes] for i, name in enumerate(self.hooks)}
            self._asked = chosen.tobytes()
        yield from self._kept.pop(hook)

    def check(self, facts: dict[str, Any]) -> None:
        """Raises ValueError unless these are the activations that `facts` describe."""
        own = describe_activations(self.lm, self.blocks)
        for name in own.keys() & facts.keys():
            if own[name] != facts[name]:
                raise ValueError(f"source: reads another {name}, {own[name]!r} instead of {facts[name]!r}")
        if facts["hook"] not in self.hooks:
            raise ValueError(f"hook {facts['hook']!r}: the source reads {', '.join(self.hooks)}")

    def expect(self, hook: str, chosen: np.ndarray) -> None:
        """Nothing can be done before."""


def describe_activations(lm: LanguageModel, blocks: TokenBlocks) -> dict[str, Any]:
    """All that decides the activations of blocks, whatever the hook."""
    return {
        "lm": lm.name,
        "lm_digest": lm.digest(),
        "lm_dtype": next((name for name, dtype in DTYPES.items() if dtype == lm.dtype), str(lm.dtype)),
        "lm_batch_tokens": lm.batch_tokens,
        "centred": lm.centred,
        "data": blocks.source,
        "text_column": blocks.text_column,
        "split": blocks.split,
        "eval_split": blocks.eval_split,
        "max_train_tokens": blocks.max_train_tokens,
        "data_digest": blocks.digest(),
        "ctx": blocks.ctx,
    }
