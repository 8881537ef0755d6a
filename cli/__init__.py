"""The command line: one file for each command, each a thin wrapper over a library call.

Nothing here imports torch until a command runs, so ``qkit --help`` answers at once.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import traceback
import warnings
from types import FrameType
from typing import Any

import click

from qkit.errors import EXIT_INTERRUPTED, QkitError, nearest

COMMANDS = (
    "quantize",
    "prune",
    "factorize",
    "distill",
    "compress",
    "inspect",
    "verify",
    "compare",
    "bench",
    "bench compare",
    "schemes",
    "targets",
    "doctor",
    "demo",
)


# How long a signal waits that must not interrupt yet.
RETRY_SECONDS = 0.05


class Stopped(BaseException):
    """A signal asked the command to stop; like KeyboardInterrupt, it unwinds and cleans up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Commands(click.Group):
    """The commands, each imported from its own file when it is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, the most used first."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command ``name``; dashes and underscores are the same."""
        if name not in COMMANDS:
            return None
        module = name.replace(" ", "_")
        command: click.Command = importlib.import_module(f"qkit.cli.{module}").command
        command.name = name  # not that of the function, which is the same in every file
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """As click does, with commands of two words, and the nearest names for an unknown one."""
        if (both := " ".join(args[:2])) in COMMANDS:
            args = [both, *args[2:]]
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            ctx.fail(f"no such command {args[0]!r}; did you mean: {nearest(args[0], COMMANDS, 3)}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """As click does, but what Ctrl-C means is said by :func:`main`."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Stopped(signal.SIGINT) from error


@click.command(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done and verified, 1 failed, 2 wrong usage, 3 input refused, 4 artifact "
    "differs, 5 nothing quantized, 6 budget missed, 7 dependency or feature missing, 130 "
    "interrupted (143 by SIGTERM, 129 by SIGHUP).",
)
@click.version_option(package_name="qkit-torch", prog_name="qkit")
def group() -> None:
    """Quantize a trained PyTorch model, and prove that the result works."""


def main(args: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = sys.argv[1:] if args is None else args
    debug = "--debug" in args
    _unwind_on_signals()
    try:
        result = group.main(list(args), prog_name="qkit", standalone_mode=False, obj=args)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, click.exceptions.Abort):
        return _interrupted(signal.SIGINT)
    except Stopped as error:
        return _interrupted(error.number)
    except click.ClickException as error:
        return _wrong_usage(error)
    except QkitError as error:
        if debug:
            traceback.print_exc()
        return _stop(str(error), error.exit_code)
    except Exception as error:
        if debug:
            traceback.print_exc()
        hint = "" if debug else " (--debug shows where)"
        return _stop(f"{type(error).__name__}: {error}{hint}", 1)


def _unwind_on_signals() -> None:
    """Let Ctrl-C, SIGTERM and a closed terminal unwind the command, unless they are ignored."""

    def unwind(number: int, frame: FrameType | None) -> None:
        if not _torch_is_starting():
            raise Stopped(number)
        later = threading.Timer(RETRY_SECONDS, os.kill, (os.getpid(), number))
        later.daemon = True
        later.start()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, unwind)


def _torch_is_starting() -> bool:
    """Whether torch is being imported: its C code swallows an exception then, or aborts."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    return getattr(spec, "_initializing", False)


def _interrupted(number: int) -> int:
    _say("interrupted; nothing partial was left behind")
    return EXIT_INTERRUPTED if number == signal.SIGINT else 128 + number


def _wrong_usage(error: click.ClickException) -> int:
    context = getattr(error, "ctx", None)
    if context is not None and error.format_message() == context.get_help():
        error.show()  # the bare command: its help, as click does
        return error.exit_code
    hint = f" (see: {context.command_path} --help)" if context is not None else ""
    return _stop(error.format_message() + hint, error.exit_code)


def _stop(text: str, code: int) -> int:
    _say(f"error: {text}")
    return code


def _say(text: str) -> None:
    """One line on standard error; names out of a file cannot control the terminal."""
    line = " ".join(text.split())
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    click.echo(f"qkit: {shown}", err=True)


def run() -> None:
    """The entry point of the ``qkit`` command."""
    if "--debug" not in sys.argv and not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries warn their callers, not the user of a command
    sys.exit(main())
