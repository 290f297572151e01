"""Make the package's AN4 from the raw corpus.

    python scripts/make_an4.py PATH/TO/an4

PATH is the folder of the original (it holds `etc` and `wav`), as unpacked from `an4.tar.gz`. The
features are the same on every machine; the packed bytes too, with the same version of zlib.
"""

from __future__ import annotations

import csv
import hashlib
import io
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from gpsearch.files import write_atomically, write_text
from gpsearch.tasks import corpus, packing

DATA = Path(__file__).resolve().parent.parent / "gpsearch" / "tasks" / "data"


def main(folder: Path, data: Path = DATA) -> None:
    """Write the index, the packed levels and their checksums into ``data``."""
    with tempfile.TemporaryDirectory() as cache:
        an4 = corpus.load(folder, Path(cache))
    levels = torch.cat([utterance.levels for utterance in an4.utterances]).numpy()
    contents = {corpus.AN4_INDEX: index(an4), corpus.AN4_LEVELS: packing.pack(levels)}
    for name, content in contents.items():
        write_atomically(data / name, partial(Path.write_bytes, data=content))
        print(f"{data / name}: {len(content):,} bytes")
    sums = (
        f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items()
    )
    write_text(data / corpus.AN4_CHECKSUMS, "".join(sums))


def index(an4: corpus.Corpus) -> bytes:
    """Return a CSV line for each utterance; dev is part of train, as AN4 is given out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("id", "speaker", "split", "frames", "text"))
    for u in an4.utterances:
        split = "test" if u.split == "test" else "train"
        writer.writerow((u.id, u.speaker, split, len(u.levels), u.text))
    return text.getvalue().encode()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
