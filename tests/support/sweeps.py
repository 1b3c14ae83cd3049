"""Small sweeps, and what they leave."""

from pathlib import Path

from prolu import ActivationStream, run_sweep

HOOK = "blocks.1.hook_resid_pre"


def stream_over(lm, blocks):
    """A stream in batches of 64, whose windows are as small as the text; the fixture `tiny_stream` is one."""
    return ActivationStream(lm, blocks, batch_size=64, seed=3, window_tokens=2048)


def sweep(runs, stream, out, **settings):
    """`run_sweep` that scores on little text and shows no progress."""
    return run_sweep(runs, stream, out, **({"eval_tokens": 320, "progress": False} | settings))


def contents(out: Path) -> dict[str, bytes]:
    """All files of a study's folder but its clock."""
    return {
        str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file() and f.name != "log.jsonl"
    }
