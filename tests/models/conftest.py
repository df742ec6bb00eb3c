"""One thread, since the tests of other folders may be running beside these, and no visits to the Hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(1)
