#!/usr/bin/env bash
# Strict type check. The checkout is the package `edgepress` whatever its folder is called, so it is
# checked through a temporary link of that name.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$checkout/.venv/bin/python}
link=$(mktemp -d)
trap 'rm -rf "$link"' EXIT
ln -s "$checkout" "$link/edgepress"
cd "$link"
MYPYPATH="$link" "$python" -m mypy --config-file "$checkout/pyproject.toml" \
    --cache-dir "$checkout/.mypy_cache" --package edgepress
