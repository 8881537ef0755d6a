"""The exception tree is the one that the module's docstring draws, and messages read well."""

from __future__ import annotations

import inspect
import re

import pytest

from qkit import errors
from qkit.errors import MissingExtraError, QkitError, UsageError, nearest

CLASSES = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, QkitError)
}


def drawn() -> dict[str, tuple[int, int | None]]:
    """Class name -> (depth, exit code or None where it is inherited), from the docstring."""
    tree = {}
    for line in errors.__doc__.splitlines():
        if found := re.match(r"^([ │├└─]*)(\w+Error)(?: (\d+))?(?:\s|$)", line):
            depth = (len(found[1]) - 4) // 4
            tree[found[2]] = depth, int(found[3]) if found[3] else None
    return tree


def make(kind: type[QkitError]) -> QkitError:
    if kind is MissingExtraError:
        return MissingExtraError("onnx", "onnx", needed_for="the ONNX target")
    return kind("it broke")


def test_the_docstring_draws_every_exception():
    assert set(drawn()) == set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_exit_code_is_the_documented_one(name):
    depth, code = drawn()[name]
    kind = CLASSES[name]
    assert len(kind.__mro__) - len(QkitError.__mro__) == depth
    assert make(kind).exit_code == (kind.__base__.exit_code if code is None else code)


def test_exit_codes_are_those_of_the_command_line():
    own = {kind.exit_code for kind in CLASSES.values()}
    assert own == {1, 2, 3, 4, 5, 6, 7}
    assert not own & {errors.EXIT_OK, errors.EXIT_INTERRUPTED}


def test_message_lists_the_given_clauses_in_order():
    error = UsageError(
        "unknown scheme", fix="see: qkit schemes", got="w9", wanted="w8a16", where="cli"
    )
    assert str(error) == (
        "unknown scheme (in: cli; got: w9; wanted: w8a16; fix: see: qkit schemes)"
    )
    assert (error.problem, error.where, error.got) == ("unknown scheme", "cli", "w9")
    assert (error.wanted, error.fix) == ("w8a16", "see: qkit schemes")


def test_message_without_clauses_is_the_problem():
    assert str(QkitError("it broke")) == "it broke"
    assert QkitError("it broke").where is None


@pytest.mark.parametrize("value", [0, False, ""])
def test_falsy_clauses_are_kept(value):
    assert str(QkitError("it broke", got=value)) == f"it broke (got: {value})"


@pytest.mark.parametrize("name", CLASSES)
def test_every_exception_is_caught_as_the_base(name):
    with pytest.raises(QkitError):
        raise make(CLASSES[name])


def test_missing_extra_names_the_pip_command():
    error = MissingExtraError("onnxruntime", "onnx", needed_for="the ONNX target")
    assert str(error) == (
        "the ONNX target needs the package 'onnxruntime', which is not installed "
        "(fix: pip install 'qkit-torch[onnx]')"
    )
    assert (error.package, error.extra) == ("onnxruntime", "onnx")


@pytest.mark.parametrize(
    ("name", "known", "want"),
    [
        ("w8a61", ["bf16", "w8a16"], "w8a16"),
        ("W8A16", ["bf16", "w8a16"], "w8a16"),
        ("zzz", ["a", "b"], "a, b"),
        ("zzz", [], ""),
    ],
    ids=["typo", "case", "nothing-close", "nothing-known"],
)
def test_nearest(name, known, want):
    assert nearest(name, iter(known)) == want


def test_nearest_is_limited():
    assert nearest("zzz", map(str, range(9)), limit=2) == "0, 1"
