"""Translation of sentences: sub-words, an attentional encoder-decoder, BLEU."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gpsearch.candidate import Architecture, Training
from gpsearch.errors import UserError
from gpsearch.tasks import Split, beam, digest_of
from gpsearch.tasks.bitext import Bitext, load, looks_tokenised
from gpsearch.tasks.bleu import bleu, tokeniser_of
from gpsearch.tasks.seq2seq import LONGEST, Seq2Seq
from gpsearch.tasks.subwords import END, PAD, START, Subwords

BATCH_SIZE_EVAL = 64
BEAM_WIDTH = 5
PAIRS_PER_SUBWORD, FEWEST, MOST = 8, 500, 8_000
"""The size of each language's vocabulary goes by the size of the corpus."""
_WERE_SPACES = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060\ufeff\ufffd]")
_WAS_LONGEST = 4192
"""Bytes of a sentence that sub-words were learnt from."""


class Example(NamedTuple):
    """A pair in sub-words, the target without start and end."""

    source: list[int]
    target: list[int]


@dataclass(frozen=True)
class Batch:
    """Some pairs, padded."""

    source: Int[Tensor, "batch source"]
    lengths: Int[Tensor, " batch"]
    """Sub-words of each source."""
    target: Int[Tensor, "batch target"]
    """From the start on."""
    following: Int[Tensor, "batch target"]
    """What follows each sub-word of the target, to the end."""
    label_smoothing: float = 0.0


class TranslationTask:
    """Sentences into another language; the metric is BLEU of greedy decoding.

    Args:
        data: A parallel corpus (see `gpsearch.tasks.bitext.load`); None is a part of Tatoeba's
            German-English in the package.
    """

    name = "translation"
    metric = "bleu"
    space = "translation"
    paper_space = "seq2seq"

    def __init__(self, data: Path | None = None) -> None:
        self.corpus: Bitext = load(data)
        pairs = self.corpus.splits["train"]
        size = min(max(len(pairs) // PAIRS_PER_SUBWORD, FEWEST), MOST)
        sources, targets = zip(*pairs, strict=True)
        self.vocabularies = Subwords.learn(sources, size), Subwords.learn(targets, size, exact=True)
        self.examples = {split: self._encode(split) for split in self.corpus.splits}
        self.tokenised = {
            split: looks_tokenised(pair.target for pair in pairs)
            for split, pairs in self.corpus.splits.items()
        }
        self.tokeniser = tokeniser_of(
            pair.target for pairs in self.corpus.splits.values() for pair in pairs
        )
        self.digest = digest_of([*self.corpus.splits.items(), *self._otherwise(sources, targets)])
        self.signatures: dict[str, str] = {}
        """How each metric was computed, once it was."""
        self.notes = (*self.corpus.notes, *self._leave_out_long(data), *self._about_tokens())

    def _otherwise(self, sources: Sequence[str], targets: Sequence[str]) -> Iterator[str]:
        """Say what older versions took otherwise: models of theirs know other sub-words."""
        exact = any(
            unicodedata.normalize("NFKC", text) != text or _WERE_SPACES.search(text)
            for text in targets
        )
        both = (*sources, *targets)
        if exact or any("\u2581" in text or len(text.encode()) > _WAS_LONGEST for text in both):
            yield "exact"
        if self.tokeniser != "13a":
            yield self.tokeniser

    def _encode(self, split: Split) -> list[Example]:
        sides = zip(*self.corpus.splits[split], strict=True)
        coded = (v.encode(side) for v, side in zip(self.vocabularies, sides, strict=True))
        return [Example(*pair) for pair in zip(*coded, strict=True)]

    def _leave_out_long(self, data: Path | None) -> Iterator[str]:
        """Train on no pair with a side that decoding would cut.

        Raises:
            UserError: No pair is left.
        """
        pairs = self.examples["train"]
        short = [max(map(len, pair)) < LONGEST for pair in pairs]
        if not any(short):
            raise UserError(
                f"--data {data}: all {len(pairs):,} training pairs have {LONGEST} or more "
                "sub-words on a side; a line should be one sentence"
            )
        if not all(short):
            yield (
                f"{short.count(False):,} of {len(pairs):,} training pairs left out: {LONGEST} "
                f"or more sub-words; the first is pair {short.index(False) + 1:,}"
            )
        self.examples["train"] = list(compress(pairs, short))
        self.corpus.splits["train"] = list(compress(self.corpus.splits["train"], short))

    def _about_tokens(self) -> Iterator[str]:
        if self.tokeniser != "13a":
            yield f"BLEU by sacrebleu's tokeniser {self.tokeniser}, after the references' script"
        if named := [split for split, tokenised in self.tokenised.items() if tokenised]:
            yield (
                f"tokenised text ({', '.join(named)}): where it is judged, BLEU is of what Moses' "
                "detokeniser makes of it"
            )

    def build(self, architecture: Architecture) -> Seq2Seq:
        """Return a fresh network of this shape."""
        return Seq2Seq(architecture, *map(len, self.vocabularies))

    def prunable(self, name: str) -> bool:
        """Let grow-and-prune touch the recurrent layers."""
        return name.startswith(("encoder.layers.", "decoder.layers."))

    def embeds(self, name: str) -> bool:
        """Name what else may be pruned when the schedule says so; the output layer is tied."""
        return name in ("encoder.embedding.weight", "decoder.embedding.weight")

    def batches(self, training: Training, epoch: int, seed: int) -> Iterator[Batch]:
        """Yield batches of pairs of like length, in random order."""
        random = torch.Generator().manual_seed(hash((seed, epoch)) % 2**63)
        pairs = self.examples["train"]
        noise = torch.rand(len(pairs), generator=random).tolist()
        order = sorted(
            range(len(pairs)), key=lambda i: (len(pairs[i].target), len(pairs[i].source) + noise[i])
        )
        groups = list(_groups([pairs[i] for i in order], training))
        for index in torch.randperm(len(groups), generator=random).tolist():
            yield _batch(groups[index], training.label_smoothing)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of a sub-word given those before it."""
        assert isinstance(model, Seq2Seq)
        device = next(model.parameters()).device
        scores = model.scores(
            batch.source.to(device), batch.lengths.to(device), batch.target.to(device)
        )
        return F.cross_entropy(
            scores.flatten(0, 1), batch.following.to(device).flatten(), ignore_index=PAD,
            label_smoothing=batch.label_smoothing,
        )  # fmt: skip

    def evaluate(self, model: nn.Module, split: Split = "dev") -> dict[str, float]:
        """Return BLEU scores of greedy decoding (see `gpsearch.tasks.bleu`), and the error.

        The test split is scored with a beam search as well (bleu_beam).
        """
        scores, self.signatures = self._score(self.translate(model, split), split)
        if split == "test":
            found, _ = self._score(self.translate(model, split, beam_width=BEAM_WIDTH), split)
            scores |= {f"{name}_beam": value for name, value in found.items()}
        return scores | {"error": 1 - scores[self.metric]}

    def _score(
        self, translations: Sequence[str], split: Split
    ) -> tuple[dict[str, float], dict[str, str]]:
        references = [pair.target for pair in self.corpus.splits[split]]
        return bleu(
            translations, references, language=self.corpus.languages[1],
            tokenised=self.tokenised[split], tokeniser=self.tokeniser,
        )  # fmt: skip

    @torch.inference_mode()
    def translate(
        self, model: nn.Module, split: Split = "dev", *, n: int | None = None, beam_width: int = 1
    ) -> list[str]:
        """Return the translations of a split's first ``n`` sentences, of all if it is None.

        Decoding is greedy, or a beam search of ``beam_width`` if that is above 1.
        """
        assert isinstance(model, Seq2Seq)
        model.eval()
        sources = [torch.tensor(e.source, dtype=torch.long) for e in self.examples[split][:n]]
        order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
        said: dict[int, list[int]] = {}
        for start in range(0, len(order), BATCH_SIZE_EVAL):
            places = order[start : start + BATCH_SIZE_EVAL]
            found = _decode(model, [sources[i] for i in places], beam_width)
            said |= dict(zip(places, found, strict=True))
        return self.vocabularies[1].decode([said[i] for i in range(len(sources))])

    def show(self, model: nn.Module, split: Split = "dev", n: int = 5) -> list[str]:
        """Return a split's first ``n`` sentences beside what the model makes of them."""
        translations = self.translate(model, split, n=n)
        pairs = self.corpus.splits[split][:n]
        return [
            f"source     {pair.source}\nreference  {pair.target}\nmodel      {said}"
            for pair, said in zip(pairs, translations, strict=True)
        ]

    def example(self) -> tuple[Tensor, ...]:
        """Return the development sentence of median length, and its translation's length.

        A network that never says the end would count for as long as decoding lasts, and the
        untrained one that latencies are compared with is such: the sentence ends, at the latest,
        where its reference does.
        """
        pairs = sorted(self.examples["dev"], key=lambda e: (len(e.source), len(e.target), e))
        middle = pairs[len(pairs) // 2]
        return torch.tensor([middle.source]), torch.tensor(len(middle.target) + 1)


def _decode(model: Seq2Seq, sources: list[Tensor], width: int) -> list[list[int]]:
    device = next(model.parameters()).device
    lengths = torch.tensor([len(one) for one in sources], device=device)
    source = pad_sequence(sources, batch_first=True, padding_value=PAD).to(device)
    tokens, _ = beam.search(
        model.decoder.stepper(), model.start(source, lengths), batch=len(sources), start=START,
        end=END, longest=LONGEST, width=width, device=device,
    )  # fmt: skip
    return tokens


def _groups(pairs: Sequence[Example], training: Training) -> Iterator[list[Example]]:
    """Split pairs, sorted by length, into groups of `batch_tokens` on the longer side."""
    group: list[Example] = []
    longest = 0
    for pair in pairs:
        longer = max(longest, len(pair.source), len(pair.target) + 1)
        size = len(group) + 1
        full = (
            size * longer > training.batch_tokens
            if training.batch_tokens
            else size > training.batch_size
        )
        if full and group:
            yield group
            group, longer = [], max(len(pair.source), len(pair.target) + 1)
        group.append(pair)
        longest = longer
    if group:
        yield group


def _batch(pairs: list[Example], label_smoothing: float) -> Batch:
    def padded(rows: list[list[int]]) -> Tensor:
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=PAD)

    return Batch(
        padded([pair.source for pair in pairs]),
        torch.tensor([len(pair.source) for pair in pairs]),
        padded([[START, *pair.target] for pair in pairs]),
        padded([[*pair.target, END] for pair in pairs]),
        label_smoothing,
    )
