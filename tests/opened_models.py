"""Small models whose modules compute with raw parameters, as ``--model opened_models:Tagger``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
    "tagger": (Tagger, lambda: (torch.randint(0, 31, (3, 6)),)),
    "seq2seq": (Seq2Seq, lambda: (torch.randn(3, 5, 7), torch.randn(3, 4, 7))),
}
