"""The `fse-patch` command: finds the subcommands, each in a module of its own."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import FsePatchError, did_you_mean
from ..version import __version__
from .ending import run

# One module of this package a subcommand, with a function `command` or, for a group, a Typer `app`.
# Modules are imported only when their command runs: `plan` must not pay for `verify`.
COMMANDS = {
    "plan": "Will this checkpoint, or this launch command, be served fused? If not, why?",
    "doctor": "Will it work on this machine? What is wrong?",
    "status": "Is it on, in a server that runs?",
    "verify": "Run the real engine stock and fused and compare log-probabilities.",
    "compare": "Was it worth it? Servers stock and fused, by the engine's own bench client.",
    "policy": "Explain a decision rule by rule, or check a policy file.",
    "bench": "Stock against fused on this device: every mode of the block, or decoding end to end.",
    "profile": "Kernels of decode steps by time, stock against ours.",
    "tune": "Measure the crossovers between the modes on this device, and store them.",
    "tuned": "List, show or remove what was measured on this machine.",
    "patches": "List every patch: target, versions, why, and when it goes away.",
}
HELP = {"help_option_names": ["-h", "--help"]}
# How all commands are made: plain help, and errors that `run` words.
PLAIN: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": HELP,
}


class _LazyGroup(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in COMMANDS if find_spec(f"{__package__}.{name}") is not None]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"{__package__}.{cmd_name}")
        sub = getattr(module, "app", None)
        if sub is None:
            sub = typer.Typer(**PLAIN)
            sub.command(cmd_name, help=COMMANDS[cmd_name], context_settings=HELP)(module.command)
        command = typer.main.get_command(sub)
        command.name = cmd_name
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        there = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in there:
            raise FsePatchError(f"no command {args[0]!r}; {did_you_mean(args[0], there)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        # Typer would import every command for its help line.
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name]) for name in self.list_commands(ctx)])


app = typer.Typer(
    **{**PLAIN, "add_completion": True},
    cls=_LazyGroup,
    no_args_is_help=True,
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
    """Run the command line."""
    run(typer.main.get_command(app))


if __name__ == "__main__":
    main()
