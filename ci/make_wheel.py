"""Builds the sdist and the wheel into dist/, the wheel from the sdist, and checks what they hold.

    python3 ci/make_wheel.py [--out DIR]

Both are made of the files that git does not ignore, in a folder of their own: nothing that an earlier build
has left gets into them. Needs setuptools of 77 or later, as .venvs/core has it. Exit status 1 says what is
wrong.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from environment import ROOT

BUILD = "import sys, setuptools.build_meta as b; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
# Of the tree, what an installed package holds, and under which name.
PARTS = {
    "fse_patch": "fse_patch",
    "fusion_core": "fse_patch/fusion_core",
    "adapters": "fse_patch/adapters",
    "patches": "fse_patch/patches",
}
# Said of a tree as it should be.
HARMLESS = ("byte-compiling is disabled", "no previously-included files matching")
# Of the tree, what a work tree of git needs alone.
LEFT_OUT = (".ci/", ".gitignore", ".pre-commit-config.yaml")


class WheelError(Exception):
    """What is wrong with a build, in one line."""


def files() -> list[str]:
    """Return every file of the tree that git does not ignore; in an unpacked sdist, all that is there."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0 and done.stdout:
        return sorted(name for name in done.stdout.split("\0") if name and (ROOT / name).is_file())
    left = {"build", "dist", "__pycache__"}
    there = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    hidden = re.compile(r"\.(?!github/|dockerignore)")
    return sorted(str(p) for p in there if not left & set(p.parts) and not hidden.match(str(p)))


def copy(names: list[str], to: Path) -> None:
    """Copy files of the tree."""
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, to / name)


def build(kind: str, source: Path, out: Path) -> str:
    """Build an "sdist" or a "wheel" of a folder; returns what setuptools said.

    Raises:
        WheelError: it failed, or it warned.
    """
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    done = subprocess.run(command, cwd=source, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise WheelError(f"{kind}: {done.stdout.strip().splitlines()[-1]}")
    warned = [line for line in done.stdout.splitlines() if re.search(r"\bwarning\b|Warning:|Deprecat", line)]
    if warned := [line for line in warned if not any(words in line for words in HARMLESS)]:
        raise WheelError(f"{kind}: setuptools warns: {warned[0].strip()}")
    return done.stdout


def installed(names: list[str]) -> set[str]:
    """Return the names that the package's files have once they are installed."""
    moved = ((name.partition("/")[0], name.partition("/")[2]) for name in names)
    return {f"{PARTS[top]}/{rest}" for top, rest in moved if top in PARTS}


def check(sdist: Path, wheel: Path, names: list[str]) -> None:
    """Compare what was built with the tree.

    Raises:
        WheelError: something is missing, or is there and should not be.
    """
    with tarfile.open(sdist) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    if missing := [name for name in names if name not in held and not name.startswith(LEFT_OUT)]:
        raise WheelError(f"{sdist.name}: {missing[0]} is missing")
    with zipfile.ZipFile(wheel) as packed:
        there = {name for name in packed.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    expected = installed(names)
    if wrong := sorted(expected ^ there):
        state = "is missing" if wrong[0] in expected else "is no file of the tree"
        raise WheelError(f"{wheel.name}: {wrong[0]} {state}")


def make(out: Path) -> tuple[Path, Path]:
    """Build and check both; returns sdist and wheel."""
    names = files()
    with tempfile.TemporaryDirectory(prefix="fse_patch_wheel_") as folder:
        tree, made, unpacked = (Path(folder) / part for part in ("tree", "made", "unpacked"))
        copy(names, tree)
        made.mkdir()
        build("sdist", tree, made)
        (sdist,) = made.glob("*.tar.gz")
        with tarfile.open(sdist) as packed:
            packed.extractall(unpacked, filter="data")
        (source,) = unpacked.iterdir()
        build("wheel", source, made)
        (wheel,) = made.glob("*.whl")
        check(sdist, wheel, names)
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy2(sdist, out)), Path(shutil.copy2(wheel, out))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    try:
        for path in make(parser.parse_args(argv).out):
            print(f"{path}: built")
    except WheelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
