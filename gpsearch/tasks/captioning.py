"""Captions of images: a user's own images and features, NeuralTalk's decoder, CIDEr-D."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gpsearch.candidate import Architecture, Training
from gpsearch.tasks import Split, beam, caption_corpus, cider, digest_of, image_features
from gpsearch.tasks.captions import Caption, Image
from gpsearch.tasks.neuraltalk import BOUNDARY, NeuralTalk

BATCH_SIZE_EVAL = 100
BEAM_WIDTH = 2
"""As in the paper's tables; for the test split, beside the greedy captions."""
COVERED = 0.99
"""Share of the training captions that are no longer than the longest that a network may write."""
NO_TARGET = -100


@dataclass(frozen=True)
class Batch:
    """Images with a caption each, padded."""

    features: Float[Tensor, "batch size"]
    tokens: Int[Tensor, "batch time"]
    """From the boundary on."""
    following: Int[Tensor, "batch time"]
    """What follows each token, to the boundary; `NO_TARGET` behind it."""
    label_smoothing: float = 0.0


class CaptioningTask:
    """Captions of images; the metric is CIDEr-D of greedy decoding. Wants --data.

    What is minimised is 1 / (1 + CIDEr-D): 1 for captions that share nothing with people's, 0.69
    at 0.45, and never below 0, as 1 - CIDEr-D would be for the best of COCO.

    Args:
        data: Captions and features (see `gpsearch.tasks.caption_corpus.load`).
    """

    name = "captioning"
    metric = "cider_d"
    unit = ""
    space = "captioning"
    paper_space = "neuraltalk"
    signatures: dict[str, str] = {"cider_d": cider.SIGNATURE}  # noqa: RUF012 - read only

    def __init__(self, data: Path | None = None) -> None:
        cider.scorers()  # what is missing at the first evaluation would cost an epoch
        self.corpus = caption_corpus.load(data)
        self.notes = self.corpus.notes
        features = image_features.digest(self.corpus.features)
        self.digest = digest_of([*self.corpus.images, features])
        self.older_digests = (digest_of(self.corpus.images),)
        train = self.corpus.split("train")
        lengths = sorted(len(caption) for image in train for caption in image.captions)
        self.longest = lengths[int(COVERED * (len(lengths) - 1))]
        self.usual = lengths[len(lengths) // 2]
        self._scale = self.corpus.features_of(train).square().mean().rsqrt()

    def build(self, architecture: Architecture) -> NeuralTalk:
        """Return a fresh network of this shape."""
        size, words = self.corpus.features.shape[1], len(self.corpus.vocabulary)
        model = NeuralTalk(architecture, size, words, self.longest)
        model.scale.copy_(self._scale)
        return model

    def prunable(self, name: str) -> bool:
        """Let grow-and-prune touch the recurrent layers."""
        return name.startswith("layers.")

    def embeds(self, name: str) -> bool:
        """Say which weights are embeddings and output layer."""
        return name.endswith("weight") and name.startswith(("image.", "words.", "output."))

    def batches(self, training: Training, epoch: int, seed: int) -> Iterator[Batch]:
        """Yield every training image once, with one of its captions, another in every epoch.

        Captions in a batch are of like length; the batches come in random order.
        """
        images = self.corpus.split("train")
        random = torch.Generator().manual_seed(hash((seed, epoch)) % 2**63)
        chosen = [self._caption(image, place, epoch, seed) for place, image in enumerate(images)]
        lengths = torch.tensor([float(len(caption)) for caption in chosen])
        order = (lengths + torch.rand(len(lengths), generator=random)).argsort()
        groups = torch.split(order, training.batch_size)
        for group in torch.randperm(len(groups), generator=random).tolist():
            places = groups[group].tolist()
            yield self._batch(
                [images[i] for i in places], [chosen[i] for i in places], training.label_smoothing
            )

    def _caption(self, image: Image, place: int, epoch: int, seed: int) -> Caption:
        """Choose a caption: in as many epochs as an image has captions, each comes once."""
        count = len(image.captions)
        random = torch.Generator().manual_seed(hash((seed, place, epoch // count)) % 2**63)
        return image.captions[int(torch.randperm(count, generator=random)[epoch % count])]

    def _batch(
        self, images: Sequence[Image], captions: Sequence[Caption], label_smoothing: float
    ) -> Batch:
        tokens = [torch.tensor([BOUNDARY, *self.corpus.encode(one), BOUNDARY]) for one in captions]
        return Batch(
            self.corpus.features_of(images),
            pad_sequence([one[:-1] for one in tokens], batch_first=True, padding_value=BOUNDARY),
            pad_sequence([one[1:] for one in tokens], batch_first=True, padding_value=NO_TARGET),
            label_smoothing,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of a word."""
        device = next(model.parameters()).device
        scores = model.scores(batch.features.to(device), batch.tokens.to(device))  # type: ignore[operator]
        return F.cross_entropy(
            scores.flatten(0, 1), batch.following.to(device).flatten(), ignore_index=NO_TARGET,
            label_smoothing=batch.label_smoothing,
        )  # fmt: skip

    def evaluate(self, model: nn.Module, split: Split = "dev") -> dict[str, float]:
        """Return CIDEr-D, BLEU-1 to 4, and the error 1 / (1 + CIDEr-D), of greedy captions.

        The test split is captioned by a beam of `BEAM_WIDTH`, too (cider_d_beam, bleu_1_beam...).
        """
        metrics = self._scores(model, split, 1)
        metrics["error"] = 1 / (1 + metrics["cider_d"])
        if split == "test":
            better = self._scores(model, split, BEAM_WIDTH)
            metrics |= {f"{name}_beam": value for name, value in better.items()}
        return metrics

    def _scores(self, model: nn.Module, split: Split, beam_width: int) -> dict[str, float]:
        said = self.caption(model, split, beam_width=beam_width)
        images = self.corpus.split(split)
        return cider.scores(said, [[" ".join(c) for c in image.captions] for image in images])

    @torch.inference_mode()
    def caption(
        self,
        model: nn.Module,
        split: Split = "dev",
        *,
        beam_width: int = 1,
        n: int | None = None,
    ) -> list[str]:
        """Return the captions of a split's images, of the first ``n`` only if that is given."""
        model.eval()
        images, device = self.corpus.split(split)[:n], next(model.parameters()).device
        said: list[list[int]] = []
        for start in range(0, len(images), BATCH_SIZE_EVAL):
            features = self.corpus.features_of(images[start : start + BATCH_SIZE_EVAL])
            tokens, _ = beam.search(
                model.step, model.start(features.to(device)),  # type: ignore[operator,arg-type]
                batch=len(features), start=BOUNDARY, end=BOUNDARY, longest=self.longest + 1,
                width=beam_width, device=device,
            )  # fmt: skip
            said += tokens
        return [self.corpus.decode(tokens) for tokens in said]

    def show(self, model: nn.Module, split: Split = "dev", n: int = 5) -> list[str]:
        """Return a split's first ``n`` images, what people wrote of them, and what the model does.

        The captions are those of a beam of `BEAM_WIDTH`.
        """
        said = self.caption(model, split, beam_width=BEAM_WIDTH, n=n)
        return [
            "\n".join(
                [
                    f"image      {image.name}",
                    *(f"reference  {' '.join(caption)}" for caption in image.captions),
                    f"model      {caption}",
                ]
            )
            for image, caption in zip(self.corpus.split(split)[:n], said, strict=True)
        ]

    def example(self) -> tuple[Tensor, ...]:
        """Return a development image, [1, D], and how many tokens to say of it.

        It is the usual caption's length, the end included: networks that are more or less brief,
        and the untrained one that latencies are compared with, do the same work.
        """
        images = sorted(self.corpus.split("dev"), key=lambda image: image.name)
        middle = images[len(images) // 2]
        return self.corpus.features_of([middle]), torch.tensor(self.usual + 1)
