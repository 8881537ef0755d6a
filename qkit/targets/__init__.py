"""Where a model is deployed: each target can check, export, load and run. No torch in this file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qkit.errors import MissingExtraError, RequestError, UsageError
from qkit.spec import Int, Scheme


@dataclass(frozen=True)
class TargetInfo:
    """A row of ``qkit targets``: what a target is, the extra that it needs (if any),
    ``expresses``, which tells whether it can run a scheme, and ``wanted``, which says in words
    what those schemes are. The files of a ``native`` one are machine code: who loads them runs
    it."""

    name: str
    module: str
    extra: str | None
    summary: str
    expresses: Callable[[Scheme], bool]
    wanted: str
    native: bool = False


def _torch_expresses(scheme: Scheme) -> bool:
    """Integer weights with integer activations or exact ones, and any others with exact ones."""
    if scheme.output is not None:
        return False
    return isinstance(scheme.weight.format, Int) or scheme.input is None


def _onnx_expresses(scheme: Scheme) -> bool:
    """int8 weights per channel or tensor with int8 activations, or weights alone in the blocks of
    MatMulNBits."""
    if scheme.input is not None:
        return _int8_expresses(scheme)
    weight = scheme.weight
    blocks = isinstance(weight.format, Int) and weight.group_size in (16, 32, 64, 128, 256)
    return blocks and weight.format.bits in (4, 8) and scheme.output is None


def _int8_expresses(scheme: Scheme) -> bool:
    """int8 weights per channel or tensor, symmetric, with int8 activations."""
    weight, acts = scheme.weight, scheme.input
    if not isinstance(weight.format, Int) or acts is None or scheme.output is not None:
        return False
    bits = weight.format.bits, acts.format.bits
    return bits == (8, 8) and weight.symmetric and weight.group_size == 0


TARGETS = {
    "torch": TargetInfo(
        "torch",
        "qkit.targets.torch",
        None,
        "safetensors + JSON (+ a torch.export program), loaded with qkit.load",
        _torch_expresses,
        "quantized weights (w8a16, w4a16-g128, w8a8, nf4, fp8, ...) or a cast (bf16)",
    ),
    "onnx": TargetInfo(
        "onnx",
        "qkit.targets.onnx",
        "onnx",
        "model.onnx with integer weights, run by ONNX Runtime",
        _onnx_expresses,
        "int8-static, int8-dynamic, or weights of 4 or 8 bits in groups of 16 to 256 (w4a16-g32)",
    ),
    "inductor": TargetInfo(
        "inductor",
        "qkit.targets.inductor",
        "pt2e",
        "model.pt2, an AOTInductor package with int8 kernels of oneDNN, run by torch on x86",
        _int8_expresses,
        "int8-static or int8-dynamic; weights without activations are for --target torch, whose "
        "layers torch.compile takes (torch's operators for them are slower than float ones in "
        "fp32, and with qkit's own a package would not run without qkit)",
        native=True,
    ),
    "xnnpack": TargetInfo(
        "xnnpack",
        "qkit.targets.xnnpack",
        "xnnpack",
        "model.pte with int8 kernels of XNNPACK, run by ExecuTorch",
        _int8_expresses,
        "int8-static or int8-dynamic: weights without activations have no kernel here that is "
        "worth it",
    ),
}
# The targets that the PT2E flow writes (qkit.targets.backend).
LOWERED = tuple(name for name in TARGETS if name != "torch")


COMPRESSED, GGUF, QUANTO, CODED = "compressed-tensors", "gguf", "quanto", "coded"


@dataclass(frozen=True)
class FormatInfo:
    """How an artifact is written: the packages of its ``extra``, and what ``obstacle`` says
    about a scheme that it cannot hold (None: it can)."""

    extra: str | None
    packages: tuple[str, ...]
    obstacle: Callable[[Scheme], str | None]


def _compressed_obstacle(scheme: Scheme) -> str | None:
    """Integers of any width with exact activations, or int8 with an int8 range for each token."""
    acts = scheme.input
    if not isinstance(scheme.weight.format, Int):
        return f"is not written with {scheme.weight.format} weights"
    if acts is None:
        return None
    if acts.when != "dynamic":
        return "is not written with static ranges of activations"
    if (scheme.weight.format.bits, acts.format.bits, acts.symmetric) != (8, 8, True):
        return "has int8 activations for int8 weights only"
    return None


def _gguf_obstacle(scheme: Scheme) -> str | None:
    """What becomes Q8_0, Q4_0 or Q4_1 blocks."""
    if scheme.name in ("w8a16-g32", "w4a16-g32", "w4a16-g32-asym"):
        return None
    return "has blocks for w8a16-g32 (Q8_0), w4a16-g32 (Q4_0) and w4a16-g32-asym (Q4_1) only"


# The values of --format.
FORMATS = {
    "qkit": FormatInfo(None, (), lambda scheme: None),
    CODED: FormatInfo(None, (), lambda scheme: None),
    COMPRESSED: FormatInfo(
        COMPRESSED, ("transformers", "compressed-tensors"), _compressed_obstacle
    ),
    GGUF: FormatInfo(GGUF, ("gguf",), _gguf_obstacle),
}


def check_format(name: str, scheme: Scheme) -> None:
    """Refuse an unknown format, one that cannot hold ``scheme``, or one whose packages are missing.

    Raises :class:`~qkit.errors.UsageError` or :class:`~qkit.errors.RequestError`.
    """
    if name not in FORMATS:
        raise UsageError("unknown format", got=repr(name), wanted=", ".join(FORMATS))
    info = FORMATS[name]
    if obstacle := info.obstacle(scheme):
        raise RequestError(
            f"the format {name!r} {obstacle}",
            got=scheme.name,
            fix="--format qkit holds every scheme",
        )
    if info.extra is not None:
        require_packages(info.packages, info.extra, f"--format {name}")


def require_packages(packages: Iterable[str], extra: str, needed_for: str) -> None:
    """Raise :class:`~qkit.errors.MissingExtraError` with the pip command if one is missing."""
    from qkit.report import package_version  # imports torch

    for package in packages:
        if package_version(package) is None:
            raise MissingExtraError(package, extra, needed_for=needed_for)


def check(name: str, scheme: Scheme) -> None:
    """Refuse an unknown target, or a scheme that it cannot express, before any work is done.

    Raises :class:`~qkit.errors.UsageError` or :class:`~qkit.errors.RequestError`.
    """
    if name not in TARGETS:
        raise UsageError(
            "unknown target", got=repr(name), wanted=", ".join(TARGETS), fix="see: qkit targets"
        )
    if TARGETS[name].expresses(scheme):
        return
    if name in LOWERED:
        lacks, fix = "has no kernels for this scheme", "one of these as --scheme, or --target torch"
    else:
        lacks, fix = _obstacle(scheme)
    raise RequestError(
        f"the target {name!r} {lacks}", got=scheme.name, wanted=TARGETS[name].wanted, fix=fix
    )


def _obstacle(scheme: Scheme) -> tuple[str, str]:
    """What no target has yet, and what to ask for instead."""
    fmt = scheme.weight.format
    if scheme.output is not None:
        instead = f"--scheme {Scheme(scheme.weight, scheme.input).name} leaves the outputs alone"
        return "has no layers with quantized outputs", instead
    instead = f"--scheme {Scheme(scheme.weight).name} leaves the activations alone"
    return f"has no kernel that multiplies {fmt} weights with quantized activations", instead


def targets_of(scheme: Scheme) -> list[str]:
    """The names of the targets that can express ``scheme``."""
    return [target.name for target in TARGETS.values() if target.expresses(scheme)]
