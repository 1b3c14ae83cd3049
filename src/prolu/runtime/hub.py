"""The Hugging Face hub: files fetched and sent, and its refusals as one sentence each, which never holds the token."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

MAIN = "main"
"""The branch that a repository begins with."""

PLACE = re.compile(r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<folder>[\w.+-]+(?:/[\w.+-]+)*))?/?")


LONGEST = 300
"""Characters of what the hub said that are repeated."""

REFUSALS = set(range(400, 500)) - {408, 429}
"""Statuses that the same request would get again."""

BY_STATUS = {
    401: "the hub does not take your token; run `hf auth login`",
    403: "your token may not do that there",
    412: "somebody else has committed there since; run the command again",
}


class HubError(ValueError):
    """The hub refused, or holds something else than was asked for."""


class Place(NamedTuple):
    """Where something lies on the hub."""

    repo: str
    """As the hub names it, user/repo."""
    folder: str
    """In the repository; empty for all of it."""

    def __str__(self) -> str:
        return f"{self.repo}/{self.folder}" if self.folder else self.repo


class Head(NamedTuple):
    """What a revision of a repository holds, before something is sent there."""

    sha: str
    """Its commit; empty if there is no such repository yet."""
    has_revision: bool
    """Whether there is such a branch; else this is the main one."""
    private: bool
    files: frozenset[str]


class Sent(NamedTuple):
    """What became of files that were sent."""

    url: str
    """Page of the commit, or of the last one if there was nothing to commit."""
    changed: bool
    """Whether there is a new commit: files that are there already, byte for byte, are left out of it."""


def place_of(name: str) -> Place:
    """What `user/repo` or `user/repo/FOLDER` names.

    Raises:
        ValueError: it is neither.
    """
    found = PLACE.fullmatch(name)
    if found is None or ".." in name:
        raise ValueError(f"{name!r}: no place on the hub; write user/repo, or user/repo/FOLDER")
    return Place(found["repo"], found["folder"] or "")


def fetch(place: Place, revision: str, patterns: Sequence[str]) -> Path:
    """Downloads the files of a place that match any pattern into the hub's own cache, where they are not there yet.

    Args:
        patterns: of names under the place's folder; * also stands for what holds a /.

    Returns:
        Its folder in the cache, if anything matched: read it, and leave it as it is.

    Raises:
        HubError: no such repository or revision, or no access.
        ConnectionError: the hub does not answer, and the cache has not all of it.
    """
    from huggingface_hub import snapshot_download

    prefix = f"{place.folder}/" if place.folder else ""
    with _answered(place):
        root = snapshot_download(place.repo, revision=revision, allow_patterns=[prefix + p for p in patterns])
    return Path(root) / place.folder


def look(place: Place, revision: str) -> Head:
    """What is there before something is sent.

    Raises:
        HubError: no token here, or the hub does not take it.
        ConnectionError: the hub does not answer.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if get_token() is None:
        raise HubError(f"{place}: nobody is logged in to the hub here; run `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="prolu")
    with _answered(place):
        try:
            return _head(api.repo_info(place.repo, revision=revision), has_revision=True)
        except RevisionNotFoundError:
            return _head(api.repo_info(place.repo), has_revision=False)
        except RepositoryNotFoundError:
            api.whoami()  # a token that is no good gets the same answer, and would be refused later
            return Head("", False, True, frozenset())


def send(
    place: Place, head: Head, files: Mapping[str, bytes | Path], message: str, *, revision: str, private: bool
) -> Sent:
    """Makes the repository and the branch if they are not there, and puts all files there in one commit.

    Args:
        head: what `look` found; if somebody else has committed since, nothing is sent.
        files: by their names in the repository.
        private: whether a new repository is.

    Raises:
        HubError: the hub refused.
        ConnectionError: the hub does not answer any more.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="prolu")
    with _answered(place):
        sha = head.sha
        if not sha:
            api.create_repo(place.repo, private=private or None)
            sha = _head(api.repo_info(place.repo), has_revision=True).sha
        if revision != MAIN and not head.has_revision:
            api.create_branch(place.repo, branch=revision, revision=sha)
        # `upload_folder` would cut a large folder into several commits.
        adds = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
        done = api.create_commit(place.repo, adds, commit_message=message, revision=revision, parent_commit=sha)
    return Sent(str(done.commit_url), done.oid != sha)


def _head(info: Any, *, has_revision: bool) -> Head:
    return Head(info.sha, has_revision, bool(info.private), frozenset(f.rfilename for f in info.siblings or ()))


@contextmanager
def _answered(place: Place) -> Iterator[None]:
    """What huggingface_hub raises, as a sentence; nothing that it raised is kept, since requests hold the token."""
    from huggingface_hub import errors

    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # its warnings are said here, in the same words as all else

    transport: type[Exception] = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]
    try:
        yield
    except errors.LocalEntryNotFoundError as problem:  # its cause is what happened
        raise _as_ours(place, problem.__cause__ or problem) from None
    except (ValueError, errors.OfflineModeIsEnabled, transport, RuntimeError) as problem:  # the last is hf_xet's
        raise _as_ours(place, problem) from None
    finally:
        log.setLevel(level)


def _as_ours(place: Place, problem: BaseException) -> Exception:
    """One sentence for each way in which the hub does not do what it is asked."""
    from huggingface_hub import errors

    refusals = (
        (errors.RevisionNotFoundError, "no such revision there"),
        (errors.GatedRepoError, "gated; ask for access on its page first"),
        (
            errors.RepositoryNotFoundError,
            "no such repository on the hub, or a private one not open to your token",
        ),
    )
    for kind, words in refusals:
        if isinstance(problem, kind):
            return HubError(f"{place}: {words}")
    status = problem.response.status_code if isinstance(problem, errors.HfHubHTTPError) else 0
    if status in REFUSALS:
        words = BY_STATUS.get(status, f"the hub refused with status {status}")
        return HubError(f"{place}: {words}{_said(problem)}")
    if isinstance(problem, ValueError):
        return HubError(f"{place}: {_plain(problem)}")
    words = f"the hub answered with status {status}; try later" if status else "the hub does not answer"
    if isinstance(problem, errors.OfflineModeIsEnabled):
        words = "HF_HUB_OFFLINE forbids to ask the hub, and not all of it is in the cache"
    return ConnectionError(f"{place}: {words}" + ("" if status else f" ({type(problem).__name__})"))


def _said(problem: Any) -> str:
    """What the hub said, if it did."""
    words = _plain(problem.server_message or "")
    return f" ({words})" if words else ""


def _plain(text: object) -> str:
    """On one line, and without the token, should somebody have repeated it."""
    from huggingface_hub import get_token

    line, token = " ".join(str(text).split()), get_token()
    return (line.replace(token, "***") if token else line)[:LONGEST]
