#!/usr/bin/env bash
# A real encoder, several real tasks, one gated run, the structure it found. Sets up .venv on first use.
# Arguments go to `gatedadapters quickstart`; --help lists them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh peft,data,bundled

gatedadapters quickstart "$@"
