"""What the commands do, once their requests have been read: each function checks first and gives back the work."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from prolu.config import RunConfig
from prolu.data import load_blocks
from prolu.estimates import estimate, outline
from prolu.evaluation import HeldOut, evaluate
from prolu.lm import LanguageModel
from prolu.results import Results, read_study
from prolu.sae import SAE, read_provenance
from prolu.stream import ActivationStream
from prolu.study import check_runs, holds_study, prepare_folder
from prolu.sweeps import run_sweep

DONE, FAILED, WRONG_REQUEST = 0, 1, 2

Job = Callable[[], int | None]
"""Work that has been checked; an exit code, or None for 0."""

RunsAtWidth = Callable[[int], tuple[list[RunConfig], int]]
"""What to train on activations of some width, and the batch size."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which activations."""

    lm: str = "builtin"
    """Language model: a Hugging Face folder or hub name; `builtin` ships with the package."""
    hook: str = "blocks.2.hook_resid_pre"
    """blocks.L.hook_resid_pre, _resid_post, _attn_out or _mlp_out; or a module's path and .input or .output."""
    data: str = "builtin"
    """Text: a .txt, .jsonl, .parquet or .arrow file, a folder of them, a hub dataset, or `builtin`
    (the Python standard library's own source)."""
    text_column: str = "text"
    """Column that holds the text, or token ids already made, where there are columns; the paper's: input_ids."""
    split: str = "train"
    """Rows to train on: a split, or a slice of one, as in 'train[0:40%]', which is the paper's."""
    eval_split: str = ""
    """Rows to score on, as in 'train[90:95%]', the paper's; empty: a tenth of the documents of the split."""
    ctx: int = 128
    """Tokens per block."""
    stream_seed: int = 0
    """Seed of the order of activations."""
    window_tokens: int = 262_144
    """Tokens that are shuffled together; their activations are held in memory."""
    eval_tokens: int = 32_768
    """Held-out tokens to score on."""
    checkpoint_minutes: float | None = None
    """Between two checkpoints; by default one or more, so that writing them takes less than 3% of the time."""
    keep_state: bool = False
    """Keep Adam's moments of finished runs (twice the size of their weights), so that they can be extended."""
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    """CPU threads; part of what decides the last bits."""


def prepare_sweep(runs_at: RunsAtWidth, source: Source, out: Path) -> Job:
    """Trains runs on one stream, then draws their report."""
    if source.threads < 1:
        raise ValueError(f"threads {source.threads}: must be at least 1")
    seconds = None if source.checkpoint_minutes is None else 60 * source.checkpoint_minutes
    if seconds is not None and seconds < 0:
        raise ValueError(f"checkpoint_minutes {source.checkpoint_minutes}: must be 0 or more")
    torch.set_num_threads(source.threads)
    n_tokens = max(run.n_tokens for run in runs_at(1)[0])
    if holds_study(out):  # a study that is extended keeps its text, and with it its stream
        n_tokens = read_study(out)["stream"].get("max_train_tokens", n_tokens)
    lm = LanguageModel(source.lm, source.hook)
    blocks = load_blocks(
        source.data, lm.tokenizer, source.ctx, max_train_tokens=n_tokens, text_column=source.text_column,
        split=source.split, eval_split=source.eval_split, progress=True,
    )  # fmt: skip
    runs, batch_size = runs_at(lm.d_in)
    stream = ActivationStream(lm, blocks, batch_size, source.stream_seed, source.window_tokens)
    prepare_folder(out, runs, stream, source.eval_tokens)

    def job() -> int:
        results = run_sweep(
            runs, stream, out, eval_tokens=source.eval_tokens, checkpoint_seconds=seconds, keep_state=source.keep_state
        )
        draw_report([out])
        for run_id, reason in results.failures.items():
            print(f"prolu: {run_id} failed ({reason}); the same command tries it again", file=sys.stderr)
        return FAILED if results.failures else DONE

    return job


def prepare_dry_run(runs_at: RunsAtWidth, source: Source, *, as_json: bool) -> Job:
    """Says what a sweep would train, and what it would cost."""
    lm = outline(source.lm, source.hook)
    runs, batch_size = runs_at(lm.d_model)
    check_runs(runs, batch_size)
    cost = estimate(
        runs, lm, batch_size=batch_size, window_tokens=source.window_tokens, eval_tokens=source.eval_tokens,
        ctx=source.ctx,
    )  # fmt: skip

    def job() -> None:
        from prolu.report import print_estimate

        if as_json:
            print(json.dumps({"runs": [asdict(run) for run in runs], "estimate": cost.describe()}))
        else:
            print_estimate(runs, cost)

    return job


def prepare_eval(run: Path, *, lm_name: str, data: str, text_column: str, eval_tokens: int, as_json: bool) -> Job:
    """Scores a saved SAE; empty names are those it was trained with."""
    sae, made = SAE.load(run), read_provenance(run)
    if missing := {"lm", "hook", "data", "ctx", "text_column", "max_train_tokens"} - made.keys():
        raise ValueError(f"{run}: its config does not say {', '.join(sorted(missing))}")
    lm = LanguageModel(lm_name or made["lm"], made["hook"])
    if lm.d_in != sae.config.d_in:
        raise ValueError(f"{run}: takes activations of width {sae.config.d_in}, {lm.name} gives {lm.d_in}")
    blocks = load_blocks(
        data or made["data"],
        lm.tokenizer,
        made["ctx"],
        max_train_tokens=made["max_train_tokens"],
        text_column=text_column or made["text_column"],
        split="train" if data else made.get("split", "train"),
        eval_split="" if data else made.get("eval_split", ""),
        progress=True,
    )

    def job() -> None:
        figures = evaluate(sae, HeldOut(lm, blocks, eval_tokens))
        print(json.dumps(figures) if as_json else "\n".join(f"{k:24} {v:.6g}" for k, v in figures.items()))

    return job


def prepare_report(folders: Sequence[Path], out: Path | None) -> Job:
    """Draws the report of one study, or of several together."""
    from prolu.report import records_of

    if not folders:
        raise ValueError("studies: name at least one folder")
    records_of([Results.load(folder) for folder in folders])
    return lambda: draw_report(folders, out)


def draw_report(folders: Sequence[Path], out: Path | None = None) -> None:
    """Figures, page, table and verdicts."""
    from prolu.report import print_summary, records_of, write_report

    page = write_report(folders, out)
    print_summary(records_of([Results.load(folder) for folder in folders]), " + ".join(map(str, folders)))
    print(f"report: {page}")
