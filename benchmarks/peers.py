"""The contenders of ``benchmarks/kernels.py``: one linear layer, by qkit and by everyone else.

Each family is a generator of :class:`Contender`; a package that is missing, or a layer that a
package cannot make, ends up in ``absent`` with its reason, never in silence. ``treatment`` is what
happens to the activations: ``exact`` (weight-only) or ``int8`` (quantized too).
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from turns import Call

import qkit
from qkit.algorithms import rtn
from qkit.errors import QkitError
from qkit.numerics import QTensor
from qkit.numerics import dequantize as values_of
from qkit.spec import Int, parse

SCHEMES = [
    "w8a16",
    "w8a16-g128",
    "w8a16-g128-asym",
    "w4a16-g128",
    "w4a16-g32",
    "w4a16-g32-asym",
    "w3a16-g128",
    "w2a16-g128",
    "w8a8",
    "w8a8-static",
    "w4a8-g128",
    "nf4-g64",
]
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
SAMPLE = 128  # outputs that errors are computed from
Layers = list[nn.Module]


def modules(layers: Layers, x: Tensor) -> list[Call]:
    """A call of each layer."""
    return [functools.partial(layer, x) for layer in layers]


@dataclass(frozen=True)
class Contender:
    """One way to compute a linear layer on activations of one dtype.

    ``calls(x)`` gives a function for each copy of the layer; going round them finds each weight
    cold. A contender with few copies is ``flushed``: the caches are emptied before each call.
    ``weight`` is the float matrix that the codes stand for, where it is known: its rows that
    :meth:`Setting.sample` takes.
    """

    name: str
    scheme: str
    dtype: str
    bits: int
    treatment: str  # float, exact or int8
    nbytes: int
    calls: Callable[[Tensor], list[Call]]
    weight: Tensor | None = None
    flushed: bool = False

    @property
    def label(self) -> str:
        """Unique within a cell."""
        return f"{self.name} {self.scheme}/{self.dtype}"


@dataclass
class Setting:
    """The float layer that all contenders stand for, and how much weight to rotate over."""

    layer: nn.Linear
    rotated: int
    dtypes: list[str]
    quick: bool
    absent: dict[str, str]

    def copies(self, layer: nn.Module, nbytes: int) -> Layers:
        """Copies of ``layer``, of ``nbytes`` each, that together exceed the caches."""
        count = max(2, math.ceil(self.rotated / nbytes))
        return [layer] + [copy.deepcopy(layer) for _ in range(count - 1)]

    def sample(self, weight: Tensor) -> Tensor:
        """Some rows of a weight (columns of an output's transpose), to find errors with."""
        return weight[:: max(1, len(weight) // SAMPLE)].clone()

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.layer.weight.numel()

    def stored(self, bits: int, group: int = 0, parameter_bytes: int = 4) -> int:
        """Bytes of a weight with ``parameter_bytes`` of scale and zero point for each group."""
        rows, columns = self.layer.weight.shape
        blocks = math.ceil(columns / group) if group else 1
        return rows * (math.ceil(columns * bits / 8) + blocks * parameter_bytes)


def rounded(layer: nn.Linear, scheme: str) -> QTensor:
    """The weight by rounding to nearest: the codes that torch and ONNX Runtime get as well."""
    return rtn(layer.weight.detach(), parse(scheme).weight)


# ---- qkit ----


def ours(setting: Setting, schemes: Iterable[str]) -> Iterator[Contender]:
    """The layers that :func:`qkit.quantize` makes."""
    calibration = torch.randn(64, setting.layer.in_features)
    for scheme in schemes:
        spec = parse(scheme)
        try:
            layer, _ = qkit.quantize(
                copy.deepcopy(setting.layer),
                scheme,
                latency=False,
                **{"calib" if scheme.endswith("static") else "inputs": calibration},
                algorithm="rtn",
            )
        except QkitError as error:
            setting.absent[f"qkit {scheme}"] = str(error).splitlines()[0]
            continue
        bits = spec.weight.format.bits if isinstance(spec.weight.format, Int) else 4
        parameters = 4 if spec.weight.symmetric else 5
        nbytes = setting.stored(bits, spec.weight.group_size, parameters)
        weight = setting.sample(values_of(rounded(setting.layer, scheme)))
        calls = functools.partial(modules, setting.copies(layer.eval(), nbytes))
        treatment = "exact" if spec.weight_only else "int8"
        for dtype in setting.dtypes:
            yield Contender("qkit", scheme, dtype, bits, treatment, nbytes, calls, weight)


# ---- torch ----


class Int8Pack(nn.Module):
    """``torch._weight_int8pack_mm``: int8 weight-only, a scale for each channel."""

    def __init__(self, bias: Tensor, q: QTensor) -> None:
        super().__init__()
        self.codes = q.codes.clone()
        scale = q.qparams.scale.flatten()
        self.by_dtype = {d: (scale.to(d), bias.detach().to(d)) for d in DTYPES.values()}

    def forward(self, x: Tensor) -> Tensor:
        scale, bias = self.by_dtype[x.dtype]
        return torch._weight_int8pack_mm(x, self.codes, scale) + bias


class Int4Pack(nn.Module):
    """``torch._weight_int4pack_mm_for_cpu``: int4 weight-only, scale and offset for each group."""

    def __init__(self, bias: Tensor, q: QTensor, group: int) -> None:
        super().__init__()
        self.group = group
        self.codes = torch._convert_weight_to_int4pack_for_cpu((q.codes + 8).int(), 1)
        pairs = torch.stack([q.qparams.scale, torch.zeros_like(q.qparams.scale)], 2)
        pairs = pairs.transpose(0, 1).contiguous()
        self.by_dtype = {d: (pairs.to(d), bias.detach().to(d)) for d in DTYPES.values()}

    def forward(self, x: Tensor) -> Tensor:
        scale, bias = self.by_dtype[x.dtype]
        return torch._weight_int4pack_mm_for_cpu(x, self.codes, self.group, scale) + bias


def torch_float(setting: Setting) -> Iterator[Contender]:
    """torch's float layers; fp32 is what everything is compared with."""
    for dtype in dict.fromkeys(["float32", *setting.dtypes]):
        layer = copy.deepcopy(setting.layer).to(DTYPES[dtype])
        bits = 8 * layer.weight.element_size()
        nbytes = setting.size * bits // 8
        calls = functools.partial(modules, setting.copies(layer, nbytes))
        weight = setting.sample(layer.weight.detach().float())
        yield Contender("torch", SHORT[dtype], dtype, bits, "float", nbytes, calls, weight)


def torch_packed(setting: Setting) -> Iterator[Contender]:
    """torch's own weight-only products."""
    q, bias = rounded(setting.layer, "w8a16"), setting.layer.bias
    nbytes = setting.stored(8, parameter_bytes=2)
    odd = setting.layer.in_features % 32 != 0
    if odd:
        setting.absent["torch int8pack"] = (
            "it reads beyond its buffers at such columns, and may die"
        )
    calls = functools.partial(modules, [] if odd else setting.copies(Int8Pack(bias, q), nbytes))
    for dtype in [] if odd else setting.dtypes:
        # The scale has the dtype of the activations; that rounding is part of what is computed.
        weight = setting.sample(q.codes * q.qparams.scale.to(DTYPES[dtype]).float())
        yield Contender("torch int8pack", "channel", dtype, 8, "exact", nbytes, calls, weight)
    for group in (128, 32):
        if setting.layer.in_features % group:
            setting.absent[f"torch int4pack g{group}"] = "columns are no multiple of the group"
            continue
        q = rounded(setting.layer, f"w4a16-g{group}")
        nbytes = setting.stored(4, group, 4)
        try:
            layers = setting.copies(Int4Pack(bias, q, group), nbytes)
        except RuntimeError as error:
            setting.absent[f"torch int4pack g{group}"] = str(error).splitlines()[0]
            continue
        calls = functools.partial(modules, layers)
        for dtype in setting.dtypes:
            scale = q.qparams.scale.to(DTYPES[dtype]).float()
            weight = setting.sample(q.codes * scale.repeat_interleave(group, 1))
            yield Contender("torch int4pack", f"g{group}", dtype, 4, "exact", nbytes, calls, weight)


def torch_dynamic(setting: Setting) -> Iterator[Contender]:
    """torch's old dynamic int8 layers: activations quantized at each call."""
    nbytes = setting.stored(8)
    for engine in ("fbgemm", "onednn"):
        if engine not in torch.backends.quantized.supported_engines:
            setting.absent[f"torch {engine} dynamic"] = "not built into this torch"
            continue
        layer = dynamic_layer(setting.layer, engine)
        calls = functools.partial(modules, setting.copies(layer, nbytes))
        yield Contender(f"torch {engine}", "dynamic", "float32", 8, "int8", nbytes, calls)


def dynamic_layer(layer: nn.Linear, engine: str) -> nn.Module:
    """torch's own quantized linear layer."""
    from torch.ao.nn.quantized import dynamic
    from torch.ao.quantization import default_dynamic_qconfig

    torch.backends.quantized.engine = engine
    layer = copy.deepcopy(layer)
    layer.qconfig = default_dynamic_qconfig
    return dynamic.Linear.from_float(layer)


# ---- torchao ----


def torchao(setting: Setting) -> Iterator[Contender]:
    """torchao's configurations for the CPU: eager, compiled, and compiled with frozen weights.

    Compiled once for all layers: dynamo would compile each module anew. Frozen weights are
    constants of the code, so there the one layer has to be flushed out of the caches.
    """
    logging.disable(logging.WARNING)  # extensions for other processors, other Pythons
    from torchao import quantization as ao

    torch._dynamo.reset()  # the shape is a new one: no dynamic sizes on account of the last
    torch._dynamo.config.recompile_limit = 64

    plain = ("float32", "bfloat16", "float16")
    configs: list[tuple[str, int, str, int, Callable[[], object], tuple[str, ...]]] = [
        ("int8wo", 8, "exact", 0, ao.Int8WeightOnlyConfig, plain),
        ("int8dq", 8, "int8", 0, ao.Int8DynamicActivationInt8WeightConfig, plain),
    ]
    try:
        from torchao.prototype.quantization.int4 import inference_workflow as int4
    except ImportError as error:
        setting.absent["torchao int4"] = str(error)
    else:
        only = functools.partial(int4.PrototypeInt4WeightOnlyConfig, group_size=128)
        both = functools.partial(int4.Int8DynamicActivationInt4WeightConfig, group_size=128)
        configs += [
            ("int4wo-g128", 4, "exact", 128, only, ("bfloat16", "float32")),
            ("int8dq-int4-g128", 4, "int8", 128, both, ("float32", "bfloat16")),
        ]
    for name, bits, treatment, group, config, dtypes in configs:
        for dtype in (d for d in dtypes if d in setting.dtypes):
            layer = copy.deepcopy(setting.layer).to(DTYPES[dtype])
            nbytes = setting.stored(bits, group)
            try:
                ao.quantize_(layer, config())
            except Exception as error:  # whatever a peer refuses with is its reason
                setting.absent[f"torchao {name}/{dtype}"] = _first_line(error)
                continue
            if type(layer.weight.data) is Tensor or layer.weight.dtype != DTYPES[dtype]:
                setting.absent[f"torchao {name}/{dtype}"] = "left this shape in float"
                continue
            layers = [layer]
            make = functools.partial(
                Contender, scheme=name, dtype=dtype, bits=bits, treatment=treatment,
                nbytes=nbytes, flushed=True,
            )  # fmt: skip
            yield make("torchao", calls=functools.partial(modules, layers))
            if setting.quick or dtype == "float16" or (bits == 4 and dtype == "float32"):
                continue
            yield make("torchao compiled", calls=functools.partial(_passing, _compiled(), layers))
            if bits == 8:
                yield make("torchao frozen", calls=functools.partial(_frozen, layer))
    if setting.quick:
        setting.absent["torchao compiled, torchao frozen"] = "left out by --quick"


def _compiled() -> Callable[..., Tensor]:
    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return nn.functional.linear(x, weight, bias)

    return torch.compile(linear)


def _passing(function: Callable[..., Tensor], layers: Layers, x: Tensor) -> list[Call]:
    return [functools.partial(function, x, layer.weight, layer.bias) for layer in layers]


def _frozen(layer: nn.Module, x: Tensor) -> list[Call]:
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        compiled = torch.compile(layer)
        compiled(x)
    return [functools.partial(compiled, x)]


# ---- optimum-quanto ----


def quanto(setting: Setting) -> Iterator[Contender]:
    """optimum-quanto's weight-only layers."""
    from optimum import quanto as oq

    for qtype, bits, group in ((oq.qint8, 8, 0), (oq.qint4, 4, 128)):
        for dtype in setting.dtypes:
            model = nn.Sequential(copy.deepcopy(setting.layer)).to(DTYPES[dtype])
            oq.quantize(model, weights=qtype)
            oq.freeze(model)
            nbytes = setting.stored(bits, group)
            calls = functools.partial(modules, [model[0]])
            scheme = str(qtype).removeprefix("quanto.")
            yield Contender(
                "optimum-quanto", scheme, dtype, bits, "exact", nbytes, calls, flushed=True
            )


# ---- ONNX Runtime ----


def onnxruntime(setting: Setting) -> Iterator[Contender]:
    """MatMulNBits of 4 and 8 bits at every accuracy level; level 4 quantizes the activations."""
    import numpy as np
    import onnx
    import onnxruntime as ort

    variants = list(itertools.product((8, 4), (128, 32), (0, 1, 2, 3, 4), ("float32", "float16")))
    for bits, group, level, dtype in variants:
        # Levels 1 to 3 run the code of level 0 where the processor has nothing better.
        if dtype not in setting.dtypes or (level in (1, 2, 3) and (setting.quick or group == 32)):
            continue
        if dtype == "float16" and (setting.quick or level in (1, 2, 3) or group == 32):
            continue
        name = f"{bits} bits g{group} level {level}"
        try:
            q = rounded(setting.layer, f"w{bits}a16-g{group}")
            data = _matmul_nbits(onnx, np, setting.layer, q, bits, group, level, dtype)
            calls = _sessions(ort, np, setting, data, dtype, setting.stored(bits, group))
        except Exception as error:  # whatever a peer refuses with is its reason
            setting.absent[f"onnxruntime {name}/{dtype}"] = _first_line(error)
            continue
        treatment = "int8" if level == 4 else "exact"
        nbytes = setting.stored(bits, group)
        exact = treatment == "exact" and dtype == "float32"
        weight = setting.sample(values_of(q)) if exact else None
        yield Contender("onnxruntime", name, dtype, bits, treatment, nbytes, calls, weight)
    if setting.quick:
        setting.absent["onnxruntime levels 1, 2 and 3, and float16"] = "left out by --quick"


def _matmul_nbits(onnx, np, layer, q, bits, group, level, dtype):  # type: ignore[no-untyped-def]
    """A model of one MatMulNBits node, as bytes."""
    rows, columns = q.codes.shape
    blocks = math.ceil(columns / group)
    codes = np.full((rows, blocks * group), 1 << (bits - 1), np.uint8)
    codes[:, :columns] = (q.codes.int() + (1 << (bits - 1))).numpy()
    packed = codes if bits == 8 else codes[:, ::2] | (codes[:, 1::2] << 4)
    kind = {"float32": np.float32, "float16": np.float16}[dtype]
    tensors = {
        "B": packed.reshape(rows, blocks, group * bits // 8),
        "scales": q.qparams.scale.numpy().astype(kind).reshape(-1),
        "bias": layer.bias.detach().numpy().astype(kind),
    }
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "B", "scales", "", "", "bias"], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=bits, block_size=group, accuracy_level=level,
    )  # fmt: skip
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    graph = onnx.helper.make_graph(
        [node],
        "linear",
        [onnx.helper.make_tensor_value_info("x", element, ["rows", columns])],
        [onnx.helper.make_tensor_value_info("y", element, ["rows", rows])],
        [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@functools.cache
def _one_pool(ort, threads: int) -> None:  # type: ignore[no-untyped-def]
    """One pool for all sessions: one each would be a thousand threads."""
    ort.set_global_thread_pool_sizes(threads, 1)


def _sessions(ort, np, setting, data, dtype, nbytes):  # type: ignore[no-untyped-def]
    """``calls`` of a :class:`Contender`: a session for each copy, inputs and outputs bound."""
    _one_pool(ort, torch.get_num_threads())
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.enable_cpu_mem_arena = False  # an arena each would be gigabytes
    options.log_severity_level = 3
    count = max(2, math.ceil(setting.rotated / nbytes))
    sessions = [
        ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        for _ in range(count)
    ]
    kind, outputs = np.dtype(dtype), setting.layer.out_features

    def calls(x: Tensor) -> list[Call]:
        y = torch.empty(len(x), outputs, dtype=x.dtype)

        def run(session, binding) -> Tensor:  # type: ignore[no-untyped-def]
            session.run_with_iobinding(binding)
            return y

        found = []
        for session in sessions:
            binding = session.io_binding()
            binding.bind_input("x", "cpu", 0, kind, list(x.shape), x.data_ptr())
            binding.bind_output("y", "cpu", 0, kind, list(y.shape), y.data_ptr())
            found.append(functools.partial(run, session, binding))
        return found

    return calls


# ---- all of them ----

PEERS: dict[str, Callable[[Setting], Iterator[Contender]]] = {
    "torch": torch_float,
    "torch packed": torch_packed,
    "torch dynamic": torch_dynamic,
    "torchao": torchao,
    "optimum-quanto": quanto,
    "onnxruntime": onnxruntime,
}


def contenders(
    setting: Setting, schemes: Iterable[str], families: Iterable[str]
) -> list[Contender]:
    """qkit's ``schemes`` and the peers of ``families``, torch's float layer first."""
    found: list[Contender] = []
    for family in families:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found += PEERS[family](setting)
            except ImportError as error:
                setting.absent[family] = f"not installed: {error}"
            except Exception as error:  # whatever a peer refuses with is its reason
                setting.absent[f"{family}, from the first that failed"] = _first_line(error)
    return found + list(ours(setting, schemes))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
