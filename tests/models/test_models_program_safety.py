"""What torch.export.load would unpickle, evaluate or import is refused first."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from qkit.errors import InputError, UnsafePickleError
from qkit.models import check_program


@pytest.fixture
def program(tools, mlp, tmp_path) -> Path:
    path = tmp_path / "a.pt2"
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(mlp, (torch.randn(4, 33),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, path)
    check_program(path)
    return path


def edit(tools, path: Path, old: str, new: str, member: str = "models/model.json") -> None:
    """Replace a value inside the JSON of the program, wherever it is."""
    text = tools.read_member(path, member).decode()
    assert old in text, f"the program has no {old}"
    tools.rewrite(path, {member: text.replace(old, new).encode()})


def refused(tools, path: Path, *words: str) -> None:
    message = tools.refuses(path, UnsafePickleError)
    assert "--trust-pickle" in message
    assert "--model package.module:factory" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("member", ["data/weights/model_weights_config.json"])
def test_pickled_weights(tools, program, member):
    edit(tools, program, '"use_pickle": false', '"use_pickle": true', member)
    refused(tools, program, "a pickled object")


@pytest.mark.parametrize("name", ["custom_obj_0", "opaque_obj_0", "weight_0/../x", "other"])
def test_constants_that_are_unpickled(tools, program, marker, name):
    config = {"config": {"c": {"path_name": name, "is_param": False, "use_pickle": False}}}
    data = io.BytesIO()
    torch.save(tools.Trap(marker), data)
    changes = {
        "data/constants/model_constants_config.json": json.dumps(config).encode(),
        f"data/constants/{name}": data.getvalue(),
    }
    tools.rewrite(program, changes)
    refused(tools, program, "a pickled object")


@pytest.mark.parametrize("protocol", [2, 4])
def test_example_inputs_that_are_a_trap(tools, program, marker, protocol):
    data = io.BytesIO()
    torch.save(((tools.Trap(marker),), {}), data, pickle_protocol=protocol)
    tools.rewrite(program, {"data/sample_inputs/model.pt": data.getvalue()})
    tools.refuses(program)


@pytest.mark.parametrize("value", [3, (1, 2, 3), ([1], 4), (torch.ones(1), None), "text"], ids=str)
def test_example_inputs_of_another_form(tools, program, value):
    data = io.BytesIO()
    torch.save(value, data)
    tools.rewrite(program, {"data/sample_inputs/model.pt": data.getvalue()})
    tools.refuses(program)


def as_text(value: str) -> str:
    return json.dumps(value)[1:-1]


SHAPES = [
    "__import__('os').mkdir('x')",
    'Symbol("s0").__class__',
    "Symbol('s0)')",
    "Symbol('__import__(1)')",
    "Symbol('u99999999999', integer=True)",
    "Integer('__import__(1)')",
    "sympify('1')",
    "S('1')",
    "Lambda(x, x)",
    "eval(1)",
    "(lambda: 1)()",
    "[x for x in (1,)]",
    "Symbol('s0') #",
    "Symbol('s0')\n+1",
    "9**9**9",
    "(9**64)**64",
    "Pow(9, Pow(9, 9))",
    "LShift(1, 99999)",
    "PowByNatural(9, 999999)",
    "f'{1}'",
    "",
    "1 +",
    "(" * 500 + ")" * 500,
    "_private",
    "Max(eval, 1)",
]


@pytest.mark.parametrize("text", SHAPES)
def test_shape_expressions(tools, program, text):
    old = json.loads(tools.read_member(program, "models/model.json"))
    symbol = next(
        size["as_expr"]["expr_str"]
        for meta in old["graph_module"]["graph"]["tensor_values"].values()
        for size in meta["sizes"]
        if "as_expr" in size
    )
    edit(tools, program, as_text(symbol), as_text(text))
    refused(tools, program, "a shape expression")


GUARDS = [
    "__import__('os').mkdir('x') is None",
    "().__class__",
    "L['x'].size().__class__",
    "eval('1')",
    "len(globals())",
    "min('import antigravity', 'x', key=exec)",
    "max(eval, 1)",
    "1 == 1 #",
    "1 ==\n1",
    "1 == '\\x41'",
    # Pasted into a message between double quotes: the apostrophe makes Python print those itself.
    'L["\'"] == 1',
    "L['+evil()+']",
    "open",
    "print(1)",
    "(x := 1)",
    "[1][0]",
    "b'x' == 1",
]


@pytest.mark.parametrize("text", GUARDS)
def test_guards(tools, program, text):
    value = json.loads(tools.read_member(program, "models/model.json"))
    value["guards_code"] = ["L['input'].size()[1] == 33", text]
    tools.rewrite(program, {"models/model.json": json.dumps(value).encode()})
    refused(tools, program, "a guard")


@pytest.mark.parametrize(
    "text",
    [
        "L['input'].size()[0] >= 2",
        "L['input'].shape[0] % 2 == 0 and 3 < L['input'].stride(0) // 4",
        "max(L['input'].size()[0], 2) + abs(-1) <= 2**31",
        "L['größe']['a.b'].storage_offset() == 0 or not L['x'][0].dim() != len(L['x'])",
    ],
)
def test_ordinary_guards(tools, program, text):
    value = json.loads(tools.read_member(program, "models/model.json"))
    value["guards_code"] = [text]
    tools.rewrite(program, {"models/model.json": json.dumps(value).encode()})
    check_program(program)


TARGETS = [
    "os.mkdir",
    "torch.load",
    "torch.hub.load",
    "torch.ops.load_library",
    "torch.ops.aten.from_file.default",
    "torch.ops.aten.save.default",
    "torch.ops.aten.save",
    "torch.ops.debugprims.load_tensor.default",
    "torch.ops.aten.add.__class__",
    "torch.ops.aten.add._schemas",
    "torch.ops.aten.__class__.x",
    "torch.ops.aten.add.Tensor.redispatch",
    "torch.ops.higher_order.call_torchbind",
    "torch.ops.higher_order.print",
    "torch.ops.higher_order.__class__",
    "torch.ops.c10d.broadcast_.default",
    "_operator.attrgetter",
    "_operator.methodcaller",
    "_operator.call",
    "math.__loader__",
    "#registered:thing",
    "torch.ops.aten.relu.default\n",
]


@pytest.mark.parametrize("text", TARGETS)
@pytest.mark.parametrize("key", ["target", "as_operator"])
def test_calls(tools, program, text, key):
    old = '"target": "torch.ops.aten.relu.default"'
    edit(tools, program, old, f'"{key}": {json.dumps(text)}')
    refused(tools, program, "a call")


CODE = "x=__import__('os').mkdir('y')"


def test_names_of_values_are_pasted_into_source(tools, program):
    """torch writes a Python function with these names and executes it."""
    edit(tools, program, '"name": "relu"', f'"name": "{CODE}"')
    refused(tools, program, "a name")


def test_names_of_parameters_are_too(tools, program):
    text = tools.read_member(program, "models/model.json").decode()
    assert '"parameter_name": "0.weight"' in text
    evil = as_text('0.a"), __import__("os").mkdir("y"), ("')
    edit(tools, program, '"parameter_name": "0.weight"', f'"parameter_name": "{evil}"')
    refused(tools, program, "a string")


def test_names_of_arguments_are_too(tools, program):
    value = json.loads(tools.read_member(program, "models/model.json"))
    signature = value["graph_module"]["module_call_graph"][0]["signature"]
    signature["forward_arg_names"] = [CODE]
    tools.rewrite(program, {"models/model.json": json.dumps(value).encode()})
    refused(tools, program, "a name")


def with_spec(tools, program, key: str, change) -> None:
    value = json.loads(tools.read_member(program, "models/model.json"))
    signature = value["graph_module"]["module_call_graph"][0]["signature"]
    signature[key] = json.dumps(change(json.loads(signature[key])))
    tools.rewrite(program, {"models/model.json": json.dumps(value).encode()})


@pytest.mark.parametrize("key", ["in_spec", "out_spec"])
@pytest.mark.parametrize(
    "context",
    [
        {"default_factory_module": "antigravity", "default_factory_name": "x"},
        {"__enum__": True, "fqn": "antigravity:x", "name": "y"},
        [{"__enum__": True, "fqn": "antigravity:x", "name": "y"}],
        [CODE],
    ],
    ids=["factory", "enum", "enum in a list", "code"],
)
def test_structures_that_import_a_module(tools, program, key, context):
    def change(spec):
        return [
            spec[0],
            {"type": "builtins.dict", "context": json.dumps(context), "children_spec": []},
        ]

    with_spec(tools, program, key, change)
    refused(tools, program, "a structure of arguments")


def test_text_that_is_an_input_is_pasted_into_a_guard(tools, program):
    value = json.loads(tools.read_member(program, "models/model.json"))
    value["graph_module"]["graph"]["inputs"].append({"as_string": f"' or {CODE} or '"})
    tools.rewrite(program, {"models/model.json": json.dumps(value).encode()})
    refused(tools, program, "a string")


def test_a_symbol_that_torch_would_count_up_to(tools, program):
    value = json.loads(tools.read_member(program, "models/model.json"))
    value["range_constraints"]["u99999999999"] = {"min_val": 0, "max_val": 1}
    tools.rewrite(program, {"models/model.json": json.dumps(value).encode()})
    refused(tools, program, "a symbol")


@pytest.mark.parametrize(
    "member",
    ["models/model.json", "data/weights/model_weights_config.json", "data/sample_inputs/model.pt"],
)
@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"null", b"\xff", b"[" * 100_000, b"{}"])
def test_members_that_are_something_else(tools, program, member, data):
    tools.rewrite(program, {member: data})
    if (member, data) == ("data/sample_inputs/model.pt", b""):
        check_program(program)  # a program without example inputs
    else:
        tools.refuses(program)


@pytest.mark.parametrize("member", ["models/model.json", "data/weights/weight_0", "archive_format"])
def test_members_that_are_missing(tools, program, member):
    tools.rewrite(program, {member: None})
    tools.refuses(program)


ORDINARY = {
    "attention": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 4, 8)),
    "convolutions": (nn.Sequential(nn.Conv1d(2, 3, 3), nn.GELU(), nn.Flatten()), (2, 2, 9)),
    "transposed": (nn.ConvTranspose2d(2, 3, 2, stride=2), (1, 2, 4, 4)),
    "normalisations": (nn.Sequential(nn.LayerNorm(6), nn.Softmax(-1), nn.Dropout()), (2, 6)),
    "resizing": (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 2, 4, 4)),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_programs_pass(tools, tmp_path, name):
    model, shape = ORDINARY[name]
    tools.save_program(model.eval(), tmp_path / "a.pt2", torch.randn(shape))
    check_program(tmp_path / "a.pt2")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="none"):
        check_program(tmp_path / "none.pt2")
