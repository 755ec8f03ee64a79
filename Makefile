# make demo   fine-tune a real language model at inference memory, on this machine's CPU
# make test   lint, types, documentation, tests, and the GPU kernels compiled ahead of time
# make docs   the documentation, under site/
# make gpu    what this machine's GPU says of the package: promises, figures, and whether they hold
# make bench  the benchmarks, with their JSON under bench/results/
#
# Each installs what it needs into .venv first; only Python (3.10 or later) and make are needed. But
# `make gpu` downloads nothing: it takes PYTHON's own torch, transformers and rich.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 2

# OpenMP's threads sleep while they wait. Spinning, they take the processor from each other and from
# every other process: one busy neighbour on two cores makes a step twenty times as slow.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint types docs gpu bench format clean

demo: $(VENV)/demo
	$(BIN)/python examples/fetch_demo_assets.py
	$(BIN)/python examples/finetune_sentiment.py

# A thread a worker: tests are many and small, and workers' threads would share each other's cores.
# A worker that has run all of its tests takes over some of another's, so that none ends late.
test: lint types docs
	OMP_NUM_THREADS=1 ZOOPT_TEST_SITE=site $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/test
	$(BIN)/mypy

# Strict: a broken link, a page outside the menu or a name that is not there fails.
docs: $(VENV)/test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

gpu:
	PYTHONPATH=. $(PYTHON) -c "from zoopt.cli import main; raise SystemExit(main())" \
		doctor --gpu --output bench/results

bench: $(VENV)/test
	$(BIN)/python -m bench.sass --json bench/results/sass.json
	$(BIN)/zoopt bench kernels --json bench/results/kernels_cpu.json
	$(BIN)/zoopt bench step --repeats 5 --json bench/results/step_cpu.json --plot bench/results/step_cpu.png
	$(BIN)/zoopt bench step --repeats 3 --json bench/results/step_zeroth_order_cpu.json \
		--optimizers mezo-in-place lozo lozo-momentum subzero zoadam-window forwardgrad
	$(BIN)/python -m bench.lowrank_step --sizes 60m 130m 350m 1b --repeats 5 --refreshes 3 --json bench/results/lowrank_step_cpu.json
	$(BIN)/python -m bench.lowrank_step --sizes 7b --repeats 3 --refreshes 1 --json bench/results/lowrank_step_7b_cpu.json
	$(BIN)/python -m bench.precision --json bench/results/precision.json --plot bench/results/precision.png
	$(BIN)/python -m bench.paper_memory --json bench/results/paper_memory.json
	$(BIN)/zoopt plan llama-7b --gpu 24GB --json bench/results/plan_llama7b.json
	$(BIN)/zoopt bench memory --json bench/results/memory_cpu.json --plot bench/results/memory_cpu.png

format: $(VENV)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first: with the pinned build in place, nothing else pulls one with gigabytes of CUDA.
$(VENV)/torch: constraints.txt
	@echo "making $(VENV) and installing torch: 200 MB, a minute or two ..."
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "pip>=23" "setuptools>=77" torch
	touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	@echo "installing the package and what the demo needs ..."
	$(INSTALL) --editable ".[demo]"
	touch $@

$(VENV)/test: $(VENV)/torch pyproject.toml
	@echo "installing the package and what its tests need ..."
	$(INSTALL) --editable ".[test]"
	touch $@ $(VENV)/demo

clean:
	rm -rf $(VENV) .data out build site .mypy_cache .pytest_cache .ruff_cache .hypothesis
