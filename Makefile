# make demo   compile the sample model with 8 bits, and with 8 and 4 bits, and compare both
# make test   lint, type check and test, without the tests that are marked as long
# make test-all   the same with all tests
# make docs   the reference of the Python API, build/docs/index.html
# make sbom   the wheel, and what it is made of as CycloneDX, dist/intaglio.cdx.json
# make audit  known vulnerabilities of the pinned versions, asked of PyPI
PYTHON ?= python3
BIN := .venv/bin
MARKED := not long
# Python compiles a module when it is first imported, and keeps the result: most of what is installed is never imported
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: demo test test-all types suite docs sbom audit

demo: .venv/.base
	$(BIN)/intaglio run samples/demo.yaml --set assign.budget.size=1 --out build/demo-w8a8
	$(BIN)/intaglio run samples/demo.yaml --out build/demo
	$(BIN)/intaglio diff build/demo-w8a8 build/demo --out build/demo.html

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory -j 2 types suite

test-all:
	$(MAKE) --no-print-directory test MARKED=

types:
	$(BIN)/mypy

suite:
	# one thread each: of two processes on two cores, threads would wait for each other
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "$(MARKED)"

docs: .venv/.dev
	$(BIN)/python .ci/reference.py build/docs

sbom: .venv/.dev
	$(BIN)/hatchling build --target wheel --clean
	$(BIN)/python .ci/sbom.py dist/intaglio-*.whl dist/intaglio.cdx.json

audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	# strict: a package that PyPI does not know is not one without vulnerabilities
	build/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

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
