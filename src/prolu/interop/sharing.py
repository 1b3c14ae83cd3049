"""Studies on the Hugging Face hub: what of them goes there, and what comes back."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from prolu.evaluation.document_sums import DOCUMENTS_FILE
from prolu.evaluation.latents import LATENTS_FILE
from prolu.runtime.files import check_can_be_folder, remove, rename_folder, write_flushed
from prolu.runtime.hub import MAIN, Head, HubError, Place, Sent, fetch, look, place_of, send
from prolu.sae.autoencoder import CONFIG_FILE, SAE, WEIGHTS_FILE
from prolu.studies.folder import CURVES_FILE, RESULTS_FILE, STUDY_FILE, read_study
from prolu.studies.results import Results

CARD_FILE, FIGURE_FILE = "README.md", "frontier.png"

SAE_FILES = (CONFIG_FILE, WEIGHTS_FILE, CURVES_FILE, DOCUMENTS_FILE, LATENTS_FILE)
"""Of a run's folder: no checkpoints, no state to go on from."""

PULLED = {*SAE_FILES, STUDY_FILE, RESULTS_FILE, CARD_FILE, FIGURE_FILE}
"""Names of what is taken from a repository, whatever else lies there."""


class Parcel(NamedTuple):
    """What would be sent, and where."""

    place: Place
    files: dict[str, bytes | Path]
    """By their names in the repository."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in self.files.items()}

    @property
    def card(self) -> str:
        """The model card."""
        return bytes(self.files[CARD_FILE]).decode()  # pyright: ignore[reportArgumentType]

    @property
    def saes(self) -> list[str]:
        """Folders of SAEs."""
        return _saes(self.files)


def pack(folder: str | Path, repo: str, *, license: str = "mit") -> Parcel:
    """A study, a run of one, or the studies that a sweep at several hooks wrote, as the hub is to have it.

    Absolute paths, of a language model's folder or of a text, are cut down to their last part.

    Args:
        folder: theirs.
        repo: user/repo.
        license: of what is sent, as the hub names licences.

    Raises:
        ValueError: no study or run there, none finished, an SAE that does not load, or not the name of a repository.
    """
    from prolu.interop.model_card import card_of
    from prolu.studies.results import records_of

    place, found = place_of(repo), _studies(Path(folder))
    if place.folder:
        raise ValueError(f"{repo!r}: a repository holds one study; write user/repo")
    records = records_of(found)
    files: dict[str, bytes | Path] = {}
    shapes: set[tuple[int, int]] = set()
    for results in found:
        prefix = f"{results.folder.name}/" if len(found) > 1 else ""
        files[prefix + STUDY_FILE] = _public(results.folder / STUDY_FILE)
        files[prefix + RESULTS_FILE] = "".join(json.dumps(r) + "\n" for r in results.records).encode()
        for run in results.runs:
            sae = run.load().config
            shapes.add((sae.d_in, sae.d_sae))
            for file in (run.folder / name for name in SAE_FILES if (run.folder / name).is_file()):
                files[f"{prefix}{run.folder.name}/{file.name}"] = _public(file) if file.name == CONFIG_FILE else file
    files[FIGURE_FILE] = _figure(records)
    configs = [_without_paths(read_study(results.folder)) for results in found]
    files[CARD_FILE] = card_of(configs, shapes, records, place.repo, FIGURE_FILE, license).encode()
    return Parcel(place, files)


def check_push(parcel: Parcel, *, revision: str, private: bool) -> Head:
    """Asks the hub what is there.

    Raises:
        ValueError: nobody is logged in, the repository is public and was to be private, or it holds other SAEs.
        ConnectionError: the hub does not answer.
    """
    head = look(parcel.place, revision)
    if private and not head.private:
        raise HubError(f"{parcel.place}: is there already, and public; make it private on its page, or push elsewhere")
    if others := sorted(set(_saes(head.files)) - set(parcel.saes)):
        raise HubError(
            f"{parcel.place}: holds SAEs that are not among these ({', '.join(others[:3])}); push the whole study, or "
            "to another repository"
        )
    return head


def deliver(parcel: Parcel, head: Head, *, revision: str, private: bool) -> Sent:
    """Sends it, in one commit. Errors are those of `hub.send`."""
    n = len(parcel.saes)
    message = f"{n} sparse autoencoder{'s' if n > 1 else ''}, by prolu"
    return send(parcel.place, head, parcel.files, message, revision=revision, private=private)


def push(
    folder: str | Path, repo: str, *, private: bool = False, revision: str = MAIN, license: str = "mit"
) -> Sent:  # fmt: skip
    """Sends a study, or a run of one, to the hub: one folder an SAE, results, figure and model card, in one commit.

    The token is huggingface_hub's own (`hf auth login`, or HF_TOKEN). What is there already is not sent again.

    Args:
        folder: of a study, of a run, or of the studies at several hooks.
        repo: user/repo; made if it is not there.
        private: whether a new repository is.
        revision: branch; made from the main one if it is not there.
        license: of what is sent, as the hub names licences.

    Raises:
        ValueError: nothing there to push, or the hub refused.
        ConnectionError: the hub does not answer. There is no commit then.
    """
    parcel = pack(folder, repo, license=license)
    head = check_push(parcel, revision=revision, private=private)
    return deliver(parcel, head, revision=revision, private=private)


def pull(place: str, out: str | Path, *, revision: str = MAIN) -> list[str]:
    """Takes a study, or a folder of one, from the hub; returns the folders of its SAEs, "" for `out` itself.

    Args:
        place: user/repo, or user/repo/FOLDER.
        out: a new folder, which then holds what the place holds. One that holds the same bytes is left alone.
        revision: branch, tag or commit.

    Raises:
        ValueError: nothing of ours there, an SAE that does not load, or another folder in the way.
        ConnectionError: the hub does not answer. Nothing is written then.
    """
    files = fetch_checked(place, revision)
    if not holds_same(files, Path(out)):
        unpack(files, Path(out))
    return _saes(files)


def fetch_checked(place: str, revision: str) -> dict[str, Path]:
    """Files of a place by name, as they lie in the hub's cache, once every SAE has been loaded.

    Raises:
        ValueError, ConnectionError: as `pull`.
    """
    where = place_of(place)
    root = fetch(where, revision, [f"*{name}" for name in sorted(PULLED)])
    files = {str(f.relative_to(root)): f for f in sorted(root.rglob("*")) if f.name in PULLED and f.is_file()}
    if not _saes(files):
        raise HubError(f"{where}: no SAEs there (no {WEIGHTS_FILE} at revision {revision!r})")
    try:
        for name in _saes(files):
            SAE.load(root / name)
        for file in (f for f in files.values() if f.name == RESULTS_FILE):
            for run in Results.load(file.parent).runs:
                if not (run.folder / WEIGHTS_FILE).is_file():
                    raise ValueError(f"{file}: names a run that is not there, {run.folder.name}")
    except ValueError as problem:
        raise HubError(f"{where}: {str(problem).replace(f'{root}/', '')}") from None
    return files


def holds_same(files: Mapping[str, Path], out: Path) -> bool:
    """Whether a folder holds these very files already, whatever else.

    Raises:
        ValueError: it holds something else.
    """
    check_can_be_folder(out)
    if not out.exists() or not any(out.iterdir()):
        return False
    for name, file in files.items():
        if not (out / name).is_file() or (out / name).read_bytes() != file.read_bytes():
            raise ValueError(f"out {str(out)!r}: holds something else ({name} differs); choose another folder")
    return True


def unpack(files: Mapping[str, Path], out: Path) -> None:
    """Copies files into a new folder, which is whole or not there."""
    partial = out.with_name(f".{out.name}.partial")
    remove(partial)
    try:
        for name, file in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            write_flushed(partial / name, file.read_bytes())
        rename_folder(partial, out)
    except OSError:
        remove(partial)
        raise


def _studies(folder: Path) -> list[Results]:
    """What a folder holds: a study, a run (as its study with that run alone), or a study a hook."""
    if (folder / WEIGHTS_FILE).is_file():
        study = Results.load(folder.resolve().parent)
        records = [r for r in study.records if r["run_id"] == folder.resolve().name]
        if not records:
            raise ValueError(f"{folder}: an SAE without results; push a run that `prolu train` or `sweep` finished")
        return [replace(study, records=records)]
    if (folder / STUDY_FILE).is_file():
        return [Results.load(folder)]
    inside = sorted(file.parent for file in folder.glob(f"*/{RESULTS_FILE}"))
    at_hooks = [place for place in inside if read_study(place)["stream"].get("hook") == place.name]
    if not at_hooks:
        raise ValueError(f"{folder}: neither a study with finished runs nor a run of one")
    return [Results.load(place) for place in at_hooks]


def _public(file: Path) -> bytes:
    """A JSON file of ours without paths."""
    return (json.dumps(_without_paths(json.loads(file.read_text(encoding="utf-8"))), indent=1) + "\n").encode()


def _without_paths(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_paths(part) for key, part in value.items()}
        case list():
            return [_without_paths(part) for part in value]
        case str():
            kinds = (PurePosixPath, PureWindowsPath)
            return next((kind(value).name for kind in kinds if kind(value).is_absolute()), value)
    return value


def _figure(records: Any) -> bytes:
    from prolu.evaluation.comparison.figures import draw_frontier, save_figure

    with tempfile.TemporaryDirectory() as folder:
        save_figure(draw_frontier(records, "l0", "degradation"), file := Path(folder) / FIGURE_FILE)
        return file.read_bytes()


def _saes(names: Any) -> list[str]:
    """Folders that hold an SAE, "" for the one that they lie in."""
    return sorted(str(Path(name).parent) if "/" in name else "" for name in names if Path(name).name == WEIGHTS_FILE)
