"""Loading a Hugging Face causal language model with its tokenizer, frozen, and naming its weights by a digest."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from prolu.runtime.files import first_line
from prolu.runtime.hub import is_reachable


def load_model(
    name: str,
    device: torch.device,
    device_map: str | dict[str, Any] | None,
    dtype: torch.dtype,
    revision: str = "",
) -> tuple[Any, Any]:
    """Return a frozen model, every parameter of which was found in its files, and its fast tokenizer.

    Args:
        name: a folder in the Hugging Face layout, a GGUF file, or a name on the hub.
        device: where to put the model, if there is no `device_map`.
        device_map: how transformers is to distribute the model over devices.
        dtype: the number format of the weights.
        revision: the branch, tag or commit of a model on the hub; empty for its main branch.

    Raises:
        ValueError: there is no such model, or it cannot be used.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, place = place_of(name)
    # A path that does not exist must not be looked up on the hub, whose answer would only confuse.
    is_path = bool(place) or Path(name).is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1
    local_only = is_path or not is_reachable()
    if is_path and revision:
        raise ValueError(f"revision {revision!r}: only models on the hub have revisions, and {name!r} is a path")
    if not place:
        _check_holds_model(name, is_path, local_only, revision)
    place["local_files_only"] = local_only
    if revision:
        place["revision"] = revision
    try:
        # Never run code that comes with a model, and never unpickle its weights.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **place)
        with _without_report_of_loading():
            # With `output_loading_info`, whose effect on the return value its type does not know.
            model, loaded = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                device_map=device_map,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported with the missing ones, and refused below
                **place,
            )
    except Exception as problem:  # the libraries raise many kinds; each means that the model cannot be loaded
        reason = first_line(problem)
        if local_only and not is_path:
            reason = f"the hub does not answer, so only its cache on this machine was searched: {reason}"
        raise ValueError(f"lm {name!r}: cannot be loaded ({reason})") from None
    _check_all_found(name, loaded)
    if not tokenizer.is_fast:
        raise ValueError(f"lm {name!r}: its tokenizer has no fast version, which is needed to read text at speed")
    if device_map is None:
        torch.nn.Module.to(model, device)  # the type of transformers' own `to` is wrong
    return model.eval().requires_grad_(False), tokenizer


def place_of(name: str) -> tuple[str, dict[str, Any]]:
    """Return the folder or name that transformers is to load a model from, and further arguments for its loaders.

    A GGUF file, which is llama.cpp's format, is named by its folder and its own name there; its quantised weights are
    turned into numbers of the chosen format when they are loaded.

    Raises:
        ValueError: a GGUF file is not there, or the packages that read it are not.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() != ".gguf":
        return name, {}
    if not path.is_file():
        raise ValueError(f"lm {name!r}: no such file")
    if missing := [package for package in ("gguf", "accelerate") if find_spec(package) is None]:
        raise ValueError(
            f"lm {name!r}: a GGUF file needs the packages gguf and accelerate (pip install 'prolu[gguf]'), and "
            f"{' and '.join(missing)} cannot be imported"
        )
    return str(path.parent), {"gguf_file": path.name}


def _check_holds_model(name: str, is_path: bool, local_only: bool, revision: str) -> None:
    """Raise ValueError if a place holds no model, or only an adapter to one."""
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        adapter = find_adapter_config_file(name, local_files_only=local_only, revision=revision or None)
    except Exception:  # whatever is wrong with the place, loading the model says it better
        adapter = None
    if adapter is not None:
        # transformers would load the base model, with or without the adapter, depending on the packages installed.
        raise ValueError(
            f"lm {name!r}: holds an adapter (adapter_config.json), not a model; merge it into its base model first, as "
            "with peft's merge_and_unload, and save that"
        )
    if is_path and not (Path(name) / "config.json").is_file():
        raise ValueError(f"lm {name!r}: no such folder with a config.json")


def _check_all_found(name: str, loaded: Mapping[str, Any]) -> None:
    """Raise ValueError if a parameter of the model is not in its files, or has another shape there.

    transformers initialises such parameters at random each time it loads the model, and only warns about it.
    """
    # The shapes that do not fit come as (name, shape in the file, shape in the model).
    unfit = [one if isinstance(one, str) else one[0] for one in loaded["mismatched_keys"]]
    missing = sorted({*loaded["missing_keys"], *unfit})
    if missing:
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(
            f"lm {name!r}: its files do not hold {named}; it may have been saved without its head, or for another task"
        )


@contextmanager
def _without_report_of_loading() -> Iterator[None]:
    """Keep transformers from printing its table of what it did not find: `_check_all_found` says it in a sentence."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def model_digest(model: Any) -> str:
    """Return the SHA-256 digest, in hexadecimal, of all parameters of a model, which names its weights."""
    # Not the hub's commit, which some versions of transformers tell and others do not: a study could then not be
    # resumed with another version.
    total = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        # As bytes, because numpy has no bf16.
        total.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return total.hexdigest()
