"""Time the training steps of other libraries on a GPU, each as that library makes it in bf16.

    python benchmarks/gpu_peers.py saelens --d-in 768 --d-sae 12288 --batch 4096

`gpu.py` starts it in its stage `peers`, once for each library, because nnsight, which dictionary_learning imports,
changes PyTorch so that torch.compile no longer works.

SAELens and dictionary_learning are called through their own trainers, in the mixed precision that they offer, autocast.
The trainer of sparsify needs a language model, so its SAE is trained here by the lines of its trainer's loop: forward
in autocast, backward, its projection of the decoder's gradient, Adam.
"""

import argparse
import itertools
import json
import traceback
from collections.abc import Callable
from contextlib import nullcontext

import torch

LR = 1e-7
"""A learning rate so small that the number of active latents stays what it is."""

KINDS = ("standard", "topk", "batchtopk")

Step = Callable[[], object]


def _saelens(kind: str, d_sae: int, x: torch.Tensor, *, compiled: bool) -> Step:
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    device = str(x.device)
    shape = {"d_in": x.shape[1], "d_sae": d_sae, "device": device, "dtype": "float32"}
    names = {"standard": "Standard", "topk": "TopK", "batchtopk": "BatchTopK"}
    config_class = getattr(sae_lens, f"{names[kind]}TrainingSAEConfig")
    sae_class = getattr(sae_lens, f"{names[kind]}TrainingSAE")
    # Sparse activations are meant for fp32 without autocast, as SAELens says.
    own = {"l1_coefficient": 1e-3} if kind == "standard" else {"k": 64, "use_sparse_activations": False}
    sae = sae_class(config_class(**shape, **own))
    if compiled:
        # As SAELens's runner does for `compile_sae`.
        sae.training_forward_pass = torch.compile(sae.training_forward_pass, mode=None, backend="inductor")
    config = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=len(x), lr=LR, lr_end=LR, device=device,
        autocast=x.is_cuda,
    )  # fmt: skip
    trainer = SAETrainer(config, sae, itertools.repeat(x))

    def once() -> None:
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1

    return once


def _dictionary_learning(kind: str, d_sae: int, x: torch.Tensor) -> Step:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer_class = {"standard": StandardTrainer, "topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[kind]
    own = {"l1_penalty": 1e-3} if kind == "standard" else {"k": 64}
    trainer = trainer_class(
        steps=10**6, activation_dim=x.shape[1], dict_size=d_sae, layer=0, lm_name="none", lr=LR, device=str(x.device),
        **own,
    )  # fmt: skip
    # As its training loop does with autocast_dtype=torch.bfloat16.
    acts = x.bfloat16() if x.is_cuda else x
    n = 1  # update 0 computes a geometric median

    def once() -> None:
        nonlocal n
        with torch.autocast("cuda", torch.bfloat16) if x.is_cuda else nullcontext():
            trainer.update(n, acts)
        n += 1

    return once


def _sparsify(d_sae: int, x: torch.Tensor) -> Step:
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    sae = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=d_sae, k=64), x.device, torch.float32)
    adam = torch.optim.Adam(sae.parameters(), lr=LR)

    def once() -> None:
        sae.set_decoder_norm_to_unit_norm()
        with torch.autocast("cuda", torch.bfloat16) if x.is_cuda else nullcontext():
            loss = sae(x).fvu
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    return once


def makers(library: str, d_sae: int, x: torch.Tensor) -> dict[str, Callable[[], Step]]:
    """Return, by name, functions that make an SAE of a library and return its training step."""
    if library == "sparsify":
        return {"sparsify topk, autocast": lambda: _sparsify(d_sae, x)}
    if library == "dictionary_learning":
        return {f"{library} {kind}, autocast": lambda k=kind: _dictionary_learning(k, d_sae, x) for kind in KINDS}
    return {
        f"SAELens {kind}, autocast{', compile' if compiled else ''}": lambda k=kind, c=compiled: _saelens(
            k, d_sae, x, compiled=c
        )
        for compiled in (False, True)
        for kind in KINDS
    }


def main() -> None:
    """Time the steps, and print a line of JSON for each."""
    from gpu import milliseconds

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=["saelens", "dictionary_learning", "sparsify"])
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=12_288)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args()
    x = torch.randn(options.batch, options.d_in, device=options.device)
    for name, make in makers(options.library, options.d_sae, x).items():
        try:
            found: object = {"ms": milliseconds(make(), options.device)}
        except Exception as problem:
            traceback.print_exc()
            found = f"failed: {type(problem).__name__}: {str(problem)[:300]}"
        print(json.dumps([name, found]), flush=True)


if __name__ == "__main__":
    main()
