"""One thread for every test process: many tiny products only wait for one another in more.

And locks of its own, so that it waits for no study at work on this machine.
"""

import os
import tempfile

_locks = tempfile.TemporaryDirectory(prefix="gpsearch-locks-")
os.environ["GPSEARCH_LOCKS"] = _locks.name  # for the processes that tests start, too
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import torch

torch.set_num_threads(1)
