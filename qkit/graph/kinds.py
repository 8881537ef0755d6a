"""The operators of a captured graph that integer kernels exist for, by what they do to codes."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from torch import Tensor, fx

# role: ``weighted``  multiplies by a weight: input and weight are quantized
#       ``binary``    of two activations, which have parameters of their own
#       ``alike``     of several activations that share their parameters with the output (cat)
#       ``same``      moves values or picks among them: the output has the input's parameters
#       ``recurrent`` multiplies by weights at each step of a sequence
#       ``table``     looks up rows of a weight, by indices
#       ``own``       computes new values: the output has parameters of its own
#       ``tail``      is computed for nothing by the operator before it (relu)


# The roles of operators with a weight.
LAYERS = ("weighted", "recurrent", "table")


class Kind(NamedTuple):
    """What an operator is called in recipes and reports, and its role."""

    name: str
    role: str


_KINDS = {
    "conv1d": Kind("Conv1d", "weighted"),
    "conv2d": Kind("Conv2d", "weighted"),
    "conv3d": Kind("Conv3d", "weighted"),
    "linear": Kind("Linear", "weighted"),
    "lstm": Kind("LSTM", "recurrent"),
    "embedding": Kind("Embedding", "table"),
    "embedding_bag": Kind("EmbeddingBag", "table"),
    "add": Kind("Add", "binary"),
    "add_": Kind("Add", "binary"),
    "mul": Kind("Mul", "binary"),
    "mul_": Kind("Mul", "binary"),
    "cat": Kind("Concat", "alike"),
    "max_pool2d": Kind("MaxPool2d", "same"),
    "upsample_nearest2d": Kind("Upsample", "same"),
    "flatten": Kind("Flatten", "same"),
    "view": Kind("Reshape", "same"),
    "reshape": Kind("Reshape", "same"),
    "permute": Kind("Transpose", "same"),
    "transpose": Kind("Transpose", "same"),
    "squeeze": Kind("Squeeze", "same"),
    "unsqueeze": Kind("Unsqueeze", "same"),
    "slice": Kind("Slice", "same"),
    "dropout": Kind("Dropout", "same"),
    "avg_pool2d": Kind("AvgPool2d", "own"),
    "adaptive_avg_pool2d": Kind("AdaptiveAvgPool2d", "own"),
    "mean": Kind("Mean", "own"),
    "relu": Kind("ReLU", "tail"),
    "relu_": Kind("ReLU", "tail"),
    "relu6": Kind("Hardtanh", "tail"),
    "relu6_": Kind("Hardtanh", "tail"),
    "hardtanh": Kind("Hardtanh", "tail"),
    "hardtanh_": Kind("Hardtanh", "tail"),
}


def kind_of(node: object) -> Kind | None:
    """The kind of a node, or None where there is no integer kernel for it."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.name.startswith("aten::"):
        return None
    kind = _KINDS.get(schema.name.removeprefix("aten::"))
    if kind is None or (kind.role == "binary" and not _plain(node)):
        return None
    return None if kind.name == "Mean" and not is_image_mean(node) else kind


def _plain(node: fx.Node) -> bool:
    """Whether a binary operator has two computed float tensors, and no factor between them."""
    return not node.kwargs and len(node.args) == 2 and len(activations(node)) == 2


def is_image_mean(node: fx.Node) -> bool:
    """Whether ``node`` is the mean of each channel of a batch of images: ``[N, C, H, W]`` over
    H and W, by ``mean`` or by a pool of one output."""
    schema, value = getattr(node.target, "_schema", None), node.meta.get("val")
    if schema is None or not isinstance(value, Tensor):
        return False
    args: Any = node.args
    if schema.name == "aten::adaptive_avg_pool2d":
        return value.dim() == 4 and set(args[1]) == {1}
    if schema.name != "aten::mean" or len(args) < 2 or node.kwargs:
        return False
    # The value's own dimensions tell those of the input, which may be a node without a value.
    size = value.dim() if len(args) > 2 and args[2] else value.dim() + 2
    return size == 4 and isinstance(args[1], list | tuple) and {d % 4 for d in args[1]} == {2, 3}


def activations(node: fx.Node) -> list[fx.Node]:
    """The float tensors among the inputs of ``node`` that are computed or given, no parameters."""
    return [n for n in node.all_input_nodes if n.op != "get_attr" and is_float(n)]


def is_float(node: fx.Node) -> bool:
    """Whether the value of ``node`` is a float tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def owner_of(node: fx.Node) -> tuple[str, str]:
    """The full name and the class name of the module whose forward calls ``node``."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return "", ""
    name, kind = stack[-1]
    kind = kind if isinstance(kind, str) else kind.__name__
    # Strict export writes L['self'].body['fc'] where non-strict export writes body.fc.
    return name.removeprefix("L['self']").lstrip("."), kind.rpartition(".")[2]


def weight_of(node: fx.Node) -> tuple[fx.Node, str] | None:
    """The node of the (first) weight of an operator that has one, and the name of its owner."""
    kind = kind_of(node)
    if kind is not None and kind.role == "recurrent":
        weights: Any = node.args[2] if len(node.args) == 9 else None
        weight = weights[0] if isinstance(weights, list | tuple) else None  # else packed sequences
    elif kind is not None and kind.role == "table":
        weight = node.args[0]
    else:
        weight = _second(node)
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    return weight, str(weight.target).rpartition(".")[0]


def _second(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")


def attribute(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor behind a ``get_attr`` node of ``module``."""
    owner, _, leaf = str(node.target).rpartition(".")
    value = getattr(module.get_submodule(owner), leaf)
    assert isinstance(value, Tensor)
    return value.detach()


def uses_of(module: fx.GraphModule) -> Counter[str]:
    """How many operators of ``module`` read each parameter or buffer, by name."""
    found: Counter[str] = Counter()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            found[str(node.target)] += len(node.users)
    return found


def bias_of(node: fx.Node) -> fx.Node | None:
    """The node of the bias of a weighted operator, where it has one that is a parameter."""
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return bias if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def dynamic_codes(node: Any) -> fx.Node | None:
    """The node whose codes, of a range that is taken at each call, ``node`` dequantizes."""
    codes: Any = node.args[0] if decomposed(node) == "dequantize_per_tensor" else None
    dynamic = decomposed(codes) == "quantize_per_tensor" and isinstance(codes.args[1], fx.Node)
    return codes if dynamic else None


def decomposed(node: Any) -> str | None:
    """The name of an operator of PT2E's converted programs; None for others."""
    schema = getattr(getattr(node, "target", None), "_schema", None)
    space, _, name = (schema.name if schema else "").partition("::")
    return name if space == "quantized_decomposed" else None
