# lightning-U2: `make` lists the targets. Every variable can be given on the command line: make train PRESET=small
PYTHON ?= python3
DATA_ROOT ?= data/demo
OUTPUT_DIR ?= runs/demo
PRESET ?= tiny
PRECISION ?= 32
DEVICES ?= auto
MAX_EPOCHS ?= 20
SPLIT ?= eval_clean
ARGS ?=
VENV = .venv/bin/python
MODES = ctc_greedy_search ctc_prefix_beam_search attention attention_rescoring

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9_]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: DATA_ROOT=$(DATA_ROOT) OUTPUT_DIR=$(OUTPUT_DIR) PRESET=$(PRESET) PRECISION=$(PRECISION)" \
	      "DEVICES=$(DEVICES) MAX_EPOCHS=$(MAX_EPOCHS) SPLIT=$(SPLIT) ARGS=$(ARGS)"

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

setup: .venv/installed  ## .venv with the pinned packages

.PHONY: help setup
