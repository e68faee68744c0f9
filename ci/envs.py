"""Builds the environments of ci/matrix.yaml under .venvs/, resumably.

    python3 ci/envs.py [NAME ...]        all of them (but those on request), or the named ones
    python3 ci/envs.py --list            their names, one a line

Every step looks at what the environment really holds and does only what is missing, so a build that was cut
off goes on where it stopped and a complete one costs a second. Needs a Python with venv and pip, and nothing
else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venvs"
SHIM = "fse_patch_torchvision_shim"
STARTED = time.monotonic()

_INSTALLED = (
    "import importlib.metadata as m,json;print(json.dumps({d.name:d.version for d in m.distributions()}))"
)
# Runs in the environment: its own pip knows its own markers.
_REQUIRED = """
import importlib.metadata as m, json, sys
from pip._vendor.packaging.requirements import Requirement
out = []
for line in sys.argv[2:] or m.requires(sys.argv[1]) or []:
    r = Requirement(line)
    if r.marker is None or r.marker.evaluate({"extra": ""}):
        r.marker = None
        try:
            held = m.version(r.name)
        except m.PackageNotFoundError:
            held = None
        out.append([r.name, str(r), held is not None and r.specifier.contains(held, prereleases=True)])
print(json.dumps(out))
"""


class BuildError(Exception):
    """A step failed; the text holds what the user needs."""


def normal(name: str) -> str:
    """A distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


class Env:
    """One environment: its folder, its log and the record of finished steps."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = VENVS / name
        self.python = self.path / "bin" / "python"
        self.log = VENVS / f"{name}.log"
        self.stamp = self.path / "fse-patch-stamp.json"

    def run(self, *args: str) -> str:
        """Run the environment's Python and return its output."""
        done = subprocess.run([self.python, *args], capture_output=True, text=True)
        if done.returncode:
            raise BuildError(done.stderr.strip())
        return done.stdout

    def pip(self, *args: str) -> None:
        """Run pip; its output goes to the log, whose end is shown if it fails."""
        with self.log.open("a") as log:
            log.write(f"\n$ pip {' '.join(args)}\n")
            log.flush()
            command = [self.python, "-m", "pip", "--disable-pip-version-check", "--no-input", *args]
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT).returncode
        if code:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
            raise BuildError(f"pip failed (status {code}); the end of {self.log.relative_to(ROOT)}:\n{tail}")

    def installed(self) -> dict[str, str]:
        """Version of every distribution, by normalised name."""
        return {normal(n): v for n, v in json.loads(self.run("-c", _INSTALLED)).items() if n}

    def stamped(self) -> dict[str, str]:
        try:
            return dict(json.loads(self.stamp.read_text()))
        except (OSError, ValueError):
            return {}

    def step(self, title: str, inputs: str, holds: Callable[[], bool], do: Callable[[], None]) -> None:
        """Do a step unless its inputs are those of the stamp or the environment holds its result anyway."""
        key = hashlib.sha256(inputs.encode()).hexdigest()[:16]
        if self.stamped().get(title) == key and holds():
            return
        if title not in self.stamped() and holds():
            self._record(title, key)
            say(f"{self.name}: {title}: already there\n")
            return
        begun = time.monotonic()
        say(f"{self.name}: {title} ")
        with Dots():
            do()
        self._record(title, key)
        print(f" {time.monotonic() - begun:.0f} s", flush=True)

    def _record(self, title: str, key: str) -> None:
        self.stamp.write_text(json.dumps(self.stamped() | {title: key}, indent=1) + "\n")


class Dots:
    """A dot every 5 seconds, so that a long step does not look dead."""

    def __enter__(self) -> None:
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.done.wait(5):
            print(".", end="", flush=True)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:4.0f} s] {text}", end="", flush=True)


def matrix() -> dict[str, Any]:
    """ci/matrix.yaml, read by a small environment of its own where this Python lacks PyYAML."""
    file = ROOT / "ci" / "matrix.yaml"
    try:
        import yaml

        return dict(yaml.safe_load(file.read_text()))
    except ImportError:
        pass
    tools = Env(".tools")
    code = "import json,sys,yaml;print(json.dumps(yaml.safe_load(open(sys.argv[1]))))"
    if tools.python.exists():
        try:
            return dict(json.loads(tools.run("-c", code, str(file))))
        except BuildError:
            pass  # cut off while it was built
    VENVS.mkdir(exist_ok=True)
    venv.create(tools.path, with_pip=True, clear=True)
    tools.pip("install", "PyYAML")
    return dict(json.loads(tools.run("-c", code, str(file))))


def base(env: Env) -> None:
    """The bare environment, remade if its interpreter is gone or broken."""

    def works() -> bool:
        try:
            return env.python.exists() and bool(env.run("-m", "pip", "--version"))
        except (BuildError, OSError):
            return False

    if not works():
        shutil.rmtree(env.path, ignore_errors=True)
        VENVS.mkdir(exist_ok=True)
        begun = time.monotonic()
        say(f"{env.name}: virtual environment ")
        venv.create(env.path, with_pip=True)
        print(f" {time.monotonic() - begun:.0f} s", flush=True)


def project(env: Env) -> None:
    """The project with its tools; editable, so that the environment follows the source."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    here = f"import fse_patch,sys;sys.exit(not fse_patch.__file__.startswith({str(ROOT) + '/'!r}))"

    def holds() -> bool:
        if env.stamped().get("project") is None or not (env.path / "bin" / "fse-patch").exists():
            return False
        try:
            env.run("-P", "-c", here) if sys.version_info >= (3, 11) else env.run("-I", "-c", here)
        except BuildError:
            return False
        return True

    env.step("project", pyproject, holds, lambda: env.pip("install", "-e", ".[dev]"))


def shims(env: Env) -> None:
    """The torchvision shim, as a .pth line: it must reach every child process, with no variable set."""
    source = (ROOT / "ci" / "shims" / f"{SHIM}.py").read_text()
    site = Path(env.run("-c", "import sysconfig;print(sysconfig.get_path('purelib'))").strip())
    module, line = site / f"{SHIM}.py", site / f"{SHIM}.pth"

    def write() -> None:
        module.write_text(source)
        line.write_text(f"import {SHIM}\n")

    env.step("torchvision shim", source, lambda: line.exists() and module.read_text() == source, write)


def folders(env: Env, names: list[str]) -> None:
    """Folders of tests/shims on the environment's path, where the engine cannot start without them.

    A shim's ``_start`` module runs in every process: the engine's children must have it too.
    """
    if not names:
        return
    site = Path(env.run("-c", "import sysconfig;print(sysconfig.get_path('purelib'))").strip())
    file = site / "fse_patch_shims.pth"
    paths = [ROOT / "tests" / "shims" / name for name in names]
    starts = [f"import {module.stem}" for path in paths for module in sorted(path.glob("*_start.py"))]
    text = "\n".join([*map(str, paths), *starts]) + "\n"
    env.step(
        "shims",
        text,
        lambda: file.exists() and file.read_text() == text,
        lambda: [None, file.write_text(text)][0],
    )


def build_core(spec: dict[str, Any]) -> None:
    env = Env("core")
    base(env)
    wanted = [str(r) for r in spec["requirements"]]
    names = {normal(re.split(r"[=<>!~\[]", r)[0]): r.partition("==")[2] for r in wanted}

    def holds() -> bool:
        held = env.installed()
        return all(n in held and v in ("", held[n]) for n, v in names.items())

    env.step("torch", repr(wanted), holds, lambda: env.pip("install", *wanted))
    project(env)


def build_engine(spec: dict[str, Any]) -> None:
    env = Env(spec["name"])
    base(env)
    name, version = spec["distribution"], str(spec["version"])
    skip = {normal(s) for s in spec.get("skip", [])}
    vision = str(spec.get("torchvision", ""))

    listed = [str(r) for r in spec.get("requirements", [])]

    def required() -> list[tuple[str, bool]]:
        rows = json.loads(env.run("-c", _REQUIRED, "" if listed else name, *listed))
        return [(line, bool(met)) for r, line, met in rows if normal(r) not in skip]

    def holds(package: str, wanted: str) -> bool:
        return env.installed().get(normal(package)) == wanted

    env.step(
        f"{name} {version}",
        version,
        lambda: holds(name, version),
        # Without its dependencies: some of them are on the skip list.
        lambda: env.pip("install", "--no-deps", f"{name}=={version}"),
    )
    env.step(
        "its requirements",
        repr((version, sorted(skip), listed)),
        lambda: all(met for _, met in required()),
        lambda: env.pip("install", *(line for line, _ in required())),
    )
    if vision:
        env.step(
            f"torchvision {vision}",
            vision,
            lambda: holds("torchvision", vision),
            lambda: env.pip("install", "--no-deps", f"torchvision=={vision}"),
        )
        shims(env)
    folders(env, [str(s) for s in spec.get("shims", [])])
    project(env)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the names and build nothing")
    parser.add_argument("--engine", help="only the environments of this engine")
    args = parser.parse_args(argv)
    spec = matrix()
    builds: dict[str, Callable[[], None]] = {} if args.engine else {"core": lambda: build_core(spec["core"])}
    for row in spec["engines"]:
        if args.engine in (None, row["engine"]):
            builds[row["name"]] = lambda row=row: build_engine(row)  # type: ignore[misc]
    if args.list:
        print("\n".join(builds))
        return 0
    if unknown := [n for n in args.names if n not in builds]:
        parser.error(f"no environment {unknown[0]!r}; there are {', '.join(builds)}")
    asked_for = {row["name"] for row in spec["engines"] if row.get("on_request")}
    for name in args.names or [name for name in builds if name not in asked_for]:
        try:
            builds[name]()
        except BuildError as error:
            print(f"\n{name}: {error}", file=sys.stderr)
            return 1
        say(f"{name}: ready\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
