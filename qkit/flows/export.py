"""Writing a quantized model for other tools: a compressed-tensors folder, or a GGUF file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qkit.flows.check import model_check
from qkit.flows.evaluate import eval_mode, fill_cost, for_dtype
from qkit.flows.ptq import Obstacle
from qkit.flows.save import complete, fill_files, head
from qkit.flows.verify import verify_runtime
from qkit.models import Inputs, Source, run
from qkit.nn import Entry, QLayer, swap
from qkit.numerics import dequantize
from qkit.packing import tensor_specs
from qkit.report import Report, compare, package_version
from qkit.spec import Scheme
from qkit.targets import COMPRESSED, GGUF
from qkit.targets.artifact import CHECK, CONFIG, WEIGHTS, Artifact, read_artifact, write_meta
from qkit.targets.compressed_tensors import layer_obstacle, quantization_config, to_format
from qkit.targets.gguf import MAGIC, write_gguf
from qkit.targets.staging import as_output_error, check_file_destination, parents, staged
from qkit.targets.torch import copy_config
from qkit.targets.weights import describe_weights, save_tensors


def compressed_obstacle(model: nn.Module, inputs: Inputs | None, acts: bool) -> Obstacle:
    """Why layers of ``model`` stay in float in a compressed-tensors folder.

    With int8 activations (``acts``) also what takes an input of two dimensions, as some layer that
    ``inputs`` show does: compressed-tensors rounds it as a whole, not row by row.
    """
    flat: set[nn.Module] = set()
    layers = {n: m for n, m in model.named_modules() if acts and isinstance(m, nn.Linear)}

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args and args[0].dim() < 3:
            flat.add(module)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers.values()]
    try:
        if layers and inputs is not None:
            with eval_mode(model):
                run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    names = {name for name, layer in layers.items() if layer in flat}

    def obstacle(entry: Entry, scheme: Scheme) -> str | None:
        if entry.name in names:
            return "compressed-tensors would round its input, of two dimensions, as a whole"
        return layer_obstacle(entry, scheme)

    return obstacle


def save_compressed_tensors(
    qmodel: nn.Module,
    path: str | Path,
    *,
    report: Report,
    inputs: Inputs,
    source: Source,
    builder: dict[str, Any] | None,
    overwrite: bool = False,
    start: float | None = None,
) -> Artifact:
    """Write ``qmodel`` (of the Hugging Face folder ``source``) so that transformers loads it.

    The layers were quantized with one scheme that
    :func:`~qkit.targets.compressed_tensors.layer_obstacle` allows. The folder appears once a fresh
    process has loaded it with transformers and got the outputs of ``qmodel`` on ``inputs``.

    Raises :class:`~qkit.errors.OutputError` if it cannot be written and
    :class:`~qkit.errors.VerificationError` if the fresh process disagrees.
    """
    out = Path(path)
    inputs = for_dtype(inputs, qmodel)
    with staged(out, overwrite=overwrite) as folder, eval_mode(qmodel):
        tensors, facts = _tensors(qmodel)
        save_tensors(tensors, folder / WEIGHTS)
        copy_config(Path(source.path), folder, config_name=CONFIG)
        meta = head(report, source, builder, target=COMPRESSED) | facts
        _write_config(qmodel, folder / CONFIG)
        save_tensors(model_check(qmodel, inputs), folder / CHECK)
        artifact, slack = write_meta(folder, meta), _slack(qmodel, inputs)
        result = verify_runtime(artifact, "transformers", "transformers", slack=slack)
        # Not for the finished folder: some readers take every safetensors file for weights.
        (folder / CHECK).unlink()
        write_meta(folder, meta)
        report.target = "transformers"
        report.remarks.append(
            "transformers dequantizes the weights, and rounds activations in float: the files are "
            "small, memory and speed there are at best those of the float model (the latency above "
            "is qkit's own; qkit.load keeps the weights packed)"
        )
        complete(report, result, folder, source, out, start)
    return read_artifact(out)


def save_gguf(
    qmodel: nn.Module,
    path: str | Path,
    *,
    report: Report,
    source: Source,
    overwrite: bool = False,
    start: float | None = None,
) -> None:
    """Write ``qmodel`` to the GGUF file ``path`` (:func:`~qkit.targets.gguf.write_gguf`).

    Every tensor is read back with the package gguf before the file appears. No runtime runs such a
    file, so nothing is computed with it.
    """
    out = Path(path)
    check_file_destination(out, MAGIC, overwrite=overwrite)
    with as_output_error(out), parents(out.absolute()):
        written = write_gguf(qmodel, out, name=Path(source.path).name)
    report.target = GGUF
    report.verification = {
        "status": "verified",
        "level": "tensors",
        "runtime": f"gguf {package_version('gguf')}, {len(written)} tensors read back",
        "fresh_process": False,
        "bit_identical": True,
        "max_rel_error": 0.0,
        "checks": [{"way": "tensors", "bit_identical": True, "max_rel_error": 0.0}],
    }
    report.remarks.append(
        "the GGUF file is a container under the names of this model: no runtime (llama.cpp "
        "neither) knows its architecture, and the error and latency above are those in torch"
    )
    fill_files(report, source, out.stat().st_size, out)
    if start is not None:
        fill_cost(report, start)


def _quantized(model: nn.Module) -> dict[str, QLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QLayer)}


def _tensors(qmodel: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the weights file holds, and what ``qkit.json`` says about it."""
    tensors, facts = describe_weights(qmodel)
    kept = qmodel.state_dict().keys()  # without the buffers that a constructor computes
    tensors = {name: tensor for name, tensor in tensors.items() if name in kept}
    for name, layer in _quantized(qmodel).items():
        for key in tensor_specs(layer.weight_size, layer.spec, layer.acts):
            del tensors[f"{name}.{key}"]
        tensors |= {f"{name}.{k}": t for k, t in to_format(layer.qtensor(), layer.acts).items()}
    return tensors, facts


# Two implementations of int8 activations sum in another order, and what lies at the border of two
# codes goes to another one: a share of what rounding to int8 did to the outputs at all. One that
# rounds by another rule differs by about as much as that.
_OTHER_CODES = 1 / 8


def _slack(qmodel: nn.Module, inputs: Inputs) -> float:
    """What transformers may differ by from ``qmodel`` for its int8 activations."""
    exact = _with_exact_inputs(qmodel)
    if exact is qmodel:
        return 0.0
    return _OTHER_CODES * _apart(run(exact, inputs), run(qmodel, inputs))


def _write_config(qmodel: nn.Module, path: Path) -> None:
    layer = next(iter(_quantized(qmodel).values()))
    ignore = [name for name, module in qmodel.named_modules() if isinstance(module, nn.Linear)]
    config = json.loads(path.read_text(encoding="utf-8"))
    scheme = Scheme(layer.spec, layer.acts)
    config["quantization_config"] = quantization_config(scheme, ignore)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _with_exact_inputs(qmodel: nn.Module) -> nn.Module:
    """``qmodel``, or a copy with float layers where it has such that quantize their input."""
    layers = _quantized(qmodel)
    floats: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        if layer.acts is not None:
            rows, columns = layer.weight_size
            linear = nn.Linear(columns, rows, device="meta")
            weight = dequantize(layer.qtensor(), layer.weight_dtype)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.register_parameter("bias", layer.bias)
            floats[name] = linear
    return swap(copy.deepcopy(qmodel), floats) if floats else qmodel


def _apart(exact: list[Tensor], ours: list[Tensor]) -> float:
    """The greatest difference of two outputs, in parts of the greatest value."""
    pairs = [(a, b) for a, b in zip(exact, ours, strict=True) if a.is_floating_point()]
    stats = compare([a for a, _ in pairs], [b for _, b in pairs])
    return stats.max_abs / stats.max_ref if stats.max_ref else stats.max_abs
