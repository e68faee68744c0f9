"""Folders whose config.json declares a quantisation, for measuring a model that was published without it."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import FsePatchError

# Format of the experts -> what a config.json declares for it. Gates stay plain.
QUANTISATIONS: dict[str, dict[str, Any]] = {
    "fp8-block": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
    "fp8-tensor": {"quant_method": "fp8", "activation_scheme": "dynamic"},
}


@contextlib.contextmanager
def quantised_folder(folder: Path, quant: str) -> Iterator[Path]:
    """Yield a folder whose config.json has this quantisation in it; ``folder`` itself for "".

    Raises:
        FsePatchError: ``quant`` is none of `QUANTISATIONS`.
    """
    if not quant:
        yield folder
        return
    if quant not in QUANTISATIONS:
        raise FsePatchError(f"{quant!r} is none of {', '.join(QUANTISATIONS)}")
    config = json.loads((folder / "config.json").read_text())
    with tempfile.TemporaryDirectory(prefix="fse_patch_") as other:
        declared = {**config, "quantization_config": QUANTISATIONS[quant]}
        (Path(other) / "config.json").write_text(json.dumps(declared))
        yield Path(other)
