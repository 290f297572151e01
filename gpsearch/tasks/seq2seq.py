"""An encoder-decoder with global attention, whose recurrent layers are LSTMs or H-LSTMs.

    source [B, S] -> encoder -> memory [B, S, M]
    token, last attentional vector -> decoder's cells -> attention to the memory
        -> attentional vector [B, E] -> output layer, tied to the target's embedding

Source: Luong et al., "Effective Approaches to Attention-based Neural Machine Translation" (arXiv
1508.04025): "general" score, input feeding. With 2 x 500 units, embeddings of 500 and one
direction it is the default of harvardnlp/seq2seq-attn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gpsearch.candidate import Architecture
from gpsearch.cell import HLSTM, HLSTMCell
from gpsearch.dropout import Dropout
from gpsearch.errors import UserError
from gpsearch.kernels.gates import Gates
from gpsearch.tasks.subwords import END, PAD, START

LONGEST = 100
"""Sub-words of a translation at which decoding gives up."""


class State(NamedTuple):
    """What a decoder carries from step to step; every tensor has a row for each sentence."""

    cells: tuple[tuple[Tensor, Tensor], ...]
    """h and c of every layer, [B, H]."""
    fed: Float[Tensor, "batch embedding"] | None
    """The last attentional vector; None without input feeding."""
    memory: Float[Tensor, "batch source memory"]
    keys: Float[Tensor, "batch source hidden"]
    """The memory as the attention compares it with h."""
    padding: Bool[Tensor, "batch source"] | None
    """Where the source has ended; None where all sentences are equally long."""


class Encoder(nn.Module):
    """Reads the source.

    Args:
        shape: Its recurrent stack.
        subwords: Size of the source's vocabulary.
    """

    def __init__(self, shape: Architecture, subwords: int) -> None:
        super().__init__()
        self.merged = shape.bidirectional and shape.merge == "sum"
        self.embedding = nn.Embedding(subwords, shape.embedding_size, PAD)
        self.dropout = Dropout(shape.dropout)
        self.norms, self.layers = nn.ModuleList(), nn.ModuleList()
        size = shape.embedding_size
        for layer in range(shape.layers):
            self.norms.append(_norm(shape, size if layer else None))
            options = {**_gates(shape), "bidirectional": shape.bidirectional}
            self.layers.append(HLSTM(size, shape.hidden_size, batch_first=True, **options))
            joined = 2 if shape.bidirectional and not self.merged else 1
            size = joined * shape.hidden_size
        self.output_size = size

    def forward(
        self, source: Int[Tensor, "batch source"], lengths: Int[Tensor, " batch"] | None = None
    ) -> tuple[Float[Tensor, "batch source memory"], tuple[tuple[Tensor, Tensor], ...]]:
        """Return the memory, and each layer's last h and c, those of two directions added up."""
        x, states = self.embedding(source), []
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x, (h, c) = layer(self.dropout(norm(x)), lengths=lengths)
            states.append((h.sum(0), c.sum(0)))
            if self.merged:
                forward, backward = x.chunk(2, dim=-1)
                x = forward + backward
        return x, tuple(states)


class Decoder(nn.Module):
    """Says the translation.

    Args:
        shape: Its recurrent stack.
        subwords: Size of the target's vocabulary.
        memory_size: Width of the encoder's memory.
    """

    def __init__(self, shape: Architecture, subwords: int, memory_size: int) -> None:
        super().__init__()
        self.input_feeding, size = shape.input_feeding, shape.embedding_size
        self.embedding = nn.Embedding(subwords, size, PAD)
        self.dropout = Dropout(shape.dropout)
        self.norms, self.layers = nn.ModuleList(), nn.ModuleList()
        below = size * (1 + shape.input_feeding)
        for layer in range(shape.layers):
            self.norms.append(_norm(shape, below if layer else None))
            self.layers.append(HLSTMCell(below, shape.hidden_size, **_gates(shape)))
            below = shape.hidden_size
        self.score = nn.Linear(memory_size, shape.hidden_size, bias=False)
        self.combine = nn.Linear(memory_size + shape.hidden_size, size, bias=False)
        self.output = nn.Linear(size, subwords)
        self.output.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=size**-0.5)
        nn.init.zeros_(self.output.bias)

    def start(
        self,
        memory: Float[Tensor, "batch source memory"],
        cells: tuple[tuple[Tensor, Tensor], ...],
        padding: Bool[Tensor, "batch source"] | None,
    ) -> State:
        """Return the state before the first token."""
        size = self.embedding.embedding_dim
        fed = memory.new_zeros(len(memory), size) if self.input_feeding else None
        return State(cells, fed, memory, self.score(memory), padding)

    def stepper(self) -> Callable[[Tensor, State], tuple[Tensor, State]]:
        """Return what takes tokens [B] to the log-probabilities [B, V] of the next ones.

        It is for decoding: no dropout is drawn, and it has to be got anew when weights change.
        """
        gates = self._gates(0)

        def step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
            attentional, state = self._step(self.embedding(tokens), state, gates)
            return self.output(attentional).log_softmax(-1), state

        return step

    def _gates(self, batch: int) -> list[Gates | None]:
        return [layer.gates(batch) for layer in self.layers if isinstance(layer, HLSTMCell)]

    def forward(
        self, tokens: Int[Tensor, "batch target"], state: State
    ) -> Float[Tensor, "batch target subwords"]:
        """Return the scores of what follows each of the given tokens (teacher forcing)."""
        embedded = self.dropout(self.embedding(tokens)).unbind(1)
        said, gates = list[Tensor](), self._gates(len(tokens))
        if self.input_feeding:
            for x in embedded:
                attentional, state = self._step(x, state, gates)
                said.append(attentional)
            return self._scores(torch.stack(said, 1))
        for x in embedded:
            top, cells = self._through_cells(x, state.cells, gates)
            said.append(top)
            state = state._replace(cells=cells)
        return self._scores(self._attend(torch.stack(said, 1), state))

    def _scores(self, attentional: Tensor) -> Tensor:
        scores: Tensor = self.output(attentional)
        return scores

    def _step(
        self, x: Tensor, state: State, gates: list[Gates | None]
    ) -> tuple[Float[Tensor, "batch embedding"], State]:
        if state.fed is not None:
            x = torch.cat([x, state.fed], 1)
        top, cells = self._through_cells(x, state.cells, gates)
        attentional = self._attend(top.unsqueeze(1), state).squeeze(1)
        fed = None if state.fed is None else attentional
        return attentional, state._replace(cells=cells, fed=fed)

    def _through_cells(
        self, x: Tensor, cells: tuple[tuple[Tensor, Tensor], ...], gates: list[Gates | None]
    ) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], ...]]:
        after = []
        for depth, (norm, cell) in enumerate(zip(self.norms, self.layers, strict=True)):
            x, c = cell(self.dropout(norm(x)) if depth else x, cells[depth], gates[depth])
            after.append((x, c))
        return x, tuple(after)

    def _attend(
        self, tops: Float[Tensor, "batch steps hidden"], state: State
    ) -> Float[Tensor, "batch steps embedding"]:
        """Return the attentional vectors: what the decoder says, seen beside what it looks at."""
        scores = torch.bmm(tops, state.keys.transpose(1, 2))
        if state.padding is not None:
            scores = scores.masked_fill(state.padding.unsqueeze(1), -torch.inf)
        context = torch.bmm(scores.softmax(-1), state.memory)
        said: Tensor = self.dropout(torch.tanh(self.combine(torch.cat([context, tops], 2))))
        return said


class Seq2Seq(nn.Module):
    """A translator.

    Args:
        shape: Its recurrent stacks; encoder and decoder have as many layers.
        source_size: Size of the source's vocabulary.
        target_size: Size of the target's vocabulary.

    Raises:
        UserError: The norm is one that a decoder cannot have.
    """

    def __init__(self, shape: Architecture, source_size: int, target_size: int) -> None:
        super().__init__()
        self.encoder = Encoder(shape, source_size)
        self.decoder = Decoder(shape, target_size, self.encoder.output_size)

    def forward(
        self, source: Int[Tensor, "1 source"], longest: Int[Tensor, ""] | None = None
    ) -> Int[Tensor, "1 target"]:
        """Translate one sentence, greedily, to its end or ``longest`` tokens, the end included."""
        state, step = self.start(source), self.decoder.stepper()
        token, said = torch.full_like(source[:, 0], START), []
        for _ in range(LONGEST if longest is None else int(longest)):
            scores, state = step(token, state)
            token = scores.argmax(-1)
            said.append(token)
            if int(token) == END:
                break
        return torch.stack(said, 1)

    def start(
        self, source: Int[Tensor, "batch source"], lengths: Int[Tensor, " batch"] | None = None
    ) -> State:
        """Read the source and return the decoder's state before the first token."""
        memory, cells = self.encoder(source, lengths)
        padding = None if lengths is None else source == PAD
        return self.decoder.start(memory, cells, padding)

    def scores(
        self,
        source: Int[Tensor, "batch source"],
        lengths: Int[Tensor, " batch"],
        target: Int[Tensor, "batch target"],
    ) -> Float[Tensor, "batch target subwords"]:
        """Return the scores of what follows each token of the known translations."""
        following: Tensor = self.decoder(target, self.start(source, lengths))
        return following


def _gates(shape: Architecture) -> dict[str, Any]:
    return {
        "gate_hidden": shape.gate_hidden,
        "activation": shape.activation,
        "gate_dropout": shape.gate_dropout,
        "gate_direct": shape.gate_direct,
        "gate_norm": shape.gate_norm,
    }


def _norm(shape: Architecture, size: int | None) -> nn.Module:
    """Return what stands before a layer of this input size; nothing before the first one."""
    if shape.norm == "batch":
        raise UserError(
            'architecture.norm = "batch" cannot be: a decoder goes step by step; "layer" or "none"'
        )
    return nn.Identity() if size is None or shape.norm == "none" else nn.LayerNorm(size)
