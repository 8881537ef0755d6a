"""Number formats: what a single stored value can be. Ranges are derived, never written down."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from qkit.errors import InputError, UsageError
from qkit.spec.floats import Float
from qkit.spec.plain import choose, from_a_file, show, take


@dataclass(frozen=True)
class Int:
    """A two's complement (``signed``) or unsigned integer of 1 to 8 bits.

    ``narrow`` leaves out the most negative code, so that the range is symmetric around zero:

    >>> Int(8, narrow=True).qmin, Int(8, narrow=True).qmax
    (-127, 127)
    >>> Int(4).qmin, Int(4).qmax
    (-8, 7)
    >>> Int(4, signed=False).qmin, Int(4, signed=False).qmax
    (0, 15)
    """

    bits: int
    signed: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise UsageError("an integer format has 1 to 8 bits", got=self.bits)
        if self.narrow and not self.signed:
            raise UsageError("only a signed integer format can be narrow", got=self)
        if self.narrow and self.bits == 1:
            raise UsageError(
                "a symmetric 1-bit integer has no code but zero",
                fix="use the affine form: w1a16-asym",
            )

    @property
    def qmin(self) -> int:
        """The smallest code."""
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + int(self.narrow)

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << (self.bits - int(self.signed))) - 1

    def __str__(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"


@dataclass(frozen=True)
class Codebook:
    """Any 2 to 256 numbers in ascending order; the code of a number is its place.

    >>> Codebook("ternary", (-1, 0, 1)).bits, NF4.entries[7]
    (2, 0.0)
    """

    name: str
    entries: tuple[float, ...]

    def __post_init__(self) -> None:
        entries = tuple(map(float, self.entries))
        object.__setattr__(self, "entries", entries)
        if not self.name:
            raise UsageError("a codebook has a name")
        if not 2 <= len(entries) <= 256:
            raise UsageError("a codebook has 2 to 256 entries", got=len(entries))
        if not all(map(math.isfinite, entries)):
            raise UsageError("the entries of a codebook are finite", got=self.name)
        if any(a >= b for a, b in itertools.pairwise(entries)):
            raise UsageError("the entries of a codebook ascend", got=self.name)

    @property
    def bits(self) -> int:
        """Stored bits per code."""
        return (len(self.entries) - 1).bit_length()

    @property
    def max(self) -> float:
        """The greatest magnitude of an entry."""
        return max(-self.entries[0], self.entries[-1])

    def __str__(self) -> str:
        return self.name


# 4-bit NormalFloat: QLoRA (Dettmers et al. 2023, arXiv 2305.14314), appendix E.
NF4 = Codebook(
    "nf4",
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
)

Format = Int | Float | Codebook


def format_to_json(fmt: Format) -> dict[str, object]:
    """``fmt`` as plain data; the inverse of :func:`format_from_json`."""
    if isinstance(fmt, Int):
        return {"type": "int", "bits": fmt.bits, "signed": fmt.signed, "narrow": fmt.narrow}
    if isinstance(fmt, Float):
        return {"type": "float", "exponent": fmt.exponent, "mantissa": fmt.mantissa}
    return {"type": "codebook", "name": fmt.name, "entries": list(fmt.entries)}


def format_from_json(data: object) -> Format:
    """The format that :func:`format_to_json` described, else :class:`~qkit.errors.InputError`."""
    name = data.get("type") if isinstance(data, dict) else data
    build, kinds = choose(name, "number format", _FROM_JSON)
    _, *fields = take(data, "number format", {"type": str} | kinds)
    for field in fields:
        if isinstance(field, list) and any(type(entry) is not float for entry in field):
            raise InputError("the entries of a codebook are floats", got=show(field))
    with from_a_file("number format"):
        return build(*fields)


_FROM_JSON: dict[str, tuple[type[Format], dict[str, type]]] = {
    "int": (Int, {"bits": int, "signed": bool, "narrow": bool}),
    "float": (Float, {"exponent": int, "mantissa": int}),
    "codebook": (Codebook, {"name": str, "entries": list}),
}
