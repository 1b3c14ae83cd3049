"""Train SAEs with the own trainers of dictionary_learning and SAELens: the other side of `quality.py`.

`quality.py` starts it in the peers' environment (`peers.py`). dictionary_learning gets activations of norm 1, the scale
that its constants are meant for, and SAELens gets them at norm sqrt(d_in), which is its own scale too. Every setting is
trained at two learning rates: the trainer's own default, and the one with which this library trains.

dictionary_learning's JumpReLU trainer counts its L0 on latents that were set to 0 below the threshold, instead of on
pre-activations. Only entries above the threshold then have a gradient from the penalty, and half of the kernel around
the threshold is lost (its issue 55). `jumprelu_once` is the same trainer with the L0 counted on pre-activations.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

BATCH = 1024
D_SAE = 1024
LR = 4e-3
DEAD_TOKENS = 200_000
"""The number of tokens without activity after which a latent counts as dead, here and in this library."""

WIDTHS = (64, 128, 256, 512, D_SAE)
"""The prefixes of nested losses, of which the last has all latents."""

Encode = Callable[[torch.Tensor], torch.Tensor]


class Trained(NamedTuple):
    """A trained SAE of another library."""

    encode: Encode
    """Its latents, selected as in training where that differs from inference."""
    encode_saved: Encode
    """Its latents at inference. BatchTopK's selection is a threshold there, found during training."""
    decode: Encode
    """The reconstructions of latents."""
    scale: float
    """The factor on activations of norm sqrt(d_in), which gives the scale that it was trained at."""


class Setting(NamedTuple):
    """One SAE of another library, and what this library trains beside it."""

    library: str
    name: str
    """The trainer, by the name that it has in this file."""
    options: dict[str, Any]
    """The options of the trainer."""
    default_lr: float
    """The learning rate that the library proposes."""
    l0: float | None
    """The L0 that the options ask for; None where they are a coefficient."""
    ours: dict[str, Any]
    """The fields of this library's RunConfig."""


def _quadratic(l0: float) -> dict[str, Any]:
    return {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": l0}


_NESTED = {"nonlinearity": "batchtopk", "penalty": "none", "matryoshka": WIDTHS[:-1]}
_JUMPRELU = {"nonlinearity": "jumprelu(1)", "penalty": "l0"}
_TOPK_LR = 2e-4 / (D_SAE / 2**14) ** 0.5

SETTINGS = [
    Setting("dictionary_learning", "topk", {"k": 16}, _TOPK_LR, 16, {"nonlinearity": "topk", "penalty": "none"}),
    Setting("dictionary_learning", "topk", {"k": 32}, _TOPK_LR, 32, {"nonlinearity": "topk", "penalty": "none"}),
    *(
        Setting("dictionary_learning", name, {"target_l0": l0}, 7e-5, l0, _JUMPRELU)
        for name in ("jumprelu", "jumprelu_once")
        for l0 in (16.0, 32.0)
    ),
    Setting("dictionary_learning", "gated", {"l1_penalty": 0.3}, 5e-5, None, {"nonlinearity": "gated"}),
    Setting("dictionary_learning", "gated", {"l1_penalty": 0.15}, 5e-5, None, {"nonlinearity": "gated"}),
    Setting("dictionary_learning", "matryoshka", {"k": 16}, _TOPK_LR, 16, _NESTED),
    Setting("dictionary_learning", "matryoshka", {"k": 32}, _TOPK_LR, 32, _NESTED),
    *(Setting("saelens", "matryoshka", {"k": k}, 3e-4, k, _NESTED) for k in (16, 32)),
    *(Setting("saelens", "jumprelu", _quadratic(l0), 3e-4, l0, _JUMPRELU) for l0 in (16.0, 32.0)),
    *(Setting("saelens", "jumprelu", {"l0_coefficient": c}, 3e-4, None, _JUMPRELU) for c in (1.0, 0.4)),
]


def train_all(file: Path, names: list[str], *, one_rate: bool) -> None:
    """Train the settings of these trainers at both learning rates, or ours only, and print a JSON line for each."""
    tensors = load_file(file)
    for number, setting in enumerate(SETTINGS):
        if names and setting.name not in names:
            continue
        for lr in (LR,) if one_rate else (setting.default_lr, LR):
            train = {"dictionary_learning": _dictionary_learning, "saelens": _saelens}[setting.library]
            start = time.perf_counter()
            trained = train(setting, lr, tensors["acts"])
            seconds = time.perf_counter() - start
            found = _scores(trained, tensors["held_out"])
            print(json.dumps({"setting": number, "lr": lr, "seconds": seconds} | found), flush=True)


@torch.no_grad()
def _scores(trained: Trained, held_out: torch.Tensor) -> dict[str, Any]:
    """Return L0, MSE and the MSE of each prefix on held-out activations, in units of norm sqrt(d_in)."""
    l0 = 0.0
    l0_saved = 0.0
    errors = [0.0] * len(WIDTHS)
    for part in held_out.split(4096):
        x = part * trained.scale
        latents = trained.encode(x)
        l0 += (latents > 0).sum().item()
        l0_saved += (trained.encode_saved(x) > 0).sum().item()
        for i, width in enumerate(WIDTHS):
            kept = latents.clone()
            kept[:, width:] = 0
            errors[i] += (x - trained.decode(kept)).double().square().sum().item()
    prefix_mse = [error / held_out.numel() / trained.scale**2 for error in errors]
    n = len(held_out)
    return {"l0": l0 / n, "l0_saved": l0_saved / n, "mse": prefix_mse[-1], "prefix_mse": prefix_mse}


def _dictionary_learning(setting: Setting, lr: float, acts: torch.Tensor) -> Trained:
    """Train one SAE by dictionary_learning's trainer."""
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    n_steps = len(acts) // BATCH
    trainer_class = {
        "topk": TopKTrainer,
        "jumprelu": JumpReluTrainer,
        "jumprelu_once": _jumprelu_once(),
        "gated": GatedSAETrainer,
        "matryoshka": MatryoshkaBatchTopKTrainer,
    }[setting.name]
    options: dict[str, Any] = {"warmup_steps": n_steps // 20, "decay_start": n_steps // 2} | setting.options
    if setting.name == "matryoshka":
        sizes = [b - a for a, b in zip((0, *WIDTHS), WIDTHS, strict=False)]
        options["group_fractions"] = [size / D_SAE for size in sizes]
    elif setting.name != "topk":
        options["sparsity_warmup_steps"] = n_steps // 20
    torch.manual_seed(0)
    trainer = trainer_class(
        steps=n_steps, activation_dim=acts.shape[1], dict_size=D_SAE, layer=0, lm_name="none", lr=lr, device="cpu",
        **options,
    )  # fmt: skip
    trainer.dead_feature_threshold = DEAD_TOKENS  # by default 10M tokens, more than it is trained on here
    scale = acts.shape[1] ** -0.5
    for i in range(n_steps):
        trainer.update(i, acts[i * BATCH : (i + 1) * BATCH] * scale)
    ae = trainer.ae
    as_trained = partial(ae.encode, use_threshold=False) if setting.name == "matryoshka" else ae.encode
    return Trained(as_trained, ae.encode, ae.decode, scale)


def _jumprelu_once() -> type:
    """Return dictionary_learning's JumpReLU trainer with the L0 of its penalty counted on pre-activations."""
    from dictionary_learning.trainers.jumprelu import JumpReLUFunction, JumpReluTrainer, StepFunction

    class OnceTrainer(JumpReluTrainer):
        def loss(self, x: torch.Tensor, step: int, logging: bool = False, **_: Any) -> torch.Tensor:
            pre = x @ self.ae.W_enc + self.ae.b_enc
            latents = JumpReLUFunction.apply(pre, self.ae.threshold, self.bandwidth)
            l0 = StepFunction.apply(pre, self.ae.threshold, self.bandwidth).sum(-1).mean()
            penalty = self.sparsity_coefficient * (l0 / self.target_l0 - 1).square()
            error = (x - self.ae.decode(latents)).square().sum(-1).mean()
            return error + self.sparsity_warmup_fn(step) * penalty

    return OnceTrainer


def _saelens(setting: Setting, lr: float, acts: torch.Tensor) -> Trained:
    """Train one SAE by SAELens's trainer."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    n_steps = len(acts) // BATCH
    shape = {"d_in": acts.shape[1], "d_sae": D_SAE, "device": "cpu", "dtype": "float32"}
    torch.manual_seed(0)
    if setting.name == "matryoshka":
        config = sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
            **shape, **setting.options, matryoshka_widths=list(WIDTHS)
        )
        sae = sae_lens.MatryoshkaBatchTopKTrainingSAE(config)
    else:
        config = sae_lens.JumpReLUTrainingSAEConfig(**shape, **setting.options, l0_warm_up_steps=n_steps // 20)
        sae = sae_lens.JumpReLUTrainingSAE(config)
    trainer_config = SAETrainerConfig(
        total_training_samples=n_steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=lr,
        lr_end=lr,
        lr_warm_up_steps=n_steps // 20,
        lr_decay_steps=n_steps // 2,
        dead_feature_window=DEAD_TOKENS // BATCH,
    )

    def batches() -> Iterator[torch.Tensor]:
        yield from acts[: n_steps * BATCH].split(BATCH)

    SAETrainer(trainer_config, sae, batches()).fit()
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        saved = sae_lens.SAE.load_from_disk(folder)
    return Trained(sae.encode, saved.encode, sae.decode, 1.0)
