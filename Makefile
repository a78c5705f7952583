# Every target sets up .venv and builds what it needs; a repeated call does only what changed.
#
#   PYTHON=python3.12              the interpreter that .venv is made from (3.10 or newer)
#   TORCH='torch==2.11.0'          another torch; the default is the CPU build of TORCH below
#   TORCH_INDEX=https://...        where to look for it besides pip's own indexes
#   WORKERS=4                      test processes; each takes whole files
#   ARGS='-k info_nce'             handed to the command of demo, test, bench and gpu-check
#   MEDCL_CUDA=auto|1|0 ...        build options, see README.md

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
EXTRAS ?= train,plot,test,dev,triton
# what the Triton tests run with where torch does not bring a Triton of its own (its CPU build does not)
TRITON ?= triton==3.7.1
ARGS ?=
WORKERS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
LIBRARY := medcl_kernels/libmedcl_kernels.so
SOURCES := CMakeLists.txt setup.py $(shell find csrc -type f 2>/dev/null)
CXX_FILES := find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs
CPU_INDEX := https://download.pytorch.org/whl/cpu

# pytest in several processes that share the cores; tests/conftest.py puts long files first
SPREAD = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$((($$(nproc) + $(WORKERS) - 1) / $(WORKERS)))} \
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# cmake and ninja may come from pip; MPLBACKEND because no target opens a window
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export MPLBACKEND ?= Agg

# Without a GPU the library is built to be checked, for two architectures; a wheel and a machine with a GPU get all.
WHEEL_ARCHS := $(MEDCL_CUDA_ARCHS)
ifeq ($(origin MEDCL_CUDA_ARCHS)$(shell command -v nvidia-smi),undefined)
export MEDCL_CUDA_ARCHS := 80;90a
endif

.PHONY: help venv build demo test format lint bench gpu-check sanitize emulator aot mutants wheel clean FORCE

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
	  while IFS='|' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

venv: $(VENV)/.stamp-packages  ## .venv with torch (CPU build unless TORCH= says otherwise) and the packages of EXTRAS

build: $(LIBRARY)  ## the C++ (and, where nvcc is found, CUDA) library, and an editable install

demo: build  ## IDEAL on a synthetic cardiac cine phantom: pre-training, fine-tuning, Dice table, report.html
	$(PY) python/train_ideal.py --config python/configs/ideal_demo.yaml $(ARGS)

test: build  ## all tests that need no GPU, the slow ones too
	$(SPREAD) $(ARGS)

format: venv  ## rewrites Python (ruff) and C++ (clang-format, where it is installed) in the project's style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	if command -v clang-format >/dev/null; then $(CXX_FILES) clang-format -i; fi

lint: venv  ## ruff, mypy, and clang-format where it is installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	if command -v clang-format >/dev/null; then \
	  $(CXX_FILES) clang-format --dry-run --Werror; \
	else echo "clang-format is not installed: C++ formatting was not checked"; fi

bench: build  ## speed and memory of every op and loss beside its peers; correctness is checked before any time
	$(PY) benchmarks/run.py $(ARGS)

# Runs with .venv or with the machine's own Python, whichever has a torch that sees a GPU, and fetches nothing.
#   WHEEL=dist/medcl_kernels-...whl   takes this wheel instead of building
#   WHEELS=folder                     with wheels of further peers
#   ARGS=--dry-run                    tries the harness itself on the CPU, with .venv
gpu-check:  ## on a machine with a CUDA device, offline: build, tests marked gpu, benchmarks, one JSON
	@python=; for candidate in $(PY) $(PYTHON); do \
	  if "$$candidate" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
	  then python="$$candidate"; break; fi; done; \
	if [ -z "$$python" ] && [[ '$(ARGS)' == *--dry-run* ]]; then python=$(PY); fi; \
	if [ -z "$$python" ]; then \
	  echo "gpu-check: no CUDA device: neither $(PY) nor $(PYTHON) has a torch that sees one; nothing was run" >&2; \
	  exit 1; fi; \
	"$$python" -m benchmarks.gpu_check $(if $(WHEEL),--wheel '$(WHEEL)') $(if $(WHEELS),--wheels '$(WHEELS)') $(ARGS)

SANITIZED := build/asan/lib/$(LIBRARY)
SANITIZED_TESTS ?= tests/test_ops.py tests/test_kept_tiles.py
# libstdc++ too: the sanitizer looks for its __cxa_throw before torch has brought it in. pytest must leave
# stderr and SIGSEGV to the sanitizer. Twice, side by side: the best kernels of this machine, and the portable ones, whose long sums
# (pair_affinity) are one chain of additions at -O1 and up to a seventh less exact than the optimised build may be.
sanitize: $(SANITIZED)  ## the C++ CPU code under AddressSanitizer and UBSan
	export LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 MEDCL_LIBRARY=$(CURDIR)/$(SANITIZED); \
	set -- -q -p no:faulthandler --capture=sys -m 'not slow and not gpu' $(SANITIZED_TESTS) $(ARGS); \
	export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}; \
	$(PY) -m pytest "$$@" & best=$$!; portable=0; \
	MEDCL_CPU_CAPABILITY=base MEDCL_GEMM=portable $(PY) -m pytest "$$@" -k 'not (pair_affinity and exact)' || portable=$$?; \
	wait $$best; exit $$portable

emulator: venv  ## every CUDA kernel on the host emulator against the reference, and under ASan, UBSan and TSan
	$(PY) -m pytest tests/test_emulator*.py $(ARGS)

aot: venv  ## every Triton kernel in every configuration, compiled for three architectures (make test: the heaviest)
	$(SPREAD) --dist load -q -m aot tests/test_triton_aot.py $(ARGS)

mutants: venv  ## planted bugs in the CUDA kernels: which check notices which, as a table (half an hour)
	PYTHONPATH=tests $(PY) tests/emulator_mutants.py

wheel: build  ## dist/medcl_kernels-*-py3-none-linux_x86_64.whl
	MEDCL_CUDA_ARCHS='$(WHEEL_ARCHS)' $(PIP) wheel -q --no-deps --no-build-isolation -w dist .

clean:  ## everything that was built, but not .venv
	rm -rf build dist *.egg-info medcl_kernels/*.so .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# ---- the virtual environment

# PyPI's torch for Linux is the CUDA build, several gigabytes that nothing here needs. So the default is
# the "+cpu" build: from a local wheel folder or mirror that pip knows, else from PyTorch's CPU index.
ifeq ($(origin TORCH)$(TORCH_INDEX)$(shell uname -s),fileLinux)
INSTALL_TORCH = $(PIP) install -q '$(TORCH)+cpu' 2>/dev/null \
	  || $(PIP) install --extra-index-url $(CPU_INDEX) '$(TORCH)+cpu' \
	  || { echo "no CPU build of $(TORCH) for this Python was found; name one with TORCH= (and TORCH_INDEX=):" \
	       "TORCH='$(TORCH)' takes PyPI's, on Linux the CUDA build of several gigabytes" >&2; exit 1; }
else
INSTALL_TORCH = $(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)'
endif

# a torch named on the command line is installed even into an existing .venv
$(VENV)/.stamp-torch: $(if $(filter command line,$(origin TORCH)),FORCE)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=..." if sys.version_info < (3, 10) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo 'installing $(TORCH) into $(VENV)'
	@$(INSTALL_TORCH)
	touch $@

# The constraints keep a dependency from replacing torch, or the Triton that came with it. The editable install compiles the library.
$(VENV)/.stamp-packages: $(VENV)/.stamp-torch pyproject.toml | build/options
	$(PIP) list --format freeze | grep -E '^(torch|triton)==' > $(VENV)/constraints.txt
	grep -q '^triton==' $(VENV)/constraints.txt || echo '$(TRITON)' >> $(VENV)/constraints.txt
	$(PIP) install -q 'setuptools>=77' wheel \
	  $$(command -v cmake >/dev/null || echo cmake) $$(command -v ninja >/dev/null || echo ninja)
	$(PIP) install -q -c $(VENV)/constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

# ---- the library

OPTIONS := MEDCL_CUDA=$(MEDCL_CUDA) ARCHS=$(MEDCL_CUDA_ARCHS) TORCH_DIR=$(MEDCL_TORCH_DIR) ARGS=$(CMAKE_ARGS)
build/options: FORCE
	@mkdir -p build; cmp -s - $@ <<< '$(OPTIONS)' || echo '$(OPTIONS)' > $@

$(LIBRARY): $(SOURCES) build/options | $(VENV)/.stamp-packages
	$(PY) setup.py -q build_ext --inplace
	touch $@

$(SANITIZED): $(SOURCES) | $(VENV)/.stamp-packages
	MEDCL_SANITIZE=1 MEDCL_CUDA=0 MEDCL_BUILD_DIR=build/asan \
	  $(PY) setup.py -q build_ext --build-lib build/asan/lib
	touch $@
