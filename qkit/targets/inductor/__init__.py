"""AOTInductor packages, native code for this processor: int8 static and dynamic."""

from qkit.targets.inductor.backend import BACKEND as BACKEND
