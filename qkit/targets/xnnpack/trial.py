"""``python -m qkit.targets.xnnpack.trial FILE``: load and run a file, apart from the caller.

An error that is told is one line on standard error and its exit code; a crash is neither.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qkit.errors import QkitError
from qkit.targets.xnnpack.runtime import try_out


def main(path: str) -> int:
    """:func:`~qkit.targets.xnnpack.runtime.try_out`, as an exit code."""
    try:
        try_out(Path(path))
    except QkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
