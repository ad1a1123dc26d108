#!/usr/bin/env bash
# The main job in miniature, on the CPU, in about five minutes: six mechanisms x two lengths x two seeds on a scaled
# ListOps (not the LRA setting), then the table of accuracy, memory and speed, the accuracy-against-speed figure, and
# one page for a browser with tables, figures and every run.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
set_up
cd "$root"
started=$(date +%s)
export LRA_RUNS=${LRA_RUNS:-runs/quickstart} LRA_DATA=${LRA_DATA:-data}
figure=$LRA_RUNS/accuracy-speed.png
table=$LRA_RUNS/table.md
page=$LRA_RUNS/report.html

.venv/bin/lra data prepare listops length=32,64
.venv/bin/lra train -m task=listops length=32,64 model=softmax,linear,luna,local,fnet,identity \
  train=quick batch_size=64 seed=0,1
.venv/bin/lra plot "$LRA_RUNS" -o "$figure"
.venv/bin/lra table "$LRA_RUNS" --format md -o "$table"
.venv/bin/lra report "$LRA_RUNS" -o "$page" --title "Quick start: six mechanisms on a scaled ListOps"
echo
echo "Written in $(($(date +%s) - started)) s:"
echo "  $figure    accuracy against speed, memory as area"
echo "  $table    the table above as Markdown"
echo "  $page    both, learning curves and every run with its command: open it in a browser"
echo "  $LRA_RUNS/*/record.json    one record a run, with metrics.jsonl, config.yaml and test predictions beside it"
echo "Next: .venv/bin/lra --help, or README.md"
