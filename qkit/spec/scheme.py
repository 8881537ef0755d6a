"""Schemes: how one layer is quantized, and the grammar of their names.

A scheme is data. The grammar accepts what the ecosystem says, in any case, with ``-`` or ``_``::

    w<bits>a<bits>[-g<size> | -channel | -tensor][-sym | -asym][-dynamic | -static]
    nf4[-g<size> | -channel | -tensor]
    fp8-e4m3 | fp8-e5m2, with -g<size>, -channel or -tensor: weights with such scales
    fp16 | bf16                                                     (the whole model cast)
    fp8-e4m3 | fp8-e5m2                                             (weights cast, no scales)
    mxfp4-e2m1 | mxfp8-e4m3 | mxfp8-e5m2                            (OCP microscaling)
    int8 | int4 | int8wo | int4wo-128 | qint8 | W2A16G64 | ...      (aliases, see ALIASES)

``a16`` and ``a32`` both mean that activations are left alone: a layer takes fp32, bf16 or fp16
and answers in the same type, and sums in fp32. Because one name means different things in
different tools, :meth:`Scheme.long_form` spells out every choice, and :attr:`Scheme.name` is
the one canonical short form.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from qkit.errors import UsageError, nearest
from qkit.spec.floats import BF16, E8M0, FP4_E2M1, FP8_E4M3, FP8_E5M2, FP16, Float
from qkit.spec.formats import NF4, Format, Int
from qkit.spec.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from qkit.spec.plain import take
from qkit.spec.qspec import QSpec

DEFAULT_GROUP = 128
NF4_GROUP = 64  # QLoRA, section 3
MX_GROUP = 32  # OCP Microscaling Formats Specification 1.0, section 5.1


@dataclass(frozen=True)
class Scheme:
    """How one layer is quantized: its weight, and its input and output where they are too.

    ``None`` for ``input`` or ``output`` means that the activation is left as it is.
    """

    weight: QSpec
    input: QSpec | None = None
    output: QSpec | None = None

    @property
    def casts_model(self) -> bool:
        """Whether the whole model, and what it computes, becomes a narrower float.

        Not fp8, in which torch multiplies next to nothing: there, weights alone are cast.
        """
        return self.weight.is_cast and self.weight.format.bits > 8

    @property
    def weight_only(self) -> bool:
        """Whether activations are left alone."""
        return self.input is None and self.output is None and not self.casts_model

    @property
    def name(self) -> str:
        """The canonical short name; ``parse(scheme.name) == scheme``."""
        spec, fmt = self.weight, self.weight.format
        if spec.is_cast:
            return str(fmt)
        if spec.scale == E8M0:
            return f"mx{fmt}"
        per = _PER.get(type(spec.granularity), "channel")
        per += str(spec.group_size or "")
        if not isinstance(fmt, Int):
            return f"{fmt}-{per}"
        act = 16 if self.input is None else self.input.format.bits
        parts = [f"w{fmt.bits}a{act}"]
        if fmt.bits < 8 or per != "channel":
            parts.append(per)
        if not self.weight.symmetric:
            parts.append("asym")
        if self.input is not None and self.input.when == "static":
            parts.append("static")
        return "-".join(parts)

    def with_scale(self, scale: Float) -> Scheme:
        """This scheme with the weight's scales stored in the format ``scale``."""
        return replace(self, weight=replace(self.weight, scale=scale))

    def long_form(self) -> str:
        """The resolved scheme in words: nothing is left to a convention of some tool."""
        if self.casts_model:
            return f"{self.name}: every float tensor of the model {self.weight.describe()}"
        if self.input is None:
            acts = "not quantized (fp32, bf16 or fp16 in, the same out, summed in fp32)"
        else:
            acts = f"{self.input.describe()}, {self.input.when}"
        return f"{self.name}: weights {self.weight.describe()}; activations {acts}"

    def to_json(self) -> dict[str, object]:
        """This scheme as plain data; ``name`` is informative."""
        return {
            "name": self.name,
            "weight": self.weight.to_json(),
            "input": self.input and self.input.to_json(),
            "output": self.output and self.output.to_json(),
        }

    @staticmethod
    def from_json(data: object) -> Scheme:
        """The scheme that :meth:`to_json` described, else :class:`~qkit.errors.InputError`."""
        kinds = {"name": str, "weight": dict, "input": object, "output": object}
        _, weight, *others = take(data, "scheme", kinds)
        specs = (None if spec is None else QSpec.from_json(spec) for spec in others)
        return Scheme(QSpec.from_json(weight), *specs)


_PER: dict[type, str] = {PerTensor: "tensor", PerGroup: "g"}

# Names that other tools use, and what they mean here. A prefix may be followed by options.
ALIASES = {
    "int8": "w8a8",
    "int4": "w4a16",
    "int8wo": "w8a16",
    "int4wo": "w4a16",
    "int8dq": "w8a8",
    "qint8": "w8a16",
    "qint4": "w4a16",
    "qint2": "w2a16",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp8": "fp8-e4m3",
    "float8-e4m3fn": "fp8-e4m3",
    "float8-e5m2": "fp8-e5m2",
    "mxfp8": "mxfp8-e4m3",
    "mxfp4": "mxfp4-e2m1",
}

CASTS = {"fp16": FP16, "bf16": BF16, "fp8-e4m3": FP8_E4M3, "fp8-e5m2": FP8_E5M2}
MICROSCALING = {f"mx{fmt}": fmt for fmt in (FP4_E2M1, FP8_E4M3, FP8_E5M2)}
SCALED: dict[str, Format] = {str(fmt): fmt for fmt in (NF4, FP8_E4M3, FP8_E5M2)}

# What `qkit schemes` lists: a sample of what the grammar can say, one line each.
PRESETS = {
    "w8a16": "int8 weights, one scale per output channel: near-lossless, a quarter of fp32",
    "w8a16-g128": "int8 weights, one scale per 128: what compressed-tensors calls W8A16",
    "w8a16-asym": "int8 weights with a zero point: for weights far from zero mean",
    "w6a16-g128": "6-bit weights",
    "w5a16-g128": "5-bit weights",
    "w4a16-g128": "4-bit weights, the common choice for language models",
    "w4a16-g32": "4-bit weights, finer groups: for small models and edge devices",
    "w4a16-g128-asym": "4-bit weights with a zero point",
    "w3a16-g128": "3-bit weights: expect a visible loss",
    "w2a16-g128": "2-bit weights: needs a calibrated algorithm or training",
    "w8a8": "int8 weights and int8 activations, per token, at each call",
    "w8a8-static": "int8 weights and activations with calibrated ranges",
    "w4a8-g128": "4-bit weights, int8 activations",
    "fp16": "the whole model cast to IEEE half precision",
    "bf16": "the whole model cast to bfloat16",
    "fp8-e4m3": "weights cast to 8-bit floats of 3 mantissa bits, at most 448, without scales",
    "fp8-e5m2": "weights cast to 8-bit floats of 2 mantissa bits, at most 57344, without scales",
    "fp8-e4m3-channel": "8-bit float weights, one scale per output channel",
    "nf4-g64": "4-bit weights at the quantiles of a normal distribution: QLoRA",
    "mxfp4-e2m1": "OCP microscaling: 4-bit floats, a power of two for every 32",
    "mxfp8-e4m3": "OCP microscaling: 8-bit floats, a power of two for every 32",
    "mxfp8-e5m2": "the same with more range and less precision",
}

_NAME = re.compile(r"w(?P<weight>[1-8])a(?P<act>4|8|16|32)(?P<options>(?:-[a-z0-9]+)*)")
_SCALED = re.compile(rf"(?P<format>{'|'.join(SCALED)})(?:-(?P<per>g?\d+|channel|tensor))?")
_OPTIONS = ("g<size>", "channel", "tensor", "sym", "asym", "dynamic", "static")


def parse(text: str, group_size: int | None = None) -> Scheme:
    """The scheme that ``text`` names.

    ``group_size`` overrides the granularity: a positive size means per-group, -1 per-channel.
    Raises :class:`~qkit.errors.UsageError` for an unknown name, with the nearest known ones.

    >>> parse("W8A16").name, parse("int4wo-64").name, parse("w4a16_asym").name
    ('w8a16', 'w4a16-g64', 'w4a16-g128-asym')
    """
    name = _resolve(text.strip().lower().replace("_", "-"))
    if group_size is not None and (name in CASTS or name in MICROSCALING):
        what = "a float cast has no groups" if name in CASTS else "a microscaling group has 32"
        raise UsageError(what, got=f"--group-size {group_size}")
    if name in CASTS:
        return Scheme(QSpec(CASTS[name], PerTensor(), scale=None))
    if name in MICROSCALING:
        return Scheme(QSpec(MICROSCALING[name], PerGroup(MX_GROUP), scale=E8M0))
    if match := _SCALED.fullmatch(name):
        per = _option(match["per"] or f"g{NF4_GROUP}", text)[1]
        return Scheme(QSpec(SCALED[match["format"]], _override(group_size) or per))
    match = _NAME.fullmatch(name)
    if match is None:
        known = [*PRESETS, *ALIASES]
        raise UsageError(
            "unknown scheme", got=repr(text), wanted=nearest(text, known), fix="see: qkit schemes"
        )
    options = _options(match["options"], text)
    if override := _override(group_size):
        options["granularity"] = override
    return _build(int(match["weight"]), int(match["act"]), options, text)


def _resolve(name: str) -> str:
    """``name`` with its alias, or that of its first word, replaced."""
    if name in ALIASES:
        return ALIASES[name]
    head, dash, rest = name.partition("-")
    if not rest.startswith("e"):  # the fp8 of fp8-e5m2 is no alias
        name = ALIASES.get(head, head) + dash + rest
    return re.sub(r"^(w\da\d+)(g\d)", r"\1-\2", name)  # AutoRound writes W4A16G128


def _override(group_size: int | None) -> Granularity | None:
    if group_size is None:
        return None
    return PerChannel(0) if group_size == -1 else PerGroup(group_size)


def _options(text: str, name: str) -> dict[str, Any]:
    """The options behind the bits; each kind at most once."""
    found: dict[str, Any] = {}
    for word in filter(None, text.split("-")):
        key, value = _option(word, name)
        if key in found:
            raise UsageError(f"scheme gives its {key} twice", got=repr(name))
        found[key] = value
    return found


def _option(word: str, name: str) -> tuple[str, Any]:
    if size := re.fullmatch(r"g?(\d+)", word):
        return "granularity", PerGroup(int(size[1]))
    if word in ("channel", "tensor"):
        return "granularity", PerChannel(0) if word == "channel" else PerTensor()
    if word in ("sym", "asym"):
        return "symmetry", word == "sym"
    if word in ("dynamic", "static"):
        return "range", word
    raise UsageError(
        f"unknown option {word!r} in scheme", got=repr(name), wanted=", ".join(_OPTIONS)
    )


def _build(bits: int, act: int, options: dict[str, Any], name: str) -> Scheme:
    # A symmetric 1-bit code could only be zero.
    symmetric = options.get("symmetry", bits > 1)
    granularity = options.get(
        "granularity", PerChannel(0) if bits == 8 else PerGroup(DEFAULT_GROUP)
    )
    # Of 256 codes one more is nothing, and integer kernels want none at -128; of 16 it is 1.2 dB.
    weight = QSpec(Int(bits, narrow=symmetric and bits == 8), granularity, symmetric)
    if act >= 16:
        if "range" in options:
            raise UsageError(
                f"{options['range']} ranges are for quantized activations",
                got=repr(name),
                wanted="w8a8-static or w8a8-dynamic",
            )
        return Scheme(weight)
    if options.get("range", "dynamic") == "dynamic":
        return Scheme(weight, QSpec(Int(act, narrow=True), PerToken(), True, "dynamic"))
    return Scheme(weight, QSpec(Int(act), PerTensor(), False, "static"))
