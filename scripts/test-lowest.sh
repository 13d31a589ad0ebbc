#!/usr/bin/env bash
# The tests with the oldest version of everything that pyproject.toml allows, in an environment of its own made anew each
# time. Needs uv, which reads the lower bounds from pyproject.toml itself. Arguments go to pytest.
# PYTHON chooses the interpreter; VENV another place for the environment; UV_TORCH_BACKEND=cpu gets torch without CUDA.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${VENV:-.venv-lowest}"

command -v uv > /dev/null || { echo "uv is not installed: pip install uv" >&2; exit 1; }
uv venv --quiet --clear --seed --python "${PYTHON:-3.11}" "$venv"
export VIRTUAL_ENV="$venv"
uv pip install --quiet --compile-bytecode --resolution lowest-direct -r pyproject.toml --extra dev
uv pip install --quiet --no-deps -e . -r benchmarks/requirements.txt
uv pip freeze
"$venv/bin/python" -m pytest -W default "$@"  # old releases warn of newer ones
