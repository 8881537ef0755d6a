"""The pictures of the documentation: drawn from what qkit's own functions return.

    python docs/site/pictures.py FOLDER

The same versions of qkit and matplotlib give the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

import qkit
from qkit.algorithms.sparse import Sparsity, kept
from qkit.distill import soft_targets
from qkit.numerics import (
    OBSERVERS,
    Observer,
    QParams,
    QTensor,
    choose_qparams,
    code_dtype,
    dequantize,
    fake_quantize,
    qparams_from_range,
    quantize,
)
from qkit.numerics.codebook import assign, fit_codebook, lookup
from qkit.numerics.values import by_code
from qkit.packing import entropy, pack
from qkit.report import tensor_sqnr_db
from qkit.spec import FP4_E2M1, NF4, Int, PerChannel, PerGroup, PerTensor, QSpec, parse

# Okabe and Ito's colours, which people see apart whatever their eyes.
BLUE, ORANGE, GREEN, PINK, SKY, GREY = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#777777"),
)
CYCLE = (BLUE, ORANGE, GREEN, PINK, SKY, "#E69F00")
STYLE = {
    "svg.hashsalt": "qkit",
    "svg.fonttype": "path",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.0,
    "figure.facecolor": "white",
}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def figure(width: float, height: float, *panels: int, **options: Any) -> tuple[Figure, Any]:
    """A figure with ``panels`` (rows, columns)."""
    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots(*panels, **options)


def decibels(x: Tensor, y: Tensor) -> str:
    """The SQNR of ``y``, an approximation of ``x``."""
    found = tensor_sqnr_db(x, y)
    return "exact" if found is None else f"{found:.1f} dB"


def grid(qparams: QParams, spec: QSpec) -> Tensor:
    """Every number that a tensor of one block can hold."""
    fmt = spec.format
    assert isinstance(fmt, Int)
    codes = torch.arange(fmt.qmin, fmt.qmax + 1).to(code_dtype(fmt))
    return dequantize(QTensor(codes, qparams, spec))


def affine() -> Figure:
    """Symmetric and affine grids of 3 bits over the same values, which are not centred."""
    x = random(6000) * 0.3 + 0.55
    made, axes = figure(8, 2.6, 1, 2, sharey=True)
    for ax, symmetric in zip(axes, (True, False), strict=True):
        spec = QSpec(Int(3), PerTensor(), symmetric)
        qparams = choose_qparams(x, spec)
        q = quantize(x, qparams, spec)
        ax.hist(x.numpy(), bins=80, color="#BBBBBB")
        used = dequantize(q).unique()
        for value in grid(qparams, spec):
            dead = not bool((used == value).any())
            ax.axvline(
                float(value), color=ORANGE if dead else BLUE, ls=":" if dead else "-", lw=1.5
            )
        point = "" if qparams.zero_point is None else f", zero point {int(qparams.zero_point)}"
        ax.set_title(
            f"{'symmetric' if symmetric else 'affine'}: "
            f"scale {abs(float(qparams.scale)):.3f}{point}"
            f"\n{len(used)} of 8 numbers used, {decibels(x, dequantize(q))}"
        )
        ax.set_xlabel("value")
    axes[0].set_ylabel("how many")
    return made


def granularity() -> Figure:
    """The rounding error of one weight under four granularities of 4 bits."""
    x = random(16, 64) * (0.2 + random(16, 1, seed=1).abs())
    x[:, 20] *= 6  # a column of outliers
    made, axes = figure(8, 3.4, 2, 2, sharex=True, sharey=True)
    kinds = (PerTensor(), PerChannel(0), PerGroup(32), PerGroup(8))
    errors = []
    for kind in kinds:
        spec = QSpec(Int(4), kind)
        q = quantize(x, choose_qparams(x, spec), spec)
        y = dequantize(q)
        title = f"{kind}: {decibels(x, y)}, {q.bits_per_weight:.1f} bits a weight"
        errors.append(((y - x).abs(), title))
    most = float(errors[0][0].max())
    for ax, (error, title) in zip(axes.flat, errors, strict=True):
        shown = ax.pcolormesh(error.numpy(), cmap="magma_r", vmin=0, vmax=most)
        ax.set_title(title)
    made.supxlabel("input channel", size=9)
    made.supylabel("output channel", size=9)
    made.colorbar(shown, ax=axes, label="|error|", shrink=0.8)
    return made


def formats() -> Figure:
    """What four bits can say: integers, floats and a codebook, each scaled to 1."""
    made, ax = figure(8, 1.9)
    narrow = Int(4, narrow=True)
    rows = {
        "int4, -7..7": [code / 7 for code in range(narrow.qmin, narrow.qmax + 1)],
        "int4, -8..7": [code / 8 for code in range(Int(4).qmin, Int(4).qmax + 1)],
        "fp4-e2m1": [value / FP4_E2M1.max for value in by_code(FP4_E2M1)],
        "nf4": list(by_code(NF4)),
    }
    for height, values in enumerate(reversed(rows.values())):
        ax.plot(values, [height] * len(values), "|", ms=16, mew=1.6, color=CYCLE[height])
        ax.text(1.04, height, f"{len(set(values))} numbers", va="center", size=8, color=GREY)
    ax.set_yticks(range(len(rows)), list(rows)[::-1])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_xlabel("value / greatest magnitude")
    return made


def packing() -> Figure:
    """Which bit of the words belongs to which value: found by packing one value at a time."""
    bits, count = 3, 14
    made, ax = figure(8, 1.7)
    for value in range(count):
        codes = torch.zeros(count, dtype=torch.uint8)
        codes[value] = (1 << bits) - 1
        words = [int(word) & 0xFFFFFFFF for word in pack(codes, bits)]
        owned = [
            (row, bit) for row, word in enumerate(words) for bit in range(32) if word >> bit & 1
        ]
        for row, bit in owned:
            ax.add_patch(
                Rectangle(
                    (bit, -row), 1, 0.8, facecolor=CYCLE[value % 6], alpha=0.55, edgecolor="white"
                )
            )
        for row in {row for row, _ in owned}:
            mine = [bit for r, bit in owned if r == row]
            middle = (min(mine) + max(mine) + 1) / 2
            ax.text(middle, 0.4 - row, f"v{value}", ha="center", va="center", size=8)
    ax.set(xlim=(0, 32), ylim=(-1.1, 1))
    ax.set_yticks([0.4, -0.6], ["word 0", "word 1"])
    ax.set_xticks(range(0, 33, 4))
    ax.set_xlabel("bit, the least significant first")
    return made


def observers() -> Figure:
    """The ranges that each observer learns from the same activation, for 4 bits."""
    x = torch.cat([random(60000).relu(), 5 + 7 * random(60, seed=1).sigmoid()])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(2))]
    spec = QSpec(Int(4, signed=False), PerTensor(), symmetric=False, when="static")
    made, (above, below) = figure(8, 3.6, 2, 1, sharex=True, height_ratios=(1.5, 1))
    above.hist(x.numpy(), bins=120, log=True, color="#BBBBBB")
    above.set_ylabel("how many")
    for row, kind in enumerate(OBSERVERS.values()):
        observer = Observer(kind(), spec)
        for batch in x.split(2000):
            observer.update(batch)
        lo, hi = observer.range()
        y = dequantize(quantize(x, qparams_from_range(lo, hi, spec), spec))
        below.plot(
            [float(lo), float(hi)], [-row, -row], color=CYCLE[row], lw=4, solid_capstyle="butt"
        )
        share = float((x > hi.float()).float().mean())
        below.text(
            float(hi) + 0.15, -row, f"to {float(hi):.2f}, clips {share:.2%}, {decibels(x, y)}",
            va="center", size=8,
        )  # fmt: skip
    below.set_yticks([-row for row in range(len(OBSERVERS))], list(OBSERVERS))
    below.set_ylim(-len(OBSERVERS) + 0.4, 0.6)
    below.set_xlim(0, 15.5)
    below.set_xlabel("activation")
    return made


def straight_through() -> Figure:
    """Fake quantization and its gradients, as autograd gives them, for 3 bits (-3..3)."""
    spec = QSpec(Int(3, narrow=True), PerChannel(0))
    x = torch.linspace(-2.2, 2.2, 1201).reshape(-1, 1).requires_grad_()
    scale = torch.full_like(x, 0.5).detach().requires_grad_()  # one for each: its own derivative
    y = fake_quantize(x, QParams(scale), spec, gradient_scale=1.0)
    y.sum().backward()
    made, axes = figure(8, 2.6, 1, 3)
    where = x.detach().flatten().numpy()
    for ax, title, values in (
        (axes[0], "forward: x' = scale * code", y.detach()),
        (axes[1], "d x' / d x: straight through", x.grad),
        (axes[2], "d x' / d scale (LSQ)", scale.grad),
    ):
        assert values is not None
        ax.plot(where, values.flatten().numpy(), color=BLUE, lw=1.4)
        ax.set_title(title)
        ax.set_xlabel("x, scale 0.5")
    axes[0].plot(where, where, color=GREY, lw=0.8, ls="--")
    return made


def temperature() -> Figure:
    """What softening does to a teacher's answer, and to the gradient of the loss."""
    teacher = torch.tensor([[6.0, 3.5, 1.0, 0.0, -2.0]])
    made, (left, right) = figure(8, 2.6, 1, 2)
    shown = (1.0, 2.0, 4.0, 8.0)
    for place, t in enumerate(shown):
        bars = (teacher / t).softmax(1).flatten().numpy()
        left.bar([i + 0.2 * place - 0.3 for i in range(5)], bars, 0.2, label=f"T = {t:g}",
                 color=CYCLE[place])  # fmt: skip
    left.set_title("softmax(teacher / T)")
    left.set_xlabel("class")
    left.legend(frameon=False, fontsize=8)
    temperatures = torch.logspace(0, 1.5, 25).tolist()
    norms = []
    for t in temperatures:
        student = torch.zeros_like(teacher, requires_grad=True)
        soft_targets(student, teacher, t).backward()
        assert student.grad is not None
        norms.append(float(student.grad.norm()))
    right.plot(temperatures, norms, color=BLUE, label="T² KL, as qkit has it")
    plain = [norm / t**2 for norm, t in zip(norms, temperatures, strict=True)]
    right.plot(temperatures, plain, color=ORANGE, ls="--", label="KL alone")
    right.set(xscale="log", yscale="log", xlabel="T", title="length of the gradient of the loss")
    right.legend(frameon=False, fontsize=8)
    return made


def pruning() -> Figure:
    """Which weights of one matrix stay, by the pattern that is asked for."""
    weight = random(16, 32) * (0.5 + random(16, 1, seed=3).abs())
    masks = {
        "50 % of the layer": kept(weight.abs(), Sparsity.parse(0.5, "layer")),
        "50 % of each row": kept(weight.abs(), Sparsity.parse(0.5, "row")),
        "2:4": kept(weight.abs(), Sparsity.parse("2:4", "row")),
        "50 % of the neurons": _neurons(weight),
    }
    made, axes = figure(8, 3.2, 2, 2, sharex=True, sharey=True)
    for ax, (name, mask) in zip(axes.flat, masks.items(), strict=True):
        colours = mpl.colors.ListedColormap(["#E8E8E8", BLUE])
        ax.pcolormesh(mask.numpy(), cmap=colours, edgecolors="white", lw=0.4)
        ax.set_title(f"{name}: {float(mask.float().mean()):.0%} stay")
        ax.set_xticks(range(0, 33, 4))
    made.supxlabel("input", size=9)
    made.supylabel("output", size=9)
    return made


def _neurons(weight: Tensor) -> Tensor:
    """The rows that :func:`qkit.prune` leaves of a layer with this weight."""
    rows, columns = weight.shape
    net = torch.nn.Sequential(
        torch.nn.Linear(columns, rows), torch.nn.ReLU(), torch.nn.Linear(rows, 4)
    )
    with torch.no_grad():
        net[0].weight.copy_(weight)
        net[2].weight.fill_(0.1)
    smaller, _ = qkit.prune(net, torch.ones(2, columns), amount=0.5, round_to=1, latency=False)
    left = smaller.get_submodule("0").weight.detach()
    alive = torch.tensor([bool((left == row).all(1).any()) for row in weight])
    return alive[:, None].expand_as(weight)


def codebook() -> Figure:
    """Eight shared values by k-means, and eight steps of an integer grid."""
    g = torch.Generator().manual_seed(0)
    x = torch.distributions.Laplace(0.0, 1.0).icdf(torch.rand(20000, generator=g) * 0.998 + 0.001)
    spec = QSpec(Int(3), PerTensor())
    qparams = choose_qparams(x, spec)
    entries = fit_codebook(x, 8)
    made, axes = figure(8, 2.6, 1, 2, sharey=True)
    cases = (
        ("int3, one scale", grid(qparams, spec), dequantize(quantize(x, qparams, spec))),
        ("codebook of 8 (k-means)", entries.flatten(), lookup(assign(x, entries), entries)),
    )
    for ax, (name, numbers, y) in zip(axes, cases, strict=True):
        ax.hist(x.numpy(), bins=120, color="#BBBBBB")
        for number in numbers:
            ax.axvline(float(number), color=BLUE, lw=1.3)
        ax.set_title(f"{name}: {decibels(x, y)}")
        ax.set_xlabel("weight")
    axes[0].set_ylabel("how many")
    return made


def coding() -> Figure:
    """Bits for each weight of 4-bit codes, dense and with nine tenths of them zero."""
    weight = random(512, 512)
    sparse = weight.masked_fill(~kept(weight.abs(), Sparsity.parse(0.9, "layer")), 0)
    spec = parse("w4a16-channel").weight
    made, axes = figure(8, 2.6, 1, 2)
    for ax, name, x in ((axes[0], "dense", weight), (axes[1], "90 % zeros", sparse)):
        codes = quantize(x, choose_qparams(x, spec), spec).codes
        found = entropy.stats(codes)
        bits = {"packed": 4.0} | {k: v for k, v in found.bits.items() if k != "raw"}
        bars = ax.bar(
            list(bits), list(bits.values()), 0.6, color=[GREY, BLUE, SKY, GREEN][: len(bits)]
        )
        ax.bar_label(bars, fmt="%.2f", size=8)
        ax.axhline(found.entropy, color=ORANGE, ls="--", lw=1.2)
        ax.set_title(f"4-bit codes of a Gaussian weight, {name}: entropy {found.entropy:.2f}")
        ax.set_ylim(0, 4.6)
    axes[0].set_ylabel("bits a weight")
    return made


# The schemes that have their name beside them, and where; more would hide one another.
NAMED = dict.fromkeys(("w2a16-g128", "w3a16-g128", "w4a16-g32", "w5a16-g128"), (6, -2))
NAMED |= {"w6a16-g128": (6, -2), "w8a16-g128": (6, 0), "w4a16-g128": (2, -12), "nf4-g64": (2, 5)}
NAMED |= {"mxfp8-e4m3": (6, -2), "mxfp8-e5m2": (6, 1)}


def rates() -> Figure:
    """SQNR by stored bits, of every scheme that was measured: two kinds of weights."""
    from decision import TABLES, WEIGHTS

    made, ax = figure(8, 4.2)
    records = [r for r in TABLES.read("numerics") if r.get("kind") == "quality"]
    for weight, colour, mark in zip(WEIGHTS, (BLUE, ORANGE), "os", strict=True):
        found = [r for r in records if r["weight"] == weight and r["bits_stored"] <= 9]
        ax.plot([r["bits_stored"] for r in found], [r["sqnr_db"] for r in found], mark, ms=5,
                color=colour, label=f"weight: {weight}")  # fmt: skip
        if colour == BLUE:
            for r in found:
                if r["scheme"] in NAMED:
                    ax.annotate(r["scheme"], (r["bits_stored"], r["sqnr_db"]), size=7,
                                xytext=NAMED[r["scheme"]], textcoords="offset points",
                                color=GREY)  # fmt: skip
    ax.plot([2, 8], [2 * 6.02, 8 * 6.02], color=GREY, lw=0.8, ls="--",
            label="6.02 dB a bit: the bound of a Gaussian")  # fmt: skip
    ax.set(xlabel="stored bits a weight", ylabel="SQNR, dB")
    ax.legend(frameon=False, fontsize=8)
    return made


PICTURES: dict[str, Callable[[], Figure]] = {
    "affine": affine,
    "granularity": granularity,
    "formats": formats,
    "packing": packing,
    "observers": observers,
    "straight-through": straight_through,
    "temperature": temperature,
    "pruning": pruning,
    "codebook": codebook,
    "coding": coding,
    "rates": rates,
}


def draw(folder: Path) -> None:
    """Write every picture to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, make in PICTURES.items():
            torch.manual_seed(0)
            made = make()
            made.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
