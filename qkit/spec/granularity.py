"""Granularity: how many values share one scale. Every granularity is a block shape.

A block shape has one entry per dimension of the tensor; the tensor is cut into blocks of that
shape, the last block of a dimension may be short, and each block has one scale (and zero
point). ``scale_shape`` is the number of blocks along each dimension.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from qkit.errors import InputError, UsageError
from qkit.spec.plain import choose, from_a_file, show, take

Shape = tuple[int, ...]


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for positive integers."""
    return -(-a // b)


@dataclass(frozen=True)
class _Blocks:
    """What all granularities share: the scale shape follows from the block shape."""

    def block_shape(self, shape: Shape) -> Shape:
        """The shape of one block in a tensor of ``shape``."""
        raise NotImplementedError

    def scale_shape(self, shape: Shape) -> Shape:
        """Number of blocks along each dimension; an empty dimension has none."""
        blocks = self.block_shape(shape)
        return tuple(ceil_div(n, b) if n else 0 for n, b in zip(shape, blocks, strict=True))


def _checked_axis(axis: int, shape: Shape, what: str) -> int:
    if not -len(shape) <= axis < len(shape):
        raise UsageError(f"{what}: the tensor has no axis {axis}", got=f"shape {tuple(shape)}")
    return axis % len(shape)


@dataclass(frozen=True)
class PerTensor(_Blocks):
    """One scale for everything.

    >>> PerTensor().scale_shape((4, 6))
    (1, 1)
    """

    def block_shape(self, shape: Shape) -> Shape:
        """The whole tensor."""
        return tuple(max(n, 1) for n in shape)

    def __str__(self) -> str:
        return "per-tensor"


@dataclass(frozen=True)
class PerChannel(_Blocks):
    """One scale for each index along ``axis``.

    >>> PerChannel(0).scale_shape((4, 6)), PerChannel(-1).scale_shape((4, 6))
    ((4, 1), (1, 6))
    """

    axis: int = 0

    def block_shape(self, shape: Shape) -> Shape:
        """All of the tensor at one index of the axis."""
        axis = _checked_axis(self.axis, shape, "per-channel")
        return tuple(1 if i == axis else max(n, 1) for i, n in enumerate(shape))

    def __str__(self) -> str:
        return "per-channel" if self.axis == 0 else f"per-channel(axis {self.axis})"


@dataclass(frozen=True)
class PerGroup(_Blocks):
    """One scale for every ``size`` neighbours along ``axis``; the last group may be short.

    >>> PerGroup(4).scale_shape((4, 6))
    (4, 2)
    """

    size: int
    axis: int = -1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError("a group has at least one element", got=self.size)
        if self.size >= 1 << 31:
            raise UsageError("a group is not that large", got=self.size, wanted="less than 2^31")

    def block_shape(self, shape: Shape) -> Shape:
        """``size`` neighbours along the axis."""
        axis = _checked_axis(self.axis, shape, "per-group")
        return tuple(max(min(self.size, n), 1) if i == axis else 1 for i, n in enumerate(shape))

    def __str__(self) -> str:
        return f"per-group({self.size})"


@dataclass(frozen=True)
class PerToken(_Blocks):
    """One scale for each vector along the last axis; used for activations.

    >>> PerToken().scale_shape((2, 3, 8))
    (2, 3, 1)
    """

    def block_shape(self, shape: Shape) -> Shape:
        """One vector of the last axis."""
        axis = _checked_axis(-1, shape, "per-token")
        return tuple(max(n, 1) if i == axis else 1 for i, n in enumerate(shape))

    def __str__(self) -> str:
        return "per-token"


@dataclass(frozen=True)
class PerBlock(_Blocks):
    """One scale for each block of the given ``shape``, aligned to the last dimensions.

    >>> PerBlock((2, 4)).scale_shape((3, 5, 6))
    (3, 3, 2)
    """

    shape: Shape

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if not self.shape or any(n < 1 for n in self.shape):
            raise UsageError("a block has at least one element in each dimension", got=self.shape)

    def block_shape(self, shape: Shape) -> Shape:
        """The block, with 1 for the leading dimensions."""
        if len(self.shape) > len(shape):
            raise UsageError("the block has more dimensions than the tensor", got=self.shape)
        full = (1,) * (len(shape) - len(self.shape)) + self.shape
        return tuple(max(min(b, n), 1) for b, n in zip(full, shape, strict=True))

    def __str__(self) -> str:
        return f"per-block({'x'.join(map(str, self.shape))})"


Granularity = PerTensor | PerChannel | PerGroup | PerToken | PerBlock

GRANULARITIES: dict[str, type] = {
    "tensor": PerTensor,
    "channel": PerChannel,
    "group": PerGroup,
    "token": PerToken,
    "block": PerBlock,
}


def granularity_to_json(granularity: Granularity) -> dict[str, object]:
    """``granularity`` as plain data; the inverse of :func:`granularity_from_json`."""
    name = next(name for name, kind in GRANULARITIES.items() if type(granularity) is kind)
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(granularity).items()}
    return {"type": name, **fields}


def granularity_from_json(data: object) -> Granularity:
    """The granularity that :func:`granularity_to_json` described, else
    :class:`~qkit.errors.InputError`."""
    name = data.get("type") if isinstance(data, dict) else data
    build = choose(name, "granularity", GRANULARITIES)
    _, *numbers = take(data, "granularity", {"type": str} | _FIELDS[build])
    for number in numbers:
        if isinstance(number, list) and any(type(n) is not int for n in number):
            raise InputError("the shape of a block is of integers", got=show(number))
    with from_a_file("granularity"):
        granularity: Granularity = build(*numbers)
    return granularity


_FIELDS: dict[type, dict[str, type]] = {
    PerTensor: {},
    PerChannel: {"axis": int},
    PerGroup: {"size": int, "axis": int},
    PerToken: {},
    PerBlock: {"shape": list},
}
