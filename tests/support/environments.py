"""Environments in the repository's folder for packages that are not in this one; each is made once."""

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES_HERE = sysconfig.get_path("purelib")
"""The folder of the packages of the environment that runs this."""


def python_with(
    name: str, packages: Sequence[str], *, imports_from: Sequence[str | Path] = (), editable: bool = False,
    without: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Return the Python of the environment `name`, which holds these packages.

    Args:
        name: the environment's folder.
        packages: what pip installs.
        imports_from: folders whose packages it imports too.
        editable: whether this library is installed as well, with what it depends on.
        without: packages that come along and are removed again.

    Raises:
        LookupError: the environment has to be made, and PyPI does not answer.
    """
    folder = ROOT / name
    python, made = folder / "bin" / "python", folder / "installed"
    if made.exists() and made.read_text() == " ".join(packages):
        return python
    print(f"making {name} (minutes)", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [python, "-m", "pip"]
    first = packages[0].partition("==")[0]
    asked = subprocess.run([*pip, "index", "versions", first, "--retries", "1"], capture_output=True, check=False)
    if asked.returncode != 0:
        raise LookupError(f"PyPI does not answer, and {name} is not made yet")
    if imports_from:
        place = ["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        theirs = subprocess.run([python, *place], capture_output=True, text=True, check=True).stdout.strip()
        Path(theirs, "ours.pth").write_text("".join(f"{place}\n" for place in imports_from))
    ours = ["--editable", ROOT] if editable else []
    constraints = ["--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, "install", "--quiet", *constraints, *packages, *ours], check=True, timeout=1800)
    if without:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *without], check=True)
    made.write_text(" ".join(packages))
    return python
