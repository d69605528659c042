# make demo   DPO beside LPC-DPO on built-in pairs: a table and a picture, in minutes
# make demo-smollm2   a short fit of SmolLM2-135M-Instruct on built-in pairs
# make test   the whole test suite, as CI runs it
# make test-fast   its quick part, in under two minutes
# make test-resume   every chain of up to three stops of a run, by SIGTERM and SIGKILL; hours. CHAINS=20 draws 20 of them;
#                    SEED=1 draws others
# make bench  this project and TRL side by side; BENCH='--data my_pairs.jsonl' for your own pairs
# make bench-gpu  the same on one GPU in eight minutes, without a hub and without pretrained weights
# make lint   ruff and mypy
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
MODEL := models/SmolLM2-135M-Instruct

.PHONY: demo demo-smollm2 test test-fast test-resume bench bench-gpu lint format clean

# Where there is no python3.11, whatever python3 there is; pip says if it is too old.
$(BIN)/python:
	$$(command -v $(PYTHON) || command -v python3) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	touch $@

$(MODEL)/config.json: | $(VENV)/.installed
	$(BIN)/lpc-lightning prepare --output $(MODEL)

demo: $(VENV)/.installed
	$(BIN)/lpc-lightning demo

demo-smollm2: $(VENV)/.installed $(MODEL)/config.json
	$(BIN)/lpc-lightning fit --config configs/experiment/demo.yaml

# Where the environment forbids bytecode, each of the programs that tests start would compile the package again.
test test-fast test-resume: export PYTHONDONTWRITEBYTECODE =

test: $(VENV)/.installed-dev
	$(BIN)/pytest -n 3 --dist worksteal

test-fast: $(VENV)/.installed-dev
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow and not distributed and not real and not cuda"

CHAINS ?= all
SEED ?= 0
test-resume: $(VENV)/.installed-dev
	LPC_STOP_CHAINS=$(CHAINS) LPC_STOP_SEED=$(SEED) $(BIN)/pytest -n 2 --dist worksteal tests/callbacks/test_stops.py

DATA_DIR ?= $(or $(LPC_DATA_DIR),data)/preferences
bench: $(VENV)/.installed-dev $(MODEL)/config.json
	$(BIN)/python -m benchmarks.run --data-dir $(DATA_DIR) --split $(BENCH)

# It takes the Python at hand where the project is not installed in .venv: a leased machine has its own torch.
bench-gpu:
	$(or $(wildcard $(BIN)/python),python3) -m benchmarks.gpu --output runs/bench-gpu $(BENCH)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info
