PYTHON ?= python3
SOURCES := $(shell find rq_compile plugins -type f -not -path '*/__pycache__/*' -not -name '*.so' -not -name '*.md')
BIN := .venv/bin
INSTALLED := .venv/installed

TRITON := .venv-triton

.PHONY: help demo test quick sanitize tritonserver kernels tensorrt-plugin cuda-ops gpu-check cuda-ops-check check tidy format docs schema frozen families wheel clean

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

$(INSTALLED): pyproject.toml $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet '.[dev]'
	touch $@

demo: $(INSTALLED) ## from the sample checkpoint to a running engine
	$(BIN)/python samples/demo.py

test: $(INSTALLED) ## all tests
	$(BIN)/pytest tests

quick: $(INSTALLED) ## the tests that need no engine of their own, in under two minutes
	$(BIN)/pytest tests -m quick

families: $(INSTALLED) ## all model types of transformers that are supported: a quarter of an hour
	RQ_MODEL_TYPES=all $(BIN)/pytest tests/architectures/test_model_types.py

sanitize: $(INSTALLED) ## the tests of the CPU's ops under AddressSanitizer and UBSan
	PYTHON=$(BIN)/python plugins/onnxruntime/sanitize.sh

tritonserver: $(TRITON)/bin/tritonserver ## Triton Inference Server in .venv-triton, for the tests that talk to it

# Without its container: the wheel's server, for the CPU, and what a packaged model.py needs.
$(TRITON)/bin/tritonserver: tests/support/install_tritonserver.py
	$(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/pip install --quiet nvidia-pytriton==0.7.0 'numpy<2' 'onnxruntime>=1.23' 'tokenizers>=0.22'
	$(TRITON)/bin/python $<

kernels: $(INSTALLED) ## the GPU kernels, compiled ahead of time; needs no GPU
	$(BIN)/python plugins/kernels/build.py -o build/kernels

tensorrt-plugin: kernels ## the plugin library of TensorRT, with the kernels in it
	cmake -S plugins/tensorrt -B build/tensorrt -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -DTENSORRT_INCLUDE_DIR=$$($(BIN)/python -c "import kernel_lens; print(kernel_lens.__path__[0])")/include/tensorrt
	cmake --build build/tensorrt --parallel 2

cuda-ops: kernels ## the op library of the CUDA provider, with the kernels in it
	cmake -S plugins/cuda -B build/cuda -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -DCUDA_INCLUDE_DIR=$$($(BIN)/python -c "import triton; print(triton.__path__[0])")/backends/nvidia/include
	cmake --build build/cuda --parallel 2
	install -D -t $$($(BIN)/python -P -c "import rq_compile; print(rq_compile.__path__[0])")/lib build/cuda/librq_moe_cuda.so

# Needs torch, Triton and a GPU, nothing else: no network and none of this project's dependencies.
gpu-check: ## the kernels on the GPU of this machine
	$(PYTHON) plugins/kernels/check_on_gpu.py

# Needs onnxruntime-gpu, onnx, torch and a GPU; no network.
cuda-ops-check: ## the op library on the GPU of this machine
	$(PYTHON) plugins/cuda/check_in_onnxruntime.py build/cuda/librq_moe_cuda.so

check: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rq_compile
	for folder in kernels cuda launcher; do $(BIN)/mypy plugins/$$folder || exit 1; done

docs: $(INSTALLED) ## the documentation as a site in build/site, links checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

tidy: $(INSTALLED) ## clang-tidy over the C++ of the CPU ops
	$(BIN)/clang-tidy --quiet plugins/onnxruntime/src/*.cc -- -std=c++17 -DRQ_X86 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx2 -mfma -mf16c -mavxvnni

format: $(INSTALLED) ## what ruff and clang-format can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cc' '*.h')

schema: $(INSTALLED) ## docs/schema anew
	$(BIN)/python -m rq_compile.schemas docs/schema

frozen: $(INSTALLED) ## tests/frozen anew, after a change of a schema
	PYTHONPATH=. $(BIN)/python tests/support/frozen_files.py

# auditwheel names the least glibc in the wheel's tag; the quick tests run against the installed wheel, away from the source.
wheel: $(INSTALLED) ## sdist and manylinux wheel in dist/, installed in an empty environment and tested
	rm -rf build/dist build/wheel dist
	$(BIN)/python -m build --outdir build/dist .
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip install --quiet dist/*.whl 'pytest>=8' 'hypothesis>=6' 'jsonschema>=4' 'tritonclient[grpc]>=2.49'
	cd tests && ../build/wheel/bin/python -P -m pytest -m quick $$(grep -l mark.quick test_*.py)

clean: ## remove what these made
	rm -rf .venv $(TRITON) build demo dist
