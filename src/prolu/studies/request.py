"""The request for a study: it is built once, checked once, and passed on unchanged."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from prolu.activations.options import Source
from prolu.activations.packing import POOL_PER_SCORED_TOKEN
from prolu.activations.source import open_streams
from prolu.activations.stream import ActivationStream
from prolu.activations.token_blocks import LATER_FACTS, TokenBlocks
from prolu.evaluation.held_out import AnyHeldOut, held_out_digest, held_out_of
from prolu.runtime.files import LOCK_FILE
from prolu.runtime.mesh import ALONE, Mesh
from prolu.runtime.names import check_inside
from prolu.studies.amounts import check_epochs, check_eval_tokens, study_amounts
from prolu.studies.extension import check_folder, runs_as_begun
from prolu.studies.folder import (
    GROUPS_FOLDER,
    LOG_FILE,
    check_parent,
    finished_runs,
    holds_study,
    read_study,
    text_to_read,
    versions,
)
from prolu.studies.recipe import Recipe
from prolu.studies.settings import SweepSettings
from prolu.training.config import RunConfig
from prolu.training.mesh_parts import check_mesh
from prolu.training.starting_weights import starting_weights
from prolu.training.steps import crossover_density


@dataclass(frozen=True)
class StudyRequest:
    """What one study is to train, on which stream, into which folder. It is built once and passed on unchanged."""

    runs: list[RunConfig]
    stream: ActivationStream
    out: Path
    settings: SweepSettings = field(default_factory=SweepSettings)
    progress: bool = True
    """Whether to show rates and the time left."""

    def __post_init__(self):
        object.__setattr__(self, "runs", runs_as_begun(self.runs, self.out))

    @cached_property
    def description(self) -> dict[str, Any]:
        """All that decides the study's numbers, and the versions that compute them: its config.json."""
        stream = self.stream
        return {
            "stream": stream.describe(),
            "eval_tokens": self.settings.eval_tokens,
            "held_out_digest": held_out_digest(stream.blocks, self.settings.eval_tokens, stream.mask),
            "amounts": study_amounts(self.runs, stream, self.settings.eval_tokens),
            "n_threads": stream.mesh.n_threads or torch.get_num_threads(),
            "crossovers": self.crossovers,
            "runs": [run.describe() for run in self.runs],
            "versions": versions(),
        }

    @cached_property
    def crossovers(self) -> dict[str, float]:
        """The densities below which steps on a CPU are sparse, by width and, if it is not fp32, precision.

        A study that was begun keeps those of its config.json: another table, of a later version, changes no bit of it.
        """
        begun = read_study(self.out).get("crossovers", {}) if holds_study(self.out) else {}
        densities = {}
        for run in self.runs:
            name = crossover_name(run, begun)
            measured = crossover_density("cpu", self.stream.d_in, run.d_sae, run.precision)
            densities[name] = begun.get(name, measured)
        return dict(sorted(densities.items()))

    def crossover(self, run: RunConfig) -> float | None:
        """Return the density below which a run's steps are sparse; None on a GPU, for which none is recorded."""
        return self.crossovers[crossover_name(run, self.crossovers)] if self.stream.device.type == "cpu" else None

    @cached_property
    def held_out(self) -> AnyHeldOut:
        """The held-out text of the study, with what the language model makes of it, which is finite; or its rows."""
        return held_out_of(self.stream, self.settings.eval_tokens, progress=self.progress)

    @property
    def unfinished(self) -> list[RunConfig]:
        """The runs that are still to be trained: those without a result after all of their `n_tokens`."""
        finished = finished_runs(self.runs, self.out)
        return [run for run in self.runs if run not in finished]


def crossover_name(run: RunConfig, begun: Mapping[str, float]) -> str:
    """Return the name of a run's crossover among those of its study, which may have one for all precisions."""
    name = str(run.d_sae) if run.precision == "fp32" else f"{run.d_sae} {run.precision}"
    return name if name in begun or str(run.d_sae) not in begun else str(run.d_sae)


def requests_at_hooks(
    runs: Iterable[RunConfig] | Callable[[int], Iterable[RunConfig]],
    streams: Iterable[ActivationStream],
    out: Path,
    settings: SweepSettings,
    *,
    progress: bool = True,
) -> list[StudyRequest]:
    """Return one request per hook, each for a study in a folder of its own, `out`/HOOK.

    Args:
        runs: what to train at each hook, or a function of the width of its activations.
        streams: one per hook, alike in all else.
        out: folder of the studies.
        settings: of every study.
        progress: whether to show rates and the time left.

    Raises:
        ValueError: no stream, two streams at one hook, streams that differ in more than the hook, or a folder that
            holds something else.
    """
    streams = list(streams)
    if not streams:
        raise ValueError("no streams: pass at least one ActivationStream")
    hooks = [stream.hook for stream in streams]
    if len(set(hooks)) < len(hooks):
        raise ValueError(f"hooks {', '.join(hooks)}: one is listed twice")
    first = streams[0].describe()
    for stream in streams[1:]:
        for name, value in stream.describe().items():
            if name not in ("hook", "hook_out", "max_norm") and value != first.get(name):
                raise ValueError(
                    f"streams at several hooks: {name} is {first.get(name)!r} and {value!r}; make them alike"
                )
    check_parent(out, hooks)
    fixed = [] if callable(runs) else list(runs)  # an iterator could be read at one hook only
    requests = []
    for stream in streams:
        runs_here = list(runs(stream.d_in)) if callable(runs) else fixed
        requests.append(StudyRequest(runs_here, stream, out / stream.hook, settings, progress))
    return requests


def open_requests(
    recipe: Recipe, source: Source, out: Path, settings: SweepSettings, mesh: Mesh = ALONE
) -> list[StudyRequest]:
    """Open the streams that a command asks for, and return a request for each of its hooks.

    Raises:
        ValueError: the model, the text or a hook cannot be had, or `out` holds something else.
    """
    several = len(source.hook) > 1 and not source.activations
    folders = [out / hook for hook in source.hook] if several else [out]
    held_out_pool = POOL_PER_SCORED_TOKEN * settings.eval_tokens
    amounts = text_to_read(folders, recipe.n_tokens, held_out_pool)
    streams = open_streams(
        source,
        *amounts,
        recipe.batch_size,
        mesh,
        check_width=lambda d_in: check_runs(recipe.runs_at(d_in), recipe.batch_size),
    )
    if several:
        return requests_at_hooks(recipe.runs_at, streams, out, settings)
    (stream,) = streams
    return [StudyRequest(recipe.runs_at(stream.d_in), stream, out, settings)]


def check_requests(requests: Sequence[StudyRequest], *, in_groups: bool = False, is_group: bool = False) -> None:
    """Raise ValueError unless each study can be trained into its folder, by one process or in groups."""
    for request in requests:
        check_runs(request.runs, request.stream.batch_size)
        for run in request.runs:
            check_mesh(run, request.stream.batch_size, request.stream.mesh)
            run.sae_config(request.stream.d_in, request.stream.d_out)  # a skip connection needs a hook to write at
            if run.init_from is not None:
                starting_weights(run, request.stream.d_in, d_out=request.stream.d_out)
        request.settings.check()
        # Checked before anything is written, because a link may lead to a file outside the folder.
        for name in (LOCK_FILE, LOG_FILE, *(run.run_id for run in request.runs)):
            check_inside(request.out, name)
        for run in request.runs:
            if (folder := request.out / run.run_id).is_file():
                raise ValueError(f"{folder}: a file, but the folder of a run needs this name; move the file away")
        check_folder(request.out, request.description, request.stream.batch_size)
        if not is_group:
            _check_text(request)
        if not in_groups and (request.out / GROUPS_FOLDER).exists():
            raise ValueError(
                f"out {str(request.out)!r}: its runs are trained in groups; resume it as it was begun, with "
                "--engine ray or --group"
            )


def _check_text(request: StudyRequest) -> None:
    """Raise ValueError if a study that begins, or is extended, asks for far more text than there is."""
    request.stream.tells_repeats = False  # here it is said before training
    blocks = request.stream.blocks
    settings = request.settings
    if not holds_study(request.out):
        check_epochs(request.runs, request.stream, settings.max_epochs)
        check_eval_tokens(blocks, settings.eval_tokens, settings.min_eval_fraction)
        return
    # A study that was begun may be finished, even if the amounts of text would be refused for a new one.
    held = read_study(request.out)
    if max(run.n_tokens for run in request.runs) > max((run.get("n_tokens", 0) for run in held["runs"]), default=0):
        check_epochs(request.runs, request.stream, settings.max_epochs)
    if "held_out_pool" not in held["stream"] and isinstance(blocks, TokenBlocks):
        # A study of an earlier version: the same text may be there, and the scored tokens chosen in another way.
        as_then = replace(blocks, held_out_pool=LATER_FACTS["held_out_pool"])
        digest = held_out_digest(as_then, settings.eval_tokens, request.stream.mask)
        if digest != request.description["held_out_digest"]:
            raise ValueError(
                f"out {str(request.out)!r}: its runs are scored on other held-out tokens, because an earlier version "
                "began it; read its text with load_blocks(..., held_out_pool=0)"
            )


def check_runs(runs: Sequence[RunConfig], batch_size: int) -> None:
    """Raises ValueError if there is nothing to train, two runs are alike, or one is shorter than a batch."""
    if not runs:
        raise ValueError("no runs: pass at least one RunConfig")
    seen: set[str] = set()
    starts: dict[RunConfig, int] = {}
    for run in runs:
        run.n_steps(batch_size)
        if run.run_id in seen:
            raise ValueError(
                f"run {run.run_id}: listed twice, or two runs differ in no setting that a run's name holds"
            )
        seen.add(run.run_id)
        if run.init_from is not None and not run.resample_fractions:  # then no draw of the run depends on its seed
            other = starts.setdefault(replace(run, init_seed=0), run.init_seed)
            if other != run.init_seed:
                raise ValueError(
                    f"init_seed {other} and {run.init_seed}: with init_from and without resampling they give the same "
                    "run to the bit; start from one SAE per seed, or train one seed"
                )
