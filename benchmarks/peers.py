"""The training steps of other libraries, each through its own trainer code, in an environment that is made for them."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from prolu.sae.weights import Weights

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".venv-peers"
PACKAGES = ["torch", "sae-lens==6.54.12", "dictionary-learning==0.1.0", "eai-sparsify==1.3.3", "numba", "jaxtyping"]
"""The packages of the environment. eai-sparsify is imported as `sparsify`."""

ALONE = ["circuit-tracer==0.5.0"]
"""Packages without their dependencies, whose pins the others' contradict; what is used of them needs PyTorch only."""


def environment() -> Path:
    """Return the Python of an environment with the other libraries and this one.

    The environment is made if it does not exist, or was made for another list of packages.
    """
    python = ENVIRONMENT / "bin" / "python"
    made = ENVIRONMENT / "installed"
    if not made.exists() or made.read_text() != "\n".join(PACKAGES + ALONE):
        print(f"making {ENVIRONMENT.name} for the peers (about two minutes)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        pip = [python, "-m", "pip"]
        constraints = ["--constraint", ROOT / "constraints.txt"]
        subprocess.run([*pip, "install", "--quiet", *constraints, *PACKAGES], check=True)
        # It comes along in a build for another torch, with which transformers cannot be imported.
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision"], check=True)
        subprocess.run([*pip, "install", "--quiet", "--no-deps", *ALONE, "--editable", ROOT], check=True)
        made.write_text("\n".join(PACKAGES + ALONE))
    return python


def peer_steps(weights: Weights, x: torch.Tensor, lr: float) -> dict[str, Callable[[], None]]:
    """Return, for each library, a function that makes one update by its trainer from the given weights.

    Raises:
        AssertionError: The latents of a library do not have the L0 that ours have.
    """
    pre = (x[:256] - weights.b_dec) @ weights.encoder.T
    l0 = (pre + weights.own["b_enc"] > 0).sum().item() / len(pre)
    return {
        "saelens_standard": _saelens("standard", weights, x, lr, l0),
        "saelens_jumprelu": _saelens("jumprelu", weights, x, lr, l0),
        "dictionary_learning_standard": _dictionary_learning_standard(weights, x, lr, l0),
        "dictionary_learning_jumprelu": _dictionary_learning_jumprelu(weights, x, lr, l0),
    }


def _saelens(architecture: str, weights: Weights, x: torch.Tensor, lr: float, l0: float) -> Callable[[], None]:
    from sae_lens import (
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    shape = {"d_in": weights.d_in, "d_sae": weights.d_sae, "device": "cpu", "dtype": "float32"}
    if architecture == "standard":
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(**shape, l1_coefficient=1e-3))
        sae.b_enc.data.copy_(weights.own["b_enc"])
    else:
        # ReLU(m + b) and JumpReLU at threshold -b are active on the same tokens.
        sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**shape, l0_coefficient=1e-3))
        sae.threshold.data.copy_(-weights.own["b_enc"])
    sae.W_enc.data.copy_(weights.encoder.T)
    sae.W_dec.data.copy_(weights.decoder)
    sae.b_dec.data.copy_(weights.b_dec)
    config = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=len(x), lr=lr, lr_end=lr)
    trainer = SAETrainer(config, sae, itertools.repeat(x))
    _check_l0(sae.encode(x[:256]), l0)

    def once() -> None:
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1

    return once


def _dictionary_learning_standard(weights: Weights, x: torch.Tensor, lr: float, l0: float) -> Callable[[], None]:
    from dictionary_learning.trainers.standard import StandardTrainer

    trainer = StandardTrainer(
        steps=10**6, activation_dim=weights.d_in, dict_size=weights.d_sae, layer=0, lm_name="none", lr=lr,
        l1_penalty=1e-3, device="cpu",
    )  # fmt: skip
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(weights.encoder)
        trainer.ae.encoder.bias.copy_(weights.own["b_enc"])
        trainer.ae.decoder.weight.copy_(weights.decoder.T)
    return _stepper(trainer, x, l0)


def _dictionary_learning_jumprelu(weights: Weights, x: torch.Tensor, lr: float, l0: float) -> Callable[[], None]:
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer

    trainer = JumpReluTrainer(
        steps=10**6, activation_dim=weights.d_in, dict_size=weights.d_sae, layer=0, lm_name="none", lr=lr,
        target_l0=l0,
    )  # fmt: skip
    with torch.no_grad():
        trainer.ae.W_enc.copy_(weights.encoder.T)
        trainer.ae.W_dec.copy_(weights.decoder)
        trainer.ae.threshold.copy_(-weights.own["b_enc"])
    return _stepper(trainer, x, l0)


def _stepper(trainer: object, x: torch.Tensor, l0: float) -> Callable[[], None]:
    _check_l0(trainer.ae.encode(x[:256]), l0)
    n = 0

    def once() -> None:
        nonlocal n
        trainer.update(n, x)
        n += 1

    return once


def _check_l0(latents: torch.Tensor, l0: float) -> None:
    theirs = (latents > 0).sum().item() / len(latents)
    assert abs(theirs - l0) < 0.01 * l0, f"the other library's L0 is {theirs}, ours is {l0}"
