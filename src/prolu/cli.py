"""Commands: they read the request, call the library, print. No logic."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, Suppress, subcommand

from prolu.files import FolderBusyError
from prolu.interrupts import INTERRUPTED
from prolu.recipes import GPT2_WIDTH, RECIPES, recipe_named
from prolu.sweeps import SweepFailedError
from prolu.training import RunConfig

DONE, FAILED, WRONG_REQUEST = 0, 1, 2


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


DATA_FIELDS = ("text_column", "split", "eval_split")
"""What goes with one dataset and no other."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The whole pipeline on the built-in language model: minutes, offline, nothing downloaded."""

    out: Path = Path("runs/demo")
    """Folder of the study."""

    def prepare(self) -> Callable[[], int | None]:
        """Checks the request; gives back the work."""
        return replace(_default_study("demo"), out=self.out).prepare()


@dataclass(frozen=True, kw_only=True)
class RunFlags(RunConfig):
    """One run: which SAE, which loss, how long."""

    def __post_init__(self):
        """Checks nothing yet: a wrong value is told in our one sentence, not in tyro's box."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one SAE."""

    run: OmitArgPrefixes[RunFlags] = field(default_factory=RunFlags)
    source: OmitArgPrefixes[Source] = field(default_factory=Source)
    batch_size: int = 4096
    """Tokens per training step."""
    out: Path
    """Folder of the study."""

    def prepare(self) -> Callable[[], int | None]:
        """Checks the request; gives back the work."""
        run = RunConfig(**asdict(self.run))
        return _prepare_sweep(lambda d_in: ([run], self.batch_size), self.source, self.out)


@dataclass(frozen=True, kw_only=True)
class Study:
    """One named study, with its own source of activations as the default."""

    recipe: Suppress[str]
    scale: float = 1.0
    """Share of the study's tokens to train on; schedule and resampling shrink with it."""
    batch_size: int
    """Tokens per training step. A smaller one gives more steps from the same tokens."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Of the matmuls' inputs; sums, weights and moments are fp32. All but fp32 are for GPUs."""
    source: OmitArgPrefixes[Source] = field(default_factory=Source)
    out: Path
    """Folder of the study."""
    dry_run: bool = False
    """Only say what would be trained, and what it would cost here; nothing is loaded or written."""
    json: bool = False
    """With --dry-run: one JSON object, {"runs": [...], "estimate": {...}}."""

    def prepare(self) -> Callable[[], int | None]:
        """Checks the request; gives back the work."""
        if self.json and not self.dry_run:
            raise ValueError("json: only with --dry-run")
        return (
            _prepare_dry_run(self) if self.dry_run else _prepare_sweep(self.at_width, self.resolved_source(), self.out)
        )

    def resolved_source(self) -> Source:
        """On the study's own data also its own column and splits, where they were not set."""
        own, plain = RECIPES[self.recipe](GPT2_WIDTH).source, Source()
        if self.source.data != own["data"]:
            return self.source
        unset = {name for name in DATA_FIELDS if getattr(self.source, name) == getattr(plain, name)}
        return replace(self.source, **{name: own[name] for name in unset & own.keys()})  # pyright: ignore[reportArgumentType]

    def at_width(self, d_in: int) -> tuple[list[RunConfig], int]:
        """What it trains on activations of that width, and in batches of which size."""
        runs = recipe_named(self.recipe)(d_in).scaled(self.scale).runs
        return [replace(run, precision=self.precision) for run in runs], self.batch_size


def _default_study(name: str) -> Study:
    recipe = RECIPES[name](GPT2_WIDTH)
    kept = {key: value for key, value in recipe.source.items() if key not in DATA_FIELDS}
    source = replace(Source(), **kept)  # pyright: ignore[reportArgumentType]
    return Study(recipe=name, batch_size=recipe.batch_size, source=source, out=Path("runs") / name)


def _study(name: str) -> Any:
    described = cleandoc(RECIPES[name].__doc__ or "")
    return subcommand(name, default=_default_study(name), description=described)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Train a named study, all its SAEs on one stream of activations. Run again: keeps what has finished."""

    study: OmitArgPrefixes[
        Annotated[Study, _study("demo")]
        | Annotated[Study, _study("experiment1")]
        | Annotated[Study, _study("experiment2")]
        | Annotated[Study, _study("experiment3")]
    ]

    def prepare(self) -> Callable[[], int | None]:
        """Checks the request; gives back the work."""
        return self.study.prepare()


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Score a saved SAE on held-out text, on what it was trained for or on other text."""

    run: Positional[Path]
    """Folder of a run: config.json and sae.safetensors."""
    lm: str = ""
    """Language model, if it lies elsewhere now."""
    data: str = ""
    """Other text to score on."""
    text_column: str = ""
    """Its column of text, if not the one trained on."""
    eval_tokens: int = 32_768
    """Held-out tokens to score on."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def prepare(self) -> Callable[[], int | None]:
        """Checks the request; gives back the work."""
        return _prepare_eval(self)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Draw the figures and the page of a study, or of several together, and print table and verdicts."""

    studies: Positional[tuple[Path, ...]]
    """Folders of studies."""
    out: Path | None = None
    """Folder of the report; by default the study's own, or `pooled` beside the first of several."""

    def prepare(self) -> Callable[[], int | None]:
        """Checks the request; gives back the work."""
        from prolu.report import records_of
        from prolu.results import Results

        if not self.studies:
            raise ValueError("studies: name at least one folder")
        records_of([Results.load(study) for study in self.studies])
        return lambda: _report(self.studies, self.out)


Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Sweep, subcommand("sweep")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Report, subcommand("report")]
)


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed while running, 2 wrong request, 130 interrupted."""
    args = sys.argv[1:] if args is None else args
    if args[:1] == ["sweep"] and args[1:] and not args[1].startswith("-") and args[1] not in RECIPES:
        print(f"prolu: study {args[1]!r}: choose one of {', '.join(RECIPES)}", file=sys.stderr)
        return WRONG_REQUEST
    command = tyro.cli(Command, prog="prolu", args=args, description="Sparse autoencoders with ProLU, compared.")
    try:
        job = command.prepare()
    except (ValueError, OSError) as problem:  # OSError: a file or folder of the request cannot be read
        print(f"prolu: {problem}", file=sys.stderr)
        return WRONG_REQUEST
    except KeyboardInterrupt:
        return INTERRUPTED
    return _finish(job)


def _finish(job: Callable[[], int | None]) -> int:
    """Does the work; a failure is one sentence where it is the world's, a traceback where it is ours."""
    kept = "what was finished is kept, the same command goes on"
    try:
        return job() or DONE
    except KeyboardInterrupt:
        sentence, code = f"interrupted; {kept}", INTERRUPTED
    except FolderBusyError as problem:
        sentence, code = str(problem), WRONG_REQUEST
    except (OSError, FloatingPointError, SweepFailedError) as problem:
        sentence, code = f"{problem}; {kept}", FAILED
    except Exception:
        traceback.print_exc()
        sentence, code = f"failed while running; {kept}", FAILED
    print(f"prolu: {sentence}", file=sys.stderr)
    return code


def _prepare_sweep(
    recipe: Callable[[int], tuple[list[RunConfig], int]], source: Source, out: Path
) -> Callable[[], int | None]:
    import torch

    from prolu.data import load_blocks
    from prolu.lm import LanguageModel
    from prolu.results import read_study
    from prolu.stream import ActivationStream
    from prolu.study import holds_study, prepare_folder
    from prolu.sweeps import run_sweep

    if source.threads < 1:
        raise ValueError(f"threads {source.threads}: must be at least 1")
    seconds = None if source.checkpoint_minutes is None else 60 * source.checkpoint_minutes
    if seconds is not None and seconds < 0:
        raise ValueError(f"checkpoint_minutes {source.checkpoint_minutes}: must be 0 or more")
    torch.set_num_threads(source.threads)
    n_tokens = max(run.n_tokens for run in recipe(1)[0])
    if holds_study(out):  # a study that is extended keeps its text, and with it its stream
        n_tokens = read_study(out)["stream"].get("max_train_tokens", n_tokens)
    lm = LanguageModel(source.lm, source.hook)
    blocks = load_blocks(
        source.data, lm.tokenizer, source.ctx, max_train_tokens=n_tokens, text_column=source.text_column,
        split=source.split, eval_split=source.eval_split, progress=True,
    )  # fmt: skip
    runs, batch_size = recipe(lm.d_in)
    stream = ActivationStream(lm, blocks, batch_size, source.stream_seed, source.window_tokens)
    prepare_folder(out, runs, stream, source.eval_tokens)

    def job() -> int:
        results = run_sweep(
            runs, stream, out, eval_tokens=source.eval_tokens, checkpoint_seconds=seconds, keep_state=source.keep_state
        )
        _report([out])
        for run_id, reason in results.failures.items():
            print(f"prolu: {run_id} failed ({reason}); the same command tries it again", file=sys.stderr)
        return FAILED if results.failures else DONE

    return job


def _prepare_dry_run(request: Study) -> Callable[[], int | None]:
    from prolu.estimates import estimate, outline
    from prolu.report import print_estimate
    from prolu.study import check_runs

    source = request.source
    lm = outline(source.lm, source.hook)
    runs, batch_size = request.at_width(lm.d_model)
    check_runs(runs, batch_size)
    cost = estimate(
        runs,
        lm,
        batch_size=batch_size,
        window_tokens=source.window_tokens,
        eval_tokens=source.eval_tokens,
        ctx=source.ctx,
    )

    def job() -> None:
        if request.json:
            print(json.dumps({"runs": [asdict(run) for run in runs], "estimate": cost.describe()}))
        else:
            print_estimate(runs, cost)

    return job


def _prepare_eval(request: Eval) -> Callable[[], int | None]:
    from prolu.data import load_blocks
    from prolu.evaluation import HeldOut, evaluate
    from prolu.lm import LanguageModel
    from prolu.sae import SAE, read_provenance

    sae, made = SAE.load(request.run), read_provenance(request.run)
    if missing := {"lm", "hook", "data", "ctx", "text_column", "max_train_tokens"} - made.keys():
        raise ValueError(f"{request.run}: its config does not say {', '.join(sorted(missing))}")
    lm = LanguageModel(request.lm or made["lm"], made["hook"])
    if lm.d_in != sae.config.d_in:
        raise ValueError(f"{request.run}: takes activations of width {sae.config.d_in}, {lm.name} gives {lm.d_in}")
    blocks = load_blocks(
        request.data or made["data"],
        lm.tokenizer,
        made["ctx"],
        max_train_tokens=made["max_train_tokens"],
        text_column=request.text_column or made["text_column"],
        split="train" if request.data else made.get("split", "train"),
        eval_split="" if request.data else made.get("eval_split", ""),
        progress=True,
    )

    def job() -> None:
        figures = evaluate(sae, HeldOut(lm, blocks, request.eval_tokens))
        print(json.dumps(figures) if request.json else "\n".join(f"{k:24} {v:.6g}" for k, v in figures.items()))

    return job


def _report(folders: Sequence[Path], out: Path | None = None) -> None:
    from prolu.report import print_summary, records_of, write_report
    from prolu.results import Results

    page = write_report(folders, out)
    print_summary(records_of([Results.load(folder) for folder in folders]), " + ".join(map(str, folders)))
    print(f"report: {page}")


if __name__ == "__main__":
    sys.exit(main())
