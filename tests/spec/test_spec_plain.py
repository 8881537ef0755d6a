"""What a file says about a spec is read strictly: never a bare KeyError or TypeError."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkit.errors import InputError
from qkit.spec import PerBlock, PerToken, QSpec, Recipe, Rule, Scheme, parse
from qkit.spec.formats import format_from_json
from qkit.spec.granularity import granularity_from_json, granularity_to_json

RECIPE = Recipe(
    (
        Rule("head", None),
        Rule("re:.*fc", parse("w4a8-g32-static")),
        Rule("re:.*proj", parse("nf4")),
        Rule("Linear", parse("mxfp4")),
        Rule("*", parse("bf16")),
    )
)
WRONG = (None, True, 7, -1, 1.5, "", "nonsense", [], {}, [None])


def places(data: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in nested plain data."""
    yield path
    if isinstance(data, dict):
        for key, value in data.items():
            yield from places(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from places(value, (*path, index))


def changed(data: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    data = copy.deepcopy(data)
    below = data
    for key in path[:-1]:
        below = below[key]
    below[path[-1]] = value
    return data


def read(data: Any) -> Recipe | None:
    """The recipe, or None if it is refused in the one way that is allowed."""
    try:
        return Recipe.from_json(data)
    except InputError:
        return None


@pytest.mark.parametrize("path", [*places(RECIPE.to_json())], ids=lambda p: ".".join(map(str, p)))
def test_a_wrong_value_anywhere_is_refused_or_means_something_else(path):
    data = RECIPE.to_json()
    for value in WRONG:
        other = changed(data, path, value)
        got = read(other)
        informative = path[-1:] == ("name",)
        assert got != RECIPE or informative or json.dumps(other) == json.dumps(data)


@pytest.mark.parametrize(
    "path", [p for p in places(RECIPE.to_json()) if p], ids=lambda p: ".".join(map(str, p))
)
def test_a_missing_or_unknown_field_is_refused(path):
    *above, key = path
    data = copy.deepcopy(RECIPE.to_json())
    below: Any = data
    for part in above:
        below = below[part]
    if isinstance(below, list):
        return
    value = below.pop(key)
    assert read(data) is None
    below[key] = value
    assert read(data) == RECIPE
    below["extra"] = 1
    assert read(data) is None


json_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(json_data)
def test_any_other_data_is_refused(data):
    for reader in (Recipe, Scheme, QSpec):
        with pytest.raises(InputError):
            reader.from_json(data)
    for function in (format_from_json, granularity_from_json):
        with pytest.raises(InputError):
            function(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"type": "uint", "bits": 8}, "unknown number format .*'uint'.*int, float, codebook"),
        ({"type": ["int"]}, "unknown number format"),
        ({"type": "int", "bits": 9, "signed": True, "narrow": False}, "1 to 8 bits"),
        ({"type": "int", "bits": True, "signed": True, "narrow": False}, "'bits'.*another type"),
        ({"type": "float", "exponent": 4, "mantissa": 4}, "unknown float format"),
        ({"type": "codebook", "name": "b", "entries": [0, 1]}, "entries of a codebook are floats"),
        ({"type": "codebook", "name": "b", "entries": [1.0, 0.0]}, "ascend"),
        ({"type": "codebook", "name": "b", "entries": [0.0, float("nan")]}, "finite"),
        ({"type": "codebook", "name": "b", "entries": [0.0]}, "2 to 256"),
        ({"type": "codebook", "entries": [0.0, 1.0]}, "wanted: the fields type, name, entries"),
        ({"type": "int", "bits": 8}, "wanted: the fields type, bits, signed, narrow"),
    ],
)
def test_formats(data, message):
    with pytest.raises(InputError, match=message):
        format_from_json(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"type": "row"}, "unknown granularity .*'row'"),
        ({"type": "group", "size": 0, "axis": -1}, "at least one element"),
        ({"type": "group", "size": "32", "axis": -1}, "'size'.*another type.*'32'"),
        ({"type": "group", "size": 1 << 40, "axis": -1}, "not that large"),
        ({"type": "block", "shape": [2, "4"]}, "of integers"),
        ({"type": "block", "shape": []}, "at least one element"),
    ],
)
def test_granularities(data, message):
    with pytest.raises(InputError, match=message):
        granularity_from_json(data)


@pytest.mark.parametrize("granularity", [PerBlock((2, 4)), PerToken()], ids=str)
def test_every_granularity_comes_back(granularity):
    assert granularity_from_json(granularity_to_json(granularity)) == granularity


def test_an_impossible_combination_is_an_input_error():
    data = parse("w4a16").weight.to_json()
    data["format"] = {"type": "int", "bits": 4, "signed": False, "narrow": False}
    with pytest.raises(InputError, match="a symmetric range needs a signed format"):
        QSpec.from_json(data)


@pytest.mark.parametrize(
    ("scale", "message"), [("fp64", "unknown scale format"), ("none", "for floats")]
)
def test_scale_formats(scale, message):
    data = parse("w4a16").weight.to_json() | {"scale": scale}
    with pytest.raises(InputError, match=message):
        QSpec.from_json(data)


def test_a_cast_that_names_a_scale_is_the_same_cast():
    """As artifacts of qkit 0.1.0 do."""
    scheme = parse("fp16")
    assert QSpec.from_json(scheme.weight.to_json() | {"scale": "fp32"}) == scheme.weight


def test_a_bad_pattern_in_a_recipe_is_an_input_error():
    data = Recipe((Rule("re:x", None),)).to_json()
    data["rules"][0]["match"] = "re:("
    with pytest.raises(InputError, match="not a regular expression"):
        Recipe.from_json(data)


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(InputError) as caught:
        Scheme.from_json("x" * 10_000)
    assert len(str(caught.value)) < 300
