"""What the commands do, once their requests have been read: each function checks first and gives back the work."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from tyro.conf import arg

from prolu.activations.source import (
    HarvestSource,
    Source,
    at_least_1,
    describe_options,
    first_hook,
    open_language_model,
    open_streams,
    open_text,
)
from prolu.activations.store import (
    STORE_FILE,
    TOKENS_FOLDER,
    HarvestRequest,
    check_disk,
    check_store_folder,
    harvest,
    store_bytes,
)
from prolu.activations.token_blocks import holds_blocks
from prolu.interop.sharing import check_push, deliver, fetch_checked, holds_same, pack, unpack
from prolu.runtime.files import owned, patiently
from prolu.runtime.mesh import mesh_of
from prolu.studies.cost import estimate, harvest_seconds, outline
from prolu.studies.folder import done_of, failures, holds_study, read_study
from prolu.studies.groups.dealing import prepare_group
from prolu.studies.groups.engine import Engine
from prolu.studies.request import StudyRequest, check_runs, prepare_folders
from prolu.studies.results import Results
from prolu.studies.sweep import requests_at_hooks, run_sweep, run_sweeps
from prolu.studies.trackers import check_trackers
from prolu.training.config import RunConfig

if TYPE_CHECKING:
    from prolu.report.latents.pages import LatentPages

DONE, FAILED, WRONG_REQUEST = 0, 1, 2

Job = Callable[[], int | None]
"""Work that has been checked; an exit code, or None for 0."""

ANY_WIDTH = 768
"""For what does not depend on the width of the activations, before that is known."""

RunsAtWidth = Callable[[int], tuple[list[RunConfig], int]]
"""What to train on activations of some width, and the batch size."""


@dataclass(frozen=True, kw_only=True)
class LatentPageOptions:
    """Pages of latents: the text on which each is active, and the tokens that it promotes."""

    latent_pages: Annotated[Literal["frontier", "all", "none"], arg(aliases=["--features"])] = "frontier"
    """Which runs get pages of their latents: those on the frontier of L0 and CE increase, all, or none."""
    latent_tokens: Annotated[int, arg(aliases=["--feature-tokens"])] = 200_000
    """Held-out tokens to look at, or all if there are fewer; their activations are held in memory."""
    examples: int = 15
    """Strongest examples to show per latent, and about as many over the whole range of its activations."""

    def check(self) -> None:
        """Raise ValueError unless both numbers are 1 or more."""
        at_least_1("latent_tokens", self.latent_tokens)
        at_least_1("examples", self.examples)


def prepare_sweep(
    runs_at: RunsAtWidth, source: Source, out: Path, latents: LatentPageOptions, engine: Engine | None = None
) -> Job:
    """Trains runs on one stream, or at several hooks on one each, then draws reports and pages of latents."""
    engine = engine or Engine()
    latents.check()
    engine.check(source)
    check_trackers(source.tracker)
    torch.set_num_threads(at_least_1("threads", source.threads))
    mesh = mesh_of(source.mesh, source.device, source.threads)
    seconds = None if source.checkpoint_minutes is None else 60 * source.checkpoint_minutes
    if seconds is not None and seconds < 0:
        raise ValueError(f"checkpoint_minutes {source.checkpoint_minutes}: must be 0 or more")
    several = len(source.hook) > 1
    folders = [out / hook for hook in source.hook] if several else [out]
    n_tokens = max(run.n_tokens for run in runs_at(ANY_WIDTH)[0])
    for held in [read_study(folder) for folder in folders if holds_study(folder)]:
        # A study that is extended keeps its text, and with it its stream.
        n_tokens = held["stream"].get("max_train_tokens", n_tokens)
    # Of the tasks of a job array one writes the text's blocks, and the others wait for it.
    patience = math.inf if engine.group else 0.0
    streams = mesh.in_turn(
        lambda: patiently(lambda: open_streams(source, n_tokens, runs_at(ANY_WIDTH)[1], mesh), patience)
    )
    settings = {"checkpoint_seconds": seconds, "keep_state": source.keep_state}
    if several:
        requests = requests_at_hooks(lambda d_in: runs_at(d_in)[0], streams, out, source.eval_tokens)
    else:
        requests = [StudyRequest(runs_at(streams[0].d_in)[0], streams[0], out, source.eval_tokens)]
    if engine.in_groups:
        train = _in_groups(requests[0], source, n_tokens, engine, settings)
    else:
        mesh.in_turn(lambda: prepare_folders(requests))
        settings |= {"eval_tokens": source.eval_tokens, "trackers": source.tracker}

        def train() -> bool:
            if several:
                run_sweeps(lambda d_in: runs_at(d_in)[0], streams, out, **settings)
            else:
                run_sweep(requests[0].runs, streams[0], out, **settings)
            return True

    def draw() -> None:
        # An array that is submitted again has all tasks draw. A lock of its own: others are still gathering.
        with owned(out, ".report") if engine.group else nullcontext():
            _draw_study(requests, latents, out, several=several)

    def job() -> int:
        finished = train()
        if not mesh.is_first:
            return DONE
        if finished:
            patiently(draw, patience)
        else:
            print(f"{out}: group {engine.group} is finished; the last task to end gathers all, and draws the report")
        failed = {f"{folder}/{run_id}": reason for folder in folders for run_id, reason in failures(folder).items()}
        for run, reason in failed.items():
            print(f"prolu: {run} failed ({reason}); the same command tries it again", file=sys.stderr)
        return FAILED if failed else DONE

    return job


def _draw_study(requests: Sequence[StudyRequest], latents: LatentPageOptions, out: Path, *, several: bool) -> None:
    """Writes missing pages of latents, then the reports of studies of one LM that have a finished run."""
    studies: list[Results] = []
    for request in requests:
        if not done_of(request.runs, request.out):
            continue
        studies.append(Results.load(request.out))
        pages = _pages_of(studies[-1], latents)
        if missing := pages.missing():
            pages.write(missing, request.stream.lm, request.stream.blocks)
    if several:
        draw_reports(studies, out)
    else:
        draw_report(studies or [out])


def _in_groups(
    request: StudyRequest, source: Source, n_tokens: int, engine: Engine, settings: dict[str, Any]
) -> Callable[[], bool]:
    """Trains a study in groups; the work says whether they are all finished."""
    if engine.group:
        return prepare_group(request, engine, **settings)
    from prolu.studies.groups.ray_cluster import prepare_cluster

    return prepare_cluster(request, source, n_tokens, engine, **settings)


def prepare_harvest(request: HarvestSource, out: Path) -> Job:
    """Writes activations into a store."""
    torch.set_num_threads(at_least_1("threads", request.threads))
    check_store_folder(out)
    description = describe_options(request, request.n_tokens)
    lm = open_language_model(description)
    widths = [lm.at(hook).d_in for hook in request.hook]
    if not (out / STORE_FILE).is_file():  # else what is there already counts
        check_disk(out, store_bytes(at_least_1("n_tokens", request.n_tokens), widths, request.dtype))
    # Token blocks that lie elsewhere are copied into the store by `harvest`; other text is tokenised right into it.
    blocks = open_text(description, lm, folder=None if holds_blocks(request.data) else out / TOKENS_FOLDER)
    HarvestRequest(lm, blocks, request.hook, request.dtype).begun(out)

    def job() -> None:
        store = harvest(lm, blocks, out, hooks=request.hook, dtype=request.dtype)
        print(f"{blocks.train.size:,} tokens at {', '.join(store.hooks)} in {out}")

    return job


def prepare_harvest_dry_run(request: HarvestSource, *, as_json: bool) -> Job:
    """Says what a harvest would cost."""
    lms = [outline(request.lm, hook) for hook in request.hook]
    first_hook(request.hook)
    n_tokens, widths = at_least_1("n_tokens", request.n_tokens), [lm.d_model for lm in lms]
    cost = {
        "tokens": n_tokens,
        "disk": store_bytes(n_tokens, widths, request.dtype),
        "seconds": harvest_seconds(n_tokens, max(lms, key=lambda lm: lm.blocks_below), request.ctx),
    }

    def job() -> None:
        if as_json:
            print(json.dumps(cost))
        else:
            hours = cost["seconds"] / 3600
            print(
                f"{n_tokens:,} tokens at {len(widths)} hooks: {cost['disk'] / 1e9:,.1f} GB on the disk, about "
                f"{hours:,.1f} hours of the language model here"
            )

    return job


def prepare_dry_run(runs_at: RunsAtWidth, source: Source, *, as_json: bool) -> Job:
    """Says what a sweep would train, and what it would cost."""
    lms = [outline(source.lm, hook) for hook in source.hook]
    first_hook(source.hook)
    runs, batch_size = runs_at(lms[0].d_model)
    check_runs(runs, batch_size)
    cost = estimate(
        runs, lms, batch_size=batch_size, window_tokens=source.window_tokens, eval_tokens=source.eval_tokens,
        ctx=source.ctx,
    )  # fmt: skip

    def job() -> None:
        from prolu.report.terminal import print_estimate

        if as_json:
            asked = {"hooks": source.hook, "runs": [asdict(run) for run in runs]}
            print(json.dumps(asked | {"estimate": cost.describe()}))
        else:
            print_estimate(runs, cost)

    return job


def prepare_report(folders: Sequence[Path], out: Path | None, latents: LatentPageOptions) -> Job:
    """Makes the pages of latents that are missing, and draws the report of one study, or of several together."""
    from prolu.studies.results import records_of

    latents.check()
    if not folders:
        raise ValueError("studies: name at least one folder")
    found = [Results.load(folder) for folder in folders]
    records_of(found)
    pages_of_studies = [_pages_of(results, latents) for results in found]
    todo = [(pages, missing, *pages.open_source()) for pages in pages_of_studies if (missing := pages.missing())]

    def job() -> None:
        for pages, missing, lm, blocks in todo:
            pages.write(missing, lm, blocks)
        draw_report(found, out)

    return job


def prepare_push(folder: Path, repo: str, *, revision: str, private: bool, license: str, dry_run: bool) -> Job:
    """Sends a study, or a run of one, to the hub; or only says what it would send."""
    parcel = pack(folder, repo, license=license)
    sizes = parcel.sizes
    told = f"{len(parcel.saes)} SAEs, {len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB"
    head = None if dry_run else check_push(parcel, revision=revision, private=private)

    def job() -> None:
        if head is None:
            print("\n".join(f"{size:>13,}  {name}" for name, size in sizes.items()))
            print(f"{told}, to {parcel.place}; nothing is sent\n\n{parcel.card}", end="")
            return
        sent = deliver(parcel, head, revision=revision, private=private)
        print(f"{told}, in {sent.url}" if sent.changed else f"{parcel.place}: holds all of it already; nothing is new")

    return job


def prepare_pull(place: str, out: Path, revision: str) -> Job:
    """Takes SAEs from the hub into a new folder."""
    files = fetch_checked(place, revision)
    is_there = holds_same(files, out)

    def job() -> None:
        if not is_there:
            unpack(files, out)
        print(f"{len(files)} files of {place} in {out}" + (", as they were" if is_there else ""))

    return job


def _pages_of(results: Results, latents: LatentPageOptions) -> "LatentPages":
    from prolu.report.latents.pages import LatentPages

    return LatentPages(results, latents.latent_pages, latents.latent_tokens, latents.examples)


def draw_reports(studies: Sequence[Results], out: Path) -> None:
    """Draw each study's own report, and one of all of them in `out`."""
    from prolu.report.writer import write_report

    for results in studies:
        draw_report([results])
    print(f"all hooks: {write_report(studies, out).page}")


def draw_report(studies: Sequence[Path | Results], out: Path | None = None) -> None:
    """Write the report of one study, or of several together, and print its summary."""
    from prolu.report.terminal import print_summary
    from prolu.report.writer import write_report

    drawn = write_report(studies, out)
    print_summary(drawn.records, " + ".join(map(str, drawn.folders)), drawn.verdicts)
    print(f"report: {drawn.page}")
