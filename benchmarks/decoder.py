"""A decoder of GPT-2's shape with room for keys and values, and its generating of tokens.

transformers' own would do, but its cache grows with each token, which ``torch.compile`` and its
peers take for new sizes each time; here all sizes are fixed, and every contender runs at its best.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Attention over what came before, and a perceptron (Radford et al. 2019)."""

    keys: Tensor
    values: Tensor

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for name in ("keys", "values"):
            room = torch.zeros(1, heads, length, width // heads)
            self.register_buffer(name, room, persistent=False)

    def forward(self, x: Tensor, at: Tensor, mask: Tensor) -> Tensor:
        """``x`` are the tokens at the positions ``at``; the others are remembered."""
        batch, count, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, count, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        self.keys.index_copy_(2, at, key)
        self.values.index_copy_(2, at, value)
        found = F.scaled_dot_product_attention(query, self.keys, self.values, attn_mask=mask)
        x = x + self.out(found.transpose(1, 2).reshape(batch, count, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Decoder(nn.Module):
    """Token numbers ``[1, n]`` at positions ``[n]`` in, the logits behind the last one out."""

    places: Tensor

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, length) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("places", torch.arange(length), persistent=False)

    def forward(self, ids: Tensor, at: Tensor) -> Tensor:
        """Logits ``[1, vocabulary]``."""
        mask = self.places <= at[:, None]
        x = self.tokens(ids) + self.positions(at)
        for block in self.blocks:
            x = block(x, at, mask)
        return self.head(self.norm(x[:, -1]))


def generate(model: Callable[..., Tensor], prompt: Tensor, following: Tensor) -> Tensor:
    """Read the prompt, then each token of ``following``: the logits behind the last one.

    The tokens are given, so that every contender does the same work and its logits can be compared.
    """
    count = prompt.shape[1]
    logits = model(ids=prompt, at=torch.arange(count))
    for step, token in enumerate(following.split(1, dim=1)):
        logits = model(ids=token, at=torch.tensor([count + step]))
    return logits
