"""The launch wrapper with a patch that fails in the processes that SGLang spawns, and nowhere else."""

from __future__ import annotations

import os
from typing import Any

from fse_patch.entry_points import sglang
from fse_patch.launch_sglang import launch


def broken(_: Any) -> Any:
    raise RuntimeError("a factory that fails in the child alone")


if __name__ == "__mp_main__":
    from fse_patch.adapters.sglang import build

    build.initialize_model = broken
if __name__ in ("__main__", "__mp_main__"):
    os.environ.setdefault("FSE_PATCH", "sglang")
    sglang()
if __name__ == "__main__":
    launch()
