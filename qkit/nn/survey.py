"""The survey of a model: every module that owns parameters, and whether it can be quantized.

Nothing is left out: the ``parameters`` of all entries sum to those of the model, and an entry
that cannot be quantized says why.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from qkit.nn.conv2d import QConv2d
from qkit.nn.layer import QLayer
from qkit.nn.linear import QLinear
from qkit.nn.tree import Tensors, without_form
from qkit.ops.schema import FLOATS

QUANTIZED: dict[type[nn.Module], type[QLayer]] = {
    layer.float_class: layer for layer in (QLinear, QConv2d)
}

_COMPUTED = "its weight or bias is computed (weight norm, pruning mask or parametrization)"


@dataclass(frozen=True, eq=False)
class Entry:
    """One module that owns parameters.

    ``parameters`` counts each shared parameter at its first owner only. ``reason`` says why the
    module stays in float, or is None where it can be quantized. ``tied_to`` is the first module
    that owns the same weight.
    """

    name: str
    module: nn.Module
    parameters: int
    reason: str | None
    tied_to: str | None = None

    @property
    def kind(self) -> str:
        """The class name."""
        return type(self.module).__name__

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, or of the only parameter; empty where there are several."""
        own = dict(self.module.named_parameters(recurse=False))
        weight = own.get("weight", next(iter(own.values())) if len(own) == 1 else None)
        if weight is None or isinstance(weight, UninitializedParameter):
            return ()
        return tuple(weight.shape)


def survey(model: nn.Module) -> list[Entry]:
    """Every module of ``model`` with parameters of its own, in the order of ``named_modules``."""
    seen: set[int] = set()
    entries = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if not own:
            continue
        new = {id(p): p for p in own if id(p) not in seen}
        seen |= new.keys()
        count = sum(_numel(p) for p in new.values())
        entries.append(Entry(name, module, count, _reason(module)))
    return _with_ties(entries)


def _numel(p: Tensor) -> int:
    return 0 if isinstance(p, UninitializedParameter) else p.numel()


def _reason(module: nn.Module) -> str | None:
    """Why ``module`` stays in float, judged by itself; None where it can be quantized."""
    kind = type(module)
    if isinstance(module, QLayer):
        return "already quantized"
    if isinstance(module, Tensors):
        return module.reason_left
    if any(isinstance(p, UninitializedParameter) for p in module.parameters(recurse=False)):
        return "not initialised: run the model once before quantizing"
    if isinstance(module, ParametrizationList):
        return "what a parametrized tensor is computed from"
    if kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "nn.MultiheadAttention reads its weight directly"
    if kind not in QUANTIZED:
        bases = [base.__name__ for base in QUANTIZED if isinstance(module, base)]
        if bases and is_parametrized(module):  # torch then makes a subclass
            return _COMPUTED
        if bases:
            return f"a subclass of {bases[0]} may compute something else"
        if any(True for _ in module.children()):
            return f"a parameter of {kind.__name__} itself, not of a layer"
        return without_form(kind.__name__)
    weight = module._parameters.get("weight")
    if weight is None or "bias" not in module._parameters:
        return _COMPUTED
    if "forward" in vars(module):
        return "its forward was replaced, and may compute something else"
    own = module._parameters.keys() | module._buffers.keys() | module._modules.keys()
    if extra := own - {"weight", "bias"}:
        return f"a quantized {kind.__name__} would lack its {', '.join(sorted(extra))}"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}"
    if weight.numel() == 0:
        return "its weight is empty"
    return None


def _with_ties(entries: list[Entry]) -> list[Entry]:
    """A weight with several owners is quantized for all of them or for none."""
    owners: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        for parameter in entry.module.parameters(recurse=False):
            owners[id(parameter)].append(entry)

    def judge(entry: Entry) -> Entry:
        weight = entry.module._parameters.get("weight")
        sharers = owners[id(weight)] if weight is not None else [entry]
        if entry.reason is not None or len(sharers) == 1:
            return entry
        for other in sharers:
            if other.reason is not None or other.kind != entry.kind:
                return replace(
                    entry,
                    reason=f"shares its weight with {other.name} ({other.kind}), left in float",
                )
        first = sharers[0]
        return entry if first is entry else replace(entry, tied_to=first.name)

    return [judge(entry) for entry in entries]
