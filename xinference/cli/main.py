# SPDX-License-Identifier: Apache-2.0
"""The command tree, and nothing else. A command's module is imported when it is named."""

from importlib import import_module
from typing import Any

import click

from xinference import __version__

from .connection import CONTEXT_SETTINGS

COMMANDS = {
    "autostart": "autostart",
    "cached": "cache",
    "cal-model-mem": "memory",
    "chat": "chat",
    "download": "cache",
    "embed": "vectors",
    "engine": "registrations",
    "generate": "chat",
    "keys": "keys",
    "launch": "models",
    "list": "models",
    "login": "keys",
    "logs": "logs",
    "quickstart": "quickstart",
    "register": "registrations",
    "registrations": "registrations",
    "remove-cache": "cache",
    "rerank": "vectors",
    "scale": "models",
    "status": "status",
    "stop-cluster": "serve",
    "terminate": "models",
    "unregister": "registrations",
    "usage": "keys",
    "virtual-env": "environments",
    "vllm-models": "registrations",
}
"""Command to its module; there it is `<name>_command`, with "_" for "-"."""

ABSENT = {
    "reload": "terminate the model, and launch it as it is to be.",
    "relaunch-api": "start the processes anew; what ran comes back by itself.",
    "relaunch-supervisor": "start the processes anew; what ran comes back by itself.",
    "service": "let systemd run xinference-local; deploy/systemd has the unit.",
}
"""Commands of Xinference that are not here, and what to do instead."""
OF_SERVERS = ("-H", "--host", "-p", "--port", "--log-level")
"""With which Xinference's own command starts a cluster."""

INTERRUPTED = 130


class Program(click.Group):
    """A group that imports a command when it is named, and exits 130 on Ctrl-C."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return one command, or None if there is none of this name."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"xinference.cli.{COMMANDS[cmd_name]}")
        command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is named first."""
        if args and args[0] in ABSENT:
            ctx.fail(f"{args[0]!r} is not here: {ABSENT[args[0]]}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the words up to the command."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name in OF_SERVERS:
                ctx.fail(f"{error.format_message()} A cluster is started by xinference-local.")
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except click.Abort as error:
            # Why: a prompt turns both Ctrl-C and the end of the input into Abort.
            if isinstance(error.__context__, KeyboardInterrupt):
                ctx.exit(INTERRUPTED)
            raise


@click.group(cls=Program, context_settings=CONTEXT_SETTINGS)
@click.version_option(__version__, "--version", "-v", message="%(prog)s %(version)s")
def program() -> None:
    """Serve open models behind one OpenAI-compatible endpoint.

    Try it: `xinference quickstart`. Servers have commands of their own: xinference-local,
    xinference-supervisor, xinference-worker.
    """


def main() -> None:
    """Run `xinference`."""
    program(prog_name="xinference")


def local() -> None:
    """Run `xinference-local`."""
    from xinference.cli.serve import local_command

    local_command(prog_name="xinference-local")


def supervisor() -> None:
    """Run `xinference-supervisor`."""
    from xinference.cli.serve import supervisor_command

    supervisor_command(prog_name="xinference-supervisor")


def worker() -> None:
    """Run `xinference-worker`."""
    from xinference.cli.serve import worker_command

    worker_command(prog_name="xinference-worker")
