# Everything from a fresh clone; each target first sets up what it needs in ./.venv and, as root on
# Debian, the system's packages.
#
#   make              set-up and build: afterwards .venv/bin/python imports ipex_llm
#   make demo         the main job on a real model: optimize, generate, save, load, compare
#                     (LOW_BIT=sym_int4 or another of the thirteen types)
#   make test         C++ tests per instruction set, once more under sanitizers, Python tests
#   make test-full    also the slow ones: the wheel in a fresh environment, long sweeps
#   make bench        speeds as ratios to this machine's limits, at most 8 minutes
#   make bench-full   every format and shape
#   make bench-gpu    every type on the GPU against bf16 cuBLAS
#   make bench-peers  other engines on the same model, each in an environment of its own
#   make zoo          optimize_model over the architectures of transformers
#   make faults       what loads after a save is killed at each of its steps
#   make fuzz         fuzzes the readers of files (SECONDS_EACH=60 or RUNS=10000000 per reader; needs
#                     clang)
#   make lint         ruff and clang-format, changing nothing; `make format` changes
#   make docs         checks the documents and renders them to build-docs/
#   make wheel        dist/ipex_llm_lowbit-*.whl
#   make cuda         compiles the CUDA kernels (needs nvcc, no GPU)
#   make clean        removes what was built; `make distclean` also .venv and .cache

SHELL := /bin/bash -o pipefail
.DEFAULT_GOAL := build
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
LOW_BIT ?= sym_int4

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
# The tools come from .venv, whatever the PATH holds.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHON
# A clone elsewhere finds the same compilations: paths relative, and no debug information to differ.
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1
LAUNCHER = $(if $(shell command -v ccache 2>/dev/null),-DCMAKE_CXX_COMPILER_LAUNCHER=ccache \
  -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
CONFIGURE = cmake --preset $(1) -DPython_EXECUTABLE=$(CURDIR)/$(PY) $(LAUNCHER) $(2)
# Where a GPU and its compiler are visible, the CUDA kernels are built with the rest.
NVCC = $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
GPU = $(if $(shell nvidia-smi -L 2>/dev/null),$(if $(NVCC),-DLOWBIT_CUDA=ON -DCMAKE_CUDA_COMPILER=$(NVCC)))
COMPILE = cmake --build --preset $(1) --parallel $(JOBS)
say = @printf '\n\033[1m== %s\033[0m\n' "$(1)"
# Models are local: nothing may ask a hub.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# ---- set-up --------------------------------------------------------------------------------------

.PHONY: setup system models
setup: $(VENV)/.ready

system:
	@scripts/system-packages.sh

# The package is used from the source tree: a path file, relative so that the clone may be moved.
$(VENV)/.ready: requirements-dev.txt requirements-nodeps.txt constraints.txt | system
	$(call say,Python environment in ./$(VENV) (a few minutes the first time))
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -r requirements-dev.txt -c constraints.txt
	$(PY) -m pip install --no-deps --no-build-isolation -r requirements-nodeps.txt
	echo ../../../../python > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ipex_llm_tree.pth"
	touch $@

models: $(VENV)/.ready
	@$(OFFLINE) $(PY) scripts/real_models.py > /dev/null

# ---- build ---------------------------------------------------------------------------------------

.PHONY: build build-asan cuda wheel
build/build.ninja: CMakePresets.json | $(VENV)/.ready system
	$(call say,Configuring the C++ build in build/)
	$(call CONFIGURE,dev,$(GPU))
	@touch $@
build: build/build.ninja
	$(call say,Building)
	@$(call COMPILE,dev)

build-asan/build.ninja: CMakePresets.json | $(VENV)/.ready system
	$(call say,Configuring the sanitizer build in build-asan/)
	$(call CONFIGURE,asan,)
	@touch $@
build-asan: build-asan/build.ninja
	$(call say,Building with sanitizers)
	@$(call COMPILE,asan)

cuda: | $(VENV)/.ready system
	$(call say,Compiling the CUDA kernels)
	$(call CONFIGURE,cuda,)
	$(call COMPILE,cuda)

wheel: | $(VENV)/.ready system
	$(call say,Building the wheel into dist/)
	$(PY) -m pip wheel . --no-deps --no-build-isolation -w dist \
	  --config-settings cmake.define.Python_EXECUTABLE=$(CURDIR)/$(PY) \
	  $(if $(shell command -v ccache 2>/dev/null),--config-settings cmake.define.CMAKE_CXX_COMPILER_LAUNCHER=ccache)

# ---- tests ---------------------------------------------------------------------------------------

.PHONY: test test-full test-cpp test-asan test-python lint format
test: test-cpp test-asan test-python
test-full: PYTEST_ARGS += --slow
test-full: test

# Once as the machine would choose, then the tests labelled per_isa forced to each other level.
test-cpp: build
	$(call say,C++ tests)
	@scripts/test-cpp.sh build

# Leaks are checked as well; threads are the caller's, so there is nothing to race with here.
test-asan: build-asan
	$(call say,C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer)
	@ctest --test-dir build-asan --output-on-failure --parallel $(JOBS) --no-tests=error

test-python: build models
	$(call say,Python tests)
	@$(OFFLINE) $(PY) -m pytest $(PYTEST_ARGS)

CXX_FILES = $(shell git ls-files --cached --others --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh')
lint: $(VENV)/.ready
	$(call say,Format and lint)
	@ruff check . && ruff format --check --diff . && clang-format --dry-run --Werror $(CXX_FILES)
format: $(VENV)/.ready
	@ruff check --fix . ; ruff format . && clang-format -i $(CXX_FILES)

# ---- demo, benchmarks, documents -----------------------------------------------------------------

.PHONY: build-bench demo bench bench-full bench-gpu bench-peers zoo docs faults fuzz
build-bench/build.ninja: CMakePresets.json | $(VENV)/.ready system
	$(call CONFIGURE,bench,)
	@touch $@
build-bench: build-bench/build.ninja
	@$(call COMPILE,bench)

demo: build models
	@$(OFFLINE) $(PY) examples/demo.py --low-bit $(LOW_BIT)

bench: build build-bench models
	@$(OFFLINE) $(PY) bench/run.py $(BENCH_ARGS)
bench-full: build build-bench models
	@$(OFFLINE) $(PY) bench/run.py --full $(BENCH_ARGS)
bench-gpu:  # needs a GPU and liblowbit_ops_cuda.so (cmake --preset cuda)
	@PYTHONPATH=python $(PY) bench/gpu.py build-gpu.json $(BENCH_ARGS)
bench-peers: build models
	@$(OFFLINE) $(PY) bench/run.py --peers $(BENCH_ARGS)

faults: build
	@LOWBIT_PRINT_FAULTS=1 build/tests/cpp/io/lowbit_io_tests --gtest_filter='Saved.Killed*:Saved.AFailure*'
	@LOWBIT_PRINT_FAULTS=1 build/tests/cpp/cli/lowbit_cli_tests --gtest_filter='Convert.Killed*:Convert.AFailure*'

fuzz:
	@SECONDS_EACH=$(SECONDS_EACH) RUNS=$(RUNS) scripts/fuzz.sh $(TARGETS)

zoo: build models
	@$(OFFLINE) $(PY) tests/python/zoo/run.py $(ZOO_ARGS)

docs: build
	@$(PY) scripts/docs.py

# ---- removal -------------------------------------------------------------------------------------

.PHONY: clean distclean
clean:
	rm -rf build build-* dist python/ipex_llm/lib .pytest_cache .hypothesis .ruff_cache
distclean: clean
	rm -rf $(VENV) .cache
