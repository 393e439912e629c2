# Everything a person does here. `make` alone lists it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
REQUIREMENTS := pyproject.toml clients/python/pyproject.toml constraints.txt
STORE ?= runs/store
SERVERS := mlserver litserve bentoml kserve

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install serve test lint types bench bench-servers image clean train-gpt-oss-20b train-deepseek-v2-lite

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-24s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/.application ## Install the application into .venv (no torch)

serve: $(VENV)/.application ## Serve the bundled predictors on loopback (ARGS="--port 9000")
	$(BIN)/specmoe serve $(ARGS)

test: $(VENV)/.development ## Run the tests (ARGS="-k store")
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.development ## Check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.development ## Check types
	$(BIN)/mypy
	$(BIN)/mypy --package specmoe_client

bench: $(VENV)/.development ## Measure model time and the service's latency on this machine
	$(BIN)/specmoe bench $(ARGS)

bench-servers: $(SERVERS:%=.venv-servers/%/.installed) ## Install the other model servers that `make bench` compares with

train-gpt-oss-20b: ## Train gpt-oss-20b's predictor and publish it (TRACES=folder STORE=folder)
train-deepseek-v2-lite: ## Train deepseek-v2-lite's predictor and publish it (TRACES=folder STORE=folder)
train-gpt-oss-20b: KNOBS = --batch-tokens 128 --learning-rate 0.0022 --averaging 0.9992 --prefixes 3 --near 75 \
	--similar 16 --width 512 --hidden 768 --dropout 0.2 --rare-token 0.08 --passes 10 --precision bfloat16
# 16,000 tokens are few: drop more. There is no token table: a wide trunk is cheap.
train-deepseek-v2-lite: KNOBS = --near 5 --similar 16 --precision bfloat16 --width 512 --dropout 0.2 --input-dropout 0.15 \
	--weight-decay 0.1 --averaging 0.997 --patience 8
train-gpt-oss-20b train-deepseek-v2-lite: $(VENV)/.training
	@test -n "$(TRACES)" || { echo "Which traces? make $@ TRACES=folder, with train*.npz and validation.npz in it."; exit 2; }
	$(BIN)/specmoe train --traces $(wildcard $(TRACES)/train*) --validation $(wildcard $(TRACES)/validation*) \
		--run runs/$(@:train-%=%) --publish --store $(STORE) --alias production $(KNOBS) $(ARGS)

image: $(VENV)/.application ## Build the container image without docker and show it answering (as root)
	deploy/build-image.sh

clean: ## Remove .venv, .venv-servers and everything built
	rm -rf $(VENV) .venv-servers build dist

# One environment, filled as far as a target needs it. A stamp is older than what it was made from: install again.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "specMoE needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1). Name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "$(PYTHON) cannot make virtual environments. On Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.application: $(VENV)/.python $(REQUIREMENTS)
	@echo "Installing specMoE into $(VENV) (some 340 MB, once)."
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.training: $(VENV)/.python $(REQUIREMENTS)
	@echo "Installing specMoE and torch into $(VENV) (some 1.5 GB, once)."
	$(INSTALL) --editable '.[training]'
	@touch $@

$(VENV)/.development: $(VENV)/.python $(REQUIREMENTS)
	@echo "Installing specMoE, its client and what tests need into $(VENV) (some 2 GB, once)."
	$(INSTALL) --editable '.[dev]' --editable clients/python
	@touch $@ $(VENV)/.application $(VENV)/.training

# Each in an environment of its own: they want different versions of the same packages.
.venv-servers/%/.installed: benchmarks/servers/%/requirements.txt
	@echo "Installing $* into .venv-servers/$* (200 to 500 MB, once)."
	$(PYTHON) -m venv .venv-servers/$*
	.venv-servers/$*/bin/python -m pip install --quiet --quiet --disable-pip-version-check --requirement $<
	@touch $@
