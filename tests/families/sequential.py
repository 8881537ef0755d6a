"""Families of sequences, sets and graphs: perceptron, recurrent, seq2seq, graph convolution."""

from __future__ import annotations

import torch
from families.family import Family, tokens, values
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB = 97


def mlp() -> nn.Module:
    return Perceptron(
        nn.Linear(33, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(64, 64),
        nn.GELU(),
        nn.Linear(64, 7),
    )


class Perceptron(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Tagger(nn.Module):
    """Tokens, a recurrent stack, and a label for each token."""

    def __init__(self, core: nn.RNNBase) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 33, padding_idx=0)
        self.core = core
        self.head = nn.Linear(core.hidden_size * (2 if core.bidirectional else 1), 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.core(self.embed(ids))[0])


def rnn() -> nn.Module:
    return Tagger(nn.RNN(33, 48, batch_first=True))


def gru() -> nn.Module:
    return Tagger(nn.GRU(33, 32, num_layers=2, batch_first=True, dropout=0.1))


def lstm() -> nn.Module:
    return Tagger(nn.LSTM(33, 32, num_layers=2, bidirectional=True, batch_first=True))


class Seq2Seq(nn.Module):
    """An encoder, and a decoder that attends to it step by step and is fed the target."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.encoder = nn.LSTM(32, 32, bidirectional=True, batch_first=True)
        self.bridge = nn.Linear(64, 48)
        self.decoder = nn.GRUCell(32 + 48, 48)
        self.head = nn.Linear(96, VOCAB)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.bridge(self.encoder(self.embed(source))[0])
        state, outputs = memory.mean(1), []
        context = torch.zeros_like(state)
        for step in self.embed(target).unbind(1):
            state = self.decoder(torch.cat([step, context], 1), state)
            weights = torch.softmax(torch.einsum("bth,bh->bt", memory, state), 1)
            context = torch.einsum("bt,bth->bh", weights, memory)
            outputs.append(self.head(torch.cat([state, context], 1)))
        return torch.stack(outputs, 1)


class GraphConvolution(nn.Module):
    """Two layers of normalised neighbourhood means, and one of attention along the edges."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(33, 64, bias=False), nn.Linear(64, 64)
        self.attend = nn.Linear(128, 1)
        self.head = nn.Linear(64, 7)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        nodes = torch.arange(x.shape[0], device=x.device)
        source, target = torch.cat([edges, torch.stack([nodes, nodes])], 1)
        degree = x.new_zeros(x.shape[0]).index_add(
            0, target, torch.ones_like(target, dtype=x.dtype)
        )
        norm = (degree[source] * degree[target]).rsqrt()[:, None]

        def spread(messages: Tensor) -> Tensor:
            return torch.zeros_like(messages[: len(x)]).index_add(0, target, messages)

        x = F.relu(spread(self.first(x)[source] * norm))
        x = F.relu(spread(self.second(x)[source] * norm))
        score = F.leaky_relu(self.attend(torch.cat([x[source], x[target]], 1)), 0.2).exp()
        total = x.new_zeros(len(x), 1).index_add(0, target, score)
        return self.head(spread(x[source] * score / total[target]))


class Encoder(nn.Module):
    """torch's own transformer: tokens in, one label out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 48)
        self.core = nn.Transformer(48, 4, 2, 1, 96, batch_first=True)
        self.head = nn.Linear(48, 7)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = source == 0
        mixed = self.core(
            self.embed(source),
            self.embed(target),
            src_key_padding_mask=mask,
            memory_key_padding_mask=mask,
        )
        return self.head(mixed)


def sentence() -> dict[str, Tensor]:
    return {"ids": tokens(2, 9, below=VOCAB)}


def pair() -> dict[str, Tensor]:
    source = tokens(2, 9, below=VOCAB)
    source[1, 6:] = 0
    return {"source": source, "target": tokens(2, 5, below=VOCAB, seed=1)}


def graph() -> dict[str, Tensor]:
    return {"x": values(15, 33), "edges": tokens(2, 41, below=15)}


FAMILIES = [
    Family("MLP", mlp, lambda: {"x": values(16, 33)}),
    Family("RNN", rnn, sentence),
    Family("GRU", gru, sentence),
    Family("LSTM", lstm, sentence),
    Family("Seq2seq", Seq2Seq, pair),
    Family("nn.Transformer", Encoder, pair),
    Family("Graph convolution", GraphConvolution, graph),
]
