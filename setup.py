"""What pyproject.toml cannot say: how a wheel stays clean, and how an editable install is found."""

from __future__ import annotations

import shutil

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel


class FreshBuild(build_py):
    """Begin with an empty build/lib: setuptools packs whatever an earlier build has left there."""

    def run(self) -> None:
        """Build."""
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class PathOfTheClone(editable_wheel):
    """Make the clone one entry of the path; fse_patch/__init__.py finds the parts that stand beside it.

    The import hook that setuptools would install comes after the folder that Python was started in: in the
    folder above, a clone named fse_patch would be taken for the package.
    """

    def finalize_options(self) -> None:
        """Leave out the parts that have another place."""
        moved = tuple(name for name in self.distribution.package_dir if "." in name)
        self.distribution.packages = [p for p in self.distribution.packages if not p.startswith(moved)]
        self.distribution.package_dir = {"": "."}
        super().finalize_options()


setup(cmdclass={"build_py": FreshBuild, "editable_wheel": PathOfTheClone})
