"""One thread for every test process: many tiny products only wait for one another in more.

And locks of its own, so that it waits for no study at work on this machine.
"""

import atexit
import os
import shutil
import tempfile

# For the processes that tests start, too.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GPSEARCH_LOCKS"] = tempfile.mkdtemp(prefix="gpsearch-locks-")

import torch

torch.set_num_threads(1)
atexit.register(shutil.rmtree, os.environ["GPSEARCH_LOCKS"], ignore_errors=True)
