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

# One architecture, and code that drivers compile for newer ones: all of them take minutes. Empty: all.
CUDA_ARCH ?= -DCMAKE_CUDA_ARCHITECTURES=80

NATIVE  := CMakeLists.txt $(wildcard native/*.* native/cpu/*.* native/cuda/*.* native/gpu/*.* native/plugin/*.* native/tests/*.*)
CPP     := $(wildcard native/*.cpp native/*.h native/cpu/*.cpp native/cpu/*.h native/cpu/*.inl native/tests/*.cpp native/tests/*.h \
	native/plugin/*.cpp native/plugin/*.h native/windows/*.h native/fuzz/*.cpp native/fuzz/*.h native/gpu/*.cpp native/gpu/*.h native/cuda/*.cu native/cuda/*.cuh native/cuda/*.h \
	native/cuda/tests/*.cpp native/cuda/tests/*.cu native/cuda/tests/*.h native/cuda/tests/emulation/*.cpp native/cuda/tests/emulation/*.h)
BUILD_TOOLS := scikit-build-core cffi cmake ninja

.PHONY: help setup demo test test-tools check docs format lint types tidy sanitize sanitize-threads races fuzz bench bench-types bench-plugin layouts selection captures wheel test-wheel clean

help:
	@echo "make demo       find hidden facts in a long document, dense against FASA (TOKENS=$(TOKENS))"
	@echo "make test       the tests"
	@echo "make test-tools  the plugin inside llama.cpp's own tools, which are built once; half an hour"
	@echo "make check      format, lint, types, docs, clang-tidy, native tests under sanitizers, races"
	@echo "make docs       the documentation as a site, into build/site"
	@echo "make fuzz       random and hostile inputs for FUZZ_SECONDS=$(FUZZ_SECONDS); needs clang and atheris"
	@echo "make bench      decode speed at depth, dense against FASA, into docs/bench"
	@echo "make bench-types  the same at 30,000 tokens for all 81 pairs of K and V types"
	@echo "make bench-plugin  stock llama-bench as it is, with the plugin idle, and with FASA"
	@echo "make layouts    the same for index layouts from 3 to 65 bytes per token"
	@echo "make selection  answers, attention mass and KLD of every selector, into docs/bench and docs/images"
	@echo "make captures   pictures of the commands and of the page of pyfasa serve, into docs/images; needs chromium"
	@echo "make wheel      an sdist, and a wheel from it, into dist; WHEEL_CUDA=ON: with the CUDA kernels (nvcc, minutes)"
	@echo "make test-wheel  the tests on that wheel in an environment of its own"
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
	CMAKE_ARGS=$(CUDA_ARCH) $(BIN)/pip install --quiet --no-build-isolation --editable '.[test]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/pyfasa.stamp
	CMAKE_ARGS=$(CUDA_ARCH) $(BIN)/pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

setup: $(VENV)/pyfasa.stamp

# ---- for users -------------------------------------------------------------------------------------------

demo: setup
	$(BIN)/pyfasa demo --tokens $(TOKENS)

test: setup
	$(BIN)/pytest

TOOLS := build/tools

$(TOOLS)/bin/llama-server: $(VENV)/llama.stamp tests/tools/build.sh
	tests/tools/build.sh $(abspath $(BIN)/pip) $(abspath $(BIN)/cmake) $(abspath $(BIN)/ninja) '$(LLAMA)' $(abspath $(TOOLS))

test-tools: setup $(TOOLS)/bin/llama-server
	$(BIN)/pip install --quiet 'openai>=1.50'
	PYFASA_TOOLS=$(TOOLS)/bin $(BIN)/pytest tests/tools

# ---- for contributors ------------------------------------------------------------------------------------

check: lint types docs tidy sanitize sanitize-threads races

docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

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
		-DPython_EXECUTABLE=$(abspath $(BIN)/python) -DPYFASA_PYTHON=OFF -DPYFASA_CUDA=OFF > /dev/null

tidy: build/tidy/build.ninja
	$(BIN)/clang-tidy --quiet -p build/tidy $(wildcard native/*.cpp native/gpu/*.cpp native/plugin/*.cpp) native/cpu/portable.cpp

sanitize: $(VENV)/dev.stamp
	CMAKE_ARGS= $(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPYFASA_PYTHON=OFF -DPYFASA_CUDA=OFF \
		-DPYFASA_TESTS=ON -DPYFASA_SANITIZE=address,undefined > /dev/null
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure

# GCC 12's ThreadSanitizer finds no room among randomized addresses. It does not see the barriers of OpenMP either, so
# graphs run on one thread here, but for those that test_threads.cpp runs on threads of its own.
NO_RANDOM := $(shell setarch -R true 2> /dev/null && echo setarch -R)

sanitize-threads: $(VENV)/dev.stamp
	CMAKE_ARGS= $(BIN)/cmake -S . -B build/threads -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPYFASA_PYTHON=OFF -DPYFASA_CUDA=OFF \
		-DPYFASA_TESTS=ON -DPYFASA_SANITIZE=thread > /dev/null
	$(BIN)/cmake --build build/threads
	OMP_THREAD_LIMIT=1 $(NO_RANDOM) $(BIN)/ctest --test-dir build/threads --output-on-failure

# Of the CUDA kernels, without a GPU.
races: $(VENV)/dev.stamp
	CMAKE_ARGS= $(BIN)/cmake -S . -B build/races -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DPython_EXECUTABLE=$(abspath $(BIN)/python) -DPYFASA_PYTHON=OFF -DPYFASA_CUDA=OFF -DPYFASA_TESTS=ON > /dev/null
	$(BIN)/cmake --build build/races --target fasa_emulated_races
	$(BIN)/ctest --test-dir build/races -R fasa_emulated_races --output-on-failure

# A quarter of the time each for the two native fuzzers, half for the readers of files.
CLANG        ?= $(firstword $(notdir $(wildcard /usr/bin/clang /usr/bin/clang-[1-9][0-9])))
FUZZ_SECONDS ?= 600
FUZZ         := -len_control=0 -verbosity=0 -print_funcs=0 -print_final_stats=1 -artifact_prefix=build/fuzz/

fuzz: $(VENV)/dev.stamp
	mkdir -p build/fuzz/stages build/fuzz/session build/fuzz/files
ifeq ($(CLANG),)
	@echo "The native fuzzers are skipped: clang with libFuzzer is needed (Debian: apt install clang libclang-rt-14-dev)."
else
	CMAKE_ARGS= $(BIN)/cmake -S . -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DCMAKE_C_COMPILER=$(CLANG) -DCMAKE_CXX_COMPILER=$(subst clang,clang++,$(CLANG)) \
		-DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPYFASA_PYTHON=OFF -DPYFASA_CUDA=OFF \
		-DPYFASA_FUZZ=ON -DPYFASA_SANITIZE=address,undefined,float-cast-overflow > /dev/null
	$(BIN)/cmake --build build/fuzz
	for name in stages session; do \
		build/fuzz/native/fuzz/fuzz_$$name $(FUZZ) -max_len=1000 -max_total_time=$$(($(FUZZ_SECONDS) / 4)) \
			build/fuzz/$$name || exit 1; \
	done
endif
	@if $(BIN)/python -c "import atheris" 2> /dev/null; then \
		$(BIN)/python tests/fuzz_profile.py $(FUZZ) -max_total_time=$$(($(FUZZ_SECONDS) / 2)) build/fuzz/files; \
	else \
		echo "The fuzzer of the file readers is skipped: atheris is needed ($(BIN)/pip install atheris)."; \
	fi

# ---- figures ---------------------------------------------------------------------------------------------

bench: setup
	mkdir -p docs/bench
	for type in q8_0 f16; do \
		$(BIN)/pyfasa bench -m $(MODEL) -d 1000,8192,30000 -ctk $$type -ctv $$type -t $(THREADS) -n 32 -r 5 -o csv \
			> docs/bench/decode-$$type.csv || exit 1; \
	done
	$(BIN)/python docs/bench/rows.py $(MODEL) > docs/bench/rows.csv
	$(BIN)/python docs/bench/tables.py

bench-types: setup
	$(BIN)/pyfasa bench -m $(MODEL) -d 30000 -ctk all -ctv all -t $(THREADS) -n 16 -r 2 -o csv > docs/bench/decode-types.csv
	$(BIN)/python docs/bench/tables.py

bench-plugin: setup $(TOOLS)/bin/llama-server
	$(BIN)/python docs/bench/plugin.py $(TOOLS)/bin $(MODEL) > docs/bench/plugin.csv
	$(BIN)/python docs/bench/tables.py

# Answers, attention mass and KLD of every selector: one and a half hours on two cores; results that are there are kept.
SELECTION := build/selection
EVAL      := $(BIN)/pyfasa eval
ANSWERS   := --task needle --questions 100 --budget 64,256,1024 -t $(THREADS)
SIZES     := allocation:2,allocation:3,allocation:6,allocation:10,allocation:20,variance:3,variance:6,variance:10,variance:20
PAPER     := agreement:6,agreement:10,agreement:20,greedy:6,greedy:10,greedy:20
OTHERS    := allocation:4,agreement:3,greedy:3,random:20,lowfreq:10,lowfreq:20
RIVALS    := quest:26,quest:13,sparq:5,double-sparsity:16,streaming
MASS      := oracle,$(SIZES),allocation:4,agreement:3,$(PAPER),random:3,random:10,random:20,quest:64,quest:26,quest:13
MASS      := $(MASS),sparq:3,sparq:5,sparq:10,double-sparsity:8,double-sparsity:16,double-sparsity:36

selection: setup
	mkdir -p $(SELECTION)
	$(EVAL) $(MODEL) $(ANSWERS) --tokens 8000,16000 --results $(SELECTION)/ours.jsonl \
		--setting dense,$(SIZES),$(PAPER),random:10
	$(EVAL) $(MODEL) $(ANSWERS) --tokens 8000 --results $(SELECTION)/ours.jsonl --setting $(OTHERS)
	$(EVAL) $(MODEL) $(ANSWERS) --tokens 8000,16000 --results $(SELECTION)/rivals.jsonl --setting oracle,$(RIVALS)
	$(EVAL) $(MODEL) $(ANSWERS) --tokens 8000 --results $(SELECTION)/rivals.jsonl \
		--setting sparq:10,double-sparsity:36,snapkv,h2o
	$(EVAL) $(MODEL) --task kld --tokens 8000 --texts 8 --budget 64,256,1024,2048 -t $(THREADS) \
		--results $(SELECTION)/kld.jsonl --setting dense,oracle,allocation:6,allocation:10,allocation:20,quest:26,quest:13
	$(BIN)/python docs/bench/outliers.py $(MODEL) $(SELECTION)/outliers.gguf
	$(EVAL) $(SELECTION)/outliers.gguf --task needle --tokens 8000 --questions 100 --budget 256,1024 -t $(THREADS) \
		--results $(SELECTION)/outliers.jsonl \
		--setting dense,oracle,allocation:6,allocation:10,allocation:20,variance:10,quest:26,quest:13
	$(EVAL) $(MODEL) --task mass --tokens 8000,16000 --texts 3 --budget 64,256,1024 -t $(THREADS) \
		--results $(SELECTION)/mass.jsonl --setting $(MASS)
	$(BIN)/pyfasa inspect $(MODEL) --plot docs/images/profile.png
	$(BIN)/python docs/bench/selection.py $(SELECTION)/*.jsonl
	$(BIN)/python docs/bench/tables.py

layouts: setup
	$(BIN)/python docs/bench/layouts.py $(MODEL) $(THREADS) > docs/bench/layouts.csv
	$(BIN)/python docs/bench/tables.py

captures: setup
	$(BIN)/pip install --quiet pyte
	$(BIN)/python docs/images/terminal.py
	$(BIN)/python docs/images/page.py $(MODEL)

# ---- release ---------------------------------------------------------------------------------------------

# OFF, so that a wheel does not depend on what the machine happens to have. Kernels are for all GPUs, not CUDA_ARCH.
WHEEL_CUDA ?= OFF

wheel: $(VENV)/llama.stamp
	$(BIN)/pip install --quiet build
	rm -rf dist
	CMAKE_ARGS=-DPYFASA_CUDA=$(WHEEL_CUDA) $(BIN)/python -m build --no-isolation
	$(BIN)/python tests/wheel/contents.py --cuda $(WHEEL_CUDA) dist/*.whl

# A folder with a wheel of llama-cpp-python; without one it is built once more, as for any user.
LLAMA_WHEELS ?=
CLEAN := build/test-wheel

# Beside the tests lies all that they read, but not pyfasa/: what is imported is the installed package.
test-wheel: wheel
	rm -rf $(CLEAN)
	$(PYTHON) -m venv $(CLEAN)/venv
	$(CLEAN)/venv/bin/pip install --quiet --no-cache-dir $(addprefix --find-links ,$(LLAMA_WHEELS)) "$$(ls dist/*.whl)[test]"
	mkdir $(CLEAN)/tree
	cp -r *.md LICENSE Makefile mkdocs.yml pyproject.toml docs models native tests $(CLEAN)/tree
	cd $(CLEAN)/tree && ../venv/bin/python -I -c "import pyfasa; print('testing', pyfasa.__file__)"
	cd $(CLEAN)/tree && ../venv/bin/pytest -p no:cacheprovider --rootdir .

clean:
	rm -rf build dist
