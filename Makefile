# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OLDEST := .venv-oldest

.PHONY: demo test test-oldest quality sanitize style docs bench-convert bench-routing bench-cache bench-kernels bench-generate bench-cpu bench-parallel bench-host-memory bench-gradients bench-lora bench-adapt-router clean

demo: $(READY)
	$(BIN)/qmoe demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# the suite on the oldest releases that pyproject.toml allows
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# needs a GPU, and compute-sanitizer of the CUDA toolkit; the first run compiles the kernels
SANITIZED := $(BIN)/python -m pytest -m gpu -k "replayed_while_workers_sleep or 640-misses-1" \
    tests/kernels/test_mailbox.py tests/kernels/test_paging.py
sanitize: $(READY)
	$(SANITIZED)
	compute-sanitizer --tool memcheck --error-exitcode 9 $(SANITIZED)
	compute-sanitizer --tool racecheck --error-exitcode 9 $(SANITIZED)

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# docs/models.md, from building and running every experts class of the installed transformers
docs: $(READY)
	$(BIN)/python tests/qmoe/zoo.py > docs/models.md.partial
	mv docs/models.md.partial docs/models.md

# needs 30 GB of free disk; BENCH_DIR says where
bench-convert: $(READY)
	$(BIN)/python benchmarks/convert.py $(if $(BENCH_DIR),--folder $(BENCH_DIR))

# needs no GPU; four minutes
bench-routing: $(READY)
	$(BIN)/python -m benchmarks.routing
	$(BIN)/python -m benchmarks.routing --draw

# needs a GPU with 80 GB and 100 GB of free host memory; ten minutes
bench-cache: $(READY)
	$(BIN)/python -m benchmarks.cache
	$(BIN)/python -m benchmarks.cache --draw

# needs a GPU with 140 GB; five minutes
bench-kernels: $(READY)
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.kernels --draw

# needs a GPU with 140 GB; three minutes
bench-generate: $(READY)
	$(BIN)/python -m benchmarks.generate
	$(BIN)/python -m benchmarks.generate --draw

# needs two GPUs with 140 GB each
bench-parallel: $(READY)
	$(BIN)/python -m benchmarks.parallel
	$(BIN)/python -m benchmarks.parallel --draw

# needs a GPU with 40 GB, and 10 GB of free disk; two minutes
bench-host-memory: $(READY)
	$(BIN)/python -m benchmarks.host_memory

# needs a GPU with 60 GB; half a minute
bench-gradients: $(READY)
	$(BIN)/python -m benchmarks.gradients

# needs a GPU with 140 GB; the part without one takes ten minutes
bench-lora: $(READY)
	$(BIN)/python -m benchmarks.lora
# needs no GPU; half an hour
bench-adapt-router: $(READY)
	$(BIN)/python -m benchmarks.adapt_router

# needs no GPU; 12 GB of memory, ten minutes
bench-cpu: $(READY)
	$(BIN)/python -m benchmarks.cpu
	$(BIN)/python -m benchmarks.cpu --draw

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "qmoe needs Python 3.10 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test,quality,bench]"
	@touch $@

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt --editable ".[test]"
	@touch $@

clean:
	rm -rf .venv $(OLDEST)
