"""Installed but not switched on, nothing of vLLM changes; switched on, exactly the ledger's targets do, and
after `remove` every original is back. By identity, over every module and class of vLLM that is loaded."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT = 240.0
# vLLM's own note that it has called its plugins.
NOTED = {"vllm.plugins.plugins_loaded"}
HEAVY = ("adapters", "fusion_core", "patches", "control", "runtime", "report")
ABSENT = object()
Places = dict[tuple[int, str], tuple[Any, Any]]


def in_process(place: str, *arguments: str, **env: str | None) -> Any:
    """Result of ``module:function`` of this folder in a new process, whose children end with it.

    An environment variable that is None is not set; our own and those of other plugins never are.
    """
    module, function = place.split(":")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FSE_PATCH") and k != "PYTHONPATH"}
    code = (
        f"import json, sys; from {module} import {function} as probe; found = probe(*sys.argv[1:]); "
        "sys.stdout.write('\\nRESULT ' + json.dumps(found) + '\\n')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**clean, **{k: v for k, v in env.items() if v is not None}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    found = [line for line in output.splitlines() if line.startswith("RESULT ")]
    assert process.returncode == 0, output
    assert found, output
    return json.loads(found[-1].removeprefix("RESULT "))


def book() -> Any:
    from fse_patch.adapters import ledger

    return ledger.load("vllm")


def import_models() -> None:
    """Every module of the ledger: its targets and where their originals are defined."""
    from vllm.platforms import current_platform

    current_platform.is_cpu()  # vLLM finds its platform out at the first question
    references = {r for p in book().patches for r in (p.target, p.source.reference)}
    for module in sorted({r.partition(":")[0] for r in references}):
        importlib.import_module(module)


def snapshot() -> Places:
    """Owner and object of every attribute of vLLM's loaded modules and of the classes they define.

    The objects are kept: a new object in the place of one that is gone could have its id.
    """
    owners: dict[int, Any] = {}
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and (name == "vllm" or name.startswith("vllm.")):
            owners[id(module)] = module
    waiting = list(owners.values())
    while waiting:
        for value in list(vars(waiting.pop()).values()):
            if isinstance(value, type) and value.__module__.startswith("vllm") and id(value) not in owners:
                owners[id(value)] = value
                waiting.append(value)
    return {(i, name): (owner, v) for i, owner in owners.items() for name, v in list(vars(owner).items())}


def changed(before: Places, after: Places) -> set[str]:
    """Names of the attributes that are new, gone or another object; modules loaded since do not count."""
    known = {owner for owner, _ in before}
    names = set()
    for place in before.keys() | {p for p in after if p[0] in known}:
        owner, old = before.get(place) or (after[place][0], ABSENT)
        if after.get(place, (owner, ABSENT))[1] is not old:
            scope = f"{owner.__module__}." if isinstance(owner, type) else ""
            names.add(f"{scope}{getattr(owner, '__qualname__', owner.__name__)}.{place[1]}")
    return names


def call_plugins() -> None:
    """What every process of vLLM does at its start."""
    from vllm import plugins

    plugins.plugins_loaded = False
    plugins.load_general_plugins()


def ours_loaded() -> list[str]:
    return sorted(m for m in sys.modules if m.startswith(tuple(f"fse_patch.{h}" for h in HEAVY)))


def targets() -> list[str]:
    from packaging.version import Version

    from fse_patch.adapters import guards

    version = Version(guards.engine_version(book()))
    return sorted(p.target.replace(":", ".") for p in book().patches if p.is_for(version))


def probe_off(value: str) -> dict[str, Any]:
    """The process reads the ledger in another one, or our modules would be loaded by the test itself."""
    for module in json.loads(value):
        importlib.import_module(module)
    from vllm.platforms import current_platform

    current_platform.is_cpu()
    finders, before = list(sys.meta_path), snapshot()
    call_plugins()
    called = "fse_patch.entry_points" in sys.modules
    return {
        "changed": sorted(changed(before, snapshot())),
        "finders": sys.meta_path == finders,
        "ours": ours_loaded(),
        "called": called,
        "attributes": len(before),
    }


def probe_modules() -> list[str]:
    references = {r for p in book().patches for r in (p.target, p.source.reference)}
    return sorted({r.partition(":")[0] for r in references})


def probe_after_import() -> dict[str, Any]:
    """Switched on after the import of everything, through the entry point; then removed."""
    import fse_patch

    import_models()
    before = snapshot()
    call_plugins()
    on = changed(before, snapshot())
    fse_patch.remove("vllm")
    return {"on": sorted(on), "removed": sorted(changed(before, snapshot())), "targets": targets()}


def probe_before_import() -> dict[str, Any]:
    """Applied before the import of anything; a child of each state; then removed."""
    import fse_patch

    states = {p.state for p in fse_patch.apply("vllm").patches}
    loaded = any(m.startswith("vllm.") for m in sys.modules)
    import_models()
    on = snapshot()
    child_on = child()
    fse_patch.remove("vllm")
    off = snapshot()
    return {
        "states": sorted(states),
        "loaded": loaded,
        "changed": sorted(changed(off, on)),
        "child": child_on,
        "child_after_remove": child(),
        "targets": targets(),
    }


def child() -> dict[str, Any]:
    """A process that Python spawns for this one, as vLLM spawns its engine core and its workers."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=in_child, args=(send,))
    process.start()
    assert receive.poll(TIMEOUT / 2)
    found: dict[str, Any] = receive.recv()
    process.join(30)
    return found


def in_child(send: Any) -> None:
    import fse_patch

    call_plugins()
    module = importlib.import_module("vllm.model_executor.models.qwen2_moe")
    replaced = hasattr(module.FusedMoEFactory, "__wrapped__")
    send.send({"replaced": replaced, "on": fse_patch.status().get("vllm", {}).get("on")})


HERE = "tests.vllm.test_off"


@pytest.fixture(scope="module")
def modules() -> list[str]:
    return in_process(f"{HERE}:probe_modules")


@pytest.mark.parametrize("value", [None, "0", "sglang"])
def test_not_switched_on_nothing_changes(modules: list[str], value: str | None) -> None:
    found = in_process(f"{HERE}:probe_off", json.dumps(modules), FSE_PATCH=value)
    assert found["called"]
    assert found["attributes"] > 10_000
    assert set(found["changed"]) == NOTED
    assert found["ours"] == []
    assert found["finders"]


def test_switched_on_the_targets_change_and_nothing_else() -> None:
    found = in_process(f"{HERE}:probe_after_import", FSE_PATCH="vllm")
    assert len(found["targets"]) > 20
    assert set(found["on"]) == {*found["targets"], *NOTED}
    # Every original is back by identity, and what was inherited is in no class of its own any more.
    assert set(found["removed"]) == NOTED


def test_before_and_after_import_are_the_same_and_children_follow() -> None:
    found = in_process(f"{HERE}:probe_before_import")
    assert not found["loaded"]
    assert found["states"] == ["waiting for import"]
    assert found["changed"] == found["targets"]
    assert found["child"] == {"replaced": True, "on": True}
    assert found["child_after_remove"] == {"replaced": False, "on": None}
