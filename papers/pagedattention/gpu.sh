#!/usr/bin/env bash
# What needs a GPU, in parts that can be run one by one; finished runs are found again.
#
#   papers/pagedattention/gpu.sh FOLDER PART...       from the root of the repository
#
#   tests   kernels against float64 and against torch's attention
#   bench   timings of the kernels, with the two floors measured on the spot
#   quick   figure 2 over 300 steps: does it run at all
#   runs    figure 2: OPT-13B's shape, random weights, 12 GiB pool, 6,000 steps of each system
#   clock   the same requests on a virtual clock with the measured step times
#
# Results lie in results/gpu and, packed with what was printed, in FOLDER.
set -uo pipefail
out=${1:?give a folder for the results}
shift
for part in "$@"; do
  [[ " tests bench quick runs clock " == *" $part "* ]] || { echo "part $part is unknown: give tests, bench, quick, runs or clock"; exit 2; }
done
export PYTHONPATH=. HF_HUB_OFFLINE=1 # and KVLAB_REVISION where the copy has no .git
results=results/gpu
status=0
mkdir -p "$out" "$results"
for part in "$@"; do
  case "$part" in
    tests) python3 -m pytest tests/kernels -p no:cacheprovider -k "not ahead_of_time and not name_clash" 2>&1 ;;
    bench) python3 -m kernels.bench --out "$results" 2>&1 ;;
    quick) python3 -m lab.experiment fragmentation --quick --out results/gpu-quick 2>&1 ;;
    runs) timeout --kill-after=30 "${SECONDS_FOR_RUNS:-540}" python3 -m lab.experiment fragmentation --out "$results" 2>&1 ;;
    clock) python3 -m lab.experiment clock --out "$results" 2>&1 ;;
  esac | tee "$out/$part.txt" || { status=$?; echo "part $part ended with status $status" | tee -a "$out/$part.txt"; }
done
tar -czf "$out/results.tgz" -C "$results" .
exit "$status"
