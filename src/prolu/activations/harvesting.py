"""Raw activations of token blocks: what every source of them offers, and the language model as such a source."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prolu.activations.language_model import DTYPES, LanguageModel
from prolu.activations.token_blocks import FACTS, TokenBlocks
from prolu.runtime.checks import one_of

Piece = Float[Tensor, "n ctx d_in"]


@runtime_checkable
class ActivationSource(Protocol):
    """Where a stream gets raw activations: from a language model (`Harvest`) or from the disk (`ActivationStore`).

    Which of the two it is changes no bit of a stream.
    """

    dtype: str
    """The number format to which the activations were rounded."""

    @abstractmethod
    def check(self, facts: dict[str, Any]) -> None:
        """Raise ValueError unless this source has the activations that `facts` describe."""

    @abstractmethod
    def at(self, hook: str, chosen: np.ndarray) -> Iterator[Piece]:
        """Yield the activations of these training blocks, in this order, some blocks at a time.

        A piece may be overwritten as soon as the next one is asked for.
        """
        ...

    def expect(self, hook: str, chosen: np.ndarray) -> None:
        """Prepare to be asked for these blocks next. By default nothing is done."""


class Harvest(ActivationSource):
    """Activations of training blocks at one or several hooks, each block in one forward pass for all hooks.

    All passes have one shape. In passes of one shape, the activations of a block do not depend on the other blocks in
    the pass, so blocks asked for in any order give the same bits.
    """

    def __init__(self, lm: LanguageModel, blocks: TokenBlocks, hooks: Sequence[str] = (), dtype: str = "fp32"):
        """Prepare to harvest; nothing is computed yet.

        Args:
            lm: the language model.
            blocks: its text.
            hooks: where to read; by default at the hook of the model.
            dtype: fp32, bf16 or fp16, to which activations are rounded.

        Raises:
            ValueError: there is no such number format, a hook is listed twice, or the model cannot take the blocks.
        """
        self.lm = lm
        self.blocks = blocks
        self.hooks = tuple(hooks) or (lm.hook,)
        self.dtype = dtype
        one_of("acts_dtype", dtype, DTYPES)
        if len(set(self.hooks)) < len(self.hooks):
            raise ValueError(f"hooks {', '.join(self.hooks)}: one is listed twice")
        if blocks.ctx > lm.max_ctx:
            raise ValueError(f"ctx {blocks.ctx}: {lm.name} takes at most {lm.max_ctx} tokens")
        lm.check_tokens(blocks.train)
        lm.check_tokens(blocks.held_out)
        self.blocks_per_pass = max(1, lm.batch_tokens // blocks.ctx)
        self._kept_for = b""  # the blocks, as bytes, whose activations are kept for the hooks that have not asked yet
        self._kept: dict[str, list[Piece]] = {}

    def all_hooks(self, chosen: np.ndarray) -> Iterator[list[Piece]]:
        """Yield the activations of these blocks at every hook, pass by pass, in the number format asked for.

        Whether all activations are finite is checked once, before the last pass is yielded, so that the CPU waits for
        the GPU only once. The caller must not use what it made of the earlier passes before the last one has come.

        Raises:
            FloatingPointError: an activation is not finite.
        """
        passes = [chosen[i : i + self.blocks_per_pass] for i in range(0, len(chosen), self.blocks_per_pass)]
        # A short pass is filled up with its own blocks again: a matrix product of another shape is summed in another
        # order, and so would round differently.
        filled_up = [np.resize(some, self.blocks_per_pass) for some in passes]
        # All at once, because the CPU waits for the GPU to copy them.
        tokens = [torch.from_numpy(self.blocks.train[blocks].astype(np.int64)) for blocks in filled_up]
        there = torch.stack(tokens).to(self.lm.device) if tokens else []
        finite: dict[str, list[Tensor]] = {hook: [] for hook in self.hooks}
        for some, ids in zip(passes, there, strict=True):
            found = [acts[: len(some)].to(DTYPES[self.dtype]) for acts in self.lm.activations_at(self.hooks, ids)]
            for hook, acts in zip(self.hooks, found, strict=True):
                # Looked at after rounding, because fp16 ends at 65,504.
                finite[hook].append(acts.isfinite().all())
            if some is passes[-1]:
                self._check_finite(passes, finite)
            yield found

    def _check_finite(self, passes: Sequence[np.ndarray], finite: dict[str, list[Tensor]]) -> None:
        """Raise FloatingPointError, which names hook and blocks, unless all passes were finite at all hooks."""
        found = {hook: torch.stack(flags).tolist() for hook, flags in finite.items()}
        for i, some in enumerate(passes):
            for hook, flags in found.items():
                if not flags[i]:
                    raise FloatingPointError(
                        f"activations at {hook} are not finite as {self.dtype}, among blocks "
                        f"{sorted(some.tolist())[:8]}...; try another number format of the language model or of "
                        "its activations"
                    )

    def at(self, hook: str, chosen: np.ndarray) -> Iterator[Piece]:
        """Yield the activations of these blocks at one hook.

        The activations of the same blocks at the other hooks are kept until they are asked for, because streams at
        several hooks ask for the same window in turn. So the passes are made once, at the first request.
        """
        if self.hooks == (hook,):
            yield from (acts for (acts,) in self.all_hooks(chosen))
            return
        if self._kept_for != chosen.tobytes() or hook not in self._kept:
            self._kept = {}  # freed before the new ones are computed, so that the two never need memory together
            passes = list(self.all_hooks(chosen))
            self._kept = {name: [found[i] for found in passes] for i, name in enumerate(self.hooks)}
            self._kept_for = chosen.tobytes()
        yield from self._kept.pop(hook)

    def check(self, facts: dict[str, Any]) -> None:
        """Raise ValueError unless these are the activations that `facts` describe."""
        own = describe_activations(self.lm, self.blocks)
        for name in own.keys() & facts.keys():
            if own[name] != facts[name]:
                raise ValueError(f"source: reads another {name}, {own[name]!r} instead of {facts[name]!r}")
        if facts["hook"] not in self.hooks:
            raise ValueError(f"hook {facts['hook']!r}: the source reads {', '.join(self.hooks)}")


def describe_activations(lm: LanguageModel, blocks: TokenBlocks) -> dict[str, Any]:
    """Return everything that decides the activations of blocks, whatever the hook."""
    return {
        "lm": lm.name,
        "lm_digest": lm.digest(),
        "lm_dtype": next((name for name, dtype in DTYPES.items() if dtype == lm.dtype), str(lm.dtype)),
        "lm_batch_tokens": lm.batch_tokens,  # the shape of a pass, and with it the rounding
        "centred": lm.centred,
        # Only where one was asked for: studies from before revisions could be chosen do not have the field.
        **({"lm_revision": lm.revision} if lm.revision else {}),
        "data": blocks.source,
        **{name: getattr(blocks, name) for name in FACTS if name != "source"},
        "data_digest": blocks.digest(),
        **({"chat_template": blocks.chat_template} if blocks.chat_template else {}),
        "ctx": blocks.ctx,
    }
