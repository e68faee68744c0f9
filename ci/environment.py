"""One environment under .venvs/: its interpreter, its pip, and the record of what was done to it.

For ci/envs.py. Needs a Python with venv and pip, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import threading
import time
import venv
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venvs"
STARTED = time.monotonic()

# Of two versions of one distribution, the one that Python would import.
_INSTALLED = """
import importlib.metadata as m, json
print(json.dumps({d.name: d.version for d in reversed(list(m.distributions()))}))
"""


class BuildError(Exception):
    """A step failed; the text holds what the user needs."""


def normal(name: str) -> str:
    """Return a distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:4.0f} s] {text}", end="", flush=True)


class Env:
    """One environment: its folder, its log and the record of finished steps.

    With a ``base`` it is a folder of its own on top of that environment, whose packages, pip among them, come
    after its own.
    """

    def __init__(self, name: str, base: Env | None = None) -> None:
        self.name = name
        self.base = base
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
        """Return the version of every distribution, by normalised name."""
        return {normal(n): v for n, v in json.loads(self.run("-c", _INSTALLED)).items() if n}

    def site_packages(self) -> Path:
        return Path(self.run("-c", "import sysconfig;print(sysconfig.get_path('purelib'))").strip())

    def create(self) -> None:
        """Make the bare environment anew if its interpreter or its link to the base is gone or broken."""
        link = ""
        if self.base:
            # With the .pth files that lie there: the project and the shims work here as they do in the base.
            link = f"import site; site.addsitedir({str(self.base.site_packages())!r})\n"
        if self._works(link):
            return
        shutil.rmtree(self.path, ignore_errors=True)
        VENVS.mkdir(exist_ok=True)
        with Progress(f"{self.name}: virtual environment"):
            if self.base:
                # The base's interpreter: the compiled packages there are for no other.
                self.base.run("-m", "venv", "--copies", "--without-pip", str(self.path))
                self._link_file().write_text(link)
            else:
                venv.create(self.path, with_pip=True)

    def _link_file(self) -> Path:
        assert self.base
        return self.path / self.base.site_packages().relative_to(self.base.path) / "fse_patch_base.pth"

    def _works(self, link: str) -> bool:
        try:
            linked = not link or self._link_file().read_text() == link
            return linked and bool(self.run("-m", "pip", "--version"))
        except (BuildError, OSError):
            return False

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
        with Progress(f"{self.name}: {title}"):
            do()
        self._record(title, key)

    def _record(self, title: str, key: str) -> None:
        self.stamp.write_text(json.dumps(self.stamped() | {title: key}, indent=1) + "\n")


class Progress:
    """A line every 20 seconds, so that a long step does not look dead; several may be under way."""

    def __init__(self, title: str) -> None:
        self.title = title

    def __enter__(self) -> None:
        self.begun = time.monotonic()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.done.wait(20):
            say(f"{self.title} ...\n")

    def __exit__(self, error: object, *_: object) -> None:
        self.done.set()
        self.thread.join()
        if error is None:
            say(f"{self.title}: {time.monotonic() - self.begun:.0f} s\n")
