#!/usr/bin/env bash
# What needs a GPU, in parts that can be run one by one; finished runs are found again.
#
#   papers/pagedattention/gpu.sh FOLDER PART...       from the root of the repository
#
#   tests        kernels against float64 and against torch's attention, the engine's texts with captured steps
#   serve        the server's tests, on this GPU
#   tune         the fastest configurations of attention for this GPU: into kernels/tuned.json, and a copy in FOLDER
#   bench        timings of the kernels, with the two floors measured on the spot
#   throughput, step, policies, profile, startup   whole workloads, one step, it under each policy, where its time goes,
#                the start (python -m lab.bench)
#   quick        figure 2 over 300 steps: does it run at all
#   an experiment by its name (options: ./together.py): fragmentation, clock, indirection, preemption, blocksize, factorial,
#   capacity, growth, gap, systems, fidelity
#
# Give together.py the experiments first, where there are several GPUs: it spreads the runs of all over them, so that none idles.
# MORE="--stop-after 250" in the environment gives an experiment more options; a run of capacity takes up to seven minutes.
# With several GPUs each carries out runs of its own. Results lie in results/gpu and, packed after every part with what was
# printed, in FOLDER; from there papers/pagedattention/reproduce.sh --keep gpu results/gpu takes them into the pages.
set -uo pipefail
out=${1:?give a folder for the results}
shift
parts=" tests serve tune bench throughput step policies profile startup quick fragmentation clock indirection preemption blocksize factorial capacity growth gap systems fidelity "
for part in "$@"; do
  [[ "$parts" == *" $part "* ]] || { echo "part $part is unknown: give some of$parts"; exit 2; }
done
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 # and KVLAB_REVISION where the copy has no .git
results=results/gpu
status=0
mkdir -p "$out" "$results"
for part in "$@"; do
  case "$part" in
    tests)
      several=$(python3 -c "import xdist" 2>/dev/null && echo "-n 8") # mostly compiling
      python3 -m pytest tests/kernels tests/test_torch_executor.py -p no:cacheprovider $several \
        -k "not ahead_of_time and not name_clash" 2>&1
      ;;
    serve)
      several=$(python3 -c "import xdist" 2>/dev/null && echo "-n 6 --dist loadfile") # each file has servers of its own
      KVLAB_DEVICE=cuda python3 -m pytest tests/serve -p no:cacheprovider $several \
        --ignore tests/serve/test_described.py --ignore tests/serve/test_smollm2.py --durations 8 2>&1
      ;;
    tune) python3 -m kernels.tune 2>&1 && cp kernels/tuned.json "$out" ;;
    bench) python3 -m kernels.bench --out "$results" 2>&1 ;;
    throughput | step | policies | profile | startup) python3 -m lab.bench "$part" --rounds 3 --out "$results" 2>&1 ;;
    quick) python3 -m lab.experiment fragmentation --quick --out results/gpu-quick 2>&1 ;;
    *) timeout --kill-after=30 "${SECONDS_FOR_A_PART:-540}" \
      python3 -m lab.experiment "$part" $(python3 papers/pagedattention/together.py --options "$part") ${MORE:-} \
      --out "$results" 2>&1 ;;
  esac | tee "$out/$part.txt" || { status=$?; echo "part $part ended with status $status" | tee -a "$out/$part.txt"; }
  rm -f "$out"/results.tgz.*
  tar -czf - -C "$results" . | split -b 15M - "$out/results.tgz." # cat results.tgz.* | tar -xz, to go on elsewhere
done
exit "$status"
