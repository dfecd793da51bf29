#!/usr/bin/env bash
# quick_installed.sh PYTHON ENVIRONMENT WHEEL [OPTIONS of pip]: test an installed wheel in an empty environment.
# PYTHON is a command such as python3.13, on the path or of pyenv. Where there is none, nothing is tested and the exit status is 0.
set -euo pipefail
python=$1 environment=$2 wheel=$(realpath "$3")
options=("${@:4}")

rm -rf "$environment"
if ! "$python" -c '' 2> /dev/null; then
  python=$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}/versions/${1#python}".*/bin/python 2> /dev/null | tail -1 || true)
  [[ $python ]] || { echo "$1 is not installed here: nothing was tested with it"; exit; }
fi
"$python" -m venv "$environment"
environment=$(realpath "$environment")
pip=("$environment/bin/pip" install --quiet "${options[@]}")

# Without extras first: running an engine must not need the compiler.
"${pip[@]}" "$wheel"
"$environment/bin/rq-compile" --version
"${pip[@]}" "$wheel[compile]" 'pytest>=8' 'hypothesis>=6' 'jsonschema>=4' 'tritonclient[grpc]>=2.49'
"$environment/bin/python" - << 'END'
import platform, onnxruntime, torch, transformers
print("Python", platform.python_version(), *(f"{m.__name__} {m.__version__}" for m in (onnxruntime, transformers, torch)))
END

# In the folder of the tests, and with -P, the source is not found.
cd "$(dirname "$0")/.."
"$environment/bin/python" -P -m pytest -m quick $(grep -rl mark.quick --include='test_*.py' .)
