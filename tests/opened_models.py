"""Small models whose modules compute with raw parameters, as ``--model opened_models:Tagger``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


class Tagger(nn.Module):
    """A tag for every token, from a bidirectional LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(31, 9)
        self.lstm = nn.LSTM(9, 12, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        self.lstm.flatten_parameters()
        return self.head(self.lstm(self.emb(tokens))[0])


class Seq2Seq(nn.Module):
    """A GRU encoder whose state starts a GRU decoder, which a cell ends."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(7, 11, batch_first=True)
        self.decoder = nn.GRU(7, 11, batch_first=True)
        self.last = nn.GRUCell(11, 11)
        self.head = nn.Linear(11, 7)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, state = self.encoder(source)
        out, state = self.decoder(target, state)
        return self.head(self.last(out[:, -1], state[-1]))


class Encoder(nn.Module):
    """torch's own transformer layers over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(31, 12)
        layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.emb(tokens)))


class Crossed(nn.Module):
    """Attention to something of another size, and to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.across = nn.MultiheadAttention(12, 3, kdim=7, vdim=7, batch_first=True)
        self.along = nn.MultiheadAttention(12, 2, add_bias_kv=True, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x, weights = self.across(x, memory, memory)
        return self.along(x, x, x, need_weights=False)[0] * weights.amax(-1, keepdim=True)


class Normed(nn.Module):
    """A convolution and a layer with weight norm, a pruned layer, and a bilinear form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = weight_norm(nn.Conv2d(3, 5, 3))
        self.fc = spectral_norm(nn.Linear(5, 7))
        self.pruned = prune.random_unstructured(nn.Linear(7, 7), "weight", 0.5)
        self.pair = nn.Bilinear(7, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().mean((2, 3))
        return self.pair(self.pruned(self.fc(x)), x)


class Weightless(nn.Module):
    """Raw parameters with an LSTM's names, in a module that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.Module()
        for name, parameter in nn.LSTM(9, 12, 2, bidirectional=True).named_parameters():
            self.lstm.register_parameter(name, parameter)
        self.emb, self.head = nn.Embedding(31, 9), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.lstm.weight_hh_l0.T


MODELS = {
    "normed": (Normed, lambda: (torch.randn(3, 3, 6, 6),)),
    "encoder": (Encoder, lambda: (torch.randint(0, 31, (3, 6)),)),
    "attention": (Crossed, lambda: (torch.randn(3, 4, 12), torch.randn(3, 5, 7))),
    "tagger": (Tagger, lambda: (torch.randint(0, 31, (3, 6)),)),
    "seq2seq": (Seq2Seq, lambda: (torch.randn(3, 5, 7), torch.randn(3, 4, 7))),
}
