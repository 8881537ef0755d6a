"""What every opened module shares: the calls of the original, its weights in ``nn.Linear`` layers.

Modules such as ``nn.LSTM`` compute with raw parameters, and there is no layer to replace. An opened
module takes the place of one: same arguments, same results, but a parameter that is a weight
becomes the weight of a ``Linear`` child of the parameter's name, and its bias that child's bias.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from qkit.ops.schema import FLOATS


class Opened(nn.Module):
    """Base of the modules whose weights are ``Linear`` children.

    The children hold the very Parameters of the original, or views of them, so opening takes no
    memory. ``opened_from`` is the class name of the original, ``copied`` names its attributes that
    say how it computes.
    """

    copied: ClassVar[tuple[str, ...]] = ()
    opened_from: str

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.opened_from = type(module).__name__
        for name in self.copied:
            setattr(self, name, getattr(module, name))
        self.training = module.training

    @classmethod
    def tensors_of(cls, module: Any) -> set[str]:
        """The names of the parameters, buffers and children of ``module`` that are understood."""
        raise NotImplementedError

    def add_linear(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        """A child ``name`` with ``weight`` ``[out, in]`` and maybe a ``bias`` ``[out]``."""
        layer = linear(weight, bias)
        self.add_module(name, layer.train(self.training))

    def take_attributes(self, module: nn.Module) -> None:
        """Those attributes of ``module`` that are not every module's."""
        base = vars(nn.Module())
        for name, value in vars(module).items():
            if name not in base:
                setattr(self, name, value)

    def extra_repr(self) -> str:
        """The class of the original and its options."""
        options = (f"{name}={getattr(self, name)}" for name in self.copied)
        return ", ".join([self.opened_from, *options])


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A ``Linear`` that holds ``weight`` and ``bias``: themselves if Parameters, else as such."""
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = _parameter(weight)
    layer.register_parameter("bias", None if bias is None else _parameter(bias))
    return layer


def _parameter(tensor: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)


def obstacle(module: nn.Module, known: set[str]) -> str | None:
    """Why ``module``, of which ``known`` tensors and children are understood, stays closed."""
    kind = type(module).__name__
    if "forward" in vars(module):
        return "its forward was replaced, and may compute something else"
    own = module._parameters.keys() | module._buffers.keys() | module._modules.keys()
    if extra := own - known:
        return f"an opened {kind} would lack its {', '.join(sorted(extra))}"
    tensors = [p for p in module.parameters() if p is not None]
    if wrong := [p for p in tensors if p.dtype not in FLOATS]:
        return f"its weight is {wrong[0].dtype}"
    if any(p.numel() == 0 for p in tensors):
        return "its weight is empty"
    return None
