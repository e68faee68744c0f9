"""How a command ends: an error is one line and a status; with --json it is an object too."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, NoReturn

import typer

from ..errors import BAD_INPUT, INTERNAL, NO_OUTPUT, FsePatchError, RefusedError
from .output import print_json, printed_json

NAME = "fse-patch"
# Typer brings its own copy of click, or imports it: what it calls a wrong argument is its own business.
_UsageError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF}


def run(command: Any, arguments: list[str] | None = None) -> NoReturn:
    """Run a command and end the process with its status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = command(arguments, prog_name=NAME, standalone_mode=False)
        sys.stdout.flush()
    except SystemExit:
        raise
    except FsePatchError as error:
        reason = error.reason if isinstance(error, RefusedError) else None
        _end(arguments, str(error), error.exit_status, reason)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
            sys.exit(BAD_INPUT)
        _end(arguments, _words(error), BAD_INPUT)
    except typer.Abort:
        sys.exit(1)
    except OSError as error:
        if error.errno == errno.EPIPE or (error.errno in _NO_SPACE and error.filename is None):
            _cannot_write(error)
        _internal(arguments, error)
    except Exception as error:
        _internal(arguments, error)
    sys.exit(status if isinstance(status, int) else 0)


def _words(error: Any) -> str:
    """Return a line for a wrong argument, with the way to the help of its command."""
    message = str(error.format_message()).rstrip(".")
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else NAME
    return f"{message[:1].lower()}{message[1:]}; see {path} --help"


def _internal(arguments: list[str], error: Exception) -> NoReturn:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in NEEDED:
        where = f"{error.name} is not installed here: install fse-patch into the engine's environment"
        _end(arguments, f"{where}, and run {NAME} there", BAD_INPUT)
    words = f"internal error, please report it: {type(error).__name__}: {error}"
    _end(arguments, words, INTERNAL)


# What comes with an engine, and never with this package.
NEEDED = {"torch", "triton", "vllm", "sglang", "safetensors", "transformers"}


def _cannot_write(error: OSError) -> NoReturn:
    """End where stdout takes no more: nothing can be printed there, and Python must not try it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno != errno.EPIPE:
        print(f"{NAME}: cannot write the output: {error.strerror}", file=sys.stderr)
    sys.exit(NO_OUTPUT)


def _end(arguments: list[str], message: str, status: int, reason: str | None = None) -> NoReturn:
    line = " ".join(message.splitlines())
    if "--json" in arguments and not printed_json():
        report: dict[str, Any] = {"error": line, "exit_status": status}
        if reason is not None:
            detail = line.partition(": ")[2]
            report = {"fuse": False, "reason": reason, "detail": detail, **report}
        try:
            print_json(report)
            sys.stdout.flush()
        except OSError as error:
            _cannot_write(error)
    print(f"{NAME}: {line}", file=sys.stderr)
    sys.exit(status)
