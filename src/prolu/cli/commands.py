"""The work of each command. A `prepare_...` function checks the request first, and returns the work to be done.

All checks are made before the work begins, so that a wrong request writes nothing.
"""

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from prolu.activations.options import HarvestSource, Source
from prolu.activations.resolving import check_is_there
from prolu.activations.row_files import width_of_rows
from prolu.activations.source import (
    check_rows_alone,
    describe_options,
    first_hook,
    open_language_model,
    open_text,
    options_read_ahead,
)
from prolu.activations.store import STORE_FILE, TOKENS_FOLDER, ActivationStore
from prolu.activations.store_writer import HarvestRequest, check_disk, check_store_folder, harvest, store_bytes
from prolu.activations.token_blocks import holds_blocks
from prolu.cli.drawing import draw_studies
from prolu.cli.job import DONE, Job
from prolu.cli.options import LatentPageOptions
from prolu.interop.sharing import check_push, deliver, fetch_checked, holds_same, pack, unpack
from prolu.runtime.checks import at_least_1
from prolu.runtime.devices import available_device
from prolu.runtime.files import json_text, locked, retry_while_busy
from prolu.runtime.mesh import mesh_of
from prolu.studies.amounts import text_amounts
from prolu.studies.cost import estimate, harvest_seconds
from prolu.studies.groups.dealing import prepare_group
from prolu.studies.groups.engine import Engine
from prolu.studies.model_sizes import outline, outline_of_rows
from prolu.studies.preflight import check_clean_loss, findings, preflight, prepare_folders
from prolu.studies.recipe import Recipe
from prolu.studies.request import StudyRequest, check_runs, open_requests
from prolu.studies.settings import SweepSettings
from prolu.studies.sweep import train

logger = logging.getLogger(__name__)


def prepare_sweep(
    recipe: Recipe,
    source: Source,
    out: Path,
    settings: SweepSettings,
    latents: LatentPageOptions,
    engine: Engine,
) -> Job:
    """Train a study, or one at each of several hooks, then write its pages of latents and draw its report."""
    latents.check()
    settings.check()
    engine.check(source, settings)
    torch.set_num_threads(at_least_1("threads", source.threads))
    mesh = mesh_of(source.mesh, source.device, source.threads)
    # The tasks of a job array start together, and one of them writes the token blocks of the text. The others wait for
    # it however long it takes; without an array, a second process in the same folder is a mistake and is refused.
    patience = math.inf if engine.group else 0.0

    def opened() -> list[StudyRequest]:
        return retry_while_busy(lambda: open_requests(recipe, source, out, settings, mesh), patience)

    requests = mesh.first_rank_first(opened)
    latents.check_named([run.run_id for request in requests for run in request.runs])
    latents.check_rows(requests[0].stream.blocks)
    if engine.in_groups:
        return [_in_groups(requests[0], source, latents, engine, patience)]
    mesh.first_rank_first(lambda: prepare_folders(requests))
    works: Job = [partial(train, requests)]
    if mesh.is_first:  # one report is enough
        works.append(lambda: draw_studies(requests, latents, out))
    return works


def _in_groups(
    request: StudyRequest, source: Source, latents: LatentPageOptions, engine: Engine, patience: float
) -> Callable[[], int]:
    """Return a function that trains a study whose runs are divided into groups, and returns an exit code.

    With `--group I/N` it trains that one group; on a cluster, all groups. It draws the report if the whole study is
    finished then.

    Args:
        request: the study.
        source: the activations, for the workers of a cluster to open.
        latents: the pages of latents to write with the report.
        engine: how the groups are made, and which is trained here.
        patience: how many seconds to wait for another task that holds the study's folder.
    """
    preflight([request], in_groups=True)
    if engine.group:
        train_groups = prepare_group(request, engine)
    else:
        from prolu.studies.groups.ray_cluster import prepare_cluster

        train_groups = prepare_cluster(request, source, engine)

    def draw() -> int:
        # When an array is submitted again, all its tasks find everything finished, and all draw. The report has a lock
        # of its own, because other tasks may still hold the study's lock while they gather.
        with locked(request.out, ".report", patience=patience) if engine.group else nullcontext():
            return draw_studies([request], latents, request.out)

    def work() -> int:
        if train_groups():
            return draw()
        print(
            f"{request.out}: group {engine.group} is finished; the last task to end gathers all, and draws the report"
        )
        return DONE

    return work


def prepare_harvest(request: HarvestSource, out: Path) -> Job:
    """Harvest activations into a store."""
    torch.set_num_threads(at_least_1("threads", request.threads))
    device = available_device("lm_device", request.lm_device)
    check_store_folder(out)
    description = describe_options(request, request.n_tokens)
    check_is_there(request.data_source)
    lm = open_language_model(description, device=device)
    widths = [lm.at(hook).d_in for hook in request.hook]
    # A store that was begun takes part of this space already, and has been checked when it was begun.
    if not (out / STORE_FILE).is_file():
        check_disk(out, store_bytes(at_least_1("n_tokens", request.n_tokens), widths, request.dtype))
    # Other text is tokenised right into the store; token blocks that lie elsewhere are copied into it by `harvest`.
    are_there = len(request.data) == 1 and holds_blocks(request.data[0])
    blocks = open_text(description, lm, folder=None if are_there else out / TOKENS_FOLDER)
    HarvestRequest(lm, blocks, request.hook, request.dtype).begun(out)
    check_clean_loss(lm, blocks)
    is_new = not (out / STORE_FILE).is_file()

    def job() -> None:
        if is_new:
            stream = description | {"lm": lm.name, "lm_digest": lm.digest()}
            for line in findings(text_amounts(blocks, blocks.held_out.size), stream):
                logger.info(line)
        store = harvest(lm, blocks, out, hooks=request.hook, dtype=request.dtype)
        print(f"{blocks.train.size:,} tokens at {', '.join(store.hooks)} in {out}")

    return [job]


def prepare_verification(out: Path) -> Job:
    """Compare every file of a store with its digest. Raise ValueError if some are not what was written."""
    store = ActivationStore(out)
    damaged = store.verify()
    if damaged:
        raise ValueError(
            f"store {str(out)!r}: {len(damaged)} files are not what was written (SHA-256): {', '.join(damaged)}; "
            "delete them and run the harvest again"
        )
    return [lambda: print(f"{store.n_shards * len(store.hooks)} files in {out} are undamaged")]


def prepare_harvest_dry_run(request: HarvestSource, *, as_json: bool) -> Job:
    """Return the work of a dry run, which prints the cost of a harvest."""
    lms = [outline(request.lm, hook, request.revision) for hook in request.hook]
    first_hook(request.hook)
    n_tokens = at_least_1("n_tokens", request.n_tokens)
    widths = [lm.d_model for lm in lms]
    cost = {
        "tokens": n_tokens,
        "disk": store_bytes(n_tokens, widths, request.dtype),
        # All hooks share one pass of the language model, which ends at the deepest of them.
        "seconds": harvest_seconds(n_tokens, max(lms, key=lambda lm: lm.blocks_below), request.ctx),
    }

    def job() -> None:
        if as_json:
            print(json_text(cost))
        else:
            hours = cost["seconds"] / 3600
            print(
                f"{n_tokens:,} tokens at {len(widths)} hooks: {cost['disk'] / 1e9:,.1f} GB on the disk, about "
                f"{hours:,.1f} hours of the language model here"
            )

    return [job]


def prepare_dry_run(recipe: Recipe, source: Source, settings: SweepSettings, *, as_json: bool) -> Job:
    """Print the runs of a sweep and their cost."""
    if source.activations:
        check_rows_alone(source)
        lms = [outline_of_rows(width_of_rows(source.activations))]
    else:
        lms = [outline(source.lm, hook, source.revision) for hook in source.hook]
        first_hook(source.hook)
    runs = recipe.runs_at(lms[0].d_model)
    check_runs(runs, recipe.batch_size)
    cost = estimate(
        runs,
        lms,
        batch_size=recipe.batch_size,
        window_tokens=source.window_tokens,
        eval_tokens=settings.eval_tokens,
        ctx=source.ctx,
        n_windows=2 if options_read_ahead(source) else 1,
    )

    def job() -> None:
        from prolu.report.estimate import print_estimate

        if as_json:
            hooks = [] if source.activations else source.hook
            description = {"hooks": hooks, "runs": [run.describe() for run in runs], "estimate": cost.describe()}
            print(json_text(description))
        else:
            print_estimate(runs, cost)

    return [job]


def prepare_push(folder: Path, repo: str, *, revision: str, private: bool, license: str, dry_run: bool) -> Job:
    """Send a study, or one of its runs, to the hub, or only print what would be sent."""
    parcel = pack(folder, repo, license=license)
    sizes = parcel.sizes
    summary = f"{len(parcel.saes)} SAEs, {len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB"
    head = None if dry_run else check_push(parcel, revision=revision, private=private)

    def job() -> None:
        if head is None:
            print("\n".join(f"{size:>13,}  {name}" for name, size in sizes.items()))
            print(f"{summary}, to {parcel.place}; nothing is sent\n\n{parcel.card}", end="")
            return
        sent = deliver(parcel, head, revision=revision, private=private)
        if sent.changed:
            print(f"{summary}, sent to {sent.url}")
        else:
            print(f"{parcel.place}: holds all of these files already; nothing was sent")

    return [job]


def prepare_pull(place: str, out: Path, revision: str) -> Job:
    """Download SAEs from the hub into a new folder."""
    files = fetch_checked(place, revision)
    is_there = holds_same(files, out)

    def job() -> None:
        if not is_there:
            unpack(files, out)
        print(f"{len(files)} files of {place} in {out}" + (", which held them already" if is_there else ""))

    return [job]
