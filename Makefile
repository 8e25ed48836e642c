# Two commands do everything on a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
QUIET := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 RAY_USAGE_STATS_ENABLED=0

.PHONY: setup demo test lint format clean

setup: $(READY)  ## a virtual environment with the pinned versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[test]'
	touch $(READY)

demo: setup  ## the main job over twelve sample requests, on the CPU, with no download
	$(QUIET) $(BIN)/pia-batch demo

lint: setup  ## style, formatting, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: lint  ## every check and every test, fast ones first
	$(QUIET) $(BIN)/python -m pytest -m 'not gpu and not slow and not s3'
	$(QUIET) $(BIN)/python -m pytest -m 'not gpu and (slow or s3)'

format: setup  ## rewrite the code as `make lint` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and every output
	rm -rf .venv outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
