# make demo   compile the sample model and name its reports
# make test   lint, type check and test
# make docs   the reference of the Python API, build/docs/index.html
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test docs

demo: .venv/.base
	$(BIN)/intaglio run samples/emoji-dit.yaml --out build/emoji-dit

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	# one thread each: of two processes on two cores, threads would wait for each other
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

docs: .venv/.dev
	$(BIN)/python .ci/reference.py build/docs

.venv/.python:
	$(PYTHON) -m venv .venv
	touch $@

.venv/.base: .venv/.python pyproject.toml constraints.txt
	$(INSTALL) -e '.[rtx]'
	touch $@

.venv/.dev: .venv/.python pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	# types of TensorRT and the schema of Triton alone: the one depends on TensorRT itself, the other on older libraries
	$(INSTALL) --no-deps tensorrt-stubs tritonclient
	touch $@
