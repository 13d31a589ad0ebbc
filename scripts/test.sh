#!/usr/bin/env bash
# Everything that is checked: style, types, tests. Sets up .venv on first use. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh dev

# A real PostgreSQL server for the tests of studies, where it can be had; elsewhere they are skipped and say so.
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null && ! ls /usr/lib/postgresql/*/bin/initdb > /dev/null 2>&1; then
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends postgresql; } \
        > /dev/null 2>&1 || echo "PostgreSQL cannot be installed here" >&2
fi

ruff check .
ruff format --check .
mypy
pytest "$@"
