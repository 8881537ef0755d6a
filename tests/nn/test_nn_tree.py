"""A bare state dict as modules: the same names, the same memory, and careful guesses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qkit.errors import InputError
from qkit.nn import QLayer, survey, swap, tree


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def assert_holds(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    got = model.state_dict()
    assert got.keys() == state.keys()
    for name, tensor in state.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].data_ptr() == tensor.data_ptr()
        assert torch.equal(got[name], tensor)


@pytest.mark.parametrize("fixture", ["mlp", "cnn"])
def test_the_tree_of_a_model(fixture, request):
    model = request.getfixturevalue(fixture)
    state = model.state_dict()
    new = tree(state)
    assert_holds(new, state)
    layers = {n: type(m) for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    assert {
        n: type(m) for n, m in new.named_modules() if type(m) in (nn.Linear, nn.Conv2d)
    } == layers


def test_an_empty_state_dict():
    assert tree({}).state_dict() == {}


def test_it_is_in_eval_mode(mlp):
    assert not any(module.training for module in tree(mlp.state_dict()).modules())


def test_modules_are_in_the_order_of_the_state_dict():
    state = {f"{name}.weight": floats(2, 2) for name in ("z", "b.1", "b.0", "a")}
    assert [entry.name for entry in survey(tree(state))] == ["z", "b.1", "b.0", "a"]


# Guesses


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"weight": (5, 3)}, nn.Linear),
        ({"weight": (5, 3), "bias": (5,)}, nn.Linear),
        ({"weight": (5, 3, 2, 2)}, nn.Conv2d),
        ({"weight": (5, 3, 1, 4), "bias": (5,)}, nn.Conv2d),
        ({"weight": (5, 3, 2)}, nn.Conv1d),
        ({"weight": (5, 3, 2), "bias": (5,)}, nn.Conv1d),
        ({"weight": (5, 3, 2, 1, 4)}, nn.Conv3d),
        ({"weight": (5, 3, 2, 1, 4, 2)}, None),
        ({"weight": (5,), "bias": (5,)}, None),
        ({"weight": ()}, None),
        ({"weight": (5, 3), "bias": (3,)}, None),
        ({"weight": (5, 3), "bias": (5, 1)}, None),
        ({"weight": (5, 3), "scale": (5,)}, None),
        ({"kernel": (5, 3)}, None),
        ({"bias": (5,)}, None),
    ],
    ids=str,
)
def test_guesses(tensors, kind):
    state = {f"block.fc.{name}": floats(*shape) for name, shape in tensors.items()}
    model = tree(state)
    (entry,) = survey(model)
    assert_holds(model, state)
    assert (type(entry.module) is kind) == (kind is not None)
    assert (entry.reason is None) == (kind is not None)
    if kind is None:
        assert entry.reason


def test_geometry_of_the_guessed_layers():
    model = tree({"fc.weight": floats(5, 3), "conv.weight": floats(4, 3, 1, 2)})
    assert (model.fc.in_features, model.fc.out_features) == (3, 5)
    assert (model.conv.in_channels, model.conv.out_channels) == (3, 4)
    assert model.conv.kernel_size == (1, 2)


@pytest.mark.parametrize(
    "shape", [(0, 3), (3, 0), (0, 3, 1, 1), (3, 0, 1, 1), (3, 2, 0, 1)], ids=str
)
def test_an_empty_weight(shape):
    state = {"fc.weight": floats(*shape)}
    model = tree(state)
    assert model.state_dict().keys() == state.keys()
    assert all(entry.reason for entry in survey(model))


@pytest.mark.parametrize(
    "name",
    [
        "wte",
        "transformer.wpe",
        "model.embed_tokens",
        "bert.embeddings.word_embeddings",
        "bert.embeddings.position_embeddings",
        "shared",
        "tok_embeddings",
        "emb",
        "Embedding_0",
    ],
)
def test_embeddings_are_known_by_name(name):
    (entry,) = survey(tree({f"{name}.weight": floats(5, 3)}))
    assert entry.reason is None
    assert type(entry.module) is nn.Embedding
    assert (entry.module.num_embeddings, entry.module.embedding_dim) == (5, 3)


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [({"weight": (5, 3), "bias": (5,)}, nn.Linear), ({"weight": (5, 3, 2, 2)}, nn.Conv2d)],
)
def test_what_is_named_after_an_embedding_but_is_none(shapes, kind):
    state = {f"embeddings.patch_embedding.{name}": floats(*shape) for name, shape in shapes.items()}
    (entry,) = survey(tree(state))
    assert type(entry.module) is kind
    assert entry.reason is None


@pytest.mark.parametrize(
    "name", ["fc", "model.layers.0.mlp.down_proj", "encoder.0.linear1", "head", "conv_1", "b.c"]
)
def test_other_names_are_no_embeddings(name):
    (entry,) = survey(tree({f"{name}.weight": floats(5, 3)}))
    assert entry.reason is None


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("fc", "Linear", None),
        ("emb", "Linear", None),
        ("fc", "Embedding", None),
        ("fc", "EmbeddingBag", None),
        ("fc", "ConvTranspose1d", "its tensors do not tell in how many groups its channels are"),
        ("fc", "Bilinear", "a Bilinear is opened where the model is in memory, not as tensors"),
        ("fc", "Conv1D", "a Conv1D is opened where the model is in memory, not as tensors"),
        ("fc", "MyExperts", "a MyExperts is opened where the model is in memory, not as tensors"),
        ("bn", "BatchNorm2d", "normalisation stays in float"),
    ],
)
def test_kinds_override_guesses(name, kind, reason):
    (entry,) = survey(tree({f"{name}.weight": floats(5, 3)}, {name: kind}))
    assert entry.reason == reason


def test_a_kind_that_does_not_fit_is_not_forced():
    (entry,) = survey(tree({"fc.weight": floats(5, 3)}, {"fc": "Conv2d"}))
    assert entry.reason == "its tensors are not those of a layer of the class Conv2d"


def test_kinds_of_other_modules_are_ignored():
    (entry,) = survey(tree({"fc.weight": floats(5, 3)}, {"other": "Embedding"}))
    assert type(entry.module) is nn.Linear


# Ties


def test_the_same_memory_is_the_same_parameter():
    weight = floats(5, 3)
    first, second = survey(tree({"a.weight": weight, "b.weight": weight.detach()}))
    assert (first.parameters, second.parameters) == (15, 0)
    assert (first.tied_to, second.tied_to) == (None, "a")


@pytest.mark.parametrize(
    "other",
    [
        lambda w: w.clone(),
        lambda w: w.t(),
        lambda w: w[:2],
        lambda w: w.view(torch.int32).view(torch.float32) * 1,
    ],
    ids=["copy", "transposed", "part", "product"],
)
def test_other_memory_is_another_parameter(other):
    weight = floats(3, 3)
    entries = survey(tree({"a.weight": weight, "b.weight": other(weight)}))
    assert [entry.tied_to for entry in entries] == [None, None]


def test_empty_tensors_are_not_tied():
    model = tree({"a.x": torch.empty(0), "b.x": torch.empty(0)})
    assert len(list(model.parameters())) == 2


def test_tensors_without_memory_are_not_tied():
    state = {f"{name}.weight": torch.empty(5, 3, device="meta") for name in "ab"}
    assert [(e.parameters, e.tied_to) for e in survey(tree(state))] == [(15, None), (15, None)]


# Names


def test_keys_without_a_dot():
    state = {"weight": floats(5, 3), "bias": floats(5)}
    model = tree(state)
    assert type(model) is nn.Linear
    assert_holds(model, state)


def test_own_tensors_and_children():
    state = {"a.weight": floats(5, 3), "a.b.weight": floats(5, 3), "a.weight.c": floats(2)}
    model = tree(state)
    assert_holds(model, state)
    assert {e.name for e in survey(model) if e.reason is None} == {"a.b"}


def test_a_root_with_children_is_not_a_layer(quantized):
    state = {"weight": floats(4, 4), "head.weight": floats(4, 4)}
    model = tree(state)
    assert_holds(model, state)
    new = {e.name: quantized(e.module, "w8a16") for e in survey(model) if e.reason is None}
    assert {name for name, _ in swap(model, new).named_modules()} == {"", "head"}


@pytest.mark.parametrize(
    "name",
    [
        "type",
        "forward",
        "parameters",
        "state_dict",
        "_modules",
        "_parameters",
        "reason_left",
        "training",
        "größe",
        "層",
        "with space",
        "a/b",
        "0",
        "__class__",
    ],
)
@pytest.mark.parametrize("where", ["{}", "a.{}", "{}.weight", "{}.a.weight", "{0}.{0}"])
def test_any_name(name, where):
    state = {where.format(name): floats(3, 2), "other.weight": floats(3, 2)}
    assert_holds(tree(state).train().eval(), state)


@pytest.mark.parametrize("key", ["", ".", "a.", ".a", "a..b", "..", "a.b.", ".a.b"])
def test_an_empty_part_is_refused(key):
    with pytest.raises(InputError, match="empty part"):
        tree({"fine.weight": floats(2, 2), key: floats(2)})


def test_integer_and_half_tensors():
    state = {
        "fc.weight": floats(5, 3).half(),
        "fc.bias": floats(5).half(),
        "norm.num_batches_tracked": torch.tensor(3),
        "mask": torch.ones(2, dtype=torch.bool),
        "codes.weight": torch.ones(5, 3, dtype=torch.int8),
        "integer_bias.weight": floats(5, 3),
        "integer_bias.bias": torch.ones(5, dtype=torch.int32),
    }
    model = tree(state)
    assert_holds(model, state)
    assert {e.name for e in survey(model) if e.reason is None} == {"fc"}


# Any state dict

PARTS = ["a", "b", "0", "weight", "bias", "emb", "type", "forward", "é"]
SHAPES = [(2,), (2, 2), (2, 1, 1, 2), (2, 3, 1), ()]
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.int64, torch.bool]


@st.composite
def state_dicts(draw) -> dict[str, torch.Tensor]:
    names = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join)
    state: dict[str, torch.Tensor] = {}
    for name in draw(st.lists(names, unique=True, max_size=8)):
        if state and draw(st.booleans()):
            state[name] = draw(st.sampled_from(list(state.values())))
        else:
            shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
            state[name] = torch.ones(shape).to(dtype)
    return state


@settings(max_examples=200)
@given(state_dicts())
def test_any_state_dict(state):
    model = tree(state)
    assert_holds(model, state)
    owned = {t.data_ptr(): t.numel() for t in state.values() if t.is_floating_point()}
    entries = survey(model)
    assert sum(entry.parameters for entry in entries) == sum(owned.values())
    for entry in entries:
        assert entry.reason is None or entry.reason
        assert not isinstance(entry.module, QLayer)
        if entry.reason is None:
            assert not list(entry.module.children()), "a layer that is replaced has no children"
