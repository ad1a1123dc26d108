#!/usr/bin/env bash
# What only a GPU can show of the mechanisms: how peak memory grows from 4,096 to 16,384 tokens against what each claims,
# then time and memory of one layer at 1,024, 4,096 and 16,384. Rows with device, versions and git revision, and the tables,
# go to $1 (default: results/mechanisms). Exit status 1 if a claim does not hold. Uses the Python in $PYTHON, else .venv's.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-results/mechanisms}
python=${PYTHON:-.venv/bin/python}
if ! command -v "$python" >/dev/null; then
  echo "gpu_check.sh: no $python; run scripts/test.sh once, or name a Python that has lra: PYTHON=python3" >&2
  exit 2
fi
status=0
mkdir -p "$out"
"$python" -m lra.layer_cost --check -o "$out/memory.jsonl" | tee "$out/memory.txt" || status=1
"$python" -m lra.layer_cost --time-limit "${TIME_LIMIT:-600}" -o "$out/cost.jsonl" | tee "$out/cost.txt" || status=1
exit $status
