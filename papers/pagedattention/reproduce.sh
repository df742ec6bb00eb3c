#!/usr/bin/env bash
# What papers/ says of results, made again: experiments run, what the pages quote is kept, the pages are written.
#
#   papers/pagedattention/reproduce.sh                  at full scale on the virtual clock: over an hour on two cores
#   papers/pagedattention/reproduce.sh --cpu            measured on this CPU, which must have nothing else to do
#   papers/pagedattention/reproduce.sh --keep gpu DIR   nothing runs: what lies in DIR, made on a GPU with --out DIR
#
# Finished runs are found again. Runs lie in results/ (or $OUT), what is kept in papers/pagedattention/results/KIND/EXPERIMENT.
# A claim that fails is a result; the exit status is 1 where an experiment has none.
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=.
python=${PYTHON:-python}
out=${OUT:-results}
most=400000 # bytes of a drawing as SVG; a larger one is kept as PNG
missing=()

keep() { # KIND FOLDER: rows, first table, claims, header and figures of an experiment
  local from=$2 to=papers/pagedattention/results/$1/${2##*/} svg
  if [[ ! -f $from/summary.json ]] || grep -q '^ "command": .*--quick' "$from/summary.json"; then
    missing+=("${2##*/}")
    return
  fi
  rm -rf "$to"
  mkdir -p "$to"
  cp "$from"/{summary.json,table.csv,rows.csv,header.json} "$to"
  for svg in "$from"/*.svg; do
    if (($(wc -c <"$svg") > most)); then cp "${svg%.svg}.png" "$to"; else cp "$svg" "$to"; fi
  done
}

run() { # KIND EXPERIMENT OPTION...
  local kind=$1 name=$2
  shift 2
  echo "== $name $*"
  rm -f "$out/$name/summary.json" # so that what is kept is new
  "$python" -m lab.experiment "$name" "$@" ${OUT:+--out "$OUT"}
  keep "$kind" "$out/$name"
}

case "${1:-}" in
  "")
    run simulated fragmentation --executor simulated --seeds 0-9
    run simulated gap --executor simulated
    run simulated factorial --executor simulated
    for name in capacity sharing prefix blocksize preemption growth systems replay; do run simulated "$name"; done
    OUT=$out/hour out=$out/hour run hour capacity --workload sharegpt --duration 3600 # as long as the paper's traces
    ;;
  --cpu)
    run cpu fragmentation --device cpu
    run cpu clock --device cpu --rate 1.5 --fresh
    run cpu sharing --device cpu
    run cpu fidelity --device cpu
    ;;
  --keep)
    kind=${2:?give a kind of results: simulated, cpu or gpu}
    [[ " simulated cpu gpu " == *" $kind "* ]] || { echo "kind $kind is unknown: give simulated, cpu or gpu"; exit 2; }
    for summary in "${3:?give a folder of results}"/*/summary.json; do keep "$kind" "$(dirname "$summary")"; done
    ;;
  *)
    echo "option $1 is unknown: give none, --cpu, or --keep KIND FOLDER"
    exit 2
    ;;
esac
"$python" papers/pages.py || exit 1
if ((${#missing[@]})); then
  echo "no results at full scale: ${missing[*]}"
  exit 1
fi
