"""The device of this machine, or of another one by its name: what can be known without torch."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ..errors import FsePatchError
from ..patches import PLATFORMS, Platform

NVIDIA = Path("/proc/driver/nvidia/gpus")
AMD = Path("/sys/class/kfd/kfd/topology/nodes")
CPU_INFO = Path("/proc/cpuinfo")
# Words of names that are of AMD; all other devices but a CPU are NVIDIA's.
_AMD_NAMES = re.compile(r"\b(AMD|Radeon|Instinct|MI\d{2,3}\w*|gfx\w+)\b", re.IGNORECASE)

# NVIDIA's of a compute capability below 8.9, as `adapters.expert_reading` asks it of the device.
_BEFORE_FP8 = re.compile(
    r"\b(A100|A800|A10G?|A16|A2|A30|A40|RTX A\d+|RTX [23]0[5-9]0|V100S?|T4G?|GTX|TITAN|Quadro|P100|P40|P4)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Args:
        name: as the driver gives it; "cpu" for none.
        here: it is of this machine, and was not given by name.
        amx: a CPU with matrix units, for which an engine may have kernels of its own.
    """

    platform: Platform
    name: str
    here: bool = False
    amx: bool = False

    @property
    def reads_fp8(self) -> bool:
        """Return whether kernels read weights in FP8 there, as far as the name says."""
        return self.platform != "cuda" or not _BEFORE_FP8.search(self.name)

    def __str__(self) -> str:
        if self.platform == "cpu":
            return "the CPU of this machine" if self.here else "a CPU"
        return f"{self.name}{' (this machine)' if self.here else ''}"


def named(name: str) -> Device:
    """Return the device of a name: "cpu", "NVIDIA H200", "H200", "MI300X"."""
    word = name.strip()
    if not word:
        raise FsePatchError("--device: give a name, such as cpu or 'NVIDIA H200'")
    if word.casefold() == "cpu":
        return Device("cpu", "cpu")
    if _AMD_NAMES.search(word):
        return Device("rocm", word)
    # Its driver writes the maker in front; people leave it out.
    return Device("cuda", word if word.upper().startswith("NVIDIA") else f"NVIDIA {word}")


def of_platform(platform_name: str) -> Device:
    """Return a device of a platform of which nothing else is known.

    Raises:
        FsePatchError: the platform is unknown.
    """
    if platform_name not in PLATFORMS:
        raise FsePatchError(f"unknown platform {platform_name!r}; use one of {', '.join(PLATFORMS)}")
    known = cast("Platform", platform_name)
    return Device(known, "cpu" if known == "cpu" else f"a {known} device (--device names it)")


def here() -> Device:
    """Return the first GPU of this machine, or its CPU; drivers are asked through their files."""
    for file in sorted(NVIDIA.glob("*/information")):
        match = re.search(r"^Model:\s*(.+)$", file.read_text(errors="replace"), re.MULTILINE)
        if match is not None:
            return Device("cuda", match[1].strip(), here=True)
    for file in sorted(AMD.glob("*/name")):
        name = file.read_text(errors="replace").strip()
        if name.startswith("gfx"):
            return Device("rocm", name, here=True)
    return Device("cpu", platform.machine(), here=True, amx=_has_amx())


def _has_amx() -> bool:
    try:
        return "amx_tile" in CPU_INFO.read_text(errors="replace")
    except OSError:
        return False
