"""The `fse-patch` command: finds the subcommands and turns their errors into one line and a status."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import FsePatchError
from ..version import __version__

# One module of this package a subcommand, with a function `command` or, for a group, a Typer `app`.
# Modules are imported only when their command runs: `plan` must not pay for `verify`.
COMMANDS = {
    "plan": "Would this checkpoint fuse, which layers, and if not, why.",
    "verify": "Run the real engine stock and fused and compare log-probabilities.",
    "policy": "Explain a decision rule by rule, or check a policy file.",
    "doctor": "What is installed, switched on and in force here, and what of it is wrong.",
    "bench": "Stock against fused on this device: every mode of the block, or decoding end to end.",
    "tune": "Measure the crossovers between the modes on this device, and store them.",
    "tuned": "List, show or remove what was measured on this machine.",
    "patches": "List every patch: target, versions, why, and when it goes away.",
}
_INTERNAL_ERROR = 70


class _LazyGroup(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in COMMANDS if find_spec(f"{__package__}.{name}") is not None]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"{__package__}.{cmd_name}")
        sub = getattr(module, "app", None)
        if sub is None:
            sub = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
            sub.command(cmd_name, help=COMMANDS[cmd_name])(module.command)
        command = typer.main.get_command(sub)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        # Typer would import every command for its help line.
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name]) for name in self.list_commands(ctx)])


app = typer.Typer(
    cls=_LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Fuse the shared expert of MoE models into the routed experts' kernel.",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fse-patch {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", callback=_show_version, is_eager=True
    ),
) -> None:
    pass


def main() -> None:
    """Run the command line; FsePatchError becomes one line on stderr and its exit status."""
    try:
        typer.main.get_command(app)(prog_name="fse-patch")
    except FsePatchError as error:
        _end(str(error), error.exit_status)
    except Exception as error:
        _end(f"internal error, please report it: {type(error).__name__}: {error}", _INTERNAL_ERROR)


def _end(message: str, status: int) -> None:
    print(f"fse-patch: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
