PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BENCH_JSON ?= .benchmarks/bench.json

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPED := .mypy_cache/installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench clean

help:
	@echo 'make demo     multiply, differentiate, train and time on this machine, checked against torch'
	@echo 'make test     the whole test suite'
	@echo 'make lint     ruff and mypy'
	@echo 'make format   let ruff fix and format the sources'
	@echo 'make bench    benchmarks against torch.mm, saved to BENCH_JSON ($(BENCH_JSON))'
	@echo 'make clean    remove $(VENV) and everything generated'
	@echo
	@echo "ARGS='...' goes to the command, as in: make test ARGS='-m gpu'"
	@echo 'PYTHON=python3.12 chooses the interpreter of a new $(VENV)'

# setuptools goes first, at its pin, so that the build needs no environment of its own.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt setuptools
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/matmul-grad check $(ARGS)

# Two at a time; pytest-benchmark, which would warn beside that, has nothing to time here.
test: $(STAMP)
	$(BIN)/python -m pytest -p no:benchmark -n 2 --dist worksteal $(ARGS)

# mypy knows no package-dir: it reads the layout as installed, laid out in links.
lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/matmul_grad/kernels
	@ln -s "$(CURDIR)"/matmul_grad/*.py "$(CURDIR)"/matmul_grad/py.typed $(TYPED)/matmul_grad
	@ln -s "$(CURDIR)"/matmul_grad/bench "$(CURDIR)"/matmul_grad/gpu_report "$(CURDIR)"/matmul_grad/tuning $(TYPED)/matmul_grad
	@ln -s "$(CURDIR)"/matmul_grad/kernels/*.py "$(CURDIR)"/kernels/?pu "$(CURDIR)"/kernels/native $(TYPED)/matmul_grad/kernels
	@ln -s "$(CURDIR)"/bench "$(CURDIR)"/examples/*.py $(TYPED)
	cd $(TYPED) && "$(CURDIR)"/$(BIN)/mypy --config-file "$(CURDIR)"/pyproject.toml --cache-dir "$(CURDIR)"/.mypy_cache .

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)
	@mkdir -p $(dir $(BENCH_JSON))
	$(BIN)/python -m pytest bench --benchmark-json=$(BENCH_JSON) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
