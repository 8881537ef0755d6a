"""The exceptions of qkit and the exit code that each one stands for.

    QkitError 1
    ├── OutputError 1         the output cannot be written: no space, no permission
    ├── UsageError 2          unknown option, scheme, target or layer name
    ├── InputError 3          unreadable, corrupt, not a model, NaN or infinity
    │   ├── UnsafePickleError    the file runs code when it is unpickled
    │   └── UnsafeCodeError      the file is native code
    ├── VerificationError 4   the artifact did not reproduce the reference
    ├── CoverageError 5       nothing was quantized, or less than was asked for
    ├── BudgetError 6         an accuracy, size or latency budget was missed
    └── RequestError 7        the target cannot express the request
        └── MissingExtraError    an optional dependency is not installed

The command line exits with ``error.exit_code``; the library raises the same object, so that a
pipeline and a shell script see the same answer. A message says what was being done, where,
what was found, what was wanted and how to fix it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

EXIT_OK = 0
EXIT_INTERRUPTED = 130


class QkitError(Exception):
    """Base of every error that qkit raises on purpose.

    ``problem`` is one sentence; the keyword arguments are printed as ``name: value`` clauses
    after it, in this order, and are kept as attributes for programs.
    """

    exit_code = 1

    def __init__(
        self,
        problem: str,
        *,
        where: str | None = None,
        got: object = None,
        wanted: object = None,
        fix: str | None = None,
    ) -> None:
        self.problem = problem
        self.where = where
        self.got = got
        self.wanted = wanted
        self.fix = fix
        clauses = {"in": where, "got": got, "wanted": wanted, "fix": fix}
        text = "; ".join(f"{name}: {value}" for name, value in clauses.items() if value is not None)
        super().__init__(f"{problem} ({text})" if text else problem)


class OutputError(QkitError):
    """The output cannot be written; nothing partial is left behind."""


class UsageError(QkitError):
    """The request itself is wrong: an unknown scheme, target, option or layer name."""

    exit_code = 2


class InputError(QkitError):
    """The given file or model is refused: unreadable, corrupt, not a model, not finite."""

    exit_code = 3


class UnsafePickleError(InputError):
    """Reading the file would run code that is not on the allow-list."""


class UnsafeCodeError(InputError):
    """Loading the file would run native code, which nothing can check."""

    def __init__(self, where: str) -> None:
        super().__init__(
            "the file is native code, which does what it likes once it is loaded",
            where=where,
            fix="--trust-code (trust_code=True), if you made it or trust whoever did",
        )


class VerificationError(QkitError):
    """The written artifact, run in a fresh process, did not reproduce the reference."""

    exit_code = 4


class CoverageError(QkitError):
    """Nothing was quantized, or less than the requested coverage."""

    exit_code = 5


class BudgetError(QkitError):
    """An accuracy, size or latency budget was missed."""

    exit_code = 6


class RequestError(QkitError):
    """The target cannot express what was asked for."""

    exit_code = 7


class MissingExtraError(RequestError):
    """An optional dependency is missing; the message names the pip command."""

    def __init__(self, package: str, extra: str, *, needed_for: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(
            f"{needed_for} needs the package {package!r}, which is not installed",
            fix=f"pip install 'qkit-torch[{extra}]'",
        )


def nearest(name: str, known: Iterable[str], limit: int = 5) -> str:
    """The known names closest to ``name``, comma separated, for an error message.

    >>> nearest("w8a61", ["w8a16", "bf16", "w4a16"], limit=1)
    'w8a16'
    """
    names = list(known)
    close = difflib.get_close_matches(name.lower(), names, n=limit, cutoff=0.5)
    return ", ".join(close or names[:limit])


def first_line(error: BaseException, length: int = 300) -> str:
    """The first line of the message of somebody else's error, at a length to read."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:length]


@contextmanager
def users_code(what: str, *, where: str | None = None, wanted: str | None = None) -> Iterator[None]:
    """What a user's own code raises in this block is an :class:`InputError`: ``what`` fails."""
    try:
        yield
    except QkitError:
        raise
    except Exception as error:  # anything at all
        raise InputError(
            f"{what} fails: {type(error).__name__}: {first_line(error)}", where=where, wanted=wanted
        ) from error
