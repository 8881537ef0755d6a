"""Whole models, qkit beside its peers: milliseconds, bytes and error, as JSON lines.

    python benchmarks/models.py [--quick] [--only MiniLM,LSTM] > benchmarks/results/models.jsonl

Kinds of lines after the first, which tells the machine: ``model`` (one model by one contender) and
``absent`` (who is not there, and why). One sample at a time (``--batch``); contenders of a model
take turns (:mod:`turns`) in one process. ``speedup`` is the median of torch's eager fp32 model by
this one's, ``size`` this one's bytes by those of that model's weights; ``sqnr_db`` and ``cosine``
compare the outputs with that model's. What static ranges are learnt from is other samples.
``tokens_per_s`` is of the decoder: :data:`FOLLOWING` tokens, one after the other, behind a prompt.

The digits CNN and MiniLM are trained; the others have random weights, with batch-norm statistics of
their inputs. The full run takes about half an hour on two cores; ``--quick`` is two small models
without a compiler.
"""

from __future__ import annotations

import argparse
import functools
import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from decoder import Decoder, generate
from lines import say, tell_head
from model_peers import Setting, contenders, reason
from pt2e_models import MODELS
from torch import Tensor, nn
from turns import Call, Turns, digits, interleave

from qkit.flows.demo import digits_cnn, load_digits, train
from qkit.models.inputs import flatten
from qkit.report import compare

FAMILIES = ("ResNet-18", "ResNet-50", "MobileNetV2", "MiniLM", "LSTM")
PROMPT, FOLLOWING = 64, 16  # tokens
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model in eval mode and some samples; of a decoder, a prompt and what follows it."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    decodes: bool = False


def digits_trained() -> nn.Module:
    torch.manual_seed(0)
    model = digits_cnn()
    with torch.enable_grad():
        train(model, load_digits())
    return model


def digits_images() -> Inputs:
    return {"input": load_digits().test_x[:16]}


def decoder(layers: int, width: int, vocabulary: int) -> Case:
    """``GPT-2``: 12 layers of 768, a vocabulary of 50257."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Decoder(layers, width, width // 64, vocabulary, PROMPT + FOLLOWING).eval()

    def tokens() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (1, PROMPT + FOLLOWING), generator=generator)
        return {"prompt": ids[:, :PROMPT], "following": ids[:, PROMPT:]}

    return Case(f"decoder {layers}x{width}", build, tokens, decodes=True)


DIGITS = Case("digits CNN", digits_trained, digits_images)
FULL = [
    DIGITS,
    *(Case(name, MODELS[name].model, MODELS[name].inputs) for name in FAMILIES),
    decoder(12, 768, 50257),
]
QUICK = [DIGITS, decoder(2, 128, 512)]


def setting_of(case: Case, batch: int, folder: Path, *, compiles: bool) -> Setting:
    """The first ``batch`` samples are timed, the others are there to learn from."""
    model, inputs = case.model(), case.inputs()
    if case.decodes:
        kwargs, rest = {"ids": inputs["prompt"], "at": torch.arange(PROMPT)}, None
    else:
        kwargs = {name: t[:batch] for name, t in inputs.items()}
        rest = {name: t[batch:] for name, t in inputs.items()}

    def drive(net: Callable[..., Any]) -> Call:
        if case.decodes:
            return functools.partial(generate, net, **inputs)
        return functools.partial(net, **kwargs)

    return Setting(model, kwargs, rest, drive, compiles, folder, {})


def records(case: Case, batch: int, seconds: float, *, compiles: bool) -> Iterator[dict[str, Any]]:
    """The lines of one model."""
    if compiles:
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 64
    with tempfile.TemporaryDirectory(prefix="qkit-models-") as folder:
        setting = setting_of(case, batch, Path(folder), compiles=compiles)
        found = contenders(setting)
        base = found[0]
        reference = list(flatten(base.call()))
        turns, errors = {}, {}
        for each in found:
            try:
                stats = compare(reference, list(flatten(each.call())))
            except Exception as error:  # whatever a peer refuses with is its reason
                if each.name.startswith("qkit"):
                    raise
                setting.absent[each.label] = reason(error)
                continue
            errors[each.label], turns[each.label] = stats.to_json(), Turns([each.call])
        interleave(turns, seconds, base.label)
    ms = {label: each.to_json() for label, each in turns.items()}
    for each in (each for each in found if each.label in ms):
        own = ms[each.label]
        record: dict[str, Any] = {
            "model": case.name,
            "batch": 1 if case.decodes else batch,
            "contender": each.name,
            "scheme": each.scheme,
            "ms": own,
            "speedup": digits(ms[base.label]["median"] / own["median"]),
            "bytes": each.nbytes,
            "size": digits(each.nbytes / base.nbytes),
        }
        error = errors[each.label]
        for name, places in (("sqnr_db", 2), ("cosine", 6)):
            value = error[name]
            record[name] = None if value is None else round(value, places)
        if case.decodes:
            record["tokens_per_s"] = digits(1e3 * FOLLOWING / own["median"])
        yield {"kind": "model", **record, "threads": torch.get_num_threads()}
    for name, why in setting.absent.items():
        yield {"kind": "absent", "model": case.name, "name": name, "why": why}


def main() -> None:
    """Print the machine, then the lines of each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="models, separated by commas")
    parser.add_argument("--batch", type=int, default=1, choices=range(1, 4), help="samples")
    parser.add_argument("--seconds", type=float, help="for each contender")
    parser.add_argument("--quick", action="store_true", help="two small models, not compiled")
    given = parser.parse_args()
    cases = {case.name: case for case in (QUICK if given.quick else FULL)}
    chosen = given.only.split(",") if given.only else list(cases)
    if unknown := [name for name in chosen if name not in cases]:
        parser.error(f"no such model: {', '.join(unknown)} (there are: {', '.join(cases)})")
    seconds = given.seconds or (0.05 if given.quick else 4.0)
    tell_head()
    with torch.no_grad():
        for name in chosen:
            for record in records(cases[name], given.batch, seconds, compiles=not given.quick):
                say(**record)
            gc.collect()


if __name__ == "__main__":
    main()
