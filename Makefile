# On a fresh clone, `make demo` and `make test` install what they need.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Bytecode is kept even where the environment says otherwise: else every process compiles the package, and pytest every test.
QUIET := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 RAY_USAGE_STATS_ENABLED=0 PYTHONDONTWRITEBYTECODE=

.PHONY: setup browser docs tables demo test test-long torture bench-check lint format lock dist release clean

setup: $(READY)  ## create a virtual environment with the pinned versions of constraints.txt

# cyclonedx-bom asks for rfc3987-syntax. Ray imports jsonschema, which builds its grammar: 0.8 s of CPU in each of Ray's processes.
$(READY): pyproject.toml constraints.txt
	@echo 'Setting up .venv; pip shows nothing for some two minutes.'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install -qq -c constraints.txt --no-deps einops spandrel  # without torchvision; see `upscale`
	$(BIN)/python -m pip uninstall -qq -y rfc3987-syntax
	touch $(READY)

browser: setup  ## install Chromium for the tests of the report, unless there is a Chromium or Chrome
	@for name in chromium chromium-browser google-chrome; do command -v $$name > /dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ]; then \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null; } \
			|| $(BIN)/playwright install --with-deps chromium; \
	else \
		$(BIN)/playwright install chromium; \
	fi

demo: setup  ## animate the sample requests on the CPU, without a download
	$(QUIET) $(BIN)/pia-batch demo

lint: setup  ## check style, formatting, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Two workers share the tests; tests/conftest.py keeps those together that start processes.
# Tests of real processes, servers and browsers run a second time if they fail, and are listed as reruns (-rR).
PYTEST := $(QUIET) $(BIN)/python -m pytest -rR

test: lint browser  ## run every check and every test but the long ones: ten minutes on two cores
	$(PYTEST) -n 2 --no-loadscope-reorder -m 'not gpu and not long'

test-long: browser  ## run the tests above some three seconds: the pages' commands, faults, kills and jobs on real processes
	$(PYTEST) -n 2 --no-loadscope-reorder -m 'long and not gpu'

RUNS ?= 1000
STACK ?= 0
SEED ?= 1
FUZZ ?= 5000
torture: setup  ## property tests on other examples, FUZZ damaged images, RUNS simulated and STACK whole-stack runs under faults
	$(PYTEST) -q --hypothesis-profile=other-examples -m 'not gpu and not long' $$(grep -rl '^@given' tests)
	$(QUIET) PIA_BATCH_FUZZ=$(FUZZ) $(BIN)/python -m pytest -q tests/media/test_images.py -k any_damage
	$(QUIET) $(BIN)/python tests/support/torture.py --runs $(RUNS) --stack $(STACK) --seed $(SEED)

docs: tables  ## build the site of docs/ into build/site; every warning is an error
	$(QUIET) $(BIN)/python -m sphinx -q -W --keep-going -b html -c docs -d build/doctrees . build/site

tables: setup  ## write the generated tables of docs/: keys, columns, error kinds, exit codes, metrics
	$(BIN)/python docs/reference.py

bench-check: setup  ## check speed ratios, each measured within one run: some minutes
	$(QUIET) $(BIN)/python tests/perf/check_speed.py

format: setup  ## rewrite the code so that `make lint` accepts it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every package that a deployment installs, CUDA's included, with its hashes and in the versions of constraints.txt.
# --upgrade: without it, packages that constraints.txt does not pin keep the versions of the old lock.
LOCK := $(BIN)/uv pip compile --upgrade pyproject.toml --extra aws --extra evaluate --extra gcp -c constraints.txt --generate-hashes --no-annotate \
	--python-platform x86_64-manylinux_2_28 --custom-compile-command 'make lock'

lock: setup  ## write requirements.lock for Linux on x86-64; it must be the same for the oldest and newest supported Python
	$(LOCK) --python-version 3.11 --output-file requirements.lock > /dev/null
	$(LOCK) --python-version 3.13 2> /dev/null | cmp - requirements.lock

SBOM := $(BIN)/python -W ignore::UserWarning:cyclonedx -m cyclonedx_py requirements requirements.lock --pyproject pyproject.toml \
	--mc-type application --output-reproducible --of JSON -o

# `dist/` holds what is published and nothing else; the bill of materials is in build/.
dist: setup  ## build sdist and wheel into dist/, check them, and write the software bill of materials of requirements.lock
	rm -rf build dist
	$(BIN)/python -m build --no-isolation > /dev/null
	$(BIN)/python -m twine check --strict dist/*
	mkdir -p build
	$(SBOM) build/pia-batch.cdx.json
	$(QUIET) PIA_BATCH_DIST=dist PIA_BATCH_PYTHONS=3.11,3.12,3.13 $(BIN)/python -m pytest -rs tests/system/test_distribution.py -m 'not gpu'
	ls -l dist build/pia-batch.cdx.json

release: setup  ## prepare VERSION: version numbers, the changelog's section; commit and tag are a person's
	$(BIN)/python jobs/release.py $(VERSION)

clean:  ## remove the environment and all outputs
	rm -rf .venv outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
