"""Speech recognition on AN4, or on a user's own recordings: a DeepSpeech2-shaped network and CTC.

    log-mel [B, T, 64] -> convolutions -> recurrent layers with norms between -> characters

Between the convolutions and the characters time comes first, as the recurrence takes it.

Source: Amodei et al., "Deep Speech 2" (arXiv 1512.02595); the paper's baseline is its form in
deepspeech.pytorch: five bidirectional LSTM layers of 800, directions summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gpsearch.candidate import Architecture, Training
from gpsearch.cell import HLSTM
from gpsearch.dropout import Dropout
from gpsearch.errors import UserError
from gpsearch.tasks import Split, digest_of, features
from gpsearch.tasks import corpus as corpora
from gpsearch.tasks.ctc import beam_search, greedy

BATCH_SIZE_EVAL = 16  # with 32, a fifth of the frames would be padding
BEAM_WIDTH = 16
_VARIETY = 0.1
"""Duration, and the vocal tract's length, vary by up to this share at strength 1: it did best on
AN4's development split. Without, lengths vary by as much where batches are put together."""


@dataclass(frozen=True)
class Batch:
    """Some utterances, padded."""

    features: Float[Tensor, "batch time mel"]
    lengths: Int[Tensor, " batch"]
    targets: Int[Tensor, " total"]
    """The character numbers of all utterances, one after another; 0 is the blank."""
    target_lengths: Int[Tensor, " batch"]
    kick: bool = False
    """Train against a uniform alignment, which shortens CTC's blank plateau at the start."""


class FrontEnd(nn.Module):
    """Two convolutions that shorten time and make channels of the spectrum.

    Args:
        kind: "light": 16 channels, time / 4, 256 outputs; "deepspeech2": 32 channels, time / 2,
            672 outputs, as in the paper's baseline.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "light":
            self.first = nn.Conv2d(1, 16, 3, stride=2, padding=1)
            self.second = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        else:
            self.first = nn.Conv2d(1, 32, (11, 21), stride=(2, 1), padding=(5, 10))
            self.second = nn.Conv2d(32, 32, (11, 21), stride=(1, 3), padding=(5, 9))
        self.output_size = {"light": 256, "deepspeech2": 672}[kind]

    def forward(
        self, features: Float[Tensor, "batch time mel"], lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "steps batch channels"], Int[Tensor, " batch"] | None]:
        """Return the channels of every step, zero behind an utterance's end, and the steps."""
        # With the channels last, both convolutions take three quarters of their time.
        x = features.unsqueeze(1).to(memory_format=torch.channels_last)
        for convolution in (self.first, self.second):
            x = convolution(x)
            if lengths is not None:
                lengths = (lengths - 1) // convolution.stride[0] + 1
                _clear_padding(x, lengths)
            x = F.hardtanh(x, 0, 20)  # DeepSpeech2's clipped ReLU; `_clear_padding` relies on the 0
        return x.permute(2, 0, 1, 3).flatten(2), lengths


@torch.no_grad()
def _clear_padding(
    x: Float[Tensor, "batch channels steps bands"], lengths: Int[Tensor, " batch"]
) -> None:
    """Make padding look like the zeros that a convolution sees beyond a lone utterance.

    It is done in place and autograd need not know: a convolution does not save what it puts out,
    and the clipped ReLU that follows has no slope at 0.
    """
    if x.is_cpu and not torch._C._is_tracing():  # a mask would take as long as a convolution
        for utterance, steps in zip(x, lengths.tolist(), strict=True):
            utterance[:, steps:] = 0
    else:
        padding = torch.arange(x.shape[2], device=x.device) >= lengths[:, None]
        x.masked_fill_(padding[:, None, :, None], 0)


class SpeechModel(nn.Module):
    """The network of a candidate.

    Args:
        architecture: Its recurrent stack.
        characters: Outputs, the blank included.
    """

    def __init__(self, architecture: Architecture, characters: int) -> None:
        super().__init__()
        self.merge = architecture.merge if architecture.bidirectional else "concat"
        self.front = FrontEnd(architecture.front)
        size = self.front.output_size
        self.norms, self.layers = nn.ModuleList(), nn.ModuleList()
        for _ in range(architecture.layers):
            self.norms.append(_norm(architecture.norm, size))
            layer = HLSTM(
                size,
                architecture.hidden_size,
                batch_first=True,
                bidirectional=architecture.bidirectional,
                gate_hidden=architecture.gate_hidden,
                activation=architecture.activation,
                gate_dropout=architecture.gate_dropout,
                gate_direct=architecture.gate_direct,
                gate_norm=architecture.gate_norm,
            )
            self.layers.append(layer)
            joined = 1 + (architecture.bidirectional and self.merge == "concat")
            size = architecture.hidden_size * joined
        self.last_norm = _norm(architecture.norm, size)
        self.dropout = Dropout(architecture.dropout)
        self.output = nn.Linear(size, characters)

    def forward(
        self,
        features: Float[Tensor, "batch time mel"],
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch steps characters"], Int[Tensor, " batch"] | None]:
        """Return the characters' log-probabilities at every step, and each utterance's steps."""
        x, lengths = self.front(features, lengths)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            # Views: the layers of saved models want the batch first, their recurrence time.
            x = layer(self.dropout(norm(x)).transpose(0, 1), lengths=lengths)[0].transpose(0, 1)
            if self.merge == "sum":
                forward, backward = x.chunk(2, dim=-1)
                x = forward + backward
        scores = self.output(self.dropout(self.last_norm(x))).log_softmax(-1)
        return scores.transpose(0, 1), lengths

    def compaction_chain(self) -> list[str]:
        """Name what the recurrent layers' units pass through (see `gpsearch.compact.Chained`)."""
        between = [f"{kind}.{i}" for i in range(len(self.layers)) for kind in ("norms", "layers")]
        return [*between, "last_norm", "output"]


class SequenceBatchNorm(nn.BatchNorm1d):
    """Batch norm over time and batch together, as between DeepSpeech2's layers."""

    def forward(self, x: Float[Tensor, "time batch size"]) -> Float[Tensor, "time batch size"]:
        """Normalise every feature over all frames of the batch."""
        return super().forward(x.flatten(0, 1)).view_as(x)


def _norm(kind: str, size: int) -> nn.Module:
    kinds: dict[str, type[nn.Module]] = {
        "layer": nn.LayerNorm,
        "batch": SequenceBatchNorm,
        "none": nn.Identity,
    }
    return kinds[kind](size)


class SpeechTask:
    """Characters from speech; the error is the greedy word error rate without a lexicon.

    Args:
        data: A folder of recordings (see `gpsearch.tasks.corpus.load`); None is the AN4 of the
            package.
    """

    name = "speech"
    metric = "wer"
    paper_space = "deepspeech2"

    def __init__(self, data: Path | None = None) -> None:
        self.corpus = corpora.load_an4() if data is None else corpora.load(data)
        self.alphabet = self.corpus.alphabet
        self.digest = digest_of((u.id, u.split, u.text) for u in self.corpus.utterances)
        self.notes = self.corpus.notes

    def build(self, architecture: Architecture) -> SpeechModel:
        """Return a fresh network of this shape."""
        return SpeechModel(architecture, len(self.alphabet))

    def prunable(self, name: str) -> bool:
        """Let grow-and-prune touch the recurrent layers, where nearly all weights are."""
        return name.startswith("layers.")

    def batches(self, training: Training, epoch: int, seed: int) -> Iterator[Batch]:
        """Yield augmented batches of utterances of like length, in random order."""
        random = torch.Generator().manual_seed(hash((seed, epoch)) % 2**63)
        utterances, strength = self.corpus.split("train"), training.augment
        # Every epoch an utterance has other neighbours: stretching sees to that, or else luck does.
        stretch, luck = (torch.rand(len(utterances), generator=random) for _ in range(2))
        stretch = 1 + _VARIETY * strength * (2 * stretch - 1)
        luck = 1 + _VARIETY * max(0.0, 1 - strength) * luck
        order = (torch.tensor([len(u.levels) for u in utterances]) * stretch * luck).argsort()
        size = training.batch_size
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        for index in torch.randperm(len(groups), generator=random).tolist():
            group = groups[index]
            yield self._batch(
                [utterances[i] for i in group.tolist()],
                partial(_augmented, stretch=stretch[group], strength=strength, random=random),
                kick=epoch < training.kick_epochs,
            )

    def _batch(
        self,
        utterances: Sequence[corpora.Utterance],
        augmented: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda *batch: batch,
        *,
        kick: bool = False,
    ) -> Batch:
        lengths = torch.tensor([len(u.levels) for u in utterances])
        levels = pad_sequence([u.levels for u in utterances], batch_first=True)
        frames, lengths = augmented(features.normalise(levels, lengths), lengths)
        for one, end in zip(frames, lengths.tolist(), strict=True):
            one[end:] = 0
        targets = [self.corpus.encode(u.text) for u in utterances]
        return Batch(
            frames,
            lengths,
            torch.cat(targets),
            torch.tensor([len(t) for t in targets]),
            kick,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return CTC's loss per utterance, or in a kick epoch the uniform alignment's."""
        device = next(model.parameters()).device
        scores, steps = model(batch.features.to(device), batch.lengths.to(device))
        if batch.kick:
            return _uniform_alignment_loss(scores, steps, batch)
        return F.ctc_loss(
            scores.transpose(0, 1), batch.targets.to(device), steps, batch.target_lengths,
            reduction="sum", zero_infinity=True,
        ) / len(batch.lengths)  # fmt: skip

    def evaluate(self, model: nn.Module, split: Split = "dev") -> dict[str, float]:
        """Return word and character error rates (fractions) of greedy decoding.

        The test split is scored by a beam search as well (wer_beam).
        """
        import jiwer

        utterances, heard = self.transcribe(model, split)
        truth = [utterance.text for utterance in utterances]
        rates = {"wer": jiwer.wer(truth, heard), "cer": jiwer.cer(truth, heard)}
        if split == "test":
            _, better = self.transcribe(model, split, beam_width=BEAM_WIDTH)
            rates["wer_beam"] = jiwer.wer(truth, better)
        return rates

    @torch.inference_mode()
    def transcribe(
        self, model: nn.Module, split: Split = "dev", *, beam_width: int = 0
    ) -> tuple[list[corpora.Utterance], list[str]]:
        """Return a split's utterances, shortest first, and what the model hears in them.

        Decoding is greedy, or a prefix beam search of ``beam_width`` if that is above 0.
        """
        model.eval()
        device = next(model.parameters()).device
        utterances = sorted(self.corpus.split(split), key=lambda u: len(u.levels))
        heard: list[str] = []
        for start in range(0, len(utterances), BATCH_SIZE_EVAL):
            batch = self._batch(utterances[start : start + BATCH_SIZE_EVAL])
            scores, steps = model(batch.features.to(device), batch.lengths.to(device))
            if beam_width:
                heard += [
                    beam_search(row[:count], self.alphabet, width=beam_width)
                    for row, count in zip(scores.cpu(), steps.tolist(), strict=True)
                ]
            else:
                heard += greedy(scores.cpu(), steps.cpu(), self.alphabet)
        return utterances, heard

    def show(self, model: nn.Module, split: Split = "dev", n: int = 5) -> list[str]:
        """Return ``n`` utterances of a split, spread over all lengths: what is said and heard."""
        utterances, heard = self.transcribe(model, split)
        places = [i * len(heard) // n for i in range(min(n, len(heard)))]
        return [f"said   {utterances[i].text}\nheard  {heard[i]}" for i in places]

    def example(self) -> tuple[Tensor, ...]:
        """Return one development utterance of median length, [1, T, 64]."""
        utterances = sorted(self.corpus.split("dev"), key=lambda u: (len(u.levels), u.id))
        if not utterances:
            raise UserError("the development split is empty")
        return (utterances[len(utterances) // 2].features[None],)


def _augmented(
    frames: Float[Tensor, "batch _frames mel"],
    lengths: Int[Tensor, " batch"],
    *,
    stretch: Float[Tensor, " batch"],
    strength: float,
    random: torch.Generator,
) -> tuple[Float[Tensor, "batch _frames_out mel"], Int[Tensor, " batch"]]:
    """Perturb duration and vocal tract and hide some of each utterance."""
    if strength == 0:
        return frames, lengths
    frames, lengths = features.stretch(frames, lengths, stretch)
    tracts = 1 + _VARIETY * strength * (2 * torch.rand(len(frames), generator=random) - 1)
    longest, widest = round(12 * strength), min(round(8 * strength), 32)
    warped = features.vtlp(frames, tracts)
    return features.mask(warped, lengths, random, longest=longest, widest=widest), lengths


def _uniform_alignment_loss(
    scores: Float[Tensor, "batch steps characters"], steps: Int[Tensor, " batch"], batch: Batch
) -> Tensor:
    """Cross-entropy against each text spread evenly over its utterance's steps."""
    total = scores.new_zeros(())
    for row, text in enumerate(
        torch.split_with_sizes(batch.targets, batch.target_lengths.tolist())
    ):
        count = int(steps[row])
        spread = text[torch.arange(count) * len(text) // count].to(scores.device)
        total = total + F.nll_loss(scores[row, :count], spread, reduction="sum")
    return total / len(batch.lengths)
