#!/usr/bin/env bash
# Everything that is checked: style, types, tests. Sets up .venv on first use. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh dev

ruff check .
ruff format --check .
mypy
pytest --durations=25 "$@"
