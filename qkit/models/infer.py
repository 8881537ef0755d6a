"""Inputs that a model takes, inferred from its configuration or its first layer, and tried."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import InputError
from qkit.models.inputs import Inputs, random_tensor, run

# Spatial sizes to try for a convolution, the common ones first.
SIZES_2D = (32, 224, 28, 64, 8, 16, 96, 128, 256, 299)
SIZES_1D = (64, 128, 1024, 16000, 3000)
SIZES_3D = (16, 32, 64)
SEQUENCE, BATCH = 16, 2


def infer(model: nn.Module, *, seed: int = 0) -> Inputs | None:
    """Random inputs with which ``model`` runs and gives finite outputs; None if none are found.

    The model's buffers, training mode and the global random state are left as they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = {
        buffer: buffer.clone()
        for _, own in buffers
        for buffer in own.values()
        if buffer is not None
    }
    state = torch.get_rng_state()
    try:
        model.eval()
        return next((c for c in _candidates(model, seed) if _works(model, c)), None)
    finally:
        for module, training in modes:
            module.training = training
        torch.set_rng_state(state)
        for module, own in buffers:  # a forward may write them, replace them and add new ones
            module._buffers.clear()
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, value in values.items():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _works(model: nn.Module, inputs: Inputs) -> bool:
    try:
        outputs = run(model, inputs)
    except InputError:
        return False
    return all(torch.isfinite(t).all() for t in outputs if t.is_floating_point())


def _candidates(model: nn.Module, seed: int) -> Iterator[Inputs]:
    config = getattr(model, "config", None)
    if hasattr(model, "main_input_name") and config is not None:
        yield from _transformers(model, config, seed)
        return
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for name, layer in model.named_modules():
        shapes = list(_shapes(layer))
        if not shapes:
            continue
        kind = f"inferred from the first layer ({name or 'the model'}: {type(layer).__name__})"
        for shape in shapes:
            if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
                x = random_tensor(shape, torch.int64, seed, layer.num_embeddings)
            else:
                x = random_tensor(shape, dtype, seed)
            yield Inputs((x,), {}, f"random {'x'.join(map(str, shape))}, {kind}")
        return


def _shapes(layer: nn.Module) -> Iterator[tuple[int, ...]]:
    """Input shapes that ``layer`` would take as the first layer of a model."""
    if isinstance(layer, nn.Linear) and layer.in_features:
        yield (BATCH, layer.in_features)
        yield (BATCH, SEQUENCE, layer.in_features)
    elif isinstance(layer, nn.Conv1d):
        yield from ((BATCH, layer.in_channels, n) for n in SIZES_1D)
    elif isinstance(layer, nn.Conv2d):
        yield from ((BATCH, layer.in_channels, n, n) for n in SIZES_2D)
    elif isinstance(layer, nn.Conv3d):
        yield from ((BATCH, layer.in_channels, n, n, n) for n in SIZES_3D)
    elif isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.num_embeddings:
        yield (BATCH, SEQUENCE)
    elif isinstance(layer, nn.RNNBase):
        sizes = (BATCH, SEQUENCE) if layer.batch_first else (SEQUENCE, BATCH)
        yield (*sizes, layer.input_size)
    elif isinstance(layer, nn.TransformerEncoderLayer):
        yield (BATCH, SEQUENCE, layer.linear1.in_features)


def _transformers(model: nn.Module, config: Any, seed: int) -> Iterator[Inputs]:
    """What transformers models take, by the name of their main input."""
    name = model.main_input_name
    text = getattr(config, "text_config", None) or config
    vocabulary = getattr(text, "vocab_size", None)
    kwargs: dict[str, Tensor] = {}
    if name == "input_ids" and isinstance(vocabulary, int) and vocabulary > 1:
        ids = 1 + random_tensor((BATCH, SEQUENCE), torch.int64, seed, vocabulary - 1)
        kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "is_encoder_decoder", False):
            kwargs["decoder_input_ids"] = ids[:, : SEQUENCE // 2].clone()
    elif name == "pixel_values":
        vision = getattr(config, "vision_config", None) or config
        side = getattr(vision, "image_size", 224)
        height, width = side if isinstance(side, list | tuple) else (side, side)
        shape = (BATCH, getattr(vision, "num_channels", 3), height, width)
        dtype = next(p.dtype for p in model.parameters())
        kwargs = {"pixel_values": random_tensor(shape, dtype, seed)}
    if kwargs:
        origin = f"random, for transformers' {type(model).__name__} ({', '.join(kwargs)})"
        yield Inputs((), kwargs, origin)
