# make demo      install into .venv and show the whole thing on real data, three minutes after the installs
# make test      install into .venv and run the tests; test-all adds the slow ones
# make build     recompile the engine in place, only what changed
# make lint | sanitize | sanitize-threads | bench | clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# PyPI's torch for Linux brings gigabytes of GPU packages; this index has the CPU build.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ENGINE := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc')

.PHONY: demo test test-all build lint sanitize sanitize-threads bench clean

demo: $(VENV)/installed
	$(BIN)/dynprune demo --out demo-output

test: $(VENV)/installed $(VENV)/models
	$(BIN)/python -m pytest

test-all: $(VENV)/installed $(VENV)/models $(VENV)/bench
	$(BIN)/python -m pytest --slow

build: $(VENV)/build-tools
	$(BIN)/python setup.py -q build_clib build_ext --inplace

lint: $(VENV)/ruff
	$(BIN)/ruff check .

# The whole package is built once more, apart, and the tests of kernels, executor and bindings run on that copy under both sanitizers. Wrong
# descriptions ask for more memory than there can be; where it is refused, AddressSanitizer is to leave that to the code.
SANITIZED := ../../tests/kernels ../../tests/test_executor.py ../../tests/test_bindings.py
sanitize: $(VENV)/installed $(VENV)/build-tools
	DYNPRUNE_SANITIZE=address $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	cd build/sanitize && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" PYTHONPATH=lib \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	  ../../$(BIN)/python -m pytest --capture=sys -p no:cacheprovider -c ../../pyproject.toml $(SANITIZED)

# The same under the thread sanitizer, on all that runs on several threads: once so that no chunk is computed twice and nothing may race,
# once as in earnest (csrc/base/thread_sanitizer.h). Other processes, ends of the interpreter and hundreds of threads are beyond the sanitizer.
THREADED := ../../tests/test_executor.py ../../tests/kernels -k 'thread and kernels or test_executor and not (1000 or fork or spawn or interpreter)'
sanitize-threads: $(VENV)/installed $(VENV)/build-tools
	DYNPRUNE_SANITIZE=thread $(BIN)/python setup.py -q build --build-base build/sanitize-threads --build-lib build/sanitize-threads/lib
	cd build/sanitize-threads && for patient in "DYNPRUNE_PATIENT=1" ""; do \
	  env $$patient LD_PRELOAD="$$(g++ -print-file-name=libtsan.so) $$(g++ -print-file-name=libstdc++.so)" PYTHONPATH=lib \
	  TSAN_OPTIONS=ignore_noninstrumented_modules=1:exitcode=66 \
	  ../../$(BIN)/python -m pytest --capture=sys -p no:cacheprovider -c ../../pyproject.toml $(THREADED) || exit 1; done

bench: $(VENV)/installed $(VENV)/models $(VENV)/bench
	$(BIN)/python bench/bench_models.py
	$(BIN)/python bench/bench_kernels.py
	$(BIN)/python bench/bench_overhead.py

clean:
	rm -rf build dist demo-output *.egg-info dynprune/runtime/_C*.so $(VENV)/installed

# ---- the environment; each file below records an install and is redone only when what it depends on changed

$(VENV)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed, got: $$($(PYTHON) --version)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "The venv module is missing; run: sudo apt install python3-venv python3-dev"; exit 1; }
	@command -v g++ >/dev/null || { echo "A C++17 compiler is missing; run: sudo apt install g++"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH)"
	@$(BIN)/pip install -q --no-deps --retries 0 --index-url $(TORCH_INDEX) '$(TORCH)' 2>/dev/null \
	  || echo "not found at $(TORCH_INDEX); taking it from the package index that pip is set to"
	$(BIN)/pip install -q '$(TORCH)'
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml $(ENGINE)
	@$(BIN)/python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
	  || { echo "Python.h is missing; run: sudo apt install python3-dev"; exit 1; }
	$(BIN)/pip install -q -e '.[demo,test]'
	@touch $@

$(VENV)/build-tools: $(VENV)/torch
	$(BIN)/pip install -q 'setuptools>=77' wheel 'pybind11>=2.13'
	@touch $@

# Libraries of models, and Lightning. torchvision's pin would replace torch; its models and timm's need only the Python part, which runs
# beside any torch. Without one of them its tests are skipped.
$(VENV)/models: $(VENV)/installed
	$(BIN)/pip install -q --no-deps torchvision timm || echo "torchvision or timm could not be installed; the tests of their models are skipped"
	$(BIN)/pip install -q transformers lightning || echo "transformers or lightning could not be installed; their tests are skipped"
	@touch $@

$(VENV)/bench: $(VENV)/installed
	$(BIN)/pip install -q openvino
	@touch $@

$(VENV)/ruff: $(VENV)/torch
	$(BIN)/pip install -q ruff
	@touch $@
