#!/usr/bin/env bash
# Which releases of TRL and transformers this package works with: the tests that touch them, each in a fresh virtual
# environment, and a table of what came of it.
#
#   tests/versions.sh                     every row
#   tests/versions.sh 1.14 lowest         some of them: a minor release of TRL, `lowest` or `newest`
#
# PYTHON is the interpreter (python3), TORCH what is installed of torch beside a minor release
# (torch==2.13.0), TESTS and CONTRACT which tests run.
set -euo pipefail
cd "$(dirname "$0")/.."
repo="$PWD"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
python="${PYTHON:-python3}"
torch="${TORCH:-torch==2.13.0}"
tests="${TESTS:-tests/trainer tests/signals tests/sampling tests/test_callback.py}"
contract="${CONTRACT:-weight_column or margin}"
rows=("$@")
[ $# -gt 0 ] || rows=(lowest 1.14 1.15 1.16 newest)
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# Of pytest's last lines alone: what a test prints may look like one.
count() { grep -E "^=+ .* in [0-9.]+s" "$work/log" | grep -oE "[0-9]+ $1" | awk '{ n += $1 } END { print n + 0 }' || true; }

printf '| run | Python | TRL | transformers | torch | passed | failed | skipped |\n|---|---|---|---|---|---|---|---|\n'
for row in "${rows[@]}"; do
    case "$row" in
        lowest) wanted=(-c constraints-lowest.txt torch) ;;
        newest) wanted=(-c constraints.txt torch) ;;
        *) wanted=("$torch" "trl==$row.*") ;;
    esac
    rm -rf "$work/venv"
    "$python" -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet "${wanted[@]}" "$repo" \
        pytest pytest-timeout pytest-xdist scikit-learn matplotlib >"$work/pip" 2>&1 || { cat "$work/pip" >&2; exit 1; }
    : >"$work/log"
    # shellcheck disable=SC2086
    "$work/venv/bin/python" -m pytest -v -n "${WORKERS:-2}" $tests >>"$work/log" 2>&1 || true
    if [ -n "$contract" ]; then
        "$work/venv/bin/python" -m pytest -v -n "${WORKERS:-2}" tests/contract -k "$contract" >>"$work/log" 2>&1 || true
    fi
    "$work/venv/bin/python" - "$row" "$(count passed)" "$(($(count failed) + $(count error)))" "$(count skipped)" <<'PYTHON'
import platform
import sys
from importlib.metadata import version

row, *counts = sys.argv[1:]
cells = [row, platform.python_version(), *map(version, ("trl", "transformers", "torch")), *counts]
print("| " + " | ".join(cells) + " |", flush=True)
PYTHON
    grep -E "^(FAILED|ERROR)" "$work/log" >&2 || true
    [ "$(count passed)" -gt 0 ] || tail -n 20 "$work/log" >&2
done
