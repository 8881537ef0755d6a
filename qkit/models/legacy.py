"""Whole models in the format of ``torch.save`` before 1.6.

Such a file holds the source code of each module class beside its name. torch's restricted
unpickler stops there; without the source, which nothing needs, it goes on.
"""

from __future__ import annotations

import io
import pickletools

# Magic number, protocol and byte order come before the object.
HEADERS = 3


def without_sources(data: bytes) -> bytes:
    """``data`` with ``("module", class, file, source)`` replaced by the class; nothing is run."""
    file = io.BytesIO(data)
    for _ in range(HEADERS):
        for _ in pickletools.genops(file):
            pass
    start = file.tell()
    ops = list(pickletools.genops(file))
    ends = [position or 0 for _, _, position in ops[1:]] + [file.tell()]
    pieces = [data[position or 0 : end] for (_, _, position), end in zip(ops, ends, strict=True)]
    marks: list[int] = []
    begun = -1  # where the last tuple began
    word: object = None  # where the memo keeps the word "module"
    for i, (op, _, _) in enumerate(ops):
        if op.name == "MARK":
            marks.append(i)
        elif op.stack_before and pickletools.markobject in op.stack_before:
            begun = marks.pop()
        elif op.name == "BINPERSID":
            first, value, _ = ops[begun + 1]
            if value == "module":
                word = ops[begun + 2][1]
            elif first.name not in ("BINGET", "LONG_BINGET") or value != word:
                continue
            at = next(j for j in range(begun, i) if ops[j][0].name == "GLOBAL")
            kept = pieces[at] + (pieces[at + 1] if "PUT" in ops[at + 1][0].name else b"")
            pieces[begun : i + 1] = [kept] + [b""] * (i - begun)
    return data[:start] + b"".join(pieces) + data[ends[-1] :]
