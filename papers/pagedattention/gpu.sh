#!/usr/bin/env bash
# Everything that needs a GPU, in an order in which an early end still leaves something. Finished runs are found again.
#   papers/pagedattention/gpu.sh OUT          from the root of the repository
set -u
out=${1:?give a folder for the results}
export PYTHONPATH=. HF_HUB_OFFLINE=1
mkdir -p "$out"
python3 -m pytest tests/kernels -q -p no:cacheprovider -k "not ahead" 2>&1 | tail -n 40 | tee "$out/tests.txt"
python3 -m kernels.bench --out "$out" | tee "$out/bench.txt"
python3 -m lab.experiment fragmentation --quick --out "$out/quick" | tee "$out/quick.txt"
python3 -m lab.experiment fragmentation --out "$out" | tee "$out/fragmentation.txt"
python3 -m lab.experiment clock --out "$out" | tee "$out/clock.txt"
