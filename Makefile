PYTHON ?= python3
TORCH ?=
VENV ?= .venv$(if $(TORCH),-torch-$(TORCH))
ARGS ?=
BENCH_JSON ?= .benchmarks/bench.json

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PINS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
# The interpreter of triton 3.6, which torch 2.11 brings, fails on numpy 2.4.
NUMPY := $(if $(filter 2.11.%,$(TORCH)),numpy<2.4)
REPORT := $(VENV)/report.xml
TYPED := .mypy_cache/installed

.DEFAULT_GOAL := help
.PHONY: help demo test support lint format bench docs wheel clean

help:
	@echo 'make demo     multiply, differentiate, train and time on this machine, checked against torch'
	@echo 'make test     the whole test suite'
	@echo "make test ARGS='-m smoke'   a minute of it, for the edit loop"
	@echo "make test ARGS='-m slow'    what it leaves out: long tests, and the whole of large grids"
	@echo 'make support  the same, and what passed goes into the table in README.md'
	@echo 'make lint     ruff and mypy'
	@echo 'make format   let ruff fix and format the sources'
	@echo 'make bench    benchmarks against torch.mm, saved to BENCH_JSON ($(BENCH_JSON))'
	@echo 'make docs     the documentation as a site, in build/site'
	@echo 'make wheel    the wheels, in dist: for any platform, and for Linux on x86-64 with the CPU kernels compiled'
	@echo 'make clean    remove the environments and everything generated'
	@echo
	@echo "ARGS='...' goes to the command, as in: make test ARGS='-m gpu'"
	@echo 'PYTHON=python3.12 chooses the interpreter of a new $(VENV)'
	@echo 'TORCH=2.15.0 runs with that version of torch, in .venv-torch-2.15.0: with CUDA libraries, 6 GB'

# setuptools goes first, so that the build needs no environment of its own, and torch, which alone fixes triton's version:
# another torch than the pinned one brings the triton, torchvision, CUDA libraries and limit on setuptools that it asks for.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifneq ($(TORCH),)
	grep -vE '^(torch|torchvision|triton|setuptools$(NUMPY:numpy%=|numpy)|cuda-[a-z]+|nvidia-[a-z]+)==' constraints.txt >$(PINS)
	printf '%s\n' 'torch==$(TORCH)' 'setuptools>=77' $(NUMPY:%='%') >>$(PINS)
endif
	$(BIN)/python -m pip install -c $(PINS) setuptools torch
	$(BIN)/python -m pip install -c $(PINS) --no-build-isolation -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/matmul-grad check $(ARGS)

# Two at a time; pytest-benchmark, which would warn beside that, has nothing to time here.
test: $(STAMP)
	$(BIN)/python -m pytest -p no:benchmark -n 2 --dist worksteal $(ARGS)

# A run with failures is written down too; it is `make test` that fails.
support: $(STAMP)
	-$(BIN)/python -m pytest -p no:benchmark -n 2 --dist worksteal --junit-xml=$(REPORT) $(ARGS)
	$(BIN)/python tests/support_table.py $(REPORT)

# mypy knows no package-dir: it reads the layout as installed, laid out in links.
lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/matmul_grad/kernels
	@ln -s "$(CURDIR)"/matmul_grad/*.py "$(CURDIR)"/matmul_grad/py.typed $(TYPED)/matmul_grad
	@ln -s "$(CURDIR)"/bench $(TYPED)/matmul_grad
	@ln -s "$(CURDIR)"/matmul_grad/kernels/*.py "$(CURDIR)"/kernels/?pu "$(CURDIR)"/kernels/native $(TYPED)/matmul_grad/kernels
	@ln -s "$(CURDIR)"/examples/*.py "$(CURDIR)"/examples/gemm/*.py "$(CURDIR)"/docs/tools/*.py "$(CURDIR)"/tools/*.py $(TYPED)
	cd $(TYPED) && "$(CURDIR)"/$(BIN)/mypy --config-file "$(CURDIR)"/pyproject.toml --cache-dir "$(CURDIR)"/.mypy_cache .

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)
	@mkdir -p $(dir $(BENCH_JSON))
	$(BIN)/python -m pytest bench --benchmark-json=$(BENCH_JSON) $(ARGS)

# Strict: a link, an anchor or a name that leads nowhere fails.
docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict --quiet $(ARGS)
	@echo 'open build/site/index.html, or, for its search too: python3 -m http.server -d build/site'

# setuptools would pack again what an earlier build left in build/lib.
wheel: $(STAMP)
	rm -rf build/lib build/bdist.* build/pure
	$(BIN)/python -m build --wheel --no-isolation --outdir build/pure
	$(BIN)/python tools/add_objects.py build/pure/*.whl --out dist $(ARGS)
	cp build/pure/*.whl dist

clean:
	rm -rf $(VENV) .venv-torch-* build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
