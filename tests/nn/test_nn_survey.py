"""The survey lists every parameter once and says of each module why it stays in float."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrizations, prune

from qkit.nn import open_modules, survey

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning"),
]


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first


class Scaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class Slow(nn.GRU):
    """A subclass that computes something else."""


class Mixed(nn.Module):
    """Parameters of its own beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(2, 2))
        self.fc = nn.Linear(4, 4)


class Leaf(nn.Module):
    """A parameter and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(3, 2))


class Renormalised(nn.Embedding):
    """Rows of another length."""

    def forward(self, input):  # noqa: A002
        return nn.functional.normalize(super().forward(input), dim=-1)


class LanguageModel(nn.Module):
    """A head on the weight of the embedding."""

    def __init__(self, table=nn.Embedding) -> None:
        super().__init__()
        self.emb, self.fc = table(9, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.emb.weight


def tied(*layers: nn.Module) -> nn.Sequential:
    for layer in layers[1:]:
        layer.weight = layers[0].weight
    return nn.Sequential(*layers)


def pruned(name: str) -> nn.Linear:
    return prune.random_unstructured(nn.Linear(4, 4), name, 0.5)


def with_weight(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def extended(**extra: object) -> nn.Linear:
    layer = nn.Linear(4, 4)
    for name, value in extra.items():
        setattr(layer, name, value)
    return layer


# name: (model, {module name: part of the reason, or None where it can be quantized})
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, str | None]]] = {
    "linear": (lambda: nn.Linear(4, 3), {"": None}),
    "conv": (lambda: nn.Conv2d(4, 3, 3, bias=False), {"": None}),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Conv2d(1, 2, 3)),
        {"0.0": None, "1": None},
    ),
    "dict and list": (
        lambda: nn.ModuleDict({"a": nn.ModuleList([nn.Linear(4, 4)]), "b": nn.Linear(4, 2)}),
        {"a.0": None, "b": None},
    ),
    "no parameters": (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), {}),
    "used twice": (Twice, {"first": None}),
    "tied linears": (lambda: tied(nn.Linear(4, 4), nn.Linear(4, 4)), {"0": None, "1": None}),
    "tied convolutions": (
        lambda: tied(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)),
        {"0": None, "1": None},
    ),
    "tied to an embedding": (
        LanguageModel,
        {"emb": None, "fc": None, "head": None},
    ),
    "tied to an embedding of another kind": (
        lambda: LanguageModel(Renormalised),
        {"emb": "subclass", "fc": None, "head": "shares its weight with emb (Renormalised)"},
    ),
    "tied turned": (
        lambda: tied(nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)),
        {
            "0": "shares its weight with 1 (ConvTranspose2d)",
            "1": "shares its weight with 0 (Conv2d)",
        },
    ),
    "tied and turned alike": (
        lambda: tied(nn.ConvTranspose2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3, stride=2)),
        {"0": None, "1": None},
    ),
    "tables": (
        lambda: nn.Sequential(
            nn.Embedding(5, 3, padding_idx=1, sparse=True, scale_grad_by_freq=True),
            nn.EmbeddingBag(5, 3, mode="max"),
            nn.Embedding(5, 3, max_norm=1.0),
            nn.EmbeddingBag(5, 3, max_norm=1.0),
        ),
        {"0": None, "1": None, "2": "max_norm", "3": "max_norm"},
    ),
    "convolutions": (
        lambda: nn.Sequential(
            *(nn.Conv1d(2, 3, 3), nn.Conv3d(2, 3, 3)),
            *(kind(2, 3, 3) for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d)),
            nn.ConvTranspose3d(2, 3, 3),
        ),
        dict.fromkeys("01234"),
    ),
    "tied before a subclass": (
        lambda: tied(nn.Linear(4, 4), Scaled(4, 4)),
        {"0": "shares its weight with 1 (Scaled)", "1": "subclass of Linear"},
    ),
    "normalisation": (
        lambda: nn.Sequential(
            nn.BatchNorm2d(3), nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.RMSNorm(3)
        ),
        dict.fromkeys("0123", "normalisation"),
    ),
    "weight norm": (lambda: nn.utils.weight_norm(nn.Linear(4, 3)), {"": None}),
    "weight norm, parametrized": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        {"": None},
    ),
    "spectral norm": (lambda: nn.utils.spectral_norm(nn.Conv2d(2, 3, 3)), {"": None}),
    "spectral norm, parametrized": (
        lambda: parametrizations.spectral_norm(nn.Conv2d(2, 3, 3)),
        {"": None},
    ),
    "weight norm of a subclass": (
        lambda: parametrizations.weight_norm(Scaled(4, 3)),
        {"": "subclass of Linear", "parametrizations.weight": "parametriz"},
    ),
    "weight norm of a table": (
        lambda: parametrizations.weight_norm(Leaf(), "table"),
        {"parametrizations.table": "parametriz"},
    ),
    "pruned": (lambda: pruned("weight"), {"": None}),
    "pruned bias": (lambda: pruned("bias"), {"": None}),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(3), nn.LazyConv2d(3, 3)),
        dict.fromkeys("01", "not initialised"),
    ),
    "uninitialised": (lambda: with_lazy_weight(), {"": "not initialised"}),
    "subclass": (lambda: nn.Sequential(Scaled(4, 4)), {"0": "subclass of Linear"}),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2),
        {"in_proj_weight": None, "out_proj": None},
    ),
    "attention with a learnt key": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, add_bias_kv=True),
        {
            "": "MultiheadAttention itself",
            "q_proj_weight": None,
            "k_proj_weight": None,
            "v_proj_weight": None,
            "out_proj": None,
        },
    ),
    "attention with a mask": (
        lambda: buffered(nn.MultiheadAttention(4, 2)),
        {"": "would lack its mask", "out_proj": "reads its weight directly"},
    ),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8),
        {
            "self_attn.in_proj_weight": None,
            "self_attn.out_proj": None,
            "linear1": None,
            "linear2": None,
            "norm1": "normalisation",
            "norm2": "normalisation",
        },
    ),
    "lstm": (
        lambda: nn.LSTM(4, 3, num_layers=2),
        {f"weight_{part}_l{layer}": None for layer in "01" for part in ("ih", "hh")},
    ),
    "lstm with weight norm": (
        lambda: nn.utils.weight_norm(nn.LSTM(4, 3), "weight_hh_l0"),
        {"weight_ih_l0": None, "weight_hh_l0": None},
    ),
    "lstm with a mask": (
        lambda: buffered(nn.LSTM(4, 3)),
        {"": "an opened LSTM would lack its mask"},
    ),
    "lstm with a replaced forward": (
        lambda: replaced(nn.LSTM(4, 3)),
        {"": "forward was replaced"},
    ),
    "complex lstm": (lambda: nn.LSTM(4, 3, dtype=torch.complex64), {"": "torch.complex64"}),
    "subclass of a gru": (lambda: Slow(4, 3), {"": "no quantized form of Slow"}),
    "tied lstms": (
        lambda: tied_recurrent(),
        {f"{n}.weight_{part}_l0": None for n in "01" for part in ("ih", "hh")},
    ),
    "other layers": (
        lambda: nn.Sequential(nn.Bilinear(2, 3, 3), nn.PReLU()),
        {"0.weight": None, "1": "PReLU"},
    ),
    "own parameters": (Mixed, {"": "Mixed itself", "fc": None}),
    "a leaf of its own": (Leaf, {"": "no quantized form of Leaf"}),
    "no inputs": (lambda: nn.Linear(0, 3), {"": "empty"}),
    "no outputs": (lambda: nn.Linear(3, 0), {"": "empty"}),
    "integer weight": (
        lambda: with_weight(torch.ones(4, 4, dtype=torch.int8)),
        {"": "torch.int8"},
    ),
    "complex weight": (
        lambda: with_weight(torch.ones(4, 4, dtype=torch.complex64)),
        {"": "torch.complex64"},
    ),
    # Already quantized to 8 bits by another tool; most operators do not take it.
    "fp8 weight": (
        lambda: with_weight(torch.ones(4, 4).to(torch.float8_e4m3fn)),
        {"": "torch.float8_e4m3fn"},
    ),
    # Whatever a quantized layer would drop.
    "a replaced forward": (lambda: extended(forward=lambda x: 2 * x), {"": "forward was replaced"}),
    "an extra buffer": (lambda: buffered(), {"": "mask"}),
    "an extra parameter": (lambda: extended(gain=nn.Parameter(torch.ones(4))), {"": "gain"}),
    "an extra module": (
        lambda: extended(adapter=nn.Linear(4, 4)),
        {"": "adapter", "adapter": None},
    ),
}


def buffered(layer: nn.Module | None = None) -> nn.Module:
    layer = layer or nn.Linear(4, 4)
    layer.register_buffer("mask", torch.ones(4))
    return layer


def replaced(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: x
    return layer


def tied_recurrent() -> nn.Sequential:
    model = nn.Sequential(nn.LSTM(4, 4), nn.LSTM(4, 4))
    model[1].weight_ih_l0 = model[0].weight_ih_l0
    return model


def with_lazy_weight() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = UninitializedParameter()
    return layer


def numel(model: nn.Module) -> int:
    known = (p for p in model.parameters() if not isinstance(p, UninitializedParameter))
    return sum(p.numel() for p in known)


every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_parameters_sum_to_the_models(name):
    model = MODELS[name][0]()
    assert sum(entry.parameters for entry in survey(model)) == numel(model)


@every_model
def test_reasons(name):
    build, reasons = MODELS[name]
    entries = {entry.name: entry for entry in survey(build())}
    assert entries.keys() == reasons.keys()
    for path, reason in reasons.items():
        got = entries[path].reason
        if reason is None:
            assert got is None, path
        else:
            assert got is not None, path
            assert reason in got, path


@every_model
def test_entries_are_in_the_models_order_and_name_their_modules(name):
    model = MODELS[name][0]()
    entries = survey(model)
    order = [path for path, _ in model.named_modules()]
    names = [entry.inside if entry.opens else entry.name for entry in entries]
    assert names == sorted(names, key=order.index)
    for entry in entries:
        if not entry.opens:
            assert entry.module is model.get_submodule(entry.name)
            assert entry.kinds == (type(entry.module).__name__,)
    model = open_modules(model, dict.fromkeys(e.inside for e in entries if e.opens))
    assert all(type(e.module) is type(model.get_submodule(e.name)) for e in entries)
    assert all(isinstance(entry.shape, tuple) for entry in entries)


def test_a_shared_parameter_counts_at_its_first_owner():
    first, second, third = survey(
        tied(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    )
    assert (first.parameters, second.parameters, third.parameters) == (20, 4, 0)
    assert (first.tied_to, second.tied_to, third.tied_to) == (None, "0", "0")


def test_a_tie_to_a_float_layer_is_not_a_tie():
    entries = {entry.name: entry for entry in survey(LanguageModel(Renormalised))}
    assert all(entry.tied_to is None for entry in entries.values())
    assert entries["head"].parameters == 0


def test_a_tie_between_a_table_and_a_layer():
    entries = {entry.name: entry for entry in survey(LanguageModel())}
    assert {name: entry.tied_to for name, entry in entries.items()} == {
        "emb": None,
        "fc": None,
        "head": "emb",
    }
    assert entries["head"].parameters == 0


def test_equal_but_separate_weights_are_not_tied():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = nn.Parameter(first.weight.detach().clone())
    assert [entry.tied_to for entry in survey(nn.Sequential(first, second))] == [None, None]


def test_shapes():
    model = nn.Sequential(nn.Conv2d(2, 3, 5), nn.PReLU(), Mixed(), Leaf())
    assert [e.shape for e in survey(model)] == [(3, 2, 5, 5), (1,), (), (4, 4), (3, 2)]


def test_layers_of_a_module_that_can_be_opened():
    first, second = survey(nn.Sequential(nn.GRU(4, 3, bias=False)))
    assert (first.name, first.kinds) == ("0.weight_ih_l0", ("Linear", "GRU"))
    assert (first.inside, first.opens, first.shape) == ("0", True, (9, 4))
    assert (first.parameters, second.parameters) == (36, 27)


def test_a_folded_weight_is_noted_and_all_its_parameters_count():
    (entry,) = survey(parametrizations.weight_norm(nn.Linear(4, 3)))
    assert (entry.note, entry.parameters, entry.kind) == (
        "weight norm folded",
        12 + 3 + 3,
        "Linear",
    )


def test_layers_inside_a_module_that_is_open_already():
    model = open_modules(nn.Sequential(nn.LSTM(4, 3)), ["0"])
    assert {entry.kinds for entry in survey(model)} == {("Linear", "LSTM")}
    assert not any(entry.opens for entry in survey(model))


def test_the_tie_of_recurrent_layers():
    ties = {entry.name: entry.tied_to for entry in survey(tied_recurrent())}
    assert ties["1.weight_ih_l0"] == "0.weight_ih_l0"
    assert ties["1.weight_hh_l0"] is None


def test_a_quantized_layer_is_listed_as_such(quantized):
    model = nn.Sequential(quantized(nn.Linear(4, 4), "w8a16"), nn.Linear(4, 4))
    assert [entry.reason for entry in survey(model)] == ["already quantized", None]


def test_survey_changes_nothing(cnn):
    state = {name: tensor.clone() for name, tensor in cnn.state_dict().items()}
    modules = dict(cnn.named_modules())
    survey(cnn)
    assert dict(cnn.named_modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in cnn.state_dict().items())
