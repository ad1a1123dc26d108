# Sourced by the scripts beside it: makes .venv in the project's root if it is missing and installs lra into it.
# usage: set_up [extra,...]     Python 3.11 to 3.13 from $PYTHON, else the first one found on the PATH.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
    if command -v "$candidate" >/dev/null && fits "$candidate"; then command -v "$candidate"; return; fi
  done
  echo "lra needs Python 3.11, 3.12 or 3.13 and found none; install one, or name it: PYTHON=/path/to/python3.12" >&2
  return 1
}

set_up() {
  local extras=${1:-} python stamp wanted
  python=$(find_python) || return 2
  stamp=$root/.venv/.lra-installed
  wanted="$extras $(cat "$root/pyproject.toml" "$root/scripts/constraints-cpu.txt" | cksum)"
  if [ ! -x "$root/.venv/bin/python" ]; then
    echo "== making .venv with $("$python" --version)"
    "$python" -m venv "$root/.venv" || return 2
  fi
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "== installing lra${extras:+[$extras]} and what it needs (PyTorch is the large part)"
    "$root/.venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
      --constraint "$root/scripts/constraints-cpu.txt" --editable "$root${extras:+[$extras]}" || return 2
    echo "$wanted" >"$stamp"
  fi
}
