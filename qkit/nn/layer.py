"""What every quantized layer shares: its stored tensors as buffers, and how they move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qkit import ops
from qkit.numerics import QParams, QTensor, no_scale
from qkit.packing import from_tensors, tensor_specs, to_tensors
from qkit.packing.store import Stored, levels_of, matrix_shape, turn
from qkit.spec import Float, QSpec, Scheme

# The module's own name for the stored int8 tensor ``weight``: see QLayer.weight.
CODES = "weight_codes"

FloatLayer = Any  # an instance of the float class: a linear layer, a convolution, an embedding


def stored_name(name: str) -> str:
    """The name on disk of a module's parameter or buffer ``name``."""
    return name.removesuffix(CODES) + "weight" if name.endswith(CODES) else name


class QLayer(nn.Module):
    """Base of the layers whose weight is quantized, and maybe (``acts``) their input.

    The weight lives in buffers, so it has no gradient and moves with the module. Their names and
    shapes in ``state_dict`` are the stored layout (:mod:`qkit.packing.store`). ``.half()`` and
    ``.to(dtype)`` change the activations' type, as with any module, but leave codes and scales as
    they are: rounding a scale again would move every weight of its block.
    """

    float_class: ClassVar[type[nn.Module]]
    # The parameters of the float layer.
    parameter_names: ClassVar[tuple[str, ...]] = ("weight", "bias")
    # Whether input_vectors tells anything: see there.
    has_vectors: ClassVar[bool] = True
    bias: nn.Parameter | None
    weight_codes: Tensor  # 8 bits
    weight_packed: Tensor  # 1 to 7 bits
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_levels: Tensor  # codebooks and narrow floats
    input_scale: Tensor  # static ranges of the input
    input_zero_point: Tensor | None

    def __init__(self, layer: FloatLayer, spec: QSpec, acts: QSpec | None = None) -> None:
        """An empty layer with the geometry, bias and device of the float ``layer``."""
        super().__init__()
        if lacks := self.lacks(Scheme(spec, acts)):
            raise TypeError(f"{type(self).__name__} {lacks}")
        # The class that was opened to get this layer (qkit.nn.open), if any.
        self.opened_from: str | None = vars(layer).get("opened_from")
        weight = layer.weight
        self.turned_by = self.turned(layer)
        self.spec = spec
        self.acts = acts
        self.bits = spec.format.bits
        self.group = spec.group_size
        self.weight_size = tuple(self.rows(layer).shape)  # as it is stored
        self.weight_dtype = weight.dtype
        for name, stored in self._stored().items():
            empty = torch.empty(stored.shape, dtype=stored.dtype, device=weight.device)
            self.register_buffer(CODES if name == "weight" else name, empty)
        derived = {}
        if isinstance(spec.format, Float):
            derived["weight_levels"] = levels_of(spec.format)
        if spec.is_cast:
            derived["weight_scale"] = no_scale().scale
        self.derived = frozenset(derived)  # what follows from the spec, and is not stored
        for name, tensor in derived.items():
            placed = tensor if weight.is_meta else tensor.to(weight.device)
            self.register_buffer(name, placed, persistent=False)
        if spec.symmetric:
            self.weight_zero_point = None
        if acts is not None and acts.when == "static" and acts.symmetric:
            self.input_zero_point = None
        self.register_parameter("bias", layer._parameters.get("bias"))
        self.train(layer.training)

    @classmethod
    def part_of(cls, scheme: Scheme) -> Scheme:
        """What of ``scheme`` such a layer follows."""
        return scheme

    @classmethod
    def unfit(cls, layer: FloatLayer) -> str | None:
        """Why the float ``layer`` itself cannot be quantized, under any scheme; None if it can."""
        return None

    @staticmethod
    def turned(layer: FloatLayer) -> int:
        """The groups by which the weight of ``layer`` is turned (:func:`~qkit.packing.store.turn`)
        to be stored; 0 where its rows come first as it is."""
        return 0

    @classmethod
    def rows(cls, layer: FloatLayer) -> Tensor:
        """The weight of the float ``layer`` in the shape that is stored, output channels first."""
        groups = cls.turned(layer)
        return turn(layer.weight, groups) if groups else layer.weight

    @classmethod
    def lacks(cls, scheme: Scheme) -> str | None:
        """Why there is no such layer under ``scheme``; None where there is."""
        if scheme.input is not None:
            return "has no kernel with quantized activations"
        return None

    @classmethod
    def from_float(
        cls,
        layer: FloatLayer,
        q: QTensor,
        acts: QSpec | None = None,
        input_qparams: QParams | None = None,
    ) -> QLayer:
        """The layer that computes what ``layer`` does with its weight replaced by ``q``.

        ``q`` holds :meth:`rows` as a matrix ``[rows, columns]`` (trailing dimensions flattened).
        The bias is the very Parameter of ``layer``. ``acts`` says how the input is quantized, and
        ``input_qparams`` with what scale where its range is static.
        """
        new = cls(layer, q.spec, acts)
        for name, tensor in to_tensors(q, new.weight_size).items():
            setattr(new, CODES if name == "weight" else name, tensor.to(layer.weight.device))
        if input_qparams is not None:
            new.set_input_range(input_qparams)
        return new

    def set_input_range(self, qparams: QParams) -> None:
        """Quantize the input with this scale (and zero point), one for all."""
        device = self.weight_scale.device
        self.input_scale = qparams.scale.reshape(1).to(device)
        if qparams.zero_point is not None:
            self.input_zero_point = qparams.zero_point.reshape(1).to(device)

    def _stored(self) -> dict[str, Stored]:
        return tensor_specs(self.weight_size, self.spec, self.acts)

    @staticmethod
    def input_vectors(layer: Any, x: Tensor) -> Tensor:
        """The vectors that the weight of the float ``layer`` meets when it is called with ``x``.

        ``[groups, vectors, columns]``, for algorithms that look at a layer's inputs.
        """
        raise NotImplementedError

    @property
    def stored_weight(self) -> Tensor:
        """The codes as the operators take them: int8, or packed int32 words."""
        return self.weight_codes if self.bits == 8 else self.weight_packed

    def qtensor(self) -> QTensor:
        """The weight as a matrix of codes with its scales."""
        names = tensor_specs(self.weight_size, self.spec)
        tensors = {name: getattr(self, CODES if name == "weight" else name) for name in names}
        return from_tensors(tensors, self.spec)

    @property
    def weight(self) -> Tensor:
        """The float weight, computed anew at every access.

        For code that reads a layer's weight instead of calling the layer (its dtype, a norm, a
        functional call): it gets the right values, at the price of a dequantization.
        """
        return self.values(self.weight_dtype)

    def values(self, dtype: torch.dtype) -> Tensor:
        """What the float layer's weight became, in its shape."""
        book = self.spec.by_table
        matrix = (ops.dequantize_codebook if book else ops.dequantize)(
            self.stored_weight,
            self.weight_scale,
            self.weight_levels if book else self.weight_zero_point,
            self.bits,
            self.group,
            matrix_shape(self.weight_size)[1],
            dtype,
        )
        rows = matrix.reshape(self.weight_size)
        return turn(rows, self.turned_by) if self.turned_by else rows

    def share_weight(self, other: QLayer) -> None:
        """Use the buffers of ``other``, whose weight this layer's weight is tied to."""
        for name in self._buffers:
            if name.startswith("weight"):
                self._buffers[name] = other._buffers[name]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QLayer:
        kept = {name: t for name, t in self._buffers.items() if t is not None}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if prefix + CODES in destination:
            destination[prefix + "weight"] = destination.pop(prefix + CODES)

    def _misfits(self, state_dict: Mapping[str, Any], prefix: str) -> Iterator[str]:
        """Which of the stored tensors in ``state_dict`` are not those of this layer.

        torch itself compares shapes only, and casts: float weights would become codes.
        """
        for name, want in self._stored().items():
            have = state_dict.get(prefix + name)
            if not isinstance(have, Tensor):
                continue  # torch reports it
            if (have.shape, have.dtype) != (want.shape, want.dtype):
                yield (
                    f"{prefix}{name} has shape {tuple(have.shape)} and {have.dtype}, "
                    f"the layer's has {want.shape} and {want.dtype}"
                )
            elif name == "weight_shape" and tuple(have.tolist()) != self.weight_size:
                # Packed words do not tell: rows of 9 and of 10 codes take as many.
                yield (
                    f"{prefix}weight_packed is of a weight of shape {tuple(have.tolist())}, "
                    f"the layer's is {self.weight_size}"
                )

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if misfits := list(self._misfits(state_dict, prefix)):
            error_msgs += misfits
            return  # the layer stays as it was
        renamed = self.bits == 8 and prefix + "weight" in state_dict
        if renamed:
            state_dict[prefix + CODES] = state_dict.pop(prefix + "weight")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if renamed:  # the caller compares the keys of its dict with those of state_dict()
            state_dict[prefix + "weight"] = state_dict.pop(prefix + CODES)

    def extra_repr(self) -> str:
        """The geometry and the spec."""
        shape = "x".join(map(str, self.weight_size))
        acts = "" if self.acts is None else f"; input {self.acts.describe()}, {self.acts.when}"
        return f"{shape}, bias={self.bias is not None}, {self.spec.describe()}{acts}"
