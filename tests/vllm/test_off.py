"""Installed but not switched on, nothing of vLLM changes; switched on, exactly the ledger's targets do, and
after `remove` every original is back. By identity, over every module and class of vLLM that is loaded."""

from __future__ import annotations

import importlib
import json
import os
import sys
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

import pytest

from .processes import TIMEOUT, in_process

pytestmark = pytest.mark.every_release
# vLLM's own note that it has called its plugins.
NOTED = {"vllm.plugins.plugins_loaded"}
OFF = (None, "0", "sglang")
# Not patches: the names of engines stand there, and reading them costs nothing.
HEAVY = ("adapters", "fusion_core", "control", "runtime", "report")
ABSENT = object()
Places = dict[tuple[int, str], tuple[Any, Any]]


def patches() -> list[Any]:
    """Those of the ledger for the installed release."""
    from packaging.version import Version

    from fse_patch.adapters.patching import guards, ledger

    book = ledger.load("vllm")
    version = Version(guards.engine_version(book))
    # What a setting asks for is not put in without it.
    return [p for p in book.patches if p.is_for(version) and p.setting is None]


def import_models(modules: str) -> None:
    """Import every module of the ledger, and whatever vLLM and its other plugins load at their start."""
    from vllm.platforms import current_platform

    current_platform.is_cpu()  # found out at the first question
    for module in json.loads(modules):
        importlib.import_module(module)
    for plugin in entry_points(group="vllm.general_plugins"):
        if plugin.name != "fse_patch":
            plugin.load()()


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


def copies(places: Places) -> list[str]:
    """Where functions are held that the ledger replaces at their definition: other modules import them."""
    plain = [p.qualname for p in patches() if not p.imported and "." not in p.qualname]
    return sorted(f"{owner.__name__}.{name}" for (_, name), (owner, _) in places.items() if name in plain)


def call_plugins() -> None:
    """What every process of vLLM does at its start."""
    from vllm import plugins

    plugins.plugins_loaded = False
    plugins.load_general_plugins()


def probe_after_import(modules: str) -> dict[str, Any]:
    """Everything is imported, then the entry point is called: off, on, removed."""
    import_models(modules)
    finders, before, off = list(sys.meta_path), snapshot(), {}
    for value in OFF:
        os.environ.update({"FSE_PATCH": value} if value else {})
        call_plugins()
        off[str(value)] = sorted(changed(before, snapshot()))
    found = {
        "attributes": len(before),
        "called": "fse_patch.entry_points" in sys.modules,
        "off": off,
        "ours": sorted(m for m in sys.modules if m.startswith(tuple(f"fse_patch.{h}" for h in HEAVY))),
        "finders": sys.meta_path == finders,
        "copies": copies(before),
    }
    os.environ["FSE_PATCH"] = "vllm"
    call_plugins()
    found["on"] = sorted(changed(before, snapshot()))
    importlib.import_module("fse_patch").remove("vllm")
    found["removed"] = sorted(changed(before, snapshot()))
    return found


def probe_before_import(modules: str) -> dict[str, Any]:
    """Applied before the import of anything, then everything is imported, then removed; a child of each."""
    import fse_patch

    states = {p.state for p in fse_patch.apply("vllm").patches}
    loaded = any(m.startswith("vllm.") for m in sys.modules)
    import_models(modules)
    on = snapshot()
    child_on = child()
    fse_patch.remove("vllm")
    return {
        "states": sorted(states),
        "loaded": loaded,
        "changed": sorted(changed(snapshot(), on)),
        "copies": copies(on),
        "child": child_on,
        "child_after_remove": child(),
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


@pytest.fixture(scope="module")
def targets() -> set[str]:
    return {p.target.replace(":", ".") for p in patches()}


@pytest.fixture(scope="module")
def modules() -> str:
    references = {r for p in patches() for r in (p.target, p.source.reference)}
    return json.dumps(sorted({r.partition(":")[0] for r in references}))


@pytest.fixture(scope="module")
def after_import(modules: str) -> dict[str, Any]:
    return in_process(f"{__name__}:probe_after_import", modules)


@pytest.mark.parametrize("value", OFF)
def test_not_switched_on_nothing_changes(after_import: dict[str, Any], value: str | None) -> None:
    assert after_import["called"]
    assert after_import["attributes"] > 10_000
    assert set(after_import["off"][str(value)]) == NOTED
    assert after_import["ours"] == []
    assert after_import["finders"]


def test_switched_on_the_targets_change_and_nothing_else(
    after_import: dict[str, Any], targets: set[str]
) -> None:
    assert len(targets) > 20
    assert len(after_import["copies"]) > 3
    assert set(after_import["on"]) == targets | NOTED | set(after_import["copies"])


def test_removed_every_original_is_back(after_import: dict[str, Any]) -> None:
    # Also what was inherited: it would be an attribute of the class itself otherwise.
    assert set(after_import["removed"]) == NOTED


def test_before_import_is_the_same_and_children_follow(targets: set[str], modules: str) -> None:
    found = in_process(f"{__name__}:probe_before_import", modules)
    assert not found["loaded"]
    assert found["states"] == ["waiting for import"]
    assert set(found["changed"]) == targets | set(found["copies"])
    assert found["child"] == {"replaced": True, "on": True}
    assert found["child_after_remove"] == {"replaced": False, "on": None}
