"""SGLang's own launcher with the patches on: python -m fse_patch.launch_sglang <any SGLang server arguments>.

Arguments, help text and exit status are those of ``python -m sglang.launch_server``. Processes that SGLang
spawns run this module again, under the name ``__mp_main__``: so they are patched without plugins too.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys

from fse_patch.entry_points import sglang
from fse_patch.errors import BAD_INPUT
from fse_patch.settings import ENABLE

LAUNCHER = "sglang.launch_server"


def launch() -> None:
    """Run SGLang's launcher as the main program."""
    # Of a module whose package is missing, find_spec raises.
    spec = importlib.util.find_spec(LAUNCHER) if importlib.util.find_spec("sglang") else None
    if spec is None or spec.origin is None:
        where = "install fse-patch into SGLang's own environment"
        print(f"fse_patch: {LAUNCHER} is not there; {where}", file=sys.stderr)
        raise SystemExit(BAD_INPUT)
    sys.argv[0] = spec.origin  # the name that its help text shows
    # sys.modules["__main__"] stays this module: children run what stands there.
    runpy.run_module(LAUNCHER, run_name="__main__", alter_sys=False)


if __name__ in ("__main__", "__mp_main__"):
    os.environ.setdefault(ENABLE, "sglang")
    if importlib.util.find_spec("sglang") is not None:
        sglang()
if __name__ == "__main__":
    launch()
