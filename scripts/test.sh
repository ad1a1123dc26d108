#!/usr/bin/env bash
# The tests: makes the environment if it is missing, then runs pytest with whatever arguments follow.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
set_up dev
cd "$root"
exec .venv/bin/python -m pytest "$@"
