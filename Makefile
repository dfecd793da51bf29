# make demo: from the sample checkpoint to a running engine. make test: the tests. Each sets itself up in .venv.
# make kernels: the GPU kernels, compiled ahead of time; make tensorrt-plugin, make cuda-ops: the libraries with them.
# make gpu-check, make cuda-ops-check: their checks on a machine with a GPU. make sanitize: the CPU ops' tests under ASan and UBSan.
# make tritonserver: Triton Inference Server in .venv-triton, for the tests that talk to it. make check: ruff and mypy. make schema: docs/schema anew. make format: what ruff can mend.

PYTHON ?= python3
SOURCES := $(shell find rq_compile plugins -type f -not -path '*/__pycache__/*' -not -name '*.so' -not -name '*.md')
BIN := .venv/bin
INSTALLED := .venv/installed

TRITON := .venv-triton

.PHONY: demo test sanitize tritonserver kernels tensorrt-plugin cuda-ops gpu-check cuda-ops-check check format schema frozen clean

$(INSTALLED): pyproject.toml $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python samples/demo.py

test: $(INSTALLED)
	$(BIN)/pytest tests

# All model types of transformers that are supported: a quarter of an hour.
families: $(INSTALLED)
	RQ_MODEL_TYPES=all $(BIN)/pytest tests/test_model_types.py

sanitize: $(INSTALLED)
	PYTHON=$(BIN)/python plugins/onnxruntime/sanitize.sh

tritonserver: $(TRITON)/bin/tritonserver

# Without its container: the wheel's server, for the CPU, and what a packaged model.py needs.
$(TRITON)/bin/tritonserver: tests/install_tritonserver.py
	$(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/pip install --quiet nvidia-pytriton==0.7.0 'numpy<2' 'onnxruntime>=1.23' 'tokenizers>=0.22'
	$(TRITON)/bin/python $<

kernels: $(INSTALLED)
	$(BIN)/python plugins/kernels/build.py -o build/kernels

tensorrt-plugin: kernels
	cmake -S plugins/tensorrt -B build/tensorrt -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -DTENSORRT_INCLUDE_DIR=$$($(BIN)/python -c "import kernel_lens; print(kernel_lens.__path__[0])")/include/tensorrt
	cmake --build build/tensorrt --parallel 2

cuda-ops: kernels
	cmake -S plugins/cuda -B build/cuda -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -DCUDA_INCLUDE_DIR=$$($(BIN)/python -c "import triton; print(triton.__path__[0])")/backends/nvidia/include
	cmake --build build/cuda --parallel 2
	install -D -t $$($(BIN)/python -P -c "import rq_compile; print(rq_compile.__path__[0])")/lib build/cuda/librq_moe_cuda.so

# Needs torch, Triton and a GPU, nothing else: no network and none of this project's dependencies.
gpu-check:
	$(PYTHON) plugins/kernels/check_on_gpu.py

# Needs onnxruntime-gpu, onnx, torch and a GPU; no network.
cuda-ops-check:
	$(PYTHON) plugins/cuda/check_in_onnxruntime.py build/cuda/librq_moe_cuda.so

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rq_compile

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(INSTALLED)
	$(BIN)/python -m rq_compile.schemas docs/schema

frozen: $(INSTALLED)
	PYTHONPATH=. $(BIN)/python tests/frozen_files.py

clean:
	rm -rf .venv $(TRITON) build demo
