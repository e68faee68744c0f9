"""Write .github/workflows/ci.yml from ci/matrix.yaml, or check that it is up to date.

    python ci/workflow.py [--write]

Without --write, exit status 1 says that the file is out of date.
"""

from __future__ import annotations

import sys
from typing import Any

import yaml
from environment import ROOT
from envs import matrix
from generated import settle

FILE = ROOT / ".github" / "workflows" / "ci.yml"
HEAD = """# Made from ci/matrix.yaml by `python ci/workflow.py --write`: a job for each release of each
# engine, and the checks that need none. Every job runs what `make` runs here.
"""
PYTHON = "3.11"
CHECKOUT = {"uses": "actions/checkout@v4"}
SETUP = {"uses": "actions/setup-python@v5", "with": {"python-version": PYTHON}}


def job(title: str, *commands: str, minutes: int = 60) -> dict[str, Any]:
    """Return a job that runs commands in a fresh clone."""
    steps = [CHECKOUT, SETUP, *({"run": command} for command in commands)]
    return {"name": title, "runs-on": "ubuntu-latest", "timeout-minutes": minutes, "steps": steps}


def engine_job(row: dict[str, Any]) -> dict[str, Any]:
    """Return the job of one release: its environment, and the tests that `make test` runs there."""
    name = row["name"]
    return job(name, f"python ci/envs.py {name}", f"python ci/testing.py {name}", minutes=180)


def jobs(spec: dict[str, Any]) -> dict[str, Any]:
    """Return all jobs, by id."""
    kernels = next(row["name"] for row in spec["engines"] if row.get("kernels"))
    checks = {
        "lint": job("lint", "make lint"),
        "core": job("core tests", "make test-core"),
        "kernels": job(
            "kernels in Triton's interpreter", f"python ci/envs.py {kernels}", "python ci/testing.py kernels"
        ),
        "docs": job("docs", "make docs"),
        "wheel": job("sdist and wheel", "make wheel"),
    }
    # Ids of jobs have no dots.
    return checks | {row["name"].replace(".", "-"): engine_job(row) for row in spec["engines"]}


def page() -> str:
    """Return the text of the workflow."""
    spec: dict[str, Any] = {
        "name": "ci",
        "on": {"push": {"branches": ["main"]}, "pull_request": {}},
        "permissions": {"contents": "read"},
        "jobs": jobs(matrix()),
    }
    # Every step is written out: GitHub reads no anchors in older runners.
    dumper = yaml.SafeDumper
    dumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]
    # "on" is a key to GitHub, and a boolean to YAML 1.1, which would quote it.
    return HEAD + yaml.dump(spec, Dumper=dumper, sort_keys=False, width=110).replace("'on':", "on:", 1)


if __name__ == "__main__":
    raise SystemExit(settle(FILE, page(), "--write" in sys.argv[1:]))
