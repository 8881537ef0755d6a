"""QSpec: how one tensor is quantized."""

from __future__ import annotations

from dataclasses import dataclass

from qkit.errors import UsageError
from qkit.spec.floats import BF16, E8M0, FP12_E5M6, FP16, FP32, Float
from qkit.spec.formats import Format, Int, format_from_json, format_to_json
from qkit.spec.granularity import (
    Granularity,
    PerGroup,
    granularity_from_json,
    granularity_to_json,
)
from qkit.spec.plain import choose, from_a_file, take

WHEN = ("weight", "dynamic", "static")
_FLOATS = (FP32, FP16, BF16, E8M0, FP12_E5M6)
SCALES: dict[str, Float | None] = {str(f): f for f in _FLOATS} | {"none": None}


@dataclass(frozen=True)
class QSpec:
    """How one tensor is quantized.

    ``when`` says when the range is known: ``weight`` (ahead of time, from the values),
    ``dynamic`` (at each call) or ``static`` (from calibration). ``scale`` is the format in which
    the scale is stored; ``e8m0`` (powers of two) makes the microscaling formats of floats, and
    ``None`` is for a float that is only cast, as are all floats of more than 8 bits. Only
    integers have a zero point. Raises :class:`~qkit.errors.UsageError` for combinations that
    mean nothing.
    """

    format: Format
    granularity: Granularity
    symmetric: bool = True
    when: str = "weight"
    scale: Float | None = FP32

    def __post_init__(self) -> None:
        fmt = self.format
        if isinstance(fmt, Float) and fmt.bits > 8:
            object.__setattr__(self, "scale", None)
        if self.when not in WHEN:
            raise UsageError("unknown quantization time", got=self.when, wanted=", ".join(WHEN))
        if self.scale not in SCALES.values():
            raise UsageError("not the format of a scale", got=self.scale, wanted=", ".join(SCALES))
        if not isinstance(fmt, Int) and not self.symmetric:
            raise UsageError("only an integer format has a zero point", got=str(fmt))
        if not isinstance(fmt, Float) and self.scale in (None, E8M0):
            raise UsageError("a scale of this kind is for floats", got=f"{fmt}, {self.scale} scale")
        if fmt == E8M0 or (self.is_cast and fmt.bits < 8):
            raise UsageError("values are not cast to this format", got=str(fmt))
        if isinstance(fmt, Int) and self.symmetric and not fmt.signed:
            raise UsageError("a symmetric range needs a signed format", got=str(fmt))
        if isinstance(fmt, Int) and self.symmetric and fmt.qmax == 0:
            raise UsageError(
                "a symmetric 1-bit integer has no code for half of its range",
                fix="use the affine form: w1a16-asym",
            )

    @property
    def is_cast(self) -> bool:
        """Whether values are only rounded to a float: no scale and no codes."""
        return self.scale is None

    @property
    def by_table(self) -> bool:
        """Whether codes of at most 8 bits stand for the values of a table: narrow floats too."""
        return not isinstance(self.format, Int) and self.format.bits <= 8

    @property
    def group_size(self) -> int:
        """Neighbours that share a scale; 0 where whole rows (or the whole tensor) do."""
        return self.granularity.size if isinstance(self.granularity, PerGroup) else 0

    def describe(self) -> str:
        """One line with every choice spelt out."""
        fmt = self.format
        if self.is_cast:
            return f"cast to {fmt}"
        rest = f"{self.granularity}, {self.scale} scale"
        if isinstance(fmt, Int):
            form = "symmetric" if self.symmetric else "affine"
            point = Int(8, fmt.signed)
            extra = "" if self.symmetric else f" and {point} zero point"
            return f"{fmt} {form} ({fmt.qmin}..{fmt.qmax}), {rest}{extra}"
        if isinstance(fmt, Float):
            return f"{fmt} (-{fmt.max:g}..{fmt.max:g}), {rest}"
        first, last = fmt.entries[0], fmt.entries[-1]
        return f"{fmt} ({len(fmt.entries)} entries in {first:g}..{last:g}), {rest}"

    def to_json(self) -> dict[str, object]:
        """This spec as plain data."""
        return {
            "format": format_to_json(self.format),
            "granularity": granularity_to_json(self.granularity),
            "symmetric": self.symmetric,
            "when": self.when,
            "scale": "none" if self.scale is None else str(self.scale),
        }

    @staticmethod
    def from_json(data: object) -> QSpec:
        """The spec that :meth:`to_json` described, else :class:`~qkit.errors.InputError`."""
        kinds = {"format": dict, "granularity": dict, "symmetric": bool, "when": str, "scale": str}
        fmt, granularity, symmetric, when, scale = take(data, "quantization spec", kinds)
        with from_a_file("quantization spec"):
            return QSpec(
                format_from_json(fmt),
                granularity_from_json(granularity),
                symmetric,
                when,
                choose(scale, "scale format", SCALES),
            )
