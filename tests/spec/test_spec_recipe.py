"""Recipes: the first rule that matches wins; unused rules are found; JSON keeps everything."""

from __future__ import annotations

import json

import pytest

from qkit.errors import InputError, UsageError
from qkit.spec import Recipe, Rule, parse

W8, W4 = parse("w8a16"), parse("w4a16-g32")


@pytest.mark.parametrize(
    ("match", "name", "matches"),
    [
        ("*", "layers.0.fc", True),
        ("*", "", True),
        ("Linear", "layers.0.fc", True),
        ("linear", "layers.0.fc", False),
        ("Conv2d", "layers.0.fc", False),
        ("layers.0.fc", "layers.0.fc", True),
        ("layers.0", "layers.0.fc", True),
        ("layers", "layers.0.fc", True),
        ("layers.0", "layers.01.fc", False),
        ("layers.0.fc", "layers.0.fc2", False),
        ("0.fc", "layers.0.fc", False),
        ("layers.0.", "layers.0.fc", False),
        (r"re:layers\.\d\.fc", "layers.0.fc", True),
        (r"re:layers\.\d\.fc", "layers.0.fc.inner", True),
        (r"re:layers\.\d\.fc$", "layers.0.fc.inner", False),
        (r"re:fc", "layers.0.fc", False),
        (r"re:.*fc", "layers.0.fc", True),
        (r"re:Linear", "layers.0.fc", False),
    ],
)
def test_what_a_rule_matches(match, name, matches):
    assert Rule(match, W8).matches(name, "Linear") is matches


def test_the_first_rule_that_matches_wins():
    first, second, third = Rule("head", None), Rule("Linear", W4, "gptq"), Rule("*", W8)
    recipe = Recipe((first, second, third))
    assert recipe.rule_for("head", "Linear") is first
    assert recipe.rule_for("head.proj", "Conv2d") is first
    assert recipe.rule_for("body.fc", "Linear") is second
    assert recipe.rule_for("stem", "Conv2d") is third


def test_without_a_matching_rule_there_is_none():
    assert Recipe((Rule("Linear", W8),)).rule_for("stem", "Conv2d") is None
    assert Recipe(()).rule_for("stem", "Conv2d") is None


def test_simple_recipe_ignores_before_it_quantizes():
    recipe = Recipe.simple(W8, ignore=["head", "re:.*norm"], targets=["Linear", "stem"])
    assert [rule.match for rule in recipe.rules] == ["head", "re:.*norm", "Linear", "stem"]
    assert [rule.scheme for rule in recipe.rules] == [None, None, W8, W8]
    assert Recipe.simple(W8).rules == (Rule("*", W8, "rtn"),)


def test_unused_rules_are_those_that_match_nothing():
    rules = Rule("head", None), Rule("haed", None), Rule("Linear", W8), Rule("re:x.*", W4)
    modules = iter([("head", "Linear"), ("stem", "Conv2d")])
    assert Recipe(rules).unused(modules) == [rules[1], rules[3]]


def test_a_rule_that_is_shadowed_is_not_unused():
    assert Recipe((Rule("*", W8), Rule("head", None))).unused([("head", "Linear")]) == []


@pytest.mark.parametrize("match", ["re:(", "re:*", "re:[a"])
def test_a_bad_regular_expression_is_refused(match):
    with pytest.raises(UsageError, match="not a regular expression") as error:
        Rule(match, W8)
    assert error.value.exit_code == 2
    assert error.value.got == match


def test_an_empty_match_is_refused():
    with pytest.raises(UsageError, match="matches nothing"):
        Rule("", W8)


def test_json_round_trip():
    recipe = Recipe((Rule("head", None), Rule("re:.*fc", W4, "gptq"), Rule("*", W8)))
    assert Recipe.from_json(json.loads(recipe.dumps())) == recipe
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize("version", [None, 0, 2, "1", True, 1.0, [1]])
def test_an_unknown_version_is_refused(version):
    data = {**Recipe.simple(W8).to_json(), "version": version}
    with pytest.raises(InputError, match="unknown recipe version"):
        Recipe.from_json(data)
