"""One engine's part of the demo; ci/demo.py runs it in that engine's environment.

    .venvs/<engine environment>/bin/python ci/demo_engine.py ENGINE FOLDER RESULT

Makes the checkpoints that FOLDER lacks, verifies each, and writes the reports to RESULT. What it prints is
the demo's progress.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from demo import MODELS
from tiny_checkpoints import make

from fse_patch.adapters.patching import guards, ledger
from fse_patch.fusion_core.decision.decide import decide_roles
from fse_patch.fusion_core.decision.outcome import Stock
from fse_patch.lab import verify

VOCAB = 256
# For one arm over all models. Less than the demo allows the engine: then the rows that ended are shown.
LIMIT = 800


def say(line: str) -> None:
    print(line, flush=True)


def main(engine: str, folder: Path, result: Path) -> None:
    jobs = []
    for model in MODELS[engine]:
        checkpoint = folder / f"{model.recipe}-{model.dtype}"
        if not checkpoint.exists():
            say(f"writing a tiny random {model.recipe}, {model.dtype}")
            # Renamed into place: the other engine must not take half a checkpoint.
            make(model.recipe, folder / "part", model.dtype).rename(checkpoint)
        decision = decide_roles(checkpoint, engine)["main"]
        if isinstance(decision, Stock):
            sys.exit(f"{model.recipe} does not fuse: {decision.reason.code}: {decision.reason.detail}")
        jobs.append(verify.VerifyJob(checkpoint, (decision,), VOCAB, model.dtype, model.engine_args))
    version = guards.engine_version(ledger.load(engine))
    reports = verify.verify(jobs, engine, version, timeout=LIMIT, progress=say)
    layers = [{"moe_layers": len(job.decisions[0].moe.layers)} for job in jobs]
    result.write_text(json.dumps([a | b for a, b in zip(layers, reports, strict=True)]))


if __name__ == "__main__":
    # As an exception, so that the engine's processes are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
