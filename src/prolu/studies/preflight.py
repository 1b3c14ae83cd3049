"""What can be known before training is asked before it, so that nothing long ends in what its start could have said."""

from collections.abc import Sequence

from prolu.studies.amounts import tell_amounts
from prolu.studies.folder import begin_folder, holds_study
from prolu.studies.request import StudyRequest, check_requests


def prepare_folders(requests: Sequence[StudyRequest], *, in_groups: bool = False, is_group: bool = False) -> None:
    """Check requests and, only if all of them are good, create each study's folder with its config.

    Args:
        requests: the studies.
        in_groups: whether the runs will be trained in groups, by processes that ask for themselves what takes time.
        is_group: whether this is a group of a study that was begun, and whose amounts of text were found good then.

    Raises:
        ValueError: as `run_sweep`.
    """
    check_requests(requests, in_groups=in_groups, is_group=is_group)
    if not in_groups:
        preflight(requests)
    new = [request for request in requests if not holds_study(request.out)]
    if new and not is_group:
        tell_amounts(new[0].runs, new[0].stream, new[0].settings)  # at all hooks they are the same
    for request in requests:
        begin_folder(request.out, request.description)


def preflight(requests: Sequence[StudyRequest]) -> None:
    """Raise ValueError if what can be found by trying will keep studies from being trained or scored.

    The requests have been checked, and nothing has been written yet.
    """
    for request in requests:
        if request.unfinished and request.stream.mesh.is_first:
            # The language model's own loss, with which every score is compared. It is kept for the scores.
            _ = request.held_out
