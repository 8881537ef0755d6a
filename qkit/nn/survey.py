"""The survey of a model: every module that owns parameters, and whether it can be quantized.

Nothing is left out: the ``parameters`` of all entries sum to those of the model, and an entry
that cannot be quantized says why. Of a module that can be opened (:mod:`qkit.nn.open`), the entries
are the layers that it would have.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from qkit.nn.computed import settled
from qkit.nn.conv import CONVOLUTIONS
from qkit.nn.embedding import QEmbedding, QEmbeddingBag
from qkit.nn.layer import QLayer
from qkit.nn.linear import QLinear
from qkit.nn.open import Opening, gone, opening, why_closed
from qkit.nn.opened import Opened
from qkit.nn.tree import Tensors, without_form
from qkit.ops.schema import FLOATS
from qkit.packing.store import join

QUANTIZED: dict[type[nn.Module], type[QLayer]] = {
    layer.float_class: layer for layer in (QLinear, *CONVOLUTIONS, QEmbedding, QEmbeddingBag)
}


@dataclass(frozen=True, eq=False)
class Entry:
    """One module that owns parameters, of the model or of a module that is opened.

    ``parameters`` counts each shared parameter at its first owner only. ``reason`` says why the
    module stays in float, or is None where it can be quantized. ``tied_to`` is the first module
    that owns the same weight. ``inside`` is the name of the opened module that this is a part of
    (its own name, where the opened module is a layer itself), ``inside_kind`` that module's class;
    ``opens`` says that the module is still to be opened.
    """

    name: str
    module: nn.Module
    parameters: int
    reason: str | None
    tied_to: str | None = None
    inside: str | None = None
    inside_kind: str | None = None
    opens: bool = False
    note: str | None = None

    @property
    def kind(self) -> str:
        """The class name."""
        own = isinstance(self.module, Opened) or self.inside == self.name
        return self.inside_kind if own and self.inside_kind else type(self.module).__name__

    @property
    def kinds(self) -> tuple[str, ...]:
        """The class names that a rule may call it by."""
        kinds = (self.kind, self.inside_kind, type(self.module).__name__)
        return tuple(dict.fromkeys(kind for kind in kinds if kind is not None))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, or of the only parameter; empty where there are several."""
        own = dict(self.module.named_parameters(recurse=False))
        weight = own.get("weight", next(iter(own.values())) if len(own) == 1 else None)
        if weight is None or isinstance(weight, UninitializedParameter):
            return ()
        return tuple(weight.shape)


def survey(model: nn.Module) -> list[Entry]:
    """Every module of ``model`` with parameters of its own, in the order of ``named_modules``.

    Parameters that are not those of the layers of an opened module (the two factors of a weight
    norm, say) are counted at its first layer.
    """
    return _with_ties(list(_Walk(model).visit("", model)))


class _Walk:
    """One walk through a model, which counts every parameter once."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: set[int] = set()
        self.counted: set[int] = set()
        self.owners = Counter(id(p) for m in model.modules() for p in set(m._parameters.values()))

    def visit(
        self, name: str, module: nn.Module, inside: str | None = None, kind: str | None = None
    ) -> Iterator[Entry]:
        """The entries of ``module``, which lies ``inside`` a module of ``kind``, and below it."""
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        form = self._opening(module)
        if isinstance(form, Opening):
            self.seen |= {id(each) for each in module.modules()}
            yield from self._opened(name, module, form)
            return
        if own := list(module.parameters(recurse=False)):
            count = self._count(own)
            yield Entry(name, module, count, form or _reason(module), None, inside, kind)
        if opened_from := vars(module).get("opened_from"):
            inside, kind = name, opened_from
        for leaf, child in module._modules.items():
            if child is not None:
                yield from self.visit(join(name, leaf), child, inside, kind)

    def _opening(self, module: nn.Module) -> Opening | str | None:
        """How ``module`` is opened, or why it is not although it could be; None for the others."""
        form = opening(module)
        if form is None:
            return None
        if not isinstance(form.module, Opened) and _reason(form.module) is not None:
            return None
        if any(self.owners[id(each)] > 1 for each in gone(module, form)):
            return "shares a parameter that it would hold in another form"
        return form

    def _opened(self, name: str, module: nn.Module, form: Opening) -> Iterator[Entry]:
        params = list(module.parameters())
        rest = sum(_numel(p) for p in params if id(p) not in self.counted)
        entries = []
        for path, layer in form.module.named_modules():
            if own := list(layer.parameters(recurse=False)):
                count = self._count(own)
                rest -= count
                full = join(name, path)
                parent = (name, form.kind, True, form.note)
                entries.append(Entry(full, layer, count, _reason(layer), None, *parent))
        self._count(params)
        yield replace(entries[0], parameters=entries[0].parameters + rest)
        yield from entries[1:]

    def _count(self, own: list[nn.Parameter]) -> int:
        """The values in ``own`` that were not counted yet."""
        new = {id(p): p for p in own if id(p) not in self.counted}
        self.counted |= new.keys()
        return sum(_numel(p) for p in new.values())


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
    plain = settled(module)
    if reason := why_closed(plain):
        return reason
    if plain is not module:
        return _reason(plain)
    if isinstance(module, Opened):
        return f"a parameter of {module.opened_from} itself, not of a layer"
    if kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "nn.MultiheadAttention reads its weight directly"
    if kind not in QUANTIZED:
        bases = [base.__name__ for base in QUANTIZED if isinstance(module, base)]
        if bases:
            return f"a subclass of {bases[0]} may compute something else"
        if any(True for _ in module.children()):
            return f"a parameter of {kind.__name__} itself, not of a layer"
        return without_form(kind.__name__)
    quantized = QUANTIZED[kind]
    weight = module._parameters.get("weight")
    if weight is None or set(quantized.parameter_names) - module._parameters.keys():
        return "its weight or bias is not a parameter of it"
    if "forward" in vars(module):
        return "its forward was replaced, and may compute something else"
    own = module._parameters.keys() | module._buffers.keys() | module._modules.keys()
    if extra := own - set(quantized.parameter_names):
        return f"a quantized {kind.__name__} would lack its {', '.join(sorted(extra))}"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}"
    if weight.numel() == 0:
        return "its weight is empty"
    return quantized.unfit(module)


def _turned(entry: Entry) -> int:
    """How the layer's weight lies on disk: only layers that agree can share it."""
    return QUANTIZED[type(entry.module)].turned(entry.module)


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
            if other.reason is not None or _turned(other) != _turned(entry):
                return replace(
                    entry,
                    reason=f"shares its weight with {other.name} ({other.kind}), left in float",
                )
        first = sharers[0]
        return entry if first is entry else replace(entry, tied_to=first.name)

    return [judge(entry) for entry in entries]
