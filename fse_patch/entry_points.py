"""What the engines call in every process: the entry points vllm.general_plugins and sglang.srt.plugins.

Standard library only until switched on: both engines log and ignore an error while importing this file.
"""

from __future__ import annotations

import logging
import os
import sys

from .errors import FsePatchError, words
from .settings import ENABLE, engines_in, load

_announced: set[tuple[int, str]] = set()


def vllm() -> None:
    """Patch vLLM if FSE_PATCH names it; otherwise do nothing."""
    _run("vllm")


def sglang() -> None:
    """Patch SGLang if FSE_PATCH names it; otherwise do nothing."""
    _run("sglang")


def _run(engine: str) -> None:
    if not os.environ.get(ENABLE):
        return
    strict: bool | None = True
    try:
        if engine not in engines_in(os.environ[ENABLE]):
            return
        strict = load().strict
        from . import session

        report = session.apply(engine, serving=True)
    except Exception as error:
        # What comes out of `apply` unasked is bad input, such as a malformed policy; or a bug of ours, which
        # must not keep a server from its work: nothing is patched, nothing is built.
        known = isinstance(error, FsePatchError)
        line = str(error) if known else words(error)
        if strict or known:
            # SGLang catches Exception around plugins and would serve unpatched.
            print(f"fse_patch: {line}", file=sys.stderr, flush=True)
            raise SystemExit(getattr(error, "exit_status", FsePatchError.exit_status)) from error
        _announce(engine, logging.WARNING, f"{engine}: off: {line}; please report it")
        return
    if not report.on:
        _announce(engine, logging.WARNING, report.summary())
    # Patches that are in say nothing yet: the line that counts is the decision for the model.
    _logger().debug("%s", report)


def _announce(engine: str, level: int, line: str) -> None:
    """Say it once a process, though engines call plugins several times."""
    if (key := (os.getpid(), engine)) not in _announced:
        _announced.add(key)
        _logger().log(level, "%s", line)


def _logger() -> logging.Logger:
    """Return our logger, with a handler of its own where nobody set one: vLLM configures "vllm" alone."""
    logger = logging.getLogger("fse_patch")
    if logger.level == logging.NOTSET:
        logger.setLevel(min(logging.INFO, logging.getLogger().level or logging.INFO))
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        line = "%(levelname)s %(asctime)s [fse_patch %(process)d] %(message)s"
        handler.setFormatter(logging.Formatter(line))
        logger.addHandler(handler)
        logger.propagate = False
    return logger
