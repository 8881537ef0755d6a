"""The PT2E flow: capture, prepare, calibrate, convert. :mod:`qkit.flows.lower` takes it to a file.

done = convert(model, "int8-static", data, dialect="onnx")
done.module(x)      # the converted program: quantize, dequantize and float operators
done.sites          # every layer, and what became of it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from qkit.errors import CoverageError, InputError, UsageError, nearest
from qkit.flows.data import Data, in_memory
from qkit.flows.evaluate import AnyInputs, eval_mode
from qkit.flows.ptq import Progress, check_rules, check_tensors, no_progress
from qkit.flows.treat import after, before
from qkit.flows.uneven import uneven_columns, uneven_rows
from qkit.graph import DIALECTS, Captured, Dialect, Site, capture, find_sites, quiet
from qkit.graph.capture import Dims
from qkit.graph.tables import look_up_codes
from qkit.graph.unfolded import spell_out
from qkit.models import Inputs, leading, run
from qkit.numerics import OBSERVERS
from qkit.spec import Recipe, Scheme, parse
from qkit.targets import require_packages
from qkit.targets.backend import Converted


@dataclass(frozen=True)
class Prepared:
    """A captured model with observers in its graph ``module``, which have seen ``samples``."""

    captured: Captured
    module: fx.GraphModule
    sites: tuple[Site, ...]
    samples: int
    observer: str
    notes: tuple[str, ...] = ()


def convert(
    model: nn.Module,
    scheme: str | Scheme | Recipe,
    data: Data | AnyInputs,
    *,
    dialect: str | Dialect = "onnx",
    ignore: Sequence[str] = (),
    observer: str = "minmax",
    dims: Dims | None = None,
    quantizer: Any = None,
    options: Mapping[str, Any] | None = None,
    watch: bool = False,
    progress: Progress = no_progress,
) -> Converted:
    """``model`` as a converted PT2E program, calibrated with ``data``.

    ``scheme`` is a name (``int8-static``, ``int8-dynamic``), a Scheme or a Recipe; ``ignore`` is as
    in :func:`qkit.quantize`, and a rule may name an operator too (``Linear`` also for
    ``F.linear``); the algorithms of rules are those of :mod:`qkit.flows.treat`. ``dialect`` is a
    key of :data:`qkit.graph.DIALECTS`; ``observer`` one of
    :data:`qkit.numerics.OBSERVERS`. ``dims`` are as in :func:`qkit.graph.capture`. A ``quantizer``
    of your own (:mod:`qkit.graph.annotate`) replaces recipe and dialect for the annotations.
    With ``watch`` the result tells what each activation looks like (``activations``).

    Raises :class:`~qkit.errors.InputError` for a model that cannot be captured, is not finite, or
    has no values, and for data that it does not take; :class:`~qkit.errors.UsageError` for unknown
    names; :class:`~qkit.errors.CoverageError` if nothing can be quantized.
    """
    done = prepare(
        model,
        scheme,
        data,
        dialect=dialect,
        ignore=ignore,
        observer=observer,
        dims=dims,
        quantizer=quantizer,
        watch=watch,
        progress=progress,
    )
    return finish(done, options or {}, watch=watch)


def prepare(
    model: nn.Module,
    scheme: str | Scheme | Recipe,
    data: Data | AnyInputs,
    *,
    dialect: str | Dialect = "onnx",
    ignore: Sequence[str] = (),
    observer: str = "minmax",
    dims: Dims | None = None,
    quantizer: Any = None,
    watch: bool = False,
    progress: Progress = no_progress,
) -> Prepared:
    """The first part of :func:`convert`: all but the conversion."""
    require_packages(["torchao"], "pt2e", "the PT2E flow")
    from qkit.graph.annotate import RecipeQuantizer, name_observers
    from qkit.graph.ao import prepare_pt2e
    from qkit.graph.ranges import watch_activations

    recipe = resolve(scheme, ignore)
    if observer not in OBSERVERS:
        raise UsageError("unknown observer", got=observer, wanted=nearest(observer, OBSERVERS))
    if isinstance(dialect, str):
        if dialect not in DIALECTS:
            raise UsageError("unknown dialect", got=dialect, wanted=", ".join(DIALECTS))
        dialect = DIALECTS[dialect]
    data = data if isinstance(data, Data) else in_memory(data)
    check_rules(recipe, model)
    check_tensors(model)
    example = data.first()
    with eval_mode(model):
        run(model, example)  # a clear error about the data, before anything is paid for
        captured = capture(model, example.args, example.kwargs, dims=dims)
    if captured.shapes is None:
        data = data.rebatched(leading(example))
    module = spell_out(captured.module())
    sites = find_sites(module, recipe, dialect)
    if quantizer is None and all(site.scheme is None for site in sites if not site.table):
        raise nothing(sites)
    notes = before(module, sites, data)
    notes += uneven_rows(module, sites, dialect, example)
    notes += uneven_columns(module, sites, recipe, dialect, data)
    quantizer = quantizer or RecipeQuantizer(recipe, dialect, observer)
    with quiet():
        prepared = prepare_pt2e(module, quantizer)
    name_observers(prepared)
    if watch:
        watch_activations(prepared)
    sites = quantizer.sites if isinstance(quantizer, RecipeQuantizer) else []
    static = not isinstance(quantizer, RecipeQuantizer) or any(site.static for site in sites)
    samples = _calibrate(prepared, data, progress, once=not static)
    fixed = captured.shapes is None
    after(prepared, sites, data, lambda count: data.first() if fixed else data.head(count))
    return Prepared(captured, prepared, tuple(sites), samples, observer, tuple(notes))


def finish(prepared: Prepared, options: Mapping[str, Any], *, watch: bool = False) -> Converted:
    """The converted program of ``prepared``, whose module is used up."""
    from qkit.graph.ao import convert_pt2e
    from qkit.graph.ranges import activation_rows

    activations = tuple(activation_rows(prepared.module)) if watch else ()
    with quiet():
        module = without_unused(look_up_codes(convert_pt2e(prepared.module)))
    sites = prepared.sites
    expected = sum(site.layers for site in sites if site.scheme is not None)
    return Converted(
        prepared.captured,
        module,
        sites,
        expected,
        dict(options),
        activations,
        prepared.samples,
        prepared.observer,
        prepared.notes,
    )


def unfolded(prepared: Prepared) -> fx.GraphModule:
    """The converted program with the weights in float, behind which they are rounded.

    It computes what that of :func:`finish` does. The module of ``prepared`` is used up.
    """
    from qkit.graph.ao import convert_pt2e

    with quiet():
        return convert_pt2e(prepared.module, fold_quantize=False)


def resolve(scheme: str | Scheme | Recipe, ignore: Sequence[str]) -> Recipe:
    """The recipe of a request; everything that it names is int8."""
    if isinstance(scheme, Recipe):
        return scheme
    return Recipe.simple(parse(scheme) if isinstance(scheme, str) else scheme, ignore)


def _calibrate(prepared: fx.GraphModule, data: Data, progress: Progress, *, once: bool) -> int:
    """Run the data, or the first batch, through the observers; the number of samples."""
    done = 0
    for batch in data.stream():
        _observe(prepared, batch)
        done += leading(batch)
        progress(done, data.samples or 0, "calibrating")
        # Without ranges to learn, one pass is still needed: weights are looked at by running.
        if once:
            break
    if not done:
        raise InputError(
            "the calibration data have no whole batch",
            where=data.origin,
            wanted="at least as many samples as the model's fixed batch",
        )
    return done


def _observe(prepared: fx.GraphModule, batch: Inputs) -> None:
    """:func:`qkit.models.run` where the observers' own errors are told as they are."""
    try:
        run(prepared, batch)
    except InputError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise


def without_unused(module: fx.GraphModule) -> fx.GraphModule:
    """``module`` without the float weights that nothing reads: they would be saved with it."""
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name in [name for name, _ in tensors if name not in used]:
        owner, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(owner), leaf)
    return module


def nothing(sites: list[Site]) -> CoverageError:
    """The error of a model of which no layer is quantized."""
    reasons = sorted({f"{site.kind}: {site.reason}" for site in sites if site.reason})
    return CoverageError(
        "nothing was quantized: no layer of the model matched",
        got="; ".join(reasons[:6]) or "a model without layers",
        fix="qkit inspect shows the model's layers",
    )
