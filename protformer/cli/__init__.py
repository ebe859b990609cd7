"""The `protformer` command: one file a command, each loaded only when it is called.

In: `sys.argv`. Out: the exit code. This is where exceptions become one line on stderr: 1 for a user's error, 2 for
usage, 130 for an interruption. PROTFORMER_DEBUG=1 shows the traceback.
"""

import importlib
import os
import signal
import sys
from collections.abc import Sequence

import click

from protformer import __version__
from protformer.errors import ProtformerError

COMMANDS = {
    "train": "train",
    "prepare": "prepare",
    "data": "data",
    "embed": "embed",
    "predict-contacts": "predict_contacts",
    "evaluate": "evaluate",
    "convert": "convert",
    "export": "export",
    "describe": "describe",
    "benchmark": "benchmark",
}
"""Command -> module in this package, in the order of the help page."""


class LazyGroup(click.Group):
    """Imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"protformer.cli.{COMMANDS[cmd_name]}")
        command: click.Command = module.command
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="protformer")
def cli() -> None:
    """Performer protein language models: train on FASTA, embed, predict contacts.

    Linear attention: whole proteins and concatenated proteins, without truncation.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit code; SIGTERM, as schedulers send it, is a Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    debug = os.environ.get("PROTFORMER_DEBUG", "") not in ("", "0")
    try:
        result = cli.main(args=arguments, prog_name="protformer", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output has left, as `head` does; nothing is wrong. Keep Python from flushing into the void.
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ProtformerError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except OSError as error:
        if debug or error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}", 1)


def _fail(message: str, exit_code: int) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return exit_code
