"""The Hugging Face hub: files downloaded and sent, and its refusals as one sentence each, which never holds the token.

huggingface_hub is imported by the functions that need it: it is slow to import, and most commands do without.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

MAIN = "main"
"""The branch that every repository begins with."""

PLACE = re.compile(r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<folder>[\w.+-]+(?:/[\w.+-]+)*))?/?")

SECONDS_TO_ANSWER = 5
"""The number of seconds within which the hub must answer to count as reachable."""

LONGEST_MESSAGE = 300
"""The number of characters of the hub's own words that an error message repeats."""

REFUSALS = set(range(400, 500)) - {408, 429}
"""The HTTP statuses that the same request would get again. After a time-out (408) or too many requests (429) it may
succeed."""

REASONS = {
    401: "the hub does not take your token; run `hf auth login`",
    403: "your token may not do that there",
    412: "somebody else has committed there since; run the command again",
}
"""The reason for each refusal that a user can do something about, by HTTP status."""


class HubError(ValueError):
    """The hub refused a request, or holds something else than was asked for."""


class Place(NamedTuple):
    """A place on the hub: a repository, or a folder in it."""

    repo: str
    """The repository, as user/repo."""
    folder: str
    """The folder in the repository; empty for the whole repository."""

    def __str__(self) -> str:
        return f"{self.repo}/{self.folder}" if self.folder else self.repo


class Head(NamedTuple):
    """The state of a repository at a revision, before something is sent there."""

    sha: str
    """The commit at the revision; empty if the repository does not exist yet."""
    has_revision: bool
    """Whether the revision exists. If it does not, the commit and the files are those of the main branch."""
    private: bool
    """Whether the repository is private."""
    files: frozenset[str]
    """The names of all files in the repository."""


class Sent(NamedTuple):
    """The result of sending files."""

    url: str
    """The address of the new commit's page, or of the last commit's if nothing was new."""
    changed: bool
    """Whether there is a new commit. Files that the hub already holds, byte for byte, are left out of it."""


def place_of(name: str) -> Place:
    """Return the place that `user/repo` or `user/repo/FOLDER` names.

    Raises:
        ValueError: The name is neither.
    """
    found = PLACE.fullmatch(name)
    if found is None or ".." in name:
        raise ValueError(f"{name!r}: not a place on the hub; write user/repo, or user/repo/FOLDER")
    return Place(found["repo"], found["folder"] or "")


@cache
def is_reachable() -> bool:
    """Return whether the hub answers at all. It is asked once in a process.

    If it does not, huggingface_hub would repeat each request for half a minute, with a warning each time. So callers
    then look only into the cache.
    """
    from huggingface_hub import constants, errors, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS_TO_ANSWER)
    except (errors.HTTPError, errors.OfflineModeIsEnabled, OSError):  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]
        return False
    return True


def fetch(place: Place, revision: str, patterns: Sequence[str]) -> Path:
    """Download the files of a place into the hub's own cache, unless they are there already, and return their folder.

    The folder belongs to the cache: read it, and change nothing in it. It is missing if no file matches.

    Args:
        place: The repository or the folder in it.
        revision: The branch, tag or commit.
        patterns: Patterns of file names in the place's folder, at least one of which a file must match. `*` also
            matches across a `/`.

    Raises:
        HubError: There is no such repository or revision, or no access to it.
        ConnectionError: The hub does not answer, and the cache does not hold all of the files.
    """
    from huggingface_hub import snapshot_download

    prefix = f"{place.folder}/" if place.folder else ""
    with errors_as_sentences(place):
        root = snapshot_download(place.repo, revision=revision, allow_patterns=[prefix + p for p in patterns])
    return Path(root) / place.folder


def look(place: Place, revision: str) -> Head:
    """Return the state of a repository before something is sent there.

    Raises:
        HubError: Nobody is logged in on this machine, or the hub does not take the token.
        ConnectionError: The hub does not answer.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if get_token() is None:
        raise HubError(f"{place}: nobody is logged in to the hub here; run `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="prolu")
    with errors_as_sentences(place):
        try:
            return _head(api.repo_info(place.repo, revision=revision), has_revision=True)
        except RevisionNotFoundError:
            return _head(api.repo_info(place.repo), has_revision=False)
        except RepositoryNotFoundError:
            # The hub gives this answer to a bad token too. Asking who we are tells the two apart before anything is
            # sent, while the request can still be refused as a whole.
            api.whoami()
            return Head("", False, True, frozenset())


def send(
    place: Place, head: Head, files: Mapping[str, bytes | Path], message: str, *, revision: str, private: bool
) -> Sent:
    """Send files in one commit. The repository and the branch are made if they do not exist.

    Args:
        place: The repository.
        head: The state that `look` found. If somebody else has committed since, nothing is sent.
        files: The content of each file, or a local file with it, by its name in the repository.
        message: The title of the commit.
        revision: The branch to commit to.
        private: Whether a repository that is made now is private.

    Raises:
        HubError: The hub refused.
        ConnectionError: The hub no longer answers.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="prolu")
    with errors_as_sentences(place):
        sha = head.sha
        if not sha:
            # None and not False: then an organisation's own default for new repositories holds.
            api.create_repo(place.repo, private=private or None)
            sha = _head(api.repo_info(place.repo), has_revision=True).sha
        if revision != MAIN and not head.has_revision:
            api.create_branch(place.repo, branch=revision, revision=sha)
        # One commit with a parent: `upload_folder` would cut a large folder into several commits, and the hub refuses
        # a commit whose parent is no longer the last one, so nobody else's work in between is overwritten.
        additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
        done = api.create_commit(place.repo, additions, commit_message=message, revision=revision, parent_commit=sha)
    return Sent(str(done.commit_url), done.oid != sha)


def _head(info: Any, *, has_revision: bool) -> Head:
    return Head(info.sha, has_revision, bool(info.private), frozenset(f.rfilename for f in info.siblings or ()))


@contextmanager
def errors_as_sentences(place: Place) -> Iterator[None]:
    """Raise what huggingface_hub raises in the block as an error of ours, with one sentence for the user."""
    from huggingface_hub import errors

    # huggingface_hub's log would repeat the errors in other words before ours.
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)

    transport: type[Exception] = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]
    # `from None` throughout: the original errors hold the request, whose headers hold the token, and a traceback or a
    # log might show it.
    try:
        yield
    except errors.LocalEntryNotFoundError as problem:
        # This error says only that the cache lacks the file. Its cause says why the hub was not asked, or did not
        # answer.
        raise _our_error(place, problem.__cause__ or problem) from None
    except (ValueError, errors.OfflineModeIsEnabled, transport, RuntimeError) as problem:
        # RuntimeError is what hf_xet, which transfers large files, raises for everything.
        raise _our_error(place, problem) from None
    finally:
        log.setLevel(level)


def _our_error(place: Place, problem: BaseException) -> Exception:
    """Return a HubError for what will not succeed if tried again, a ConnectionError for what may."""
    from huggingface_hub import errors

    # These are checked first: they are HTTP errors too, but their types say more than their status.
    refusals = (
        (errors.RevisionNotFoundError, "no such revision there"),
        (errors.GatedRepoError, "gated; ask for access on its page first"),
        (
            errors.RepositoryNotFoundError,
            "no such repository on the hub, or a private one that your token gives no access to",
        ),
    )
    for kind, reason in refusals:
        if isinstance(problem, kind):
            return HubError(f"{place}: {reason}")
    if isinstance(problem, errors.HfHubHTTPError):
        status = problem.response.status_code
        if status not in REFUSALS:
            return ConnectionError(f"{place}: the hub answered with status {status}; try again later")
        reason = REASONS.get(status, f"the hub refused with status {status}")
        hubs_words = _one_line_without_token(problem.server_message or "")
        return HubError(f"{place}: {reason}" + (f" ({hubs_words})" if hubs_words else ""))
    if isinstance(problem, ValueError):
        return HubError(f"{place}: {_one_line_without_token(problem)}")
    reason = "the hub does not answer"
    if isinstance(problem, errors.OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE forbids asking the hub, and the cache does not hold all of it"
    return ConnectionError(f"{place}: {reason} ({type(problem).__name__})")


def _one_line_without_token(text: object) -> str:
    """Return a text cut to one line, with the token masked should the hub have repeated it."""
    from huggingface_hub import get_token

    line = " ".join(str(text).split())
    token = get_token()
    # Masked before the line is cut, so that no part of the token is left at its end.
    return (line.replace(token, "***") if token else line)[:LONGEST_MESSAGE]
