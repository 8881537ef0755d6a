"""Reports as text."""

from __future__ import annotations

import json
from typing import Any


def as_text(data: Any) -> str:
    """Plain data as JSON (strict: no NaN, no infinity)."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"
