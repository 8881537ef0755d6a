"""Opening of everything but recurrent modules and attention, which have files of their own."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from qkit.nn import Opened, open_modules, opening, survey
from qkit.nn.computed import settled
from qkit.nn.open import opened_like

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
EPS = torch.finfo(torch.float32).eps


def assert_sums(got: torch.Tensor, want: torch.Tensor, terms: int) -> None:
    """Equal but for sums of ``terms`` products in another order, of values of about ``want``'s."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    bound = 8 * terms * EPS * max(1.0, float(want.detach().abs().max()))
    torch.testing.assert_close(got, want, rtol=0, atol=bound)


# Bilinear


@given(
    sizes=st.tuples(*[st.sampled_from([1, 3, 7])] * 3),
    shape=st.lists(st.integers(1, 4), max_size=3),
    bias=st.booleans(),
)
def test_bilinear(sizes, shape, bias):
    module = nn.Bilinear(*sizes, bias=bias)
    a, b = torch.randn(*shape, sizes[0]), torch.randn(*shape, sizes[1])
    form = opening(module)
    assert form.kind == "Bilinear"
    assert_sums(form.module(a, b), module(a, b), sizes[0] * sizes[1])


@pytest.mark.parametrize(("a", "b"), [((2, 4), (2, 5)), ((2, 3), (2, 4)), ((2, 3), (1, 5))])
def test_bilinear_of_other_shapes(a, b):
    with pytest.raises(RuntimeError, match="Bilinear: expected"):
        opening(nn.Bilinear(3, 5, 2)).module(torch.zeros(a), torch.zeros(b))


# transformers' Conv1D


def conv1d(rows: int, columns: int) -> nn.Module:
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(rows, columns)
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_conv1d_becomes_a_linear_layer(shape):
    module = conv1d(7, 3)
    form, x = opening(module), torch.randn(*shape, 3)
    assert type(form.module) is nn.Linear
    assert (form.kind, form.module.in_features, form.module.out_features) == ("Conv1D", 3, 7)
    assert form.module.weight.data_ptr() == module.weight.data_ptr()
    assert_sums(form.module(x), module(x), 3)


def test_the_entry_of_a_conv1d_has_its_name_and_both_kinds():
    entries = survey(nn.Sequential(conv1d(7, 3)))
    assert [(e.name, e.kind, e.kinds) for e in entries] == [("0", "Conv1D", ("Conv1D", "Linear"))]
    assert (entries[0].shape, entries[0].parameters, entries[0].inside) == ((7, 3), 28, "0")


def test_a_shared_conv1d_weight_stays_closed():
    first, second = conv1d(3, 3), conv1d(3, 3)
    second.weight = first.weight
    reasons = [entry.reason for entry in survey(nn.Sequential(first, second))]
    assert reasons == ["shares a parameter that it would hold in another form"] * 2


# Experts of transformers

EXPERTS = {
    "mixtral": ("mixtral", "MixtralExperts"),
    "qwen3": ("qwen3_moe", "Qwen3MoeExperts"),
    "gpt-oss": ("gpt_oss", "GptOssExperts"),
    "transposed": ("aria", "AriaExperts"),
    "no gate": ("nemotron_h", "NemotronHExperts"),
    "clamped": ("deepseek_v4", "DeepseekV4Experts"),
    "norm behind": ("muse_spark", "MuseSparkExperts"),
    "transposed with bias": ("openai_privacy_filter", "OpenAIPrivacyFilterExperts"),
}


def experts(name: str) -> Any:
    """An expert module with five experts, from the attributes that all configurations have."""
    package, cls = EXPERTS[name]
    pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    sizes = {"hidden_size": 9, "moe_hidden_size": 9, "intermediate_size": 7}
    config = SimpleNamespace(
        num_local_experts=5, num_experts=5, n_routed_experts=5, moe_num_experts=5,
        moe_intermediate_size=7, moe_latent_size=None, hidden_act="silu", mlp_hidden_act="relu2",
        swiglu_alpha=1.7, swiglu_limit=2.0, post_norm_eps=1e-6, _experts_implementation="eager",
        **sizes,
    )  # fmt: skip
    made = getattr(module, cls)(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made.eval()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name, implementation):
    module = experts(name)
    module.config._experts_implementation = implementation
    form = opening(module)
    assert form.kind == type(module).__name__
    for tokens, chosen in ((1, 1), (7, 2), (3, 5)):
        x = torch.randn(tokens, 9)
        index = torch.stack([torch.randperm(5)[:chosen] for _ in range(tokens)])
        weights = torch.rand(tokens, chosen)
        with torch.no_grad():
            got, want = (m(x, index, weights) for m in (form.module, module))
        assert_sums(got, want, 32 * chosen)


def test_the_layers_of_experts():
    module = experts("gpt-oss")
    form = opening(module)
    for expert, layer in enumerate(form.module.gate_up_proj):
        assert torch.equal(layer.weight, module.gate_up_proj[expert].T)
        assert layer.weight.data_ptr() == module.gate_up_proj[expert].data_ptr()
        assert torch.equal(layer.bias, module.gate_up_proj_bias[expert])
    entries = survey(nn.ModuleDict({"mlp": module}))
    assert {e.inside for e in entries} == {"mlp"}
    assert [e.name for e in entries[:2]] == ["mlp.gate_up_proj.0", "mlp.gate_up_proj.1"]
    assert sum(e.parameters for e in entries) == sum(p.numel() for p in module.parameters())


def test_an_index_past_the_last_expert_is_no_expert():
    module = experts("mixtral")
    x, weights = torch.randn(3, 9), torch.rand(3, 2)
    index = torch.tensor([[0, 5], [5, 5], [4, 1]])
    with torch.no_grad():
        got, want = (m(x, index, weights) for m in (opening(module).module, module))
    assert_sums(got, want, 64)
    assert not got[1].any()


def test_a_copy_of_opened_experts_is_its_own():
    opened = opening(experts("gpt-oss")).module
    other = copy.deepcopy(opened)
    x, index, weights = torch.randn(3, 9), torch.tensor([[0], [1], [2]]), torch.rand(3, 1)
    want = opened(x, index, weights)
    for parameter in opened.parameters():
        parameter.data.zero_()
    assert torch.equal(other(x, index, weights), want)


def test_experts_that_are_laid_out_otherwise_stay_closed():
    module = experts("mixtral")
    module.down_proj = nn.Parameter(torch.randn(4, 9, 7))
    assert opening(module) is None
    (entry,) = survey(module)
    assert entry.reason == "an opened MixtralExperts would lack its down_proj, gate_up_proj"


# Computed weights


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def spectral(layer: nn.Module) -> nn.Module:
    layer = nn.utils.spectral_norm(layer)
    layer(torch.randn(2, 4))  # one step in training: eval then keeps u and v
    return layer


def twice_pruned(layer: nn.Module) -> nn.Module:
    prune.random_unstructured(layer, "weight", 0.3)
    return prune.l1_unstructured(layer, "weight", 0.3)


def both(layer: nn.Module) -> nn.Module:
    return prune.random_unstructured(nn.utils.weight_norm(layer), "bias", 0.5)


COMPUTED = {
    "weight norm": (nn.utils.weight_norm, "weight norm"),
    "weight norm of all": (lambda m: nn.utils.weight_norm(m, dim=None), "weight norm"),
    "weight norm, parametrized": (parametrizations.weight_norm, "weight norm"),
    "spectral norm": (spectral, "spectral norm"),
    "spectral norm, parametrized": (parametrizations.spectral_norm, "spectral norm"),
    "orthogonal": (parametrizations.orthogonal, "the parametrization Orthogonal"),
    "own": (
        lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
        "the parametrization Doubled",
    ),
    "pruned": (lambda m: prune.random_unstructured(m, "weight", 0.5), "the pruning mask"),
    "pruned twice": (twice_pruned, "the pruning mask"),
    "pruned bias": (lambda m: prune.random_unstructured(m, "bias", 0.5), "the pruning mask"),
    "two": (both, "weight norm, the pruning mask"),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", COMPUTED)
def test_a_computed_weight_is_folded(name, training):
    compute, what = COMPUTED[name]
    module = compute(nn.Linear(4, 3)).train(training)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    form = opening(module)
    assert type(form.module) is nn.Linear
    assert {n for n, _ in form.module.named_parameters()} == {"weight", "bias"}
    assert form.note == f"{what} folded"
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert module.training is training
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(form.module(x), module.eval()(x))


def test_a_stale_weight_is_computed_anew():
    module = nn.utils.weight_norm(nn.Linear(4, 3))
    module.weight_g.data.mul_(2)  # as load_state_dict does: no forward since
    x = torch.randn(2, 4)
    assert torch.equal(opening(module).module(x), module(x))


def test_a_computed_weight_inside_a_recurrent_module():
    module = nn.utils.weight_norm(nn.LSTM(5, 7), "weight_hh_l0").eval()
    form = opening(module)
    assert (form.kind, form.note) == ("LSTM", "weight norm folded")
    x = torch.randn(3, 2, 5)
    with torch.no_grad():
        assert_sums(form.module(x)[0], module(x)[0], 100)
    entries = survey(module)
    assert sum(e.parameters for e in entries) == sum(p.numel() for p in module.parameters())


def test_what_is_not_computed_is_itself():
    layer = nn.Linear(4, 3)
    assert settled(layer) is layer
    assert opening(layer) is None


def test_hooks_stay_but_for_those_that_compute():
    seen = []
    layer = nn.utils.weight_norm(nn.Linear(4, 3))
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(True))
    model = open_modules(nn.Sequential(layer), ["0"])
    model(torch.randn(2, 4))
    assert seen == [True]
    handle.remove()
    model(torch.randn(2, 4))
    assert seen == [True]
    assert not hasattr(model[0], "weight_g")


# Opening in a model


class Twice(nn.Module):
    """One module at two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GRU(4, 4)
        self.body = nn.ModuleDict({"again": self.first})


@pytest.mark.parametrize("names", [["first"], ["body.again"], ["first", "body.again"]], ids=str)
def test_a_module_at_two_paths_is_opened_once(names):
    model = open_modules(Twice(), names)
    assert isinstance(model.first, Opened)
    assert model.first is model.body["again"]


def test_what_cannot_be_opened():
    with pytest.raises(KeyError, match="0"):
        open_modules(nn.Sequential(nn.Linear(4, 4)), ["0"])


def test_a_copy_that_is_opened_alike_shares_its_tensors():
    model = nn.Sequential(nn.GRU(4, 4), nn.utils.weight_norm(nn.Linear(4, 4)))
    model[1](torch.randn(2, 4))  # the weight is then the result of a computation
    other = open_modules(copy.deepcopy(nn.Sequential(nn.GRU(4, 4), nn.Linear(4, 4))), ["0"])
    alike = opened_like(model, other)
    assert isinstance(alike[0], Opened)
    assert type(model[0]) is nn.GRU
    assert {id(p) for p in alike[0].parameters()} == {id(p) for p in model[0].parameters()}
    assert opened_like(model, model) is model


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_lazy_module_that_was_run_is_a_plain_one():
    lazy = nn.LazyLinear(3)
    assert "not initialised" in survey(lazy)[0].reason
    lazy(torch.randn(2, 4))
    assert [(entry.reason, entry.parameters) for entry in survey(lazy)] == [(None, 15)]
