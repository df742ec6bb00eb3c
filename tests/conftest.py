"""One hypothesis profile for everybody: the same examples on every machine and run, and no deadline on slow ones.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before anything imports Triton.
"""

import os

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "ci",
    max_examples=20,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("thorough", max_examples=300, stateful_step_count=60, deadline=None)
settings.load_profile("ci")  # another by `pytest --hypothesis-profile thorough`
