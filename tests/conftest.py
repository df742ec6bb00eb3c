"""One hypothesis profile for everybody: the same examples on every machine and run, and no deadline on slow ones.

Processes that run tests side by side share the cores, as do those that they start. Torch would take all cores in each,
and threads that wait for one without a core slow everything down many times; it reads its share when it is imported.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before anything imports Triton.
"""

import os

if several := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(several)))

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
