# `make demo` and `make test` set everything up by themselves; a second call starts at once.
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
TOKENS  ?= 16000
THREADS ?= $(shell nproc)
MODEL   := models/pyfasa-tiny-12m-Q8_0.gguf

# The llama-cpp-python that pyfasa is tested with, from the one place that names it.
LLAMA := $(shell sed -n 's/^ *"\(llama-cpp-python==[^"]*\)",*$$/\1/p' pyproject.toml | head -n 1)

# GCC 12's AMX code crashes on CPUs that have AMX; pip's wheel cache does not look at CMAKE_ARGS, so it is not used.
ifeq ($(shell uname -m),x86_64)
NO_AMX := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
export CMAKE_ARGS := -DCMAKE_C_FLAGS='$(NO_AMX)' -DCMAKE_CXX_FLAGS='$(NO_AMX)'
endif

NATIVE  := CMakeLists.txt $(wildcard native/*.* native/cpu/*.* native/tests/*.*)
CPP     := $(wildcard native/*.cpp native/*.h native/cpu/*.cpp native/cpu/*.h native/cpu/*.inl native/tests/*.cpp native/tests/*.h)
BUILD_TOOLS := scikit-build-core cffi cmake ninja

.PHONY: help setup demo test check format lint types tidy sanitize bench retrieval clean

help:
	@echo "make demo       find hidden facts in a long document, dense against FASA (TOKENS=$(TOKENS))"
	@echo "make test       the tests"
	@echo "make check      format, lint, types, clang-tidy, native tests under sanitizers"
	@echo "make bench      decode speed at depth, dense against FASA, into docs/bench"
	@echo "make retrieval  retrieval table on fresh documents, into docs/bench"
	@echo "make format     rewrite sources in the project's format"
	@echo "make clean      remove builds, keep the environment"

# ---- environment -----------------------------------------------------------------------------------------

$(VENV)/llama.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(BUILD_TOOLS)
	@echo "building $(LLAMA): some minutes, once"
	$(BIN)/pip install --quiet --no-cache-dir --no-binary llama-cpp-python '$(LLAMA)'
	touch $@

$(VENV)/pyfasa.stamp: $(VENV)/llama.stamp $(NATIVE)
	CMAKE_ARGS= $(BIN)/pip install --quiet --no-build-isolation --editable '.[test]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/pyfasa.stamp
	CMAKE_ARGS= $(BIN)/pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

setup: $(VENV)/pyfasa.stamp

# ---- for users -------------------------------------------------------------------------------------------

demo: setup
	$(BIN)/pyfasa demo --tokens $(TOKENS)

test: setup
	$(BIN)/pytest

# ---- for contributors ------------------------------------------------------------------------------------

check: lint types tidy sanitize

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

types: $(VENV)/dev.stamp
	$(BIN)/mypy

build/tidy/build.ninja: $(VENV)/dev.stamp CMakeLists.txt
	CMAKE_ARGS= $(BIN)/cmake -S . -B build/tidy -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DPython_EXECUTABLE=$(abspath $(BIN)/python) -DPYFASA_PYTHON=OFF > /dev/null

tidy: build/tidy/build.ninja
	$(BIN)/clang-tidy --quiet -p build/tidy $(wildcard native/*.cpp) native/cpu/portable.cpp

sanitize: $(VENV)/dev.stamp
	CMAKE_ARGS= $(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPYFASA_PYTHON=OFF \
		-DPYFASA_TESTS=ON -DPYFASA_SANITIZE=address,undefined > /dev/null
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure

# ---- figures ---------------------------------------------------------------------------------------------

bench: setup
	mkdir -p docs/bench
	for type in q8_0 f16; do \
		$(BIN)/pyfasa bench -m $(MODEL) -d 1000,8192,30000 -ctk $$type -ctv $$type -t $(THREADS) -n 32 -r 5 -o csv \
			> docs/bench/decode-$$type.csv || exit 1; \
	done
	$(BIN)/python docs/bench/tables.py

retrieval: setup
	mkdir -p docs/bench
	$(BIN)/python -m pyfasa.evaluate $(MODEL) --tokens 8000 --questions 40 \
		--csv docs/bench/retrieval-8000.csv
	$(BIN)/python docs/bench/tables.py

clean:
	rm -rf build dist
