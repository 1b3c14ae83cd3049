"""The flags of commands."""

from support.sweeps import HOOK


def flags(**settings):
    """Flags by their names: `flags(d_sae=40, hook=["a", "b"])` is `--d-sae 40 --hook a b`; True stands for no value."""
    words = []
    for name, value in settings.items():
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, list | tuple):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words


def text_flags(lm, text, **settings):
    """Flags of a command that reads a text in blocks of 32 tokens, at one hook of a language model; then others."""
    return flags(**({"lm": lm, "data": text, "hook": HOOK, "ctx": 32} | settings))
