PYTHON ?= python3
SOURCES := $(shell find rq_compile plugins -type f -not -path '*/__pycache__/*' -not -name '*.so' -not -name '*.md')
BIN := .venv/bin
INSTALLED := .venv/installed

TRITON := .venv-triton
AARCH64 := .venv-aarch64
AARCH64_CXX ?= aarch64-linux-gnu-g++
PACKAGE = $$($(BIN)/python -P -c "import rq_compile; print(rq_compile.__path__[0])")

.PHONY: help demo test quick mpi-ops sanitize tritonserver aarch64 kernels tensorrt-plugin cuda-ops gpu-check cuda-ops-check check types tidy format docs schema frozen families passes wheel installed oldest newest clean

help: ## print this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

$(INSTALLED): pyproject.toml $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet '.[dev]'
	touch $@

demo: $(INSTALLED) ## take a sample checkpoint to a running engine
	$(BIN)/python samples/demo.py

test: $(INSTALLED) mpi-ops ## run all tests, a process on each core
	$(BIN)/pytest tests --numprocesses auto --maxprocesses 4 --dist worksteal

quick: $(INSTALLED) ## run the tests that need no engine of their own, in under two minutes
	$(BIN)/pytest tests -m quick

families: $(INSTALLED) ## test all supported model types of transformers and write the table in docs/families.md: half an hour
	RQ_MODEL_TYPES=all $(BIN)/pytest tests/architectures/test_model_types.py -o junit_family=xunit1 --junitxml=build/families.xml; \
	  $(BIN)/python tests/support/families_table.py docs/families.md build/families.xml

passes: $(INSTALLED) ## write tests/support/pass_counts.json, for all model types or for those in RQ_MODEL_TYPES: a quarter of an hour
	RQ_MODEL_TYPES=$(or $(RQ_MODEL_TYPES),all) $(BIN)/pytest tests/architectures/test_model_types.py -k passes_change \
	  -o junit_family=xunit1 --junitxml=build/passes.xml; \
	  $(BIN)/python tests/support/pass_counts.py build/passes.xml

sanitize: $(INSTALLED) ## test the CPU's ops under AddressSanitizer and UBSan
	PYTHON=$(BIN)/python plugins/onnxruntime/sanitize.sh

tritonserver: $(TRITON)/bin/tritonserver ## install Triton Inference Server in .venv-triton, for the tests that need it

# The server comes from a wheel for the CPU, without a container. The other packages are needed by a packaged model.py.
$(TRITON)/bin/tritonserver: tests/support/install_tritonserver.py
	$(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/pip install --quiet nvidia-pytriton==0.7.0 'numpy<2' 'onnxruntime>=1.23' 'tokenizers>=0.22' 'jinja2>=3.1.6'
	$(TRITON)/bin/python $<

# On Debian 12: apt-get install g++-aarch64-linux-gnu qemu-user
aarch64: $(INSTALLED) $(AARCH64)/bin/python ## build the op library for 64-bit ARM, and install a Python for ARM in .venv-aarch64 to test it in qemu
	cmake -S plugins/onnxruntime -B build/aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(AARCH64_CXX)
	cmake --build build/aarch64 --parallel 2
	install -D -t $(PACKAGE)/lib/aarch64 build/aarch64/librq_moe.so

$(AARCH64)/bin/python: tests/support/install_aarch64.py
	$(PYTHON) $< $(AARCH64)

kernels: $(INSTALLED) ## compile the GPU kernels ahead of time; needs no GPU
	$(BIN)/python plugins/kernels/build.py -o build/kernels

tensorrt-plugin: kernels ## build the plugin library of TensorRT, with the kernels in it
	cmake -S plugins/tensorrt -B build/tensorrt -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -DTENSORRT_INCLUDE_DIR=$$($(BIN)/python -c "import kernel_lens; print(kernel_lens.__path__[0])")/include/tensorrt
	cmake --build build/tensorrt --parallel 2

cuda-ops: kernels ## build the op library of the CUDA provider, with the kernels in it
	cmake -S plugins/cuda -B build/cuda -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -DCUDA_INCLUDE_DIR=$$($(BIN)/python -c "import triton; print(triton.__path__[0])")/backends/nvidia/include
	cmake --build build/cuda --parallel 2
	install -D -t $(PACKAGE)/lib build/cuda/librq_moe_cuda.so

# MPI is that of `mpicxx` on the path: of the distribution, or of the wheel in the environment.
mpi-ops: $(INSTALLED) ## build the op library of engines with several ranks; needs MPI
	PATH=$(CURDIR)/$(BIN):$$PATH cmake -S plugins/mpi -B build/mpi
	PATH=$(CURDIR)/$(BIN):$$PATH cmake --build build/mpi --parallel 2
	install -D -t $(PACKAGE)/lib build/mpi/librq_moe_mpi.so

# Needs only torch, Triton and a GPU: no network and none of this project's dependencies.
gpu-check: ## check the kernels on the GPU of this machine
	$(PYTHON) plugins/kernels/check_on_gpu.py

# Needs onnxruntime-gpu, onnx, torch and a GPU; no network.
cuda-ops-check: ## check the op library on the GPU of this machine
	$(PYTHON) plugins/cuda/check_in_onnxruntime.py build/cuda/librq_moe_cuda.so

check: types ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## run mypy on the package, the plugins, the tests, the benchmarks and the samples
	$(BIN)/mypy rq_compile tests
	MYPYPATH=benchmarks $(BIN)/mypy benchmarks samples docs
	for folder in kernels cuda launcher; do $(BIN)/mypy plugins/$$folder || exit 1; done

docs: $(INSTALLED) ## build the documentation as a site in build/site and check its links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

CPU_SOURCES = $(filter-out plugins/onnxruntime/src/kernels_neon%,$(wildcard plugins/onnxruntime/src/*.cc)) $(wildcard plugins/quantizer/src/*.cc)
X86 := -DRQ_X86 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16 -mamx-tile -mamx-int8 -mamx-bf16 -mavx2 -mfma -mf16c -mavxvnni

tidy: $(INSTALLED) ## run clang-tidy on the C++ of the CPU ops, the quantizer and the launcher
	$(BIN)/clang-tidy --quiet $(CPU_SOURCES) -- -std=c++17 $(X86)
	$(BIN)/clang-tidy --quiet plugins/launcher/*.cc -- -std=c++17 \
	  -I$$($(BIN)/python -c "import triton; print(triton.__path__[0])")/backends/nvidia/include

format: $(INSTALLED) ## apply the fixes of ruff and clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cc' '*.h')

schema: $(INSTALLED) ## write docs/schema
	$(BIN)/python -m rq_compile.schemas docs/schema

frozen: $(INSTALLED) ## write tests/frozen, after a change of a schema
	PYTHONPATH=. $(BIN)/python tests/support/frozen_files.py

# auditwheel states the oldest glibc in the wheel's tag.
wheel: $(INSTALLED) ## build the sdist and a manylinux wheel in dist/, and test the wheel in an empty environment
	rm -rf build/dist dist
	$(BIN)/python -m build --outdir build/dist .
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist
	$(MAKE) installed

installed: ## test the wheel in dist/ in an empty environment, for example with PYTHON=python3.13
	tests/support/quick_installed.sh $(PYTHON) build/installed dist/*.whl

# What the quick tests leave out of the oldest ONNX Runtime and transformers: the ops, the fused ops, the names that we use of
# transformers, and the engines of a family.
ON_OLDEST := plugins/test_ops.py rewrite/test_fused_ops.py rewrite/test_fused_norms.py architectures/test_transformers_names.py architectures/test_families.py \
  -k 'not lesser and (olmoe or not families)'

# One wheel serves both: its libraries are not tied to a version of Python.
build/wheel/built: $(INSTALLED)
	rm -rf build/wheel
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	touch $@

oldest: build/wheel/built ## test on Python 3.11 with the oldest packages that pyproject.toml allows
	$(BIN)/python tests/support/oldest_versions.py > build/oldest.txt
	tests/support/quick_installed.sh python3.11 .venv-oldest build/wheel/*.whl --constraint build/oldest.txt
	test ! -d .venv-oldest || (cd tests && ../.venv-oldest/bin/python -P -m pytest $(ON_OLDEST))

newest: build/wheel/built ## test on Python 3.13 with the newest packages
	tests/support/quick_installed.sh python3.13 .venv-newest build/wheel/*.whl

clean: ## remove everything that these commands made
	rm -rf .venv .venv-oldest .venv-newest $(TRITON) $(AARCH64) build demo dist
