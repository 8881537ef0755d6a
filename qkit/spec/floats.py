"""Binary floats: fp32, fp16 and bf16, those of 8 and 4 bits, and two formats of scales alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from qkit.errors import UsageError


@dataclass(frozen=True)
class Float:
    """A binary float: a sign bit, ``exponent`` bits (biased), ``mantissa`` stored bits.

    With the bias ``2^(exponent - 1) - 1``, a pattern with the fields ``e`` and ``m`` stands for
    ``(1 + m / 2^mantissa) * 2^(e - bias)``, or for the subnormal ``m / 2^mantissa * 2^(1 - bias)``
    where ``e`` is 0. Which patterns are infinite or NaN instead is up to the format: those of
    IEEE 754 (and fp8-e5m2) give the greatest exponent to them, fp8-e4m3 (``e4m3fn``: finite) has
    two NaN and no infinity, fp4-e2m1 neither (OCP 8-bit Floating Point Specification 1.0,
    section 5; OCP Microscaling Formats Specification 1.0, section 5.3).

    ``e8m0`` is the scale of the microscaling formats (section 5.4.1): a power of two alone, with
    no sign, no mantissa, no zero, and one NaN.

    ``fp12-e5m6`` is fp16 without its last four bits, stored as fp16: as a scale, its products with
    0..15 are fp16 numbers too (7 + 4 significant bits), which GGUF's Q4_1 needs.

    >>> str(Float(5, 10)), Float(8, 7).bits
    ('fp16', 16)
    >>> FP8_E4M3.max, FP8_E5M2.max, FP4_E2M1.max, FP8_E4M3.smallest
    (448.0, 57344.0, 6.0, 0.001953125)
    """

    exponent: int
    mantissa: int

    def __post_init__(self) -> None:
        if (self.exponent, self.mantissa) not in FLOATS:
            raise UsageError(
                "unknown float format",
                got=f"{self.exponent} exponent and {self.mantissa} mantissa bits",
                wanted=", ".join(kind.name for kind in FLOATS.values()),
            )

    @property
    def kind(self) -> FloatKind:
        """What the numbers of bits do not tell."""
        return FLOATS[self.exponent, self.mantissa]

    @property
    def signed(self) -> bool:
        """Whether there is a sign bit: everywhere but in ``e8m0``."""
        return self.mantissa > 0

    @property
    def bits(self) -> int:
        """Stored bits per value."""
        return int(self.signed) + self.exponent + self.mantissa

    @property
    def has_inf(self) -> bool:
        """Whether some pattern is infinite."""
        return self.kind.specials == "inf and nan"

    @property
    def has_nan(self) -> bool:
        """Whether some pattern is NaN."""
        return self.kind.specials != "none"

    @property
    def top(self) -> int:
        """The bit pattern of the greatest finite value; positive values count up to it."""
        if self.has_inf:
            return (((1 << self.exponent) - 1) << self.mantissa) - 1
        return (1 << (self.exponent + self.mantissa)) - 1 - int(self.has_nan)

    def value(self, pattern: int) -> float:
        """What a bit pattern stands for.

        >>> [FP4_E2M1.value(pattern) for pattern in range(8)]
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        """
        magnitude = pattern & ((1 << (self.exponent + self.mantissa)) - 1)
        field, fraction = magnitude >> self.mantissa, magnitude & ((1 << self.mantissa) - 1)
        if magnitude > self.top:
            infinite = self.has_inf and fraction == 0
            value = math.inf if infinite else math.nan
        else:
            implicit = 0 if field == 0 and self.signed else 1 << self.mantissa
            power = (max(field, 1) if self.signed else field) - self._bias - self.mantissa
            value = math.ldexp(implicit + fraction, power)
        return -value if self.signed and pattern >> (self.bits - 1) else value

    @property
    def max(self) -> float:
        """The greatest finite value."""
        return self.value(self.top)

    @property
    def emax(self) -> int:
        """The exponent of the greatest finite value."""
        return (self.top >> self.mantissa) - self._bias

    @property
    def smallest(self) -> float:
        """The smallest positive value, subnormal where there are subnormal numbers."""
        return self.value(int(self.signed))

    @property
    def _bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def torch_name(self) -> str:
        """The name of the same type in torch, for example ``bfloat16``; else ``TypeError``."""
        if self.kind.torch_name is None:
            raise TypeError(f"torch has no type of one {self} value")
        return self.kind.torch_name

    def __str__(self) -> str:
        return self.kind.name


class FloatKind(NamedTuple):
    """A float format's name here and in torch, and what its greatest patterns are for."""

    name: str
    torch_name: str | None
    specials: str  # "inf and nan", "nan" or "none"


# By the numbers of exponent and mantissa bits.
FLOATS = {
    (5, 10): FloatKind("fp16", "float16", "inf and nan"),
    (8, 7): FloatKind("bf16", "bfloat16", "inf and nan"),
    (8, 23): FloatKind("fp32", "float32", "inf and nan"),
    (4, 3): FloatKind("fp8-e4m3", "float8_e4m3fn", "nan"),
    (5, 2): FloatKind("fp8-e5m2", "float8_e5m2", "inf and nan"),
    (2, 1): FloatKind("fp4-e2m1", None, "none"),
    (8, 0): FloatKind("e8m0", "float8_e8m0fnu", "nan"),
    (5, 6): FloatKind("fp12-e5m6", None, "inf and nan"),
}

FP16 = Float(5, 10)
BF16 = Float(8, 7)
FP32 = Float(8, 23)
FP12_E5M6 = Float(5, 6)
FP8_E4M3 = Float(4, 3)
FP8_E5M2 = Float(5, 2)
FP4_E2M1 = Float(2, 1)
E8M0 = Float(8, 0)
