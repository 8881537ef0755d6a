"""What this machine's processors can have, so that no test is skipped for another architecture."""

from __future__ import annotations

import platform

from qkit import native

_ARM = ("neon", "dotprod")
_IS_ARM = platform.machine().lower() in ("aarch64", "arm64")

# The instruction sets of this architecture. (The native check program runs those of ARM under
# emulation.)
ISAS = tuple(isa for isa in native.ISAS if isa == "scalar" or (isa in _ARM) == _IS_ARM)
