"""Real child processes: patched through the environment and the entry point, or untouched."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .conftest import Toy

# As engines do: discover, load, call. SGLang's way, which swallows Exception, is the harder one.
PLUGINS = """
import sys
from importlib.metadata import entry_points


def load_plugins(group):
    for plugin in {(p.name, p.value): p for p in entry_points(group=group)}.values():
        try:
            plugin.load()()
        except Exception:
            print("swallowed")
"""
SERVE = """
from {name} import plugins
plugins.load_plugins("vllm.general_plugins")
plugins.load_plugins("vllm.general_plugins")
from {name} import core
print(core.greet(), "wrapt" in sys.modules)
"""
SWALLOWING = """
try:
    from {name} import core
except Exception:
    pass
"""
LEDGER = """
import os
if os.environ.get("FSE_PATCH") not in (None, "", "0"):
    from pathlib import Path
    from fse_patch.adapters.patching import ledger
    ledger.FOLDER = Path(r"{folder}")
"""


@pytest.fixture
def served(engine: Toy) -> Toy:
    engine.write("plugins.py", PLUGINS)
    (engine.root / "sitecustomize.py").write_text(LEDGER.format(folder=engine.root / "ledger"))
    return engine


def child(toy: Toy, code: str = SERVE, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    code, *rest = (text.format(name=toy.name) for text in ("import sys\n" + code, *arguments))
    path = os.pathsep.join(filter(None, [str(toy.root), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code, *rest],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=toy.root,
    )


class TestOn:
    def test_patched_and_nothing_said_before_a_model_is_decided_for(self, served: Toy) -> None:
        done = child(served, FSE_PATCH="1")
        assert done.stdout == "hello! True\n"
        assert done.stderr == ""

    def test_a_child_of_apply(self, served: Toy) -> None:
        code = f"""
from pathlib import Path
import subprocess
import fse_patch
from fse_patch.adapters.patching import ledger

ledger.FOLDER = Path(r"{served.root / "ledger"}")
fse_patch.apply("vllm")
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
fse_patch.remove("vllm")
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""
        done = child(served, code.replace("{", "{{").replace("}", "}}"), "import sys\n" + SERVE)
        assert done.stdout == "hello! True\nhello False\n", done.stderr


class TestOff:
    @pytest.mark.parametrize("env", [{}, {"FSE_PATCH": ""}, {"FSE_PATCH": "0"}, {"FSE_PATCH": "sglang"}])
    def test_nothing_imported_changed_or_said(self, served: Toy, env: dict[str, str]) -> None:
        (served.root / "sitecustomize.py").unlink()
        done = child(served, **env)
        assert (done.stdout, done.stderr, done.returncode) == ("hello False\n", "", 0)

    def test_only_the_standard_library_is_loaded(self, served: Toy) -> None:
        (served.root / "sitecustomize.py").unlink()
        code = """
before = set(sys.modules)
from {name} import plugins
plugins.load_plugins("vllm.general_plugins")
loaded = set(m.partition(".")[0] for m in set(sys.modules) - before)
ours = sorted(m for m in sys.modules if m.startswith("fse_patch."))
print(sorted(loaded - set(sys.stdlib_module_names)), ours)
"""
        done = child(served, code)
        names = ("entry_points", "errors", "patches", "settings", "version")
        ours = [f"fse_patch.{name}" for name in names]
        assert done.stdout == f"{sorted(['fse_patch', served.name])} {ours}\n", done.stderr


class TestCannotBeApplied:
    @pytest.fixture
    def changed(self, served: Toy) -> Toy:
        served.write("core.py", "def greet():\n    return 'hallo'\n")
        return served

    def test_strict_stops_the_process_though_the_engine_swallows(self, changed: Toy) -> None:
        done = child(changed, FSE_PATCH="vllm", FSE_PATCH_STRICT="1")
        assert (done.stdout, done.returncode) == ("", 3)
        assert done.stderr.startswith("fse_patch: fingerprint: ")
        assert done.stderr.count("\n") == 1

    @pytest.mark.parametrize("env", [{}, {"FSE_PATCH_STRICT": "0"}])
    def test_otherwise_it_warns_and_stays_stock(self, changed: Toy, env: dict[str, str]) -> None:
        done = child(changed, FSE_PATCH="vllm", **env)
        assert done.stdout.startswith("hallo ")
        assert done.returncode == 0
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("WARNING ")
        assert (
            f"vllm 1.0: off: fingerprint: vllm 1.0: patch core:greet of {changed.name}.core:greet"
            in done.stderr
        )

    @pytest.mark.parametrize("strict", ["", "1"])
    def test_an_import_that_fails(self, served: Toy, strict: str) -> None:
        (served.root / f"{served.factories}.py").write_text(
            "def louder(original):\n    raise ValueError('boom')\n"
        )
        code = SERVE.replace("from {name} import core", SWALLOWING)
        done = child(served, code, FSE_PATCH="vllm", FSE_PATCH_STRICT=strict)
        assert (done.stdout, done.returncode) == (("", 2) if strict else ("hello True\n", 0))
        assert "boom" in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_bug_of_ours_is_reported_and_the_server_stays_stock(self, served: Toy) -> None:
        bug = "from fse_patch import session\nsession.apply = lambda *_, **__: 1 / 0\n"
        done = child(served, bug + SERVE, FSE_PATCH="vllm")
        assert done.stdout.startswith("hello ")
        assert "vllm: off: ZeroDivisionError: division by zero; please report it" in done.stderr
        strict = child(served, bug + SERVE, FSE_PATCH="vllm", FSE_PATCH_STRICT="1")
        assert (strict.stdout, strict.returncode) == ("", 2)

    @pytest.mark.parametrize("env", [{"FSE_PATCH": "vlm"}, {"FSE_PATCH": "1", "FSE_PATCH_STRICT": "perhaps"}])
    def test_malformed_setting_stops_the_process(self, served: Toy, env: dict[str, str]) -> None:
        (served.root / "sitecustomize.py").unlink()
        done = child(served, **env)
        assert (done.stdout, done.returncode) == ("", 2)
        assert done.stderr.count("\n") == 1


def test_import_is_light_and_fast() -> None:
    code = """
import time
start = time.perf_counter()
import fse_patch
took = time.perf_counter() - start
heavy = {"torch", "vllm", "sglang", "pydantic", "yaml", "wrapt", "typer", "rich", "packaging"}
print(took < 0.150, sorted(heavy & set(sys.modules)))
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", "import sys\n" + code], capture_output=True, text=True, timeout=60
        )
        for _ in range(3)
    ]
    # One slow run on a busy machine is no fault of the package.
    assert any(run.stdout == "True []\n" for run in runs), [run.stdout + run.stderr for run in runs]
    assert all(run.stdout.endswith("[]\n") for run in runs)
