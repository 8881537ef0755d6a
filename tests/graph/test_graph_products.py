"""Products with a parameter are linear layers, and compute what they did."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qkit.flows import lower
from qkit.flows.pt2e import convert
from qkit.graph import capture
from qkit.graph.kinds import kind_of

# Products in fp32, summed in another order.
FP32 = 2.0**-20


class Products(nn.Module):
    """The three forms; a matrix with two readers; one multiplied from the left; two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(5, n)) for n in (7, 5, 5))
        self.bias, self.wide = nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(5, 7))
        self.both = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x, self.a) + torch.addmm(self.wide[:1], x, self.a * 2)
        z = x.unsqueeze(1) @ self.b + (torch.mm(x, self.c) @ self.both).unsqueeze(1)
        left = (self.wide @ torch.ones(7, 2)).sum() + self.both.sum()
        return y.sum(1) + z.sum((1, 2)) + left + (x.t() @ x).sum()


def test_what_is_a_product_with_a_parameter_becomes_a_layer():
    model, x = Products().eval(), torch.randn(9, 5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    module = capture(model, (x,), {}).module()
    names = [str(n.args[1]) for n in module.graph.nodes if (k := kind_of(n)) and k.name == "Linear"]
    # `a` is read by `a * 2` too, `both` by its sum.
    assert names == ["b", "c"]
    for size in (9, 2):
        x = torch.randn(size, 5)
        assert (module(x) - model(x)).abs().max() <= 2**4 * FP32 * model(x).abs().max()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dialect", ["onnx", "inductor", "xnnpack"])
def test_conv1d_of_transformers_is_a_layer_of_every_target(dialect):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=131, n_positions=33, n_embd=24, n_layer=1, n_head=3, use_cache=False
    )
    model, ids = GPT2LMHeadModel(config).eval(), torch.randint(0, 131, (4, 9))
    done = convert(model, "int8-dynamic", {"input_ids": ids}, dialect=dialect)
    layers = [site.owner for site in done.sites if not site.table]
    assert done.expected == len(layers) == 5
    assert layers[-2:] == ["transformer.h.0.mlp.c_proj", "lm_head"]


def test_rows_of_conv1d_and_of_a_head_that_shares_its_table():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=131, n_positions=33, n_embd=24, n_layer=1, n_head=3, use_cache=False
    )
    ids = torch.randint(0, 131, (4, 9))
    model = GPT2LMHeadModel(config).eval()
    report = lower(model, "int8-dynamic", None, target="onnx", calib={"input_ids": ids})
    schemes = {row.name: row.scheme for row in report.layers}
    assert schemes["transformer.h.0.attn.c_attn"] == schemes["lm_head"] == "w8a8"
    assert schemes["transformer.wte"] == schemes["transformer.wpe"] == "w8a16"
