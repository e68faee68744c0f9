"""The FSE_PATCH_* environment, read here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from .errors import FsePatchError
from .patches import ENGINES

ENABLE = "FSE_PATCH"
STRICT = "FSE_PATCH_STRICT"
ALLOW_UNMEASURED = "FSE_PATCH_ALLOW_UNMEASURED"
ALLOW_UNPROVEN = "FSE_PATCH_ALLOW_UNPROVEN"
VERIFY = "FSE_PATCH_VERIFY"
GATE_KERNEL = "FSE_PATCH_GATE_KERNEL"
LM_HEAD = "FSE_PATCH_LM_HEAD"
TUNED = "FSE_PATCH_TUNED"
POLICY = "FSE_PATCH_POLICY"
LAYOUT = "FSE_PATCH_LAYOUT"
MEASURE = "FSE_PATCH_MEASURE"
CACHE = "FSE_PATCH_CACHE"
CPU_THRESHOLD = "FSE_PATCH_CPU_THRESHOLD"
LAYOUT_CHOICES = ("auto", "merged", "paired")
MEASURE_CHOICES = ("auto", "always", "off")
VERIFY_CHOICES = ("off", "sample", "all")
LM_HEAD_CHOICES = ("off", "int8:g32")
# Variables that ask for patches which nobody gets otherwise.
SWITCHES = (GATE_KERNEL, LM_HEAD)
# Of every variable, what holds where it is not set.
DEFAULTS = {
    ENABLE: "0",
    STRICT: "",
    POLICY: "",
    VERIFY: "sample",
    ALLOW_UNMEASURED: "0",
    ALLOW_UNPROVEN: "0",
    TUNED: "",
    LAYOUT: "auto",
    MEASURE: "auto",
    CACHE: "",
    CPU_THRESHOLD: "0",
    GATE_KERNEL: "0",
    LM_HEAD: "off",
}
TRUE = {"1", "true", "on", "yes"}
_FALSE = {"", "0", "false", "off", "no"}


@dataclass(frozen=True)
class Settings:
    """Effective settings of this process.

    Args:
        engines: engines that FSE_PATCH switches on ("1" means all, or a comma list of names).
        strict: FSE_PATCH_STRICT: a patch that cannot be applied stops a server, and so do engine arguments
            that forbid to fuse. None where it is not set: a server runs unfused, `fse_patch.apply` raises.
        policy: FSE_PATCH_POLICY, path of the user's own policy file, or None.
        allow_unmeasured: FSE_PATCH_ALLOW_UNMEASURED: fuse where nothing shows that it is not slower.
        allow_unproven: FSE_PATCH_ALLOW_UNPROVEN: fuse quantised formats that were never compared there, or
            that the canary cannot read.
        verify: FSE_PATCH_VERIFY: layers that the canary proves before serving: "off", "sample" (one), "all".
        tuned: FSE_PATCH_TUNED, path of a table that `fse-patch tune` has written, or None.
        layout: FSE_PATCH_LAYOUT: "merged", "paired", or "auto", which picks.
        measure: FSE_PATCH_MEASURE: thresholds of paired layers are measured where the cache has none
            ("auto"), at each start ("always"), or never ("off").
        cache: FSE_PATCH_CACHE, folder of what was measured on this machine; None: the user's cache folder.
        cpu_threshold: FSE_PATCH_CPU_THRESHOLD, for tests: pairs on a CPU for up to so many tokens, from
            copies of the weights; 0: not.
        lm_head: FSE_PATCH_LM_HEAD: for few tokens the head runs from a copy in 8 bits ("int8:g32"), or not
            ("off").
        switches: those of `SWITCHES` that are on. FSE_PATCH_GATE_KERNEL: shared experts that stay unfused get
            their gate in one launch.
    """

    engines: frozenset[str] = frozenset()
    strict: bool | None = None
    policy: str | None = None
    allow_unmeasured: bool = False
    allow_unproven: bool = False
    verify: str = "sample"
    tuned: str | None = None
    layout: str = "auto"
    measure: str = "auto"
    cache: str | None = None
    cpu_threshold: int = 0
    lm_head: str = "off"
    switches: frozenset[str] = frozenset()

    @property
    def policy_file(self) -> Path | None:
        """Return ``policy`` as a path."""
        return Path(self.policy) if self.policy else None

    @property
    def cache_folder(self) -> Path:
        """Return the folder of what was measured on this machine; it may not be there yet."""
        if self.cache:
            return Path(self.cache)
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fse_patch"

    @property
    def tuned_file(self) -> Path | None:
        """Return ``tuned`` as a path."""
        return Path(self.tuned) if self.tuned else None


def _flag(env: Mapping[str, str], name: str, default: bool) -> bool:
    value = env.get(name)
    if value is None:
        return default
    if value.strip().lower() in TRUE:
        return True
    if value.strip().lower() in _FALSE:
        return False
    raise FsePatchError(f"{name}={value!r}: use 1 or 0")


def _choice(env: Mapping[str, str], name: str, default: str, choices: tuple[str, ...]) -> str:
    value = env.get(name, "").strip().lower() or default
    if value not in choices:
        raise FsePatchError(f"{name}={env[name]!r}: use {', '.join(choices[:-1])} or {choices[-1]}")
    return value


def _number(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "").strip() or "0"
    if not (value.isascii() and value.isdecimal()):
        raise FsePatchError(f"{name}={env[name]!r}: use a whole number, 0 or above")
    return int(value)


def engines_in(value: str) -> frozenset[str]:
    """Return the engines that a value of FSE_PATCH names.

    Raises:
        FsePatchError: the value is neither a switch nor a list of known engines.
    """
    word = value.strip().lower()
    if word in _FALSE:
        return frozenset()
    if word in TRUE:
        return frozenset(ENGINES)
    names = frozenset(n.strip() for n in word.split(",") if n.strip())
    if unknown := sorted(names - set(ENGINES)):
        raise FsePatchError(
            f"{ENABLE}={value!r}: unknown engine {unknown[0]!r}; use 1, 0 or a list of {', '.join(ENGINES)}"
        )
    return names


def origins(env: Mapping[str, str] | None = None) -> dict[str, dict[str, str]]:
    """Return each variable's value, and its origin: "default", "environment", "unset", or "unknown name".

    FSE_PATCH_STRICT is "unset": that is not the same as any value that it can have.
    """
    env = os.environ if env is None else env
    known = {
        name: {"value": env.get(name, default), "origin": "environment" if name in env else "default"}
        for name, default in DEFAULTS.items()
    }
    if STRICT not in env:
        known[STRICT] = {"value": "", "origin": "unset"}
    others = sorted(name for name in env if name not in DEFAULTS and _is_meant_for_us(name))
    return known | {name: {"value": env[name], "origin": "unknown name"} for name in others}


def _is_meant_for_us(name: str) -> bool:
    """Return whether a variable looks like one of ours: FSEPATCH, FSE_PATH, fse_patch."""
    if name.upper().startswith(ENABLE):
        return True
    return bool("FSE" in name.upper() and get_close_matches(name.upper(), DEFAULTS, 1, 0.85))


def load(env: Mapping[str, str] | None = None) -> Settings:
    """Read the settings from ``env`` (default: the process environment)."""
    env = os.environ if env is None else env
    lm_head = _choice(env, LM_HEAD, "off", LM_HEAD_CHOICES)
    asked = {GATE_KERNEL: _flag(env, GATE_KERNEL, False), LM_HEAD: lm_head != "off"}
    return Settings(
        engines=engines_in(env.get(ENABLE, "")),
        strict=_flag(env, STRICT, False) if env.get(STRICT) else None,
        policy=env.get(POLICY) or None,
        allow_unmeasured=_flag(env, ALLOW_UNMEASURED, False),
        allow_unproven=_flag(env, ALLOW_UNPROVEN, False),
        verify=_choice(env, VERIFY, "sample", VERIFY_CHOICES),
        tuned=env.get(TUNED) or None,
        layout=_choice(env, LAYOUT, "auto", LAYOUT_CHOICES),
        measure=_choice(env, MEASURE, "auto", MEASURE_CHOICES),
        cache=env.get(CACHE) or None,
        cpu_threshold=_number(env, CPU_THRESHOLD),
        lm_head=lm_head,
        switches=frozenset(name for name in SWITCHES if asked[name]),
    )
