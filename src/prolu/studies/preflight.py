"""Checks before training begins, so that a long training does not fail for a reason that could have been found at once.
Other checks are made where things are opened: that every parameter of the model is in its files (`model_loading`), that
every token id has a row in the embedding (`Harvest`), and that the text is long enough (`check_requests`).
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prolu.activations.language_model import LanguageModel
from prolu.activations.token_blocks import TokenBlocks
from prolu.activations.token_mask import NO_MASK, TokenMask
from prolu.evaluation.held_out import HeldOut
from prolu.runtime.files import first_line, nearest_existing
from prolu.sae.nonlinearities import nonlinearity_named
from prolu.sae.penalties import penalty_named
from prolu.sae.saved_sae import SAEConfig
from prolu.studies.amounts import tell_amounts
from prolu.studies.cost import state_bytes
from prolu.studies.folder import begin_folder, holds_study
from prolu.studies.request import StudyRequest, check_requests
from prolu.training.config import RunConfig
from prolu.training.config_checks import check_precision
from prolu.training.starting_weights import initial_weights
from prolu.training.steps import Objective
from prolu.training.steps.choice import has_numba
from prolu.training.target_l0 import FEWEST_CONTROLLED_STEPS

logger = logging.getLogger(__name__)

FEW_BLOCKS = 4
"""The number of held-out token blocks on which the language model's loss is checked before a harvest and before
training in groups, where each group checks all blocks."""

CHECKPOINTS_AT_ONCE = 3
"""The number of checkpoints on the disk while one is written: the two that are kept, and the new one."""


def prepare_folders(requests: Sequence[StudyRequest], *, in_groups: bool = False, is_group: bool = False) -> None:
    """Check requests and, only if all of them are good, create each study's folder with its config.

    Args:
        requests: the studies.
        in_groups: whether the runs will be trained in groups, by processes that make the slow checks themselves.
        is_group: whether this is a group of a study whose amounts of text were checked when it was begun.

    Raises:
        ValueError: as `run_sweep`.
    """
    check_requests(requests, in_groups=in_groups, is_group=is_group)
    if not in_groups:
        preflight(requests)
    new = [request for request in requests if not holds_study(request.out)]
    for request in requests:
        begin_folder(request.out, request.description)
    if new and not is_group:
        # At all hooks they are the same.
        for line in findings(new[0].description["amounts"], new[0].description["stream"]):
            logger.info(line)
        _tell_short_targets(new[0].runs, new[0].stream.batch_size)
        _tell_unused_coeffs(new[0].runs)
        _tell_skipped_resamplings(new[0].runs, new[0].stream.batch_size)
        tell_amounts(new[0].runs, new[0].stream, new[0].settings)


def preflight(requests: Sequence[StudyRequest], *, in_groups: bool = False) -> None:
    """Try what studies need to be trained and scored, and raise ValueError if something does not work.

    The requests have been checked, and nothing has been written yet. Nothing is checked for runs that are finished
    already.

    Args:
        requests: the studies.
        in_groups: whether other processes train the runs; they try their own kernels and all held-out text.
    """
    unfinished = [request for request in requests if request.unfinished]
    _check_disk(unfinished)
    for request in unfinished:
        stream = request.stream
        for run in request.unfinished:
            check_precision(run, stream.device.type)
        if not in_groups and stream.device.type == "cpu":
            _check_kernels(request.unfinished)
        # The language model's own loss, with which every score is compared, must be finite.
        if in_groups and isinstance(stream.blocks, TokenBlocks):
            check_clean_loss(stream.lm, stream.blocks)
        elif not in_groups and stream.mesh.is_first:
            _ = request.held_out  # kept for the scores, so it costs nothing here


def check_clean_loss(lm: LanguageModel, blocks: TokenBlocks) -> None:
    """Raise ValueError unless the language model's own loss on a few held-out blocks is finite."""
    if len(blocks.held_out):
        HeldOut(lm, blocks, FEW_BLOCKS * blocks.ctx)


def findings(amounts: Mapping[str, Any], stream: Mapping[str, Any]) -> list[str]:
    """Return what was found before training, in a few lines.

    Args:
        amounts: those of the study's config.json.
        stream: the description of the stream there.
    """
    scored = f", of which {amounts['eval_tokens']:,} are scored" if "epochs" in amounts else ""
    if "rows" in stream:
        return [
            f"rows: {amounts['train_tokens']:,} to train on, of {stream['data']}; no language model",
            f"epochs: {amounts['epochs']:.2f}",
            f"held out: {amounts['held_out_tokens']:,} rows{scored}",
        ]
    without_text = f", and {amounts['rows_left_out']:,} rows without text" if amounts["rows_left_out"] else ""
    per_epoch = amounts.get("tokens_dropped_per_epoch")
    at_windows = f", and in each epoch {per_epoch:,} that fill no batch" if per_epoch else ""
    revision = f", revision {stream['lm_revision']}" if stream.get("lm_revision") else ""
    documents = amounts["documents"]
    mask = TokenMask.recorded(stream)
    left_out = f"left out of training and scores: {mask}; {amounts.get('tokens_left_out', 0):,} of the training tokens"
    return [
        *([left_out] if mask != NO_MASK else []),
        f"documents: {'not known' if documents is None else f'{documents:,}'}{without_text}",
        f"tokens: {amounts['train_tokens']:,} to train on; dropped: {amounts['tokens_dropped'] or 0:,} that fill no "
        f"block{at_windows}",
        f"epochs: {amounts['epochs']:.2f}" if "epochs" in amounts else "epochs: 1, since a harvest reads the text once",
        f"held out: {amounts['held_out_tokens']:,} tokens{scored}",
        f"model: {stream['lm']}{revision}, in {stream['lm_dtype']}, weights {stream['lm_digest'][:12]}",
    ]


def _tell_short_targets(runs: Sequence[RunConfig], batch_size: int) -> None:
    """Warn of runs that are too short to reach their target L0."""
    n_steps = [n for run in runs if run.has_target_l0 and (n := run.n_steps(batch_size)) < FEWEST_CONTROLLED_STEPS]
    if n_steps:
        logger.warning(
            "target_l0: %d of %d runs have fewer than %d steps (%d), in which the L0 controller may miss its target by "
            "far; more tokens or a smaller batch help",
            len(n_steps),
            len(runs),
            FEWEST_CONTROLLED_STEPS,
            min(n_steps),
        )


def _tell_unused_coeffs(runs: Sequence[RunConfig]) -> None:
    """Warn of runs that have a coefficient in their names, but no penalty."""
    # With a target L0 the coefficient is not in the name; it is the one from which other families of a grid start.
    unused = [run for run in runs if run.ignores_coeff and run.target_l0 is None]
    if unused:
        logger.warning(
            "coeff: %d of %d runs are trained without a penalty, and their coefficients (%s) do nothing",
            len(unused),
            len(runs),
            ", ".join(f"{coeff:g}" for coeff in dict.fromkeys(run.coeff for run in unused)),
        )


def _tell_skipped_resamplings(runs: Sequence[RunConfig], batch_size: int) -> None:
    """Warn of runs so short that the fraction of their steps after which they are resampled is all of them."""
    skipped = [
        f"{run.run_id} after {fraction:g} of its {run.n_steps(batch_size)} steps"
        for run in runs
        for fraction, step in zip(run.resample_fractions, run.resampling(batch_size).steps, strict=True)
        if step >= run.n_steps(batch_size)
    ]
    if skipped:
        logger.warning(
            "resample_fractions: %d resamplings of %d runs are left out, because they would come after the last step "
            "(the first: %s); train on more tokens, or with a smaller batch",
            len(skipped),
            len(runs),
            skipped[0],
        )


def _check_disk(requests: Sequence[StudyRequest]) -> None:
    """Raise ValueError unless the disk of each study that begins has room for its checkpoints and its SAEs."""
    for request in requests:
        if holds_study(request.out):
            continue  # its checkpoints are there, and are replaced
        state = state_bytes([run.d_sae for run in request.runs], request.stream.d_in)
        needed = CHECKPOINTS_AT_ONCE * state + state // 3  # of the state, a third are weights
        disk = shutil.disk_usage(nearest_existing(Path(request.out)))
        if disk.total and needed > disk.free:  # /proc and the like have no size; writing there fails at once
            raise ValueError(
                f"out {str(request.out)!r}: the study needs {needed / 1e9:,.2g} GB for checkpoints and SAEs, and its "
                f"disk has {disk.free / 1e9:,.2g} GB free; train fewer or smaller SAEs, or choose another disk"
            )


def _check_kernels(runs: Sequence[RunConfig]) -> None:
    """Make a tiny sparse step of every nonlinearity, so that kernels are compiled now and not when they are needed.

    Raises:
        ValueError: numba cannot compile or run them.
    """
    sparse = [run for run in runs if run.step in ("auto", "sparse") and run.precision != "tf32"]
    if not sparse or not has_numba():
        return
    try:
        for name in dict.fromkeys(run.resolved_nonlinearity for run in sparse):
            _tiny_step(name)
    except Exception as problem:  # LLVM, OpenMP and numba have errors of their own
        raise ValueError(
            f"step {sparse[0].step!r}: numba cannot compile the kernels of sparse steps here ({first_line(problem)}); "
            "choose --step sparse_torch or dense"
        ) from problem


def _tiny_step(nonlinearity: str) -> None:
    from prolu.training.moments import Moments
    from prolu.training.steps import Update
    from prolu.training.steps.sparse_numba import SparseNumbaStep

    selection = nonlinearity_named(nonlinearity).in_training.selection
    # As many latents as are selected, which fewer could not be.
    d_sae = 32 if selection is None else max(32, selection.k)
    weights = initial_weights(SAEConfig(d_in=4, d_sae=d_sae, nonlinearity=nonlinearity), 0)
    acts = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    objective = Objective(nonlinearity_named(nonlinearity), penalty_named("l1"), 0.0)
    SparseNumbaStep(weights, 8).update_(weights, Moments.zeros_like(weights), acts, objective, Update(0, 0.0))
