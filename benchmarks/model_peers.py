"""The contenders of ``benchmarks/models.py``: one whole model, by qkit and by everyone else.

Each family is a generator of :class:`Contender`, as in :mod:`peers`; what is missing, or what a
package cannot make of the model, ends up in ``absent`` with its reason. *Compiled* is by Inductor
with frozen weights: that is its fastest, and without it no integer kernel of torch runs.
"""

from __future__ import annotations

import copy
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ort
import torch
from torch import Tensor, nn
from turns import Call

import qkit
from qkit.errors import QkitError, first_line
from qkit.flows.evaluate import tensor_bytes
from qkit.flows.pt2e import convert
from qkit.graph import capture
from qkit.targets.backend import backend

SCHEMES = ("w8a16", "w4a16-g32", "w8a8")
LEAST_SHARE = 0.5  # of what is multiplied: who quantizes less has made another model
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Contender:
    """One way to compute the model: ``call()`` gives its output, ``nbytes`` is what it stores."""

    name: str
    scheme: str
    nbytes: int
    call: Call

    @property
    def label(self) -> str:
        """Unique for a model."""
        return f"{self.name} {self.scheme}"


@dataclass
class Setting:
    """The float model that all stand for; ``kwargs`` is what it is called with by name.

    ``drive`` makes the call that is timed of any function that is called as the model is.
    ``calibration`` are other samples, to learn ranges from: none where the model keeps a state,
    which no program of PT2E or ONNX does here.
    """

    model: nn.Module
    kwargs: Mapping[str, Tensor]
    calibration: Mapping[str, Tensor] | None
    drive: Callable[[Callable[..., Any]], Call]
    compiles: bool
    folder: Path
    absent: dict[str, str]

    @property
    def dynamic(self) -> bool:
        """Whether ranges are taken at each call: the advice for all but convolutions."""
        return not any(isinstance(m, CONVOLUTIONS) for m in self.model.modules())

    def module(self, name: str, scheme: str, model: nn.Module, nbytes: int) -> Iterator[Contender]:
        """A module, and compiled."""
        yield Contender(name, scheme, nbytes, self.drive(model))
        if not self.compiles:
            return
        name = f"{name} compiled"
        try:
            yield Contender(name, scheme, nbytes, self.compiled(model))
        except Exception as error:  # of many kinds, from a compiler
            self.absent[f"{name} {scheme}"] = reason(error)

    def compiled(self, model: nn.Module) -> Call:
        """The call of the compiled model, which has compiled all that it needs."""
        with torch._inductor.config.patch(freezing=True):
            call = self.drive(torch.compile(model))
            call()
        return call

    def covers(self, name: str, model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
        """Whether layers of ``kinds`` hold enough of the model; if not, that is noted."""
        layers = [m for m in model.modules() if isinstance(m, kinds)]
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        share = parameters(*layers) / (parameters(model) - parameters(*tables))
        if share < LEAST_SHARE:
            told = " and ".join(f"nn.{kind.__name__}" for kind in kinds)
            self.absent[name] = f"it quantizes {told}: {share:.0%} of what is multiplied"
        return share >= LEAST_SHARE


def parameters(*models: nn.Module) -> int:
    """How many there are; a shared one counts once."""
    return sum({id(p): p.numel() for m in models for p in m.parameters()}.values())


def reason(error: Exception) -> str:
    """Why a contender is not there, in a line."""
    return f"{type(error).__name__}: {first_line(error, 200)}"


# ---- torch, and qkit's layers ----


def torch_float(setting: Setting) -> Iterator[Contender]:
    """The model as it is: what everything is compared with comes first."""
    nbytes = tensor_bytes(dict(setting.model.named_parameters()))
    yield from setting.module("torch", "fp32", setting.model, nbytes)


def ours(setting: Setting) -> Iterator[Contender]:
    """What :func:`qkit.quantize` makes, weights rounded to nearest."""
    for scheme in SCHEMES:
        try:
            model, _ = qkit.quantize(
                setting.model, scheme, inputs=dict(setting.kwargs), latency=False, algorithm="rtn"
            )
        except QkitError as error:
            setting.absent[f"qkit {scheme}"] = reason(error)
            continue
        nbytes = tensor_bytes(model.state_dict())
        yield from setting.module("qkit", scheme, model.eval(), nbytes)


def ours_lowered(setting: Setting) -> Iterator[Contender]:
    """What ``qkit quantize --target`` makes for torch's and ONNX Runtime's integer kernels."""
    scheme = "int8-dynamic" if setting.dynamic else "int8-static"
    for target in ("onnx", "inductor"):
        if setting.calibration is None:
            setting.absent[f"qkit {target} {scheme}"] = "the model keeps a state between calls"
            continue
        if target == "inductor" and not setting.compiles:
            continue
        runtime = backend(target)
        try:
            done = convert(
                setting.model, scheme, dict(setting.calibration), dialect=runtime.dialect({})
            )
            file = setting.folder / runtime.file
            runtime.export(replace(done, module=runtime.specialize(done)), file)
            session = runtime.load(file, torch.get_num_threads())
        except QkitError as error:
            setting.absent[f"qkit {target} {scheme}"] = reason(error)
            continue
        call = functools.partial(session, (), setting.kwargs)
        yield Contender(f"qkit {target}", scheme, file.stat().st_size, call)


def torch_dynamic(setting: Setting) -> Iterator[Contender]:
    """torch's old dynamic int8 layers, FBGEMM's on x86."""
    from torch.ao.quantization import quantize_dynamic

    kinds = (nn.Linear, nn.LSTM)
    if setting.covers("torch dynamic", setting.model, kinds):
        torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
        if "fbgemm" in torch.backends.quantized.supported_engines:
            torch.backends.quantized.engine = "fbgemm"
        model = quantize_dynamic(copy.deepcopy(setting.model), set(kinds), dtype=torch.qint8)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        yield Contender("torch dynamic", "int8", file.tell(), setting.drive(model))


# ---- torchao and optimum-quanto ----


def torchao(setting: Setting) -> Iterator[Contender]:
    """Its int8 configurations for the CPU."""
    logging.disable(logging.WARNING)  # extensions for other processors, other Pythons
    from torchao import quantization as ao
    from torchao.utils import get_model_size_in_bytes

    if not setting.covers("torchao", setting.model, (nn.Linear,)):
        return
    for scheme, config in (
        ("int8wo", ao.Int8WeightOnlyConfig),
        ("int8dq", ao.Int8DynamicActivationInt8WeightConfig),
    ):
        model = copy.deepcopy(setting.model)
        ao.quantize_(model, config())
        yield from setting.module("torchao", scheme, model, get_model_size_in_bytes(model))


def quanto(setting: Setting) -> Iterator[Contender]:
    """Its weight-only layers."""
    from optimum import quanto as oq

    if not setting.covers("optimum-quanto", setting.model, (nn.Linear, nn.Conv2d)):
        return
    for qtype in (oq.qint8, oq.qint4):
        model = copy.deepcopy(setting.model)
        oq.quantize(model, weights=qtype)
        oq.freeze(model)
        scheme = str(qtype).removeprefix("quanto.")
        nbytes = tensor_bytes(model.state_dict())
        yield Contender("optimum-quanto", scheme, nbytes, setting.drive(model))


# ---- ONNX Runtime ----


def onnxruntime(setting: Setting) -> Iterator[Contender]:
    """The float file that qkit writes, and its own quantizer's of that file."""
    if setting.calibration is None:
        setting.absent["onnxruntime"] = "the model keeps a state between calls"
        return
    runtime = backend("onnx")
    source = setting.folder / "float.onnx"
    runtime.export_float(capture(setting.model, (), setting.calibration), source)
    files = {"fp32": source}
    if setting.dynamic:
        files["int8 dynamic"] = setting.folder / "dynamic.onnx"
        ort.quantize_dynamic(source, files["int8 dynamic"])
    else:
        files["int8 static"] = setting.folder / "static.onnx"
        ort.quantize_static(source, files["int8 static"], [setting.calibration])
    for scheme, file in files.items():
        session = runtime.load(file, torch.get_num_threads())
        call = functools.partial(session, (), setting.kwargs)
        yield Contender("onnxruntime", scheme, file.stat().st_size, call)


FAMILIES: dict[str, Callable[[Setting], Iterator[Contender]]] = {
    "torch": torch_float,
    "qkit": ours,
    "qkit lowered": ours_lowered,
    "torch dynamic": torch_dynamic,
    "torchao": torchao,
    "optimum-quanto": quanto,
    "onnxruntime": onnxruntime,
}


def contenders(setting: Setting) -> list[Contender]:
    """All of them, torch's float model first; only qkit's own failures are raised."""
    found: list[Contender] = []
    for name, family in FAMILIES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                for each in family(setting):
                    found.append(each)
            except ImportError as error:
                setting.absent[name] = f"not installed: {error}"
            except Exception as error:  # whatever a peer refuses with is its reason
                if name.startswith("qkit"):
                    raise
                setting.absent[f"{name}, from the first that failed"] = reason(error)
    return found
