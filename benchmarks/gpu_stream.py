"""Time the stream of activations on a GPU: the harvest against the bare language model, and the wait for a store.

`gpu.py` uses it in its stage `stream`. The language model is randomly initialised, of GPT-2 small's shape, and read at
`blocks.6.hook_resid_pre`; small, everything is tiny.
"""

import time
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

from prolu import ActivationStore, ActivationStream, LanguageModel, RunConfig, Trainer, harvest
from prolu.activations.language_model import DTYPES
from stream import CTX, HOOK, Noise, in_turns, random_blocks, waiting, write_gpt2

ROUNDS = 5
WAYS = ("off", "on")
"""Whether windows are read ahead."""


class Problem:
    """A language model, its text, and the sizes of everything."""

    def __init__(self, folder: Path, device: str, *, small: bool):
        self._folder = folder
        self._device = device
        self._small = small
        self._n_ids = 300 if small else 50_257
        shape = {"n_embd": 32, "n_head": 2, "n_layer": 8} if small else {}
        write_gpt2(folder / "gpt2", self._n_ids, **shape)
        self._window = 2048 if small else 262_144
        self._batch = 256 if small else 4096

    def _wait(self) -> None:
        if self._device != "cpu":
            torch.cuda.synchronize()

    def harvest_over_bare(self, dtype: str) -> dict[str, float]:
        """Return the tokens per second of windows that are harvested on the GPU, and of the bare model's six blocks.

        A window is harvested, looked through for what is not finite, normalised in fp32 and shuffled.
        """
        per_pass = 512 if self._small else 8192
        lm = LanguageModel(self._folder / "gpt2", HOOK, device=self._device, dtype=DTYPES[dtype], batch_tokens=per_pass)
        blocks = random_blocks((ROUNDS + 1) * self._window, self._n_ids)
        stream = ActivationStream(lm, blocks, self._batch, window_tokens=self._window, device=self._device)
        body = GPT2LMHeadModel.from_pretrained(self._folder / "gpt2").transformer.to(self._device, DTYPES[dtype]).eval()
        body.h = body.h[:6]
        body.ln_f = torch.nn.Identity()
        ids = torch.from_numpy(blocks.train[: per_pass // CTX].astype("int64")).to(self._device)
        windows = iter(range(ROUNDS + 1))

        @torch.inference_mode()
        def bare() -> None:
            for _ in range(self._window // per_pass):
                body(input_ids=ids, use_cache=False)
            self._wait()

        def ours() -> None:
            stream[next(windows) * (self._window // self._batch)]
            self._wait()

        seconds = in_turns(ROUNDS, bare=bare, harvest=ours)
        return {
            "bare_tokens_per_second": self._window / seconds["bare"],
            "harvest_tokens_per_second": self._window / seconds["harvest"],
            "harvest_over_bare": seconds["bare"] / seconds["harvest"],
        }

    def waiting(self) -> dict[str, float]:
        """Return the milliseconds of a step, and the fraction of training that waits for a store's data.

        That is 1 - (time of steps on one batch that is there) / (time of steps on batches from the store), for windows
        that are read between steps and for windows that are read ahead.
        """
        lm = LanguageModel(self._folder / "gpt2", HOOK)
        n_windows = 2 if self._small else 3
        text = random_blocks((n_windows + 1) * self._window, self._n_ids)
        start = time.perf_counter()
        store = harvest(Noise(lm), text, self._folder / "store", progress=False)
        written = time.perf_counter() - start
        run = RunConfig(
            d_sae=16 * lm.d_in, n_tokens=10**9, nonlinearity="prolu_ste", penalty="sqrt_l1", lr=1e-8, step="dense",
            precision="fp32" if self._small else "bf16",
        )  # fmt: skip
        trainer = Trainer(run, lm.d_in, self._batch, device=self._device)
        streams = {
            f"read_ahead_{way}": ActivationStream(
                lm,
                store.blocks(),
                self._batch,
                window_tokens=self._window,
                source=ActivationStore(store.folder),
                device=self._device,
                read_ahead=way,
            )
            for way in WAYS
        }
        for stream in streams.values():
            stream.tells_repeats = False
        found = waiting(trainer, streams, n_windows, ROUNDS, self._wait)
        return found | {"store_bytes_per_second": text.train.size * lm.d_in * 2 / written}
