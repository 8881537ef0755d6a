"""Attributes that a module's own code counts channels by: found by value, proven by running.

``x.view(b, t, self.heads, self.size)`` mentions sizes that shrink with the model. Which attribute
says which size the graph does not tell: each integer of the module that has the value is taken,
and the cut model must give what the whole one gives with zeros in place of what was removed.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from qkit.models import Inputs, run
from qkit.pruning.facts import Count, Facts, Site
from qkit.pruning.groups import Removed
from qkit.pruning.surgery import cut, twin, zeroed
from qkit.report import compare
from qkit.report.metrics import BOUNDS

# Of how many ways to set attributes one may be right.
MAX_TRIES = 64
_HEADS = re.compile(r"heads?$")


class Misfit(Exception):
    """The cut model does not run, or computes something else. ``modules`` were running, the
    innermost first; ``error`` is what was raised, if anything was; ``removed`` had been cut."""

    def __init__(self, modules: tuple[str, ...], error: Exception | None) -> None:
        super().__init__(str(error))
        self.modules, self.error = modules, error
        self.removed: Removed = np.zeros(0, np.bool_)


Key = tuple[str, str]  # the class of a module and an attribute
Options = dict[Key, list[list[Count]]]


def candidates(facts: Facts, model: nn.Module, *, deep: bool) -> Options:
    """For each attribute that may say a size: what it may count, in all modules of its class.

    Modules of a class share their code, so what an attribute says must have its value in every one
    of them. Of a size whose innermost module has no such attribute, the modules around it are
    looked at if ``deep``.
    """
    counted = {(c.module, c.attribute) for c in facts.counts}
    said: dict[Key, dict[str, dict[str, Count]]] = defaultdict(lambda: defaultdict(dict))
    modules_by_name = dict(model.named_modules())
    for site in facts.sites:
        for name, attribute in _attributes(site, modules_by_name, deep=deep):
            if (name, attribute) not in counted:
                kind = type(modules_by_name[name]).__name__
                count = Count(name, attribute, site.ids, site.dim)
                before = said[kind, attribute][name].setdefault(site.place, count)
                if not before.ids.any():  # the same line again, with something to count
                    said[kind, attribute][name][site.place] = count
    found = {}
    for key, modules in said.items():
        common = set.intersection(*(set(places) for places in modules.values()))
        options = [[places[place] for places in modules.values()] for place in sorted(common)]
        # What counts nothing that can be removed says nothing.
        if options := [o for o in options if any(count.ids.any() for count in o)]:
            found[key] = options
    return found


def _attributes(site: Site, modules: dict[str, nn.Module], *, deep: bool) -> list[tuple[str, str]]:
    """The integers with the site's size, of the innermost of its modules that has any.

    A program tells of modules that it no longer has.
    """
    for name in site.modules:
        names = [
            attribute
            for attribute, value in (vars(modules[name]) if name in modules else {}).items()
            if type(value) is int and value == site.size and not attribute.startswith("_")
        ]
        if names or not deep:
            return [(name, attribute) for attribute in names]
    return []


def fit(
    model: nn.Module, facts: Facts, removed: Removed, inputs: Inputs
) -> tuple[nn.Module, list[Count]]:
    """A cut copy of ``model`` that is proven right, and the counts that were set in it.

    Raises :class:`Misfit` if there is none.
    """
    reference = _reference(model, facts, removed, inputs)
    misfit: Misfit | None = None

    def attempt(choice: dict[Key, list[Count]]) -> nn.Module | None:
        nonlocal misfit
        pruned = twin(model, facts)
        counts = [*facts.counts, *(count for own in choice.values() for count in own)]
        cut(pruned, facts, removed, counts, shared=True)
        try:
            _prove(pruned, inputs, reference, exact=not facts.through_norms)
        except Misfit as error:
            misfit = error
            return None
        return pruned

    tries = [_choices(candidates(facts, model, deep=deep)) for deep in (False, True)]
    for choice in itertools.chain(*(itertools.islice(each, MAX_TRIES) for each in tries)):
        if (pruned := attempt(choice)) is not None:
            break
    else:
        assert misfit is not None
        misfit.removed = removed
        raise misfit
    for key in list(choice):
        # A value may be the size by chance. A number of heads is told by its name, even where the
        # code does not ask for it; of others, only what the code needs is set.
        if not _HEADS.search(key[1]):
            fewer = {k: own for k, own in choice.items() if k != key}
            if (smaller := attempt(fewer)) is not None:
                pruned, choice = smaller, fewer
    return pruned, [*facts.counts, *(count for own in choice.values() for count in own)]


def _choices(options: Options) -> Iterator[dict[Key, list[Count]]]:
    """Which attributes to set, and to which counts: all of them first, then fewer and fewer."""
    keys = list(options)
    for count in range(len(keys), -1, -1):
        for some in itertools.combinations(keys, count):
            for picked in itertools.product(*(options[key] for key in some)):
                yield dict(zip(some, picked, strict=True))


def _reference(model: nn.Module, facts: Facts, removed: Removed, inputs: Inputs) -> list[Tensor]:
    """What ``model`` gives with zeros in place of what is removed."""
    zeros = zeroed(facts, removed)
    # All before the first is changed: one may be a view of another.
    whole = {key: facts.slots[key].tensor.detach().clone() for key in zeros}
    try:
        for key, values in zeros.items():
            facts.slots[key].tensor.data.copy_(values)
        return run(model, inputs)
    finally:
        for key, values in whole.items():
            facts.slots[key].tensor.data.copy_(values)


def _prove(model: nn.Module, inputs: Inputs, reference: list[Tensor], *, exact: bool) -> None:
    with _watched(model) as running:
        try:
            outputs = run(model, inputs)
        except Exception as error:  # whatever the model's code raises
            raise Misfit(tuple(reversed(running)), error) from error
    if [t.shape for t in outputs] != [t.shape for t in reference]:
        raise Misfit((), None)
    for want, have in zip(reference, outputs, strict=True):
        stats = compare([want], [have])
        if exact and not stats.max_abs <= BOUNDS.get(want.dtype, 0.0) * max(stats.max_ref, 1e-30):
            raise Misfit((), None)


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that are running, the innermost last."""
    running: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, n=name: running.append(n)))
        handles.append(module.register_forward_hook(lambda *_: (running.pop(), None)[1]))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def hold(facts: Facts, model: nn.Module, misfit: Misfit) -> str | None:
    """After a :class:`Misfit`: freeze what the code may count by a number, and say where.

    Sizes that no attribute explains are frozen first, and those in the code that failed. None if
    nothing is left that could be the reason.
    """
    modules = dict(model.named_modules())
    touched = [site for site in facts.sites if misfit.removed[site.ids].any()]
    failed = [s for s in touched if s.modules[0] in misfit.modules]
    for sites in (failed, touched):
        bare = [s for s in sites if not _attributes(s, modules, deep=False)]
        if some := bare or sites:
            for site in some:
                facts.labels.freeze(site.ids)
            facts.close()
            return ", ".join(sorted({_line(site) for site in some}))
    return None


def _line(site: Site) -> str:
    match = re.match(r'File "([^"]+)", line (\d+)', site.place)
    return f"{Path(match[1]).name}:{match[2]}" if match else (site.modules[0] or "the model")
