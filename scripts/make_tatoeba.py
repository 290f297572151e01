"""Make the package's sentence pairs from Tatoeba's German-English ones.

    python scripts/make_tatoeba.py PATH/TO/deu-eng.zip

The file comes from www.manythings.org/anki. Kept are the pairs whose English has so few words that
two cores learn them in minutes, and of those a part that depends on nothing but the English.
"""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

from gpsearch.files import write_text
from gpsearch.tasks import bitext

DATA = Path(__file__).resolve().parent.parent / "gpsearch" / "tasks" / "data"
WORDS = range(3, 7)
"""Words of the English sentence."""
SHARE = 0.14
"""Of the English sentences of that length; each comes with all its translations."""


def main(path: Path, data: Path = DATA) -> None:
    """Write the pairs into ``data``, in the order of the original."""
    with zipfile.ZipFile(path) as archive:
        rows = bitext.lines(str(path), archive.read("deu.txt"))
    kept = [row.text for row in rows if is_kept(row.text.split("\t")[0])]
    write_text(data / bitext.TATOEBA, "".join(f"{row}\n" for row in kept))
    size = (data / bitext.TATOEBA).stat().st_size
    print(f"{data / bitext.TATOEBA}: {len(kept):,} pairs, {size:,} bytes")


def is_kept(english: str) -> bool:
    """Say whether the pairs of this English sentence are kept."""
    # Not the number that `bitext.split_of` goes by, or the splits would have other shares.
    number = int(hashlib.md5(english.encode(), usedforsecurity=False).hexdigest()[:8], 16)
    return len(english.split()) in WORDS and number < SHARE * 2**32


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
