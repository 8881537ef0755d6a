"""Links: channels that a factor may pass through, from what makes them to the layers that read
them.

Relu, pools and dropout let a positive factor pass, relu6 (:func:`ceiling_of`) only below its
ceiling. A link ends in layers alone: where a sum, a gelu or the output of the model reads a channel
too, no factor may pass. (But for a layer norm before a shortcut, as BERT has them: there a product
with the factors' inverses is put before the linear layers, if it is asked for.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qkit.graph.columns import times
from qkit.graph.kinds import attribute, bias_of, kind_of, uses_of, weight_of
from qkit.graph.norms import put

_OF_VALUES = frozenset({"ReLU", "Hardtanh", "Dropout"})
_OF_IMAGES = frozenset({"MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "Mean", "Upsample"})
_OF_SHAPES = frozenset({"Flatten", "Reshape", "Squeeze"})


@dataclass(frozen=True)
class Link:
    """The ``channels`` that ``maker`` (a convolution, linear layer or layer norm) makes along its
    axis, the operators ``between``, and the ``readers``, which are convolutions or linear layers.
    """

    maker: fx.Node
    between: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]
    channels: int

    # Others read the channels too: a product before the readers divides them.
    apart: bool = False

    @property
    def ceiling(self) -> float | None:
        """The least ceiling between; None where nothing is clipped."""
        ceilings = [c for node in self.between if (c := ceiling_of(node)) is not None]
        return min(ceilings, default=None)


def ceiling_of(node: fx.Node) -> float | None:
    """Where ``node`` clips from above, if it is a relu6 or a hardtanh from zero on."""
    kind = kind_of(node)
    if kind is None or kind.name != "Hardtanh":
        return None
    if "relu6" in str(node.target):
        return 6.0
    given: list[Any] = list(node.args[1:3])
    low, high = given + [-1.0, 1.0][len(given) :]
    return float(high) if low == 0 else None


def is_layer_norm(node: fx.Node) -> bool:
    """Whether ``node`` normalises its last dimension and has a weight of its own."""
    schema = getattr(node.target, "_schema", None)
    args: Any = node.args
    return (
        schema is not None
        and schema.name == "aten::layer_norm"
        and len(args[1]) == 1
        and len(args) > 3
        and all(isinstance(each, fx.Node) and each.op == "get_attr" for each in args[2:4])
    )


def channel_axis(node: fx.Node) -> int:
    """The dimension of the value of a convolution, linear layer or layer norm that its weight's
    rows make."""
    kind = kind_of(node)
    if kind is not None and kind.name.startswith("Conv"):
        return 1
    last: int = node.meta["val"].dim() - 1
    return last


class Links:
    """The links of ``module``, whose batch-norms are folded, and what can be done to them."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self._uses = uses_of(module)
        found = (self._link(node) for node in module.graph.nodes)
        self.all = [link for link in found if link is not None]

    def made(self, link: Link) -> Tensor:
        """The greatest magnitude of the weights that make each channel."""
        return self._weight(link.maker).abs().flatten(1).amax(1)

    def read(self, link: Link) -> Tensor:
        """The greatest magnitude of the weights that read each channel, of all readers."""
        return torch.stack([self._columns(node).abs().amax((0, 2)) for node in link.readers]).amax(
            0
        )

    def scale(self, link: Link, factor: Tensor) -> None:
        """Divide the channels by ``factor`` where they are made, multiply where they are read."""
        if link.apart:
            self._divide(link, factor)
        for node in () if link.apart else self._tensors(link.maker):
            tensor = attribute(self.module, node)
            shape = (-1, *[1] * (tensor.dim() - 1))
            self._put(node, tensor / factor.to(tensor).reshape(shape))
        for reader in link.readers:
            node = self._parameter(reader)
            shape = attribute(self.module, node).shape
            columns = self._columns(reader)
            columns = columns * factor.to(columns).reshape(1, -1, 1)
            self._put(node, self._from_columns(columns, shape))

    def _divide(self, link: Link, factor: Tensor) -> None:
        times(self.module, link.maker, (1 / factor).float(), link.readers)

    def _put(self, node: fx.Node, tensor: Tensor) -> None:
        put(self.module, str(node.target), nn.Parameter(tensor.contiguous(), requires_grad=False))

    def _tensors(self, maker: fx.Node) -> list[fx.Node]:
        if is_layer_norm(maker):
            return [each for each in maker.args[2:4] if isinstance(each, fx.Node)]
        bias = bias_of(maker)
        return [self._parameter(maker), *([] if bias is None else [bias])]

    def _parameter(self, layer: fx.Node) -> fx.Node:
        weight = weight_of(layer)
        assert weight is not None
        return weight[0]

    def _weight(self, maker: fx.Node) -> Tensor:
        if is_layer_norm(maker):
            gamma: Any = maker.args[2]
            return attribute(self.module, gamma)[:, None]
        return attribute(self.module, self._parameter(maker))

    def _columns(self, reader: fx.Node) -> Tensor:
        """The weight of a reader as ``[rows, channels, rest]``."""
        weight = attribute(self.module, self._parameter(reader))
        if weight.dim() > 2 and weight.shape[1] == 1:  # depthwise: a row for each channel, or more
            channels = _groups(reader)
            return weight.reshape(channels, -1, weight[0].numel()).transpose(0, 1)
        return weight.flatten(2) if weight.dim() > 2 else weight[:, :, None]

    @staticmethod
    def _from_columns(columns: Tensor, shape: torch.Size) -> Tensor:
        if len(shape) > 2 and shape[1] == 1:
            return columns.transpose(0, 1).reshape(shape)
        return columns.reshape(shape)

    def _own(self, *nodes: fx.Node) -> bool:
        """Whether parameters are used once."""
        return all(self._uses[str(node.target)] == 1 for node in nodes)

    def _link(self, maker: fx.Node) -> Link | None:
        kind = kind_of(maker)
        layer = kind is not None and kind.role == "weighted" and kind.name != "Conv3d"
        if not (layer and weight_of(maker) is not None) and not is_layer_norm(maker):
            return None
        extra = maker.args[2] if layer and len(maker.args) > 2 else None
        if isinstance(extra, fx.Node) and extra.op != "get_attr":  # a bias that is computed
            return None
        if not self._own(*self._tensors(maker)):
            return None
        channels, axis = len(self._weight(maker)), channel_axis(maker)
        between: list[fx.Node] = []
        readers: list[fx.Node] = []
        if self._follow(maker, axis, channels, between, readers):
            return Link(maker, tuple(between), tuple(readers), channels)
        direct = [n for n in maker.users if (k := kind_of(n)) and k.name == "Linear"]
        direct = [n for n in direct if n.args[0] is maker and self._reads(n, axis, channels)]
        if is_layer_norm(maker) and direct:
            return Link(maker, (), tuple(direct), channels, apart=True)
        return None

    def _follow(
        self,
        node: fx.Node,
        axis: int,
        channels: int,
        between: list[fx.Node],
        readers: list[fx.Node],
    ) -> bool:
        """Whether all that reads ``node`` ends in layers; they are noted."""
        for user in node.users:
            kind = kind_of(user)
            if kind is None or user.args[0] is not node:
                return False
            if kind.role == "weighted":
                if not self._reads(user, axis, channels):
                    return False
                readers.append(user)
                continue
            dims = node.meta["val"].dim()
            if kind.name in _OF_VALUES:
                passes = kind.name != "Hardtanh" or ceiling_of(user) is not None
            elif kind.name in _OF_IMAGES:
                passes = axis == 1 and dims == 4 and user.meta["val"].dim() in (2, 4)
            else:
                passes = kind.name in _OF_SHAPES and _drops_ones(node, user, axis)
            if not passes:
                return False
            between.append(user)
            if not self._follow(user, axis, channels, between, readers):
                return False
        return bool(node.users)

    def _reads(self, layer: fx.Node, axis: int, channels: int) -> bool:
        """Whether ``layer`` reads each channel along ``axis`` by a weight of its own."""
        weight, x = weight_of(layer), layer.args[0]
        if weight is None or not isinstance(x, fx.Node) or not self._own(weight[0]):
            return False
        shape = attribute(self.module, weight[0]).shape
        if len(shape) == 2:
            return axis == x.meta["val"].dim() - 1 and shape[1] == channels
        if len(shape) > 4 or axis != 1:
            return False
        groups = _groups(layer)
        return (groups == 1 and shape[1] == channels) or groups == channels


def _groups(conv: fx.Node) -> int:
    return int(conv.args[6]) if len(conv.args) > 6 else 1  # type: ignore[arg-type]


def _drops_ones(node: fx.Node, user: fx.Node, axis: int) -> bool:
    """Whether ``user`` makes ``[N, C]`` of ``[N, C, 1, 1]``."""
    before, after = node.meta["val"].shape, user.meta["val"].shape
    ones = axis == 1 and all(size == 1 for size in before[2:])
    return ones and len(after) == 2 and after[1] == before[1]
