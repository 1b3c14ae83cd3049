"""Many SAEs on one stream of activations: one language-model pass, results as they finish, kept when killed."""

import itertools
import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prolu.evaluation import HeldOut, evaluate, probe
from prolu.files import read_json_lines, write_atomically
from prolu.frontiers import is_converged
from prolu.progress import Meter
from prolu.results import CURVES_FILE, RESULTS_FILE, STUDY_FILE, Results, read_study
from prolu.steps import Steps, crossover_density
from prolu.stream import ActivationStream
from prolu.training import RunConfig, StepReport, Trainer

LINES_PER_CURVE = 100
"""Lines of metrics.jsonl that a run writes."""


def grid(base: RunConfig, **values: Sequence[Any]) -> list[RunConfig]:
    """All combinations of some fields' values: `grid(RunConfig(), penalty=["l1", "sqrt_l1"], coeff=[1e-3, 2e-3])`.

    Raises:
        ValueError: not a field of RunConfig, or not a valid value.
    """
    known = asdict(base)
    for name in values:
        if name not in known:
            raise ValueError(f"{name!r}: not a field of RunConfig; fields: {', '.join(known)}")
    return [replace(base, **dict(zip(values, point, strict=True))) for point in itertools.product(*values.values())]


def describe_study(runs: Sequence[RunConfig], stream: ActivationStream, eval_tokens: int) -> dict[str, Any]:
    """All that decides a study's numbers, and the versions that computed them."""
    return {
        "stream": stream.describe(),
        "eval_tokens": eval_tokens,
        "n_threads": torch.get_num_threads(),
        "crossovers": {str(d): crossover_density("cpu", stream.d_in, d) for d in sorted({r.d_sae for r in runs})},
        "runs": [asdict(run) for run in runs],
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("prolu", "torch", "transformers")},
    }


def run_sweep(
    runs: Iterable[RunConfig],
    stream: ActivationStream,
    out: str | Path,
    *,
    eval_tokens: int = 32_768,
    progress: bool = True,
) -> Results:
    """Trains all runs on one stream, evaluates each when it ends, and writes the study's folder.

    A run's bits do not depend on the runs beside it. Called again with the same arguments, it keeps the
    runs that have finished and trains the others.

    Args:
        runs: what to train; `train` is a sweep of one.
        stream: activations, shared by all.
        out: the study's folder: config.json, results.jsonl, and a folder for each run.
        eval_tokens: held-out tokens to score on.
        progress: show rates and time left.

    Raises:
        ValueError: two runs alike, a run shorter than a batch, or a folder that holds something else.
            Nothing is written then.
    """
    runs, out = list(runs), Path(out)
    prepare_folder(out, runs, stream, eval_tokens)
    done = {record["run_id"] for record in read_json_lines(out / RESULTS_FILE)}
    todo = [run for run in runs if run.run_id not in done]
    if todo:
        _train(todo, stream, HeldOut(stream.lm, stream.blocks, eval_tokens), out, progress)
    return Results.load(out)


def prepare_folder(out: Path, runs: Sequence[RunConfig], stream: ActivationStream, eval_tokens: int) -> None:
    """Checks a request and, only if it is good, creates the study's folder with its config.

    Raises:
        ValueError: as `run_sweep`.
    """
    check_runs(runs, stream.batch_size)
    if eval_tokens < 1:
        raise ValueError(f"eval_tokens {eval_tokens}: must be at least 1")
    study = describe_study(runs, stream, eval_tokens)
    check_folder(out, study)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / STUDY_FILE, json.dumps(study, indent=1) + "\n")
    except OSError as problem:
        raise ValueError(f"out {str(out)!r}: cannot be written ({problem.strerror})") from None


def check_runs(runs: Sequence[RunConfig], batch_size: int) -> None:
    """Raises ValueError if there is nothing to train, two runs are alike, or one is shorter than a batch."""
    if not runs:
        raise ValueError("no runs: pass at least one RunConfig")
    seen: set[str] = set()
    for run in runs:
        run.n_steps(batch_size)
        if run.run_id in seen:
            raise ValueError(f"run {run.run_id}: listed twice, or two runs differ only in what is not in a run's name")
        seen.add(run.run_id)


def check_folder(out: Path, study: dict[str, Any]) -> None:
    """Raises ValueError unless `out` can be created, or holds this very study."""
    nearest = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise ValueError(f"out {str(out)!r}: {nearest} is a file")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / STUDY_FILE).is_file():
        raise ValueError(f"out {str(out)!r}: not empty, and not a study; choose another folder")
    held, asked = _flat(read_study(out)), _flat(json.loads(json.dumps(study)))
    for name in sorted(held.keys() | asked.keys()):
        # Paths may change, what lies there may not: the digests are compared.
        if (
            not name.startswith("versions")
            and name not in ("stream.lm", "stream.data")
            and held.get(name) != asked.get(name)
        ):
            raise ValueError(
                f"out {str(out)!r} holds another study: {name} is {held.get(name)!r} there, "
                f"{asked.get(name)!r} here; choose another folder"
            )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict of dotted names, `runs.3.coeff` for example."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, part in items for k, v in _flat(part, f"{name}.{key}".strip(".")).items()}


class _ActiveRun:
    """A trainer with what the world sees of it: its folder, its curve, its probes."""

    def __init__(self, trainer: Trainer, folder: Path, provenance: dict[str, Any]):
        self.trainer, self.folder = trainer, folder
        self._provenance = provenance | {"run": trainer.describe()}
        self.resampled: list[dict[str, int]] = []
        self._probes: dict[int, dict[str, float]] = {}
        self._curve: list[str] = []
        self._probe_steps = trainer.config.probe_steps(trainer.batch_size)
        self._every = max(1, trainer.n_steps // LINES_PER_CURVE)

    @property
    def finished(self) -> bool:
        return self.trainer.state.n_updates >= self.trainer.n_steps

    def after_step(self, report: StepReport, held_out: HeldOut) -> None:
        n_updates = self.trainer.state.n_updates
        if n_updates % self._every == 0 or self.finished:
            self._curve.append(json.dumps(self.trainer.summary(report)) + "\n")
        if n_updates in self._probe_steps:
            self._probes[n_updates] = probe(self.trainer.sae(), held_out)

    def finish(self, held_out: HeldOut) -> dict[str, Any]:
        """Saves the SAE and its curve; returns its line of results."""
        config, sae = self.trainer.config, self.trainer.sae()
        figures = evaluate(sae, held_out)
        start, end = (self._probes.get(n, figures) for n in self._probe_steps)
        sae.save(self.folder, self._provenance)
        write_atomically(self.folder / CURVES_FILE, "".join(self._curve))
        facts = asdict(config) | {"run_id": config.run_id, "converged": is_converged(start, end)}
        facts["resampled"] = self.resampled
        probes = {
            f"{name}_probe_{when}": p[name] for when, p in (("start", start), ("end", end)) for name in ("l0", "mse")
        }
        return facts | {"eval_tokens": held_out.n_tokens} | figures | probes


def _train(todo: list[RunConfig], stream: ActivationStream, held_out: HeldOut, out: Path, progress: bool) -> None:
    shared: dict[tuple[int, str], Steps] = {}
    active = []
    for config in todo:
        shape = config.d_sae, config.precision
        trainer = Trainer(config, stream.d_in, stream.batch_size, steps=shared.get(shape))
        shared.setdefault(shape, trainer.steps)
        active.append(_ActiveRun(trainer, out / config.run_id, stream.describe()))
    n_steps = max(run.trainer.n_steps for run in active)
    with Meter("training", n_steps * stream.batch_size, len(active), shown=progress) as meter:
        for step in range(n_steps):
            _resample([run for run in active if run.trainer.resamples_now], stream, step)
            batch = stream[step]
            for run in active:
                run.after_step(run.trainer.step(batch.acts), held_out)
            finished = [run for run in active if run.finished]
            active = [run for run in active if not run.finished]
            meter.advance(stream.batch_size)
            if finished:
                _conclude(finished, held_out, out, progress)
        rate = {"tokens_per_second": meter.tokens_per_second, "seconds": meter.seconds, "n_saes": len(todo)}
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps({"event": "trained"} | rate) + "\n")


def _resample(due: list[_ActiveRun], stream: ActivationStream, step: int) -> None:
    """Resamples the dead latents of all runs whose turn it is, on one harvest of fresh activations."""
    rebirths = [run.trainer.rebirth() for run in due]
    if any(rebirth.n_dead for rebirth in rebirths):
        most = max(run.trainer.resampling.n_candidates for run in due)
        for batch in stream.fresh(most, "resample", step):
            for rebirth in rebirths:
                rebirth.offer(batch.acts, batch.raw_norm)
    for run, rebirth in zip(due, rebirths, strict=True):
        run.resampled.append({"step": step} | run.trainer.resample_(rebirth)._asdict())


def _conclude(finished: list[_ActiveRun], held_out: HeldOut, out: Path, progress: bool) -> None:
    """Evaluates runs that have ended; each is on the disk before the next is looked at."""
    with Meter("evaluating", held_out.n_tokens * len(finished), shown=progress) as meter:
        for run in finished:
            record = run.finish(held_out)
            records = [*read_json_lines(out / RESULTS_FILE), record]
            write_atomically(out / RESULTS_FILE, "".join(json.dumps(r) + "\n" for r in records))
            meter.advance(held_out.n_tokens)
