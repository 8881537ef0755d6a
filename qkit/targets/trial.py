"""``python -m qkit.targets.trial TARGET FILE``: load and run a file of a runtime, apart from us.

Some corrupt files end the process that loads them. An error that is told is one line on standard
error and its exit code; a crash is neither.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

from qkit.errors import InputError, QkitError, VerificationError
from qkit.targets import TARGETS


def fresh_command(module: str, *arguments: str) -> list[str]:
    """What runs a ``module`` in a fresh process of this Python."""
    # -P: what lies in the working directory must not shadow an installed package. A factory of the
    # user's may lie there; resolve_factory looks for it itself.
    flags = ["-P"] if sys.version_info >= (3, 11) else []
    return [sys.executable, *flags, "-m", module, *arguments]


def apart(target: str, path: Path) -> None:
    """``try_out`` of the runtime of ``target`` on a file, in a process of its own.

    Raises :class:`~qkit.errors.InputError` if it cannot be loaded or run, and
    :class:`~qkit.errors.VerificationError` if an output is not finite.
    """
    command = fresh_command("qkit.targets.trial", target, str(path))
    process = subprocess.run(command, capture_output=True, text=True, errors="replace")
    told = (process.stderr.strip().splitlines() or ["no message"])[-1][:300]
    if process.returncode == VerificationError.exit_code:
        raise VerificationError(told)
    if process.returncode == InputError.exit_code:
        raise InputError(told)
    if process.returncode:
        raise InputError(
            f"the file ends the process that loads it: {told}",
            where=str(path),
            got=f"exit {process.returncode}",
        )


def main(target: str, path: str) -> int:
    """``try_out``, as an exit code."""
    runtime = importlib.import_module(f"{TARGETS[target].module}.runtime")
    try:
        runtime.try_out(Path(path))
    except QkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
