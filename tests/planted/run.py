"""Plants one fault after the other in one process of an engine.

    python -m tests.planted.run ENGINE JOBS RESULTS

A job is what `suite.job` makes. Its result says what ended the start, or why the model stayed stock; it is
empty where the model would have been served.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from contextlib import nullcontext as nothing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fse_patch.fusion_core.weights.samples import Comparison, SlotSample
from fse_patch.settings import VERIFY

from .plant import PLANTS


def serve(name: str, engine: Any, job: dict[str, Any]) -> str:
    """What ends the start of a model or its update, or why it is stock; empty if it would serve fused."""
    from fse_patch import runtime
    from fse_patch.adapters.role import CONSTRUCTED, constructed

    runtime.clear()
    os.environ[VERIFY] = job.get("verify", "sample")
    try:
        with without(job.get("without")), PLANTS[job["fault"]](name) if job["fault"] else nothing():
            model = engine.load(job["folder"], job["draft"])
            for fused_role in constructed():
                for layer in fused_role.layers.values():
                    engine.warm_up(layer.block, torch.zeros(2, fused_role.layout.hidden_size))
            if job["update"]:
                engine.update(model, weights(job["update"]))
            if CONSTRUCTED:
                return ""
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        CONSTRUCTED.clear()
    refused = [f"{d['reason']}: {d['detail']}" for d in runtime.decisions() if not d["fuse"]]
    return f"stock: {'; '.join(refused)}" if refused else "stock, and nothing said so"


def without(defence: str | None) -> Any:
    """A defence that is off."""
    return patch.object(SlotSample, "compare", lambda *_: Comparison()) if defence == "samples" else nothing()


def weights(folder: str) -> Any:
    from safetensors.torch import load_file

    return [item for file in sorted(Path(folder).glob("*.safetensors")) for item in load_file(file).items()]


def main(name: str, jobs: Path, results: Path) -> None:
    for module in ("tensors", "stream", "loading", "weighing", "routing", "building", "deciding"):
        importlib.import_module(f"tests.planted.{module}")
    engine = importlib.import_module(f"tests.planted.on_{name}").Engine(f"{results}.rendezvous")
    found = []
    for number, job in enumerate(json.loads(jobs.read_text())):
        start = time.monotonic()
        outcome = serve(name, engine, job)
        found.append({"outcome": outcome, "seconds": time.monotonic() - start})
        results.write_text(json.dumps(found))
        if number == 0:
            engine.settle()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
