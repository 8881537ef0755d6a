"""All families by name, in the order of the page."""

from __future__ import annotations

from families import convolutional, imaging, sequential, transformer_models
from families.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for module in (sequential, convolutional, imaging, transformer_models)
    for family in module.FAMILIES
}
