"""Runs a command on the package as it installs: every part under the name fse_patch, in .cache/staged.

    python ci/staged.py mypy --config-file pyproject.toml -p fse_patch

In the tree the four code folders stand side by side, and pyproject.toml maps them under one name when it
builds. Tools that walk folders do not see that mapping. A staged copy follows the source, where an installed
one would go stale. Paths given to the command are those of the repository; the command's own folder is the
staged one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGED = ROOT / ".cache" / "staged"
PARTS = ("fusion_core", "adapters", "patches")


def stage() -> None:
    """Copy the package; copies keep their times, so that caches hold."""
    package = STAGED / "fse_patch"
    shutil.rmtree(package, ignore_errors=True)
    # A second checkout may link the parts into the package, to run its own ones beside this environment.
    leave = shutil.ignore_patterns("__pycache__", "*.pyc", *PARTS)
    shutil.copytree(ROOT / "fse_patch", package, ignore=leave)
    for part in PARTS:
        shutil.copytree(ROOT / part, package / part, ignore=leave)


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    stage()
    command = [str(ROOT / a) if a == "pyproject.toml" else a for a in sys.argv[1:]]
    tool = Path(sys.executable).parent / command[0]
    command[0] = str(tool) if tool.exists() else command[0]
    return subprocess.run(command, cwd=STAGED, env=os.environ | {"PYTHONPATH": str(STAGED)}).returncode


if __name__ == "__main__":
    sys.exit(main())
