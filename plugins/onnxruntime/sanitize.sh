#!/usr/bin/env bash
# The op library built with AddressSanitizer and UBSan, and the tests of the ops with it: any report ends them.
# The checked library goes into a copy of the package, so that the one in use stays. Further arguments are pytest's.
#
#     PYTHON=.venv/bin/python plugins/onnxruntime/sanitize.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-python3}
compiler=${CXX:-g++}
folder=$PWD/build/sanitized

cmake -S plugins/onnxruntime -B "$folder/library" -DCMAKE_CXX_COMPILER="$compiler" -DRQ_SANITIZE=address,undefined
cmake --build "$folder/library" --parallel 2
symbols=$(nm -D "$folder/library/librq_moe.so")
[[ $symbols == *__asan_* && $symbols == *__ubsan_* ]] || { echo "the library was built without the sanitizers" >&2; exit 1; }

mkdir -p "$folder/package"
cp -r rq_compile "$folder/package/"
install -D -t "$folder/package/rq_compile/lib" "$folder/library/librq_moe.so"

# Python is not built with them, so their libraries have to be loaded first; what Python itself never frees is no concern here.
export LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONPATH=$folder/package
# -P, or the package in the working directory would come before that copy.
loaded=$("$python" -P -c "from rq_compile.engine.library import library_path; print(library_path())")
[[ $loaded == "$folder"/* ]] || { echo "$loaded would be tested" >&2; exit 1; }
# Reports go to file descriptor 2, which pytest would keep to itself while the process ends.
"$python" -P -m pytest --capture=sys tests/plugins/test_ops.py tests/plugins/test_ops_fuzz.py tests/plugins/test_activation_bits.py \
  tests/plugins/test_cache_attention.py tests/plugins/test_latent_attention.py tests/plugins/test_causal_mask.py \
  tests/rewrite/test_dense_gemms.py "$@"
