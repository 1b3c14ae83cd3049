"""The files of each split of a folder here or of a dataset on the hub, found as the datasets library finds them."""

import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prolu.activations.shards import Shard, ending_of
from prolu.activations.text_files import FILE_FORMATS, open_file
from prolu.runtime.files import first_line

logger = logging.getLogger(__name__)

TABLES = {*FILE_FORMATS, ".csv", ".tsv"}
"""The endings from which the format of a split is chosen. Text tables such as CSV are listed so that a licence file
beside them is not taken for the data, although they cannot be read here."""

PREFERRED = (".json", ".jsonl", ".arrow", ".parquet")
"""The order of preference for endings with equally many files, the most preferred last, as in `datasets`."""

ABOUT_THE_DATA = ("license", "licence", "copying", "notice", "readme", "changelog", "citation")
"""The first words of the names of text files that describe data, such as a licence. They are data only if a card lists
them."""

CLEARLY_LARGER = 10
"""A format with fewer files than another one is chosen if its files are this many times as large as all others
together."""

NOT_DATA = {"dataset_info.json", "state.json", "dataset_dict.json"}
"""The names of files that `datasets` writes beside the rows."""

NOT_FOUND = "neither a file, a folder, 'builtin', nor a dataset that the hub provides"
"""What is wrong with a name under which there is nothing."""


def splits_of_repository(source: str, config: str) -> dict[str, list[Shard]]:
    """Return the splits of a folder of files, of a cloned repository, or of a dataset on the hub.

    Raises:
        ValueError: there is no such repository or configuration, its card cannot be used, or its files cannot be read.
    """
    folder = Path(source)
    card = _configs_of_card(folder) if os.path.isdir(source) else None
    if card == []:  # a folder without a card: its files tell the splits
        if config not in ("", "default"):
            raise ValueError(f"data_config {config!r}: {source} has no configurations; leave it out")
        found = _files_by_pattern(folder)
    else:
        found = _declared_files(source, config)
    splits = {}
    for split, files in found.items():
        if kept := _of_one_kind(source, str(split), [str(file) for file in files], is_declared=bool(card)):
            splits[str(split)] = [open_file(file) for file in kept]
    if not splits:
        raise ValueError(f"data {source!r}: no file of a known kind; known: {', '.join(FILE_FORMATS)}")
    return splits


def _files_by_pattern(folder: Path) -> Mapping[Any, Iterable[Any]]:
    """Return the files of a folder by split.

    Names such as train-00000.parquet or test/a.jsonl tell the split, as they do on the hub; other files are `train`.
    """
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        return DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    except (EmptyDatasetError, FileNotFoundError):
        return {}


def _configs_of_card(folder: Path) -> list[Any]:
    """Return the configurations that a folder's card (README.md) declares; none if there is no card.

    Raises:
        ValueError: the card cannot be read, or names files outside the folder.
    """
    import yaml
    from huggingface_hub import metadata_load

    configs = []
    try:
        if (folder / "README.md").is_file():
            configs = (metadata_load(folder / "README.md") or {}).get("configs") or []
        if (folder / ".huggingface.yaml").is_file():  # takes the place of the card's own
            own = yaml.safe_load((folder / ".huggingface.yaml").read_text(encoding="utf-8")) or {}
            configs = own.get("configs") or configs
    except (OSError, ValueError, AttributeError, TypeError, RecursionError, yaml.YAMLError) as problem:
        raise ValueError(f"data {str(folder)!r}: its card cannot be read ({first_line(problem)})") from None
    if not isinstance(configs, list):
        raise ValueError(f"data {str(folder)!r}: 'configs' in its card is no list")
    for pattern in _texts_in(configs):
        # A card from an unknown author must not make this machine download anything, or read files outside the folder.
        if "://" in pattern or "::" in pattern or os.path.isabs(pattern) or ".." in Path(pattern).parts:
            raise ValueError(f"data {str(folder)!r}: its card names {pattern!r}, which is not in the folder")
    return configs


def _texts_in(value: Any) -> Iterable[str]:
    """Return all texts in nested lists and objects; an object that occurs several times is visited once."""
    texts = []
    seen: set[int] = set()
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            texts.append(one)
        elif isinstance(one, list | dict) and id(one) not in seen:
            seen.add(id(one))
            todo += one.values() if isinstance(one, dict) else one
    return texts


def _declared_files(source: str, config: str) -> Mapping[Any, Iterable[Any]]:
    """Return the files of a configuration by split, as a repository declares them, here or on the hub."""
    from datasets import get_dataset_config_names, get_dataset_default_config_name, load_dataset_builder

    is_folder = os.path.isdir(source)
    # An absolute path: a folder called `text` or `json` would be taken for a format of that name.
    place = str(Path(source).absolute()) if is_folder else source
    if is_folder and (Path(place) / f"{Path(place).name}.py").exists():
        raise ValueError(f"data {source!r}: a dataset with a script, and scripts are not run; pass its files")
    try:
        names = get_dataset_config_names(place)
        chosen = config or get_dataset_default_config_name(place) or ""
        if chosen in names:
            # Nothing is kept: `datasets` makes a folder in its cache, which may not be writable.
            with tempfile.TemporaryDirectory() as cache:
                return dict(load_dataset_builder(place, chosen, cache_dir=cache).config.data_files or {})  # pyright: ignore[reportArgumentType, reportCallIssue]
    except Exception as problem:  # the hub client raises many kinds; each means that the dataset cannot be had
        reason = first_line(problem)
        what = "its card cannot be resolved" if is_folder else NOT_FOUND
        raise ValueError(f"data {source!r}: {what} ({reason})") from None
    listed = ", ".join(names)
    if config:
        raise ValueError(f"data_config {config!r}: {source} has {listed}")
    raise ValueError(f"data_config: {source} has several configurations; name one of {listed}")


def _of_one_kind(source: str, split: str, files: Sequence[str], *, is_declared: bool) -> list[str]:
    """Return the files of a split that are of its format, in the order of their names; the rest is named in a warning.

    The format is that of most files, as in `datasets`, or one that holds nearly all bytes.

    Raises:
        ValueError: The files of another format are larger, so that the format cannot be told.
    """
    files = sorted(file for file in files if Path(file).name not in NOT_DATA)
    tables = [file for file in files if ending_of(file) in TABLES]
    about = [] if is_declared else [file for file in tables if _is_about_the_data(file)]
    data = [file for file in tables if file not in about] or tables
    if not data:
        return []
    by_ending = {ending: [f for f in data if ending_of(f) == ending] for ending in {ending_of(f) for f in data}}
    sizes = {ending: _bytes_of(named) for ending, named in by_ending.items()}
    chosen = max(by_ending, key=lambda e: (len(by_ending[e]), PREFERRED.index(e) if e in PREFERRED else -1, e))
    largest = max(sizes, key=lambda e: (sizes[e], e == chosen))
    if sizes[largest] >= CLEARLY_LARGER * (sum(sizes.values()) - sizes[largest]):
        chosen = largest  # one large table is the data, and not the two small files beside it
    if chosen not in FILE_FORMATS or chosen != largest:
        found = ", ".join(f"{len(by_ending[e])} {e} ({sizes[e]:,} bytes)" for e in sorted(sizes))
        raise ValueError(
            f"data {source!r}, split {split}: files of several formats or of none that is known ({found}); pass one "
            f"file or a folder of one format; known: {', '.join(FILE_FORMATS)}"
        )
    kept = by_ending[chosen]
    if others := [
        os.path.relpath(file, source) if Path(file).exists() else file for file in tables if file not in kept
    ]:
        logger.warning(
            "data %s, split %s: %d %s files are read, and not %s", source, split, len(kept), chosen, ", ".join(others)
        )
    return kept


def _is_about_the_data(file: str) -> bool:
    return ending_of(file) == ".txt" and Path(file).name.lower().startswith(ABOUT_THE_DATA)


def _bytes_of(files: Iterable[str]) -> int:
    """Return the size of local files together; of files on the hub, 0."""
    return sum(Path(file).stat().st_size for file in files if Path(file).is_file())
