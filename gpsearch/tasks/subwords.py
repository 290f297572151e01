"""Sub-words of one language, learned by SentencePiece from its training sentences."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterable, Sequence

PAD, UNKNOWN, START, END = range(4)
FEWEST_OTHERS = 8
"""The special tokens, and room for what marks the beginning of a word."""
LONGEST_BYTES = 20_000
"""Of a sentence that is learnt from: `bitext.LONGEST` characters of four bytes."""


class Subwords:
    """A vocabulary of sub-words, and the way from text to their numbers and back.

    Args:
        model: A SentencePiece model with the special tokens of this module.
    """

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def learn(cls, sentences: Iterable[str], size: int, *, exact: bool = False) -> Subwords:
        """Learn at most ``size`` sub-words, the special tokens and every common letter included.

        Where a script has more letters than half of that, there are as many more.

        The same sentences give the same vocabulary, on any number of processors.

        Args:
            sentences: What is learnt from.
            size: Of the vocabulary.
            exact: Whether letters come back as they were written, for what is compared with
                references. Otherwise like letters are one (by NFKC, with "1ᵉʳ" as "1er"), which
                leaves fewer to learn.

        Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units"
        (arXiv 1508.07909): byte-pair encoding.
        """
        import sentencepiece

        sentences, model = [_spaced(one) for one in sentences], io.BytesIO()
        text = "".join(sentences)
        letters = len(set(text if exact else unicodedata.normalize("NFKC", text)))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, model_type="bpe",
            vocab_size=max(size, size // 2 + letters + FEWEST_OTHERS), hard_vocab_limit=False,
            num_threads=1, minloglevel=2, pad_id=PAD, unk_id=UNKNOWN, bos_id=START, eos_id=END,
            normalization_rule_name="identity" if exact else "nmt_nfkc",
            max_sentence_length=LONGEST_BYTES,
        )  # fmt: skip
        return cls(model.getvalue())

    def __len__(self) -> int:
        """Return the number of sub-words, special tokens included."""
        return int(self._processor.get_piece_size())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the sub-words of every text, without start or end."""
        numbers: list[list[int]] = self._processor.encode([_spaced(one) for one in texts])
        return numbers

    def decode(self, numbers: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of sub-words; special tokens say nothing, but for "⁇", the unknown."""
        texts: list[str] = self._processor.decode([list(one) for one in numbers])
        return texts


def _spaced(text: str) -> str:
    """Return a text with one plain space for whatever is space, SentencePiece's U+2581 as well.

    BLEU splits at all of them alike.
    """
    return " ".join(text.replace("\u2581", " ").split())
