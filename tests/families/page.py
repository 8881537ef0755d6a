"""``docs/coverage.md``: written from the results of the tests, and compared with them."""

from __future__ import annotations

import re
from pathlib import Path

from families.trial import LEAST_COSINE, ROW, Cell, least_cosine
from families.zoo import FAMILIES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coverage.md"
COLUMNS = (*LEAST_COSINE, "export", "compile")
Key = tuple[str, str]  # family, column

# What the tests of this run have found: a scheme's cell, or in words what a capture gave.
FOUND: dict[Key, Cell | str] = {}

HEAD = """# Coverage by family

Made by `QKIT_WRITE_COVERAGE=1 pytest tests/families`; every run of the tests compares what it
computes with this page. Each family is a small model with random weights (`tests/families/`),
either written there with the layers and skips of the original or built by transformers from a
small configuration. The versions are those of `constraints.txt`.

A cell is **size / cosine**: the bytes of the stored tensors beside those of the float model, and
the cosine of all outputs, as one vector, to the float model's. Behind it stands, where it is below
95 %, how much of the parameters in matrices, convolutions and embeddings is quantized. Every cell
with figures has passed: the report's rows sum to all parameters; the outputs are those of the float
model with the dequantized weights (of the cast model for `bf16`; not judged where activations are
rounded too); the artifact was loaded in a fresh process and gave the same outputs, bit for bit; and
the cosine is at least

{bounds}

for outputs that go through {row} quantized layers. 1 - cosine is half of the noise power, and noise
adds up over the layers: of a deeper family the bound is wider in proportion, and where it had to be
a note says so. A number in brackets is a note below the table.

`export`: the graphs that `torch.export` gives for the `w8a16` model, which is then saved with its
program, loaded from it in a fresh process and run. `compile`: the graphs that `torch.compile` makes
of it (more than one: the model's own code breaks the graph), run with the same outputs.

"""


def text(key: Key) -> tuple[str, str]:
    """The figures that were found for a cell of the page, and the note that it gets."""
    found = FOUND[key]
    if isinstance(found, str):
        return (found, "") if found.isdecimal() else ("", found)
    if found.reason is not None:
        return "", found.reason
    assert found.ratio is not None
    assert found.cosine is not None
    assert found.covered is not None
    figures = f"{found.ratio:.3f} / {found.cosine:.5f}"
    if found.covered < 0.95:
        figures += f" ({found.covered:.0%})"
    return figures, deeper(*key, found.cosine)


def deeper(name: str, scheme: str, cosine: float) -> str:
    """Why a cosine below the promise is one that was to be expected."""
    if cosine >= LEAST_COSINE[scheme]:
        return ""
    family = FAMILIES[name]
    least = least_cosine(family, scheme)
    return f"{family.depth} quantized layers deep: at least {least:.4g} for `{scheme}`"


def write() -> None:
    """The page with what was found, which must be complete."""
    notes: dict[str, int] = {}

    def cell(key: Key) -> str:
        figures, note = text(key)
        number = f"[{notes.setdefault(note, len(notes) + 1)}]" if note else ""
        return f"{figures} {number}".strip()

    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in FAMILIES:
        row = [cell((family, column)) for column in COLUMNS]
        lines.append(f"| {family} | {' | '.join(row)} |")
    bounds = ", ".join(f"`{scheme}` {least:.4g}" for scheme, least in LEAST_COSINE.items())
    told = [f"{number}. {note}" for note, number in notes.items()]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(HEAD.format(bounds=bounds, row=ROW) + "\n".join([*lines, "", *told]) + "\n")


def read() -> dict[Key, tuple[str, str]]:
    """The cells of the committed page: figures and note."""
    lines = PAGE.read_text().splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    notes = dict(m.groups() for line in lines if (m := re.fullmatch(r"(\d+)\. (.+)", line)))
    (_, *columns), _, *body = rows

    def spelled(cell: str) -> tuple[str, str]:
        figures, _, number = cell.rstrip("]").partition("[")
        return figures.strip(), notes[number] if number else ""

    return {
        (family, column): spelled(cell)
        for family, *cells in body
        for column, cell in zip(columns, cells, strict=True)
    }


def agrees(told: tuple[str, str], key: Key) -> bool:
    """Whether the page's cell is what was found, up to what another processor may change.

    Sums in another order move a cosine in its last digits, and further where a model chooses by
    comparing (experts, durations): a tenth of the distance to 1 is no other result.
    """
    found, (figures, note) = FOUND[key], text(key)
    if isinstance(found, str) or found.cosine is None or told[0].count(" / ") != 1:
        return told == (figures, note)
    cosine = told[0].split(" ")[2]
    near = abs(float(cosine) - found.cosine) <= 0.1 * (1 - found.cosine) + 2e-5
    return near and told == (figures.replace(f"{found.cosine:.5f}", cosine), note)
