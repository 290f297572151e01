"""A caption decoder: an image, then word after word, through LSTMs or H-LSTMs.

    features [B, D] -> embedding, the input of step 0
    tokens [B, T]   -> embeddings, the inputs after it -> recurrent layers -> words

Source: Vinyals et al., "Show and Tell" (arXiv 1411.4555), as in Karpathy's NeuralTalk: one layer
of 512 on embeddings of 512.
"""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gpsearch.candidate import Architecture
from gpsearch.cell import HLSTM
from gpsearch.dropout import Dropout
from gpsearch.errors import UserError
from gpsearch.tasks import beam

BOUNDARY = 0
"""The token that every caption begins and ends with."""
State = tuple[tuple[Tensor, Tensor], ...]
"""h and c of every layer, [B, H]."""


class NeuralTalk(nn.Module):
    """The network of a candidate.

    Args:
        shape: Its recurrent stack. A decoder reads forward only, so `bidirectional` and `merge` do
            not matter.
        features: Size of an image's features.
        vocabulary: Tokens, the `BOUNDARY` included.
        longest: Most words of a caption.

    Raises:
        UserError: The norm is one that a decoder cannot have.
    """

    scale: Tensor

    def __init__(self, shape: Architecture, features: int, vocabulary: int, longest: int) -> None:
        super().__init__()
        self.longest, self.beam_width, size = longest, 1, shape.embedding_size
        self.register_buffer("scale", torch.ones(()))
        self.image = nn.Linear(features, size)
        self.words = nn.Embedding(vocabulary, size)
        self.dropout = Dropout(shape.dropout)
        self.norms, self.layers = nn.ModuleList(), nn.ModuleList()
        for _ in range(shape.layers):
            self.norms.append(_norm(shape, size))
            self.layers.append(_layer(shape, size))
            size = shape.hidden_size
        self.last_norm = _norm(shape, size)
        self.output = nn.Linear(size, vocabulary)

    @torch.no_grad()
    def forward(
        self, features: Float[Tensor, "batch size"], words: Int[Tensor, ""] | None = None
    ) -> Int[Tensor, "batch words"]:
        """Caption images, by a beam of `beam_width`; greedily where that is 1.

        Args:
            features: Of the images.
            words: Say exactly so many tokens, ends like any other, so that networks can be
                compared by the same work; None goes on to the captions' ends.

        Returns:
            The tokens, `BOUNDARY` from a caption's end on.
        """
        said, _ = beam.search(
            self.step, self.start(features), batch=len(features), start=BOUNDARY,
            end=BOUNDARY if words is None else -1,
            longest=self.longest + 1 if words is None else int(words),
            width=self.beam_width, device=features.device,
        )  # fmt: skip
        rows = [torch.tensor(one, dtype=torch.long) for one in said]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=BOUNDARY)
        return padded.to(features.device)

    def scores(
        self, features: Float[Tensor, "batch size"], tokens: Int[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time vocabulary"]:
        """Return the scores of what follows each token of known captions (teacher forcing)."""
        x = torch.cat([self._seen(features).unsqueeze(1), self.words(tokens)], 1)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x, _ = layer(self.dropout(norm(x)))
        scores: Tensor = self.output(self.dropout(self.last_norm(x[:, 1:])))
        return scores

    def start(self, features: Float[Tensor, "batch size"]) -> State:
        """Return the state after the image, before the first token."""
        zeros = features.new_zeros
        empty = tuple(
            (
                zeros(len(features), int(layer.hidden_size)),
                zeros(len(features), int(layer.hidden_size)),
            )
            for layer in cast("list[HLSTM]", list(self.layers))
        )
        return self._through_layers(self._seen(features), empty)[1]

    def step(
        self, tokens: Int[Tensor, " batch"], state: State
    ) -> tuple[Float[Tensor, "batch vocabulary"], State]:
        """Return the next tokens' log-probabilities, and the state after ``tokens``."""
        x, state = self._through_layers(self.words(tokens), state)
        return self.output(self.dropout(self.last_norm(x))).log_softmax(-1), state

    def _seen(self, features: Float[Tensor, "batch size"]) -> Float[Tensor, "batch embedding"]:
        seen: Tensor = self.image(self.dropout(features * self.scale))
        return seen

    def _through_layers(
        self, x: Float[Tensor, "batch embedding"], state: State
    ) -> tuple[Float[Tensor, "batch hidden"], State]:
        after = []
        for norm, layer, (h, c) in zip(self.norms, self.layers, state, strict=True):
            y, (h, c) = layer(self.dropout(norm(x)).unsqueeze(1), (h[None], c[None]))
            x = y.squeeze(1)
            after.append((h[0], c[0]))
        return x, tuple(after)

    def compaction_chain(self) -> list[str]:
        """Name what the recurrent layers' units pass through (see `gpsearch.compact.Chained`)."""
        between = [f"{kind}.{i}" for i in range(len(self.layers)) for kind in ("norms", "layers")]
        return [*between[1:], "last_norm", "output"]


def _norm(shape: Architecture, size: int) -> nn.Module:
    if shape.norm == "batch":
        raise UserError(
            'architecture.norm = "batch" cannot be: a decoder goes word by word; "layer" or "none"'
        )
    return nn.LayerNorm(size) if shape.norm == "layer" else nn.Identity()


def _layer(shape: Architecture, size: int) -> HLSTM:
    return HLSTM(
        size,
        shape.hidden_size,
        batch_first=True,
        gate_hidden=shape.gate_hidden,
        activation=shape.activation,
        gate_dropout=shape.gate_dropout,
        gate_direct=shape.gate_direct,
        gate_norm=shape.gate_norm,
    )
