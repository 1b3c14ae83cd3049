"""Loading a Hugging Face causal language model with its tokenizer, frozen, and naming its weights by a digest."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from prolu.runtime.files import first_line
from prolu.runtime.hub import is_reachable


def load_model(
    name: str, device: torch.device, device_map: str | dict[str, Any] | None, dtype: torch.dtype
) -> tuple[Any, Any]:
    """Return a frozen model and its fast tokenizer.

    Args:
        name: a folder in the Hugging Face layout, or a name on the hub.
        device: where to put the model, if there is no `device_map`.
        device_map: how transformers is to distribute the model over devices.
        dtype: the number format of the weights.

    Raises:
        ValueError: there is no such model, or it cannot be used.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    # A path that does not exist must not be looked up on the hub, whose answer would only confuse.
    is_path = Path(name).is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not (Path(name) / "config.json").is_file():
        raise ValueError(f"lm {name!r}: no such folder with a config.json")
    local_only = is_path or not is_reachable()
    try:
        # Never run code that comes with a model, and never unpickle its weights.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local_only)
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            device_map=device_map,
            local_files_only=local_only,
        )
    except Exception as problem:  # the libraries raise many kinds; each means that the model cannot be loaded
        reason = first_line(problem)
        if local_only and not is_path:
            reason = f"the hub does not answer, so only its cache on this machine was searched: {reason}"
        raise ValueError(f"lm {name!r}: cannot be loaded ({reason})") from None
    if not tokenizer.is_fast:
        raise ValueError(f"lm {name!r}: its tokenizer has no fast version, which is needed to read text at speed")
    if device_map is None:
        torch.nn.Module.to(model, device)  # the type of transformers' own `to` is wrong
    return model.eval().requires_grad_(False), tokenizer


def model_digest(model: Any) -> str:
    """Return what names the weights of a model: the hub's commit, or else SHA-256 over all its parameters."""
    return getattr(model.config, "_commit_hash", None) or _parameters_digest(model)


def _parameters_digest(model: Any) -> str:
    total = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        # As bytes, because numpy has no bf16.
        total.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return total.hexdigest()
