"""How a contender wants to be called, where that is fixed.

A program takes its inputs by place or by name, as its example did, and the same data may come
either way; it may take no other batch than that of its example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkit.errors import InputError
from qkit.flows.bench.feed import samples
from qkit.models import Inputs, batches, leading


@dataclass(frozen=True)
class Signature:
    """The names of the inputs by place (empty where unknown), and of those by name."""

    args: tuple[str, ...]
    kwargs: tuple[str, ...]

    @staticmethod
    def of(example: Inputs, names: Sequence[str] = ()) -> Signature:
        """That of a call with ``example``, whose first inputs are called ``names``."""
        count = len(example.args)
        known = [*names, *[""] * count][:count]
        return Signature(tuple(known), tuple(example.kwargs))

    def fit(self, inputs: Inputs) -> Inputs:
        """The same tensors, each where it belongs: by name, or, where there is one of them or all
        come and are taken by place, by place.

        Raises :class:`~qkit.errors.InputError` where it is not clear which is which.
        """
        given = [*inputs.args, *inputs.kwargs.values()]
        names = (*self.args, *self.kwargs)
        if len(given) == len(names) == 1:
            found = dict(zip(names, given, strict=True))
        elif not inputs.kwargs and not self.kwargs and len(given) == len(names):
            return inputs
        elif not inputs.args and inputs.kwargs.keys() == set(names):
            found = inputs.kwargs
        elif (len(inputs.args), set(inputs.kwargs)) == (len(self.args), set(self.kwargs)):
            return inputs
        else:
            raise InputError(
                "other inputs than the model's",
                where=inputs.origin,
                got=", ".join([*(f"input {i}" for i in range(len(inputs.args))), *inputs.kwargs]),
                wanted=", ".join(name or f"input {i}" for i, name in enumerate(names)),
            )
        args = tuple(found[name] for name in self.args)
        return replace(inputs, args=args, kwargs={name: found[name] for name in self.kwargs})


def in_batches(call: Callable[[Inputs], list[Tensor]], inputs: Inputs, size: int) -> list[Tensor]:
    """What ``call`` gives for any number of samples, ``size`` in each call: a contender may take
    no other batch. The last batch is filled up, and its outputs are cut.

    Raises :class:`~qkit.errors.InputError` for outputs that are not one for each sample.
    """
    parts: list[list[Tensor]] = []
    for part in batches(inputs, size):
        count = leading(part)
        results = call(samples(part, size))
        if any(t.dim() == 0 or len(t) != size for t in results):
            raise InputError(
                "an output does not have the samples as its first dimension",
                got=[tuple(t.shape) for t in results],
                wanted=size,
            )
        parts.append([t[:count] for t in results])
    return [torch.cat(each) for each in zip(*parts, strict=True)]
