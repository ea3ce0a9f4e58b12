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
}
"""Command to its module; there it is `<name>_command`, with "_" for "-"."""

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
