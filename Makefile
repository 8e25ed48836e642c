# Two commands do everything on a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
QUIET := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 RAY_USAGE_STATS_ENABLED=0

.PHONY: setup browser docs demo test test-long torture bench-check lint format lock clean

setup: $(READY)  ## a virtual environment with the pinned versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[test]'
	touch $(READY)

browser: setup  ## the Chromium that shows the report to its tests; nothing, if there is one
	@for name in chromium chromium-browser google-chrome; do command -v $$name > /dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ]; then \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null; } \
			|| $(BIN)/playwright install --with-deps chromium; \
	else \
		$(BIN)/playwright install chromium; \
	fi

demo: setup  ## the main job over twelve sample requests, on the CPU, with no download
	$(QUIET) $(BIN)/pia-batch demo

lint: setup  ## style, formatting, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# What meets real processes, servers and browsers is tried once more where it fails, and listed as a rerun.
test: lint browser  ## every check and every test, fast ones first
	$(QUIET) $(BIN)/python -m pytest -n 2 -m 'not gpu and not slow and not s3 and not long'
	$(QUIET) $(BIN)/python -m pytest --reruns 1 -rR -m 'not gpu and not long and (slow or s3)'

test-long: browser  ## pages followed word by word, drivers killed at random, commands copied from a page: a quarter of an hour
	$(QUIET) $(BIN)/python -m pytest -m 'long and not gpu'

RUNS ?= 1000
STACK ?= 0
SEED ?= 1
FUZZ ?= 5000
torture: setup  ## RUNS simulated runs, STACK whole-stack ones, under random faults from SEED on; FUZZ damaged images
	$(QUIET) PIA_BATCH_FUZZ=$(FUZZ) $(BIN)/python -m pytest -q tests/media/test_images.py -k any_damage
	$(QUIET) $(BIN)/python tests/support/torture.py --runs $(RUNS) --stack $(STACK) --seed $(SEED)

docs: setup  ## the tables of docs/ that come from the code: keys, columns, error kinds, exit codes, metrics
	$(BIN)/python docs/reference.py

bench-check: setup  ## what must stay fast, as ratios of two sides in one run: some minutes
	$(QUIET) $(BIN)/python tests/perf/check_speed.py

format: setup  ## rewrite the code as `make lint` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What a deployment installs: every package of constraints.txt that pia_batch needs, CUDA's included, with its hashes.
LOCK := $(BIN)/uv pip compile pyproject.toml --extra aws --extra gcp -c constraints.txt --generate-hashes --no-annotate \
	--python-platform x86_64-manylinux_2_28 --custom-compile-command 'make lock'

lock: setup  ## requirements.lock anew: Linux on x86-64, the same for the oldest and the newest Python that are supported
	$(BIN)/python -m pip install -qq -c constraints.txt uv
	$(LOCK) --python-version 3.11 --output-file requirements.lock > /dev/null
	$(LOCK) --python-version 3.13 2> /dev/null | cmp - requirements.lock

clean:  ## remove the environment and every output
	rm -rf .venv outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
