"""ExecuTorch programs whose layers run in XNNPACK: int8 static and dynamic."""

from qkit.targets.xnnpack.backend import BACKEND as BACKEND
