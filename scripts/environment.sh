# Sourced by the scripts beside it: makes .venv in the project's root if it is missing and installs lra into it.
# usage: set_up [dev]     Python 3.11 to 3.13 from $PYTHON, else the first one found on the PATH.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    if fits "$PYTHON"; then echo "$PYTHON"; return; fi
    echo "PYTHON=$PYTHON is not Python 3.11, 3.12 or 3.13; name one that is, or leave PYTHON unset" >&2
    return 1
  fi
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if command -v "$candidate" >/dev/null && fits "$candidate"; then command -v "$candidate"; return; fi
  done
  echo "lra needs Python 3.11, 3.12 or 3.13 and found none; install one, or name it: PYTHON=/path/to/python3.12" >&2
  return 1
}

set_up() {
  local extra=${1:-} python wanted installed
  if [ ! -x "$root/.venv/bin/python" ]; then
    python=$(find_python) || return 2
    echo "== making .venv with $("$python" --version)"
    "$python" -m venv "$root/.venv" || return 2
  elif ! fits "$root/.venv/bin/python"; then
    echo ".venv holds $("$root/.venv/bin/python" --version 2>&1), not Python 3.11 to 3.13; delete it and try again" >&2
    return 2
  fi
  wanted=$(cat "$root/pyproject.toml" "$root/scripts/constraints-cpu.txt" | cksum)
  installed=$(cat "$root/.venv/.lra-installed" 2>/dev/null || true)
  if [ "$installed" != "$wanted dev" ] && [ "$installed" != "$wanted $extra" ]; then
    echo "== installing lra${extra:+[$extra]} and what it needs (PyTorch is the large part)"
    "$root/.venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
      --constraint "$root/scripts/constraints-cpu.txt" --editable "$root${extra:+[$extra]}" || return 2
    echo "$wanted $extra" >"$root/.venv/.lra-installed"
  fi
}
