"""What ships with the package: a small trained language model, and the text it was trained on."""

from importlib.resources import files
from pathlib import Path

from prolu.activations.builtin.corpus import stdlib_documents

MODEL_DIR = Path(str(files("prolu.activations.builtin"))) / "model"
"""Hugging Face folder of the built-in GPT-2; its card is `README.md` there."""

HOOK = "blocks.2.hook_resid_pre"
"""Where SAEs read the built-in model unless told otherwise: the middle of its four blocks."""

__all__ = ["HOOK", "MODEL_DIR", "stdlib_documents"]
