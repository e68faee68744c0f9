"""What is patched and what may fuse, as data; and the names that the data is keyed by.

Standard library only: settings and entry points read these names in processes that are not switched on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

FOLDER = Path(__file__).parent
Engine = Literal["vllm", "sglang"]
ENGINES: tuple[str, ...] = get_args(Engine)
Platform = Literal["cpu", "cuda", "rocm"]
PLATFORMS: tuple[str, ...] = get_args(Platform)
