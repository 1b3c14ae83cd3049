"""Install a wheel into a new environment outside the repository and use it: python scripts/try_wheel.py FILE.whl."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRAINING = ["--n-tokens", "20000", "--d-sae", "64", "--batch-size", "512", "--eval-tokens", "2048"]


def check_contents(wheel: Path) -> None:
    """Raise SystemExit unless the wheel holds exactly the files that the repository has of the package."""
    listed = subprocess.run(
        ["git", "ls-files", "src/prolu"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    wanted = {line.removeprefix("src/") for line in listed.splitlines()}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("prolu/")}
    if wanted != held:
        sys.exit(f"{wheel.name}: lacks {sorted(wanted - held)}, and holds {sorted(held - wanted)} besides")
    print(f"{wheel.name}: {len(held)} files of the package, as in the repository")


def main() -> None:
    """Install the wheel, ask for its version, train with it, and check the report."""
    wheel = Path(sys.argv[1]).resolve()
    check_contents(wheel)
    # Without what would lead the new environment's Python back to the repository.
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bin_folder = folder / "venv" / "bin"
        constraint = ["--constraint", str(ROOT / "constraints.txt")]
        for command in (
            [sys.executable, "-m", "venv", str(folder / "venv")],
            [str(bin_folder / "pip"), "install", "--quiet", *constraint, str(wheel)],
            [str(bin_folder / "prolu"), "--version"],
            [str(bin_folder / "prolu"), "train", *TRAINING, "--out", "runs/one"],
        ):
            subprocess.run(command, cwd=folder, check=True, env=own)
        page = folder / "runs/one/report.html"
        tables = list((folder / "runs/one").glob("*/features/index.html"))
        written = page.read_text()
        for asset in ("theme.css", "page.css", "page.js"):
            if (ROOT / "src/prolu/report" / asset).read_text()[:200] not in written:
                sys.exit(f"the report lacks {asset}")
        print(f"report of {page.stat().st_size:,} bytes, pages of latents of {len(tables)} SAE")


if __name__ == "__main__":
    main()
