"""Devices by name: which of the GPUs a name means, and whether it is there."""

import re

import torch


def numbered(device: str | torch.device) -> torch.device:
    """Return a device; `cuda` without a number becomes the GPU that this thread uses now."""
    # `cuda` means another GPU in each thread that has set one, and windows are read by threads of their own.
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def available_device(field: str, name: str) -> torch.device:
    """Return the device of this name.

    Args:
        field: The name of what the user has set, for error messages.
        name: `cpu`, `cuda`, or `cuda:N` for GPU number N.

    Raises:
        ValueError: It is no such name, or this machine has no such GPU.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"{field} {name!r}: must be cpu, cuda, or cuda:N for GPU number N")
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name != "cpu" and n_gpus == 0:
        raise ValueError(f"{field} {name!r}: PyTorch finds no CUDA GPU on this machine; choose cpu")
    if (torch.device(name).index or 0) >= n_gpus > 0:
        raise ValueError(f"{field} {name!r}: this machine has the GPUs 0 to {n_gpus - 1}")
    return numbered(name)
