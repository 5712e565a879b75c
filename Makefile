# lightning-U2. `make` lists the targets and the variables.
# Every variable can be given on the command line: make train PRESET=small
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := help

PYTHON ?= python3
DATA_ROOT ?= data/demo
OUTPUT_DIR ?= runs/demo
PRESET ?= tiny
# A CPU that multiplies bfloat16 trains faster so (docs/training.md, "Which precision a CPU gets").
# Give PRECISION=16 or PRECISION=bf16-mixed on a GPU.
PRECISION ?= $(if $(shell grep -m1 -E 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null),bf16-mixed,32)
DEVICES ?= auto
MAX_EPOCHS ?= 16
SPLIT ?= eval_clean
ARGS ?=
RECIPE ?= --batch_size 8 --optimizer muon --lr 4e-3 --ctc_weight 0.5 --ema_decay 0.99 --num_subs 0 --num_time_masks 1

PY = .venv/bin/python
BEST = $(OUTPUT_DIR)/best.ckpt

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9_]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile
	@echo "Variables: DATA_ROOT=$(DATA_ROOT) OUTPUT_DIR=$(OUTPUT_DIR) PRESET=$(PRESET) PRECISION=$(PRECISION)"
	@echo "           DEVICES=$(DEVICES) MAX_EPOCHS=$(MAX_EPOCHS) SPLIT=$(SPLIT) ARGS=\"$(ARGS)\" (more flags for the command)"
	@echo "           PYTHON=$(PYTHON) RECIPE=\"$(RECIPE)\" (flags of make train)"
	@echo "           SOURCE=$(SOURCE) AN4_RUN=$(AN4_RUN) AN4_EPOCHS=$(AN4_EPOCHS) AN4_START=\"$(AN4_START)\" (of make an4)"
	@echo "           SOURCES=\"$(SOURCES)\" (of make ablation)"

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

setup: .venv/installed  ## .venv with the pinned packages

# data/demo_source holds wavs and metadata.csv, as a corpus of your own does.
data/demo/tokenizer.json: | .venv/installed
	test -e data/demo_source/train/metadata.csv || $(PY) -m tools.demo --out data/demo_source
	$(PY) prepare.py --source data/demo_source --data_root data/demo

data: data/demo/tokenizer.json  ## the synthetic demo corpus: data/demo_source, and data/demo made of it

train: .venv/installed $(if $(filter data/demo,$(DATA_ROOT)),data/demo/tokenizer.json)  ## train, then score SPLIT in all modes
	$(PY) train.py --data_root $(DATA_ROOT) --output_dir $(OUTPUT_DIR) --preset $(PRESET) --precision $(PRECISION) \
	  --devices $(DEVICES) --max_epochs $(MAX_EPOCHS) $(RECIPE) $(ARGS)
	$(PY) score.py --checkpoint $(BEST) --data_root $(DATA_ROOT) --split $(SPLIT) --mode all --examples 5 --keep
	$(PY) -m tools.compare $(OUTPUT_DIR)
	@echo
	@echo "Best checkpoint: $(BEST). Next:"
	@echo "  $(PY) transcribe.py --checkpoint $(BEST) FILE.wav ..."
	@echo "  make score OUTPUT_DIR=$(OUTPUT_DIR) ARGS='--chunk_size 16'     # the same model, streaming"
	@echo "  make train OUTPUT_DIR=runs/idea ARGS='--dropout_rate 0.2'      # an idea, then: make compare"

score: .venv/installed  ## score OUTPUT_DIR/best.ckpt on SPLIT
	$(PY) score.py --checkpoint $(BEST) --data_root $(DATA_ROOT) --split $(SPLIT) --keep $(ARGS)

transcribe: .venv/installed  ## transcribe files: make transcribe ARGS="a.wav b.flac"
	$(PY) transcribe.py --checkpoint $(BEST) $(ARGS)

live: .venv/installed  ## a page to talk to OUTPUT_DIR/best.ckpt, at http://127.0.0.1:8000/
	$(PY) -m tools.live --checkpoint $(BEST) $(ARGS)

export: .venv/installed  ## OUTPUT_DIR/best.ckpt as ONNX in OUTPUT_DIR/export: make export ARGS="--audio a.wav b.flac"
	$(PY) -m tools.export --checkpoint $(BEST) --out $(OUTPUT_DIR)/export --overwrite $(ARGS)

# Browsers hear by this file of the npm registry; the export checks that it is the right one.
ONNXRUNTIME_WEB = data/onnxruntime-web-1.30.0.tgz

$(ONNXRUNTIME_WEB):
	@mkdir -p $(@D)
	@npm pack --silent --pack-destination $(@D) onnxruntime-web@$(patsubst onnxruntime-web-%.tgz,%,$(@F)) >/dev/null 2>&1 \
	  || { echo "$(@F) did not come: make web needs npm (Node.js) and a network, or that file in $(@D)" >&2; exit 1; }

web: .venv/installed $(ONNXRUNTIME_WEB)  ## OUTPUT_DIR/export with a page that hears in the browser, without a server
	$(PY) -m tools.export --checkpoint $(BEST) --out $(OUTPUT_DIR)/export --overwrite --onnxruntime_web $(ONNXRUNTIME_WEB) $(ARGS)
	@echo "To talk: $(PYTHON) -m http.server --bind 127.0.0.1 --directory $(OUTPUT_DIR)/export 8000, then open http://127.0.0.1:8000/"

parity: .venv/installed  ## AN4 as torch, onnxruntime and sherpa-onnx hear it: make parity ARGS="--checkpoint runs/mine/best.ckpt"
	$(PY) -m tools.parity $(ARGS)

compare: .venv/installed  ## table of the runs in runs/
	$(PY) -m tools.compare $(ARGS)

report: .venv/installed  ## OUTPUT_DIR/report.html: curves, augmentation, attention, errors to hear (ARGS="OTHER_RUN --split dev")
	$(PY) -m tools.report $(OUTPUT_DIR) $(ARGS)

test: .venv/installed  ## the tests
	$(PY) -m pytest -q -n logical --maxprocesses 8 --dist loadfile --max-worker-restart 0 tests $(ARGS)

lint: .venv/installed  ## layout and names, by ruff (make format writes the layout)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

format: .venv/installed  ## ruff's layout, 100 columns
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

smoke: .venv/installed  ## the whole chain on a handful of rows
	$(PY) -m pytest -q tests/test_smoke.py $(ARGS)

bench: .venv/installed  ## speed of data, training, decoding and streaming here, in some minutes
	for what in data train decode stream; do echo "== $$what"; $(PY) -m tools.bench $$what $(ARGS); done

gpu_check: .venv/installed  ## what only a GPU can show, within five minutes (ARGS=--json)
	$(PY) -m tools.gpu_check $(ARGS)

torture: .venv/installed  ## kill -9 a small training 200 times and resume it: nothing may be lost (ARGS="--kills N")
	$(PY) -m tools.torture $(ARGS)

clean:  ## remove the demo corpus and the demo run (never your data, your runs or .venv)
	rm -rf data/demo data/demo_source data/.demo.* data/.demo_source.* runs/demo

# ---- AN4, real recordings: make an4 SOURCE=../shared/speech/an4
# SOURCE has the folders train and dev, each with a metadata.csv.
SOURCE ?=
# Batches of 8 make twice the updates of 16 for a tenth more time; a small corpus lacks updates.
# Without a tail, AN4's recordings end too soon for their last words.
AN4 = --batch_size 8 --optimizer muon --lr 4e-3 --warmup_steps 200 --ctc_weight 0.5 --ema_decay 0.99 \
  --num_subs 0 --speeds 0.9 0.95 1.0 1.05 1.1 --tail_padding 300
# What synthetic voices teach is soon learnt, and masks would only make it slower.
AN4_SPOKEN = --max_epochs 3 --num_time_masks 0 --num_freq_masks 0 --dropout_rate 0.05

SOURCE_IS_SET = $(if $(SOURCE),,$(error SOURCE is not set; say make an4 SOURCE=FOLDER with FOLDER/train/metadata.csv and FOLDER/dev))

data/an4/tokenizer.json: | .venv/installed
	$(SOURCE_IS_SET)$(PY) prepare.py --source "$(SOURCE)" --data_root data/an4

# The same words from synthetic voices come first.
data/an4_spoken/tokenizer.json: | data/an4/tokenizer.json
	$(SOURCE_IS_SET)$(PY) -m tools.demo --texts "$(SOURCE)/train/metadata.csv" --hours 1.5 --out data/an4_spoken_source --overwrite
	$(PY) prepare.py --source data/an4_spoken_source --data_root data/an4_spoken --tokenizer data/an4/tokenizer.json

# A training that is stopped leaves the best.ckpt of an epoch before its last, which is no start.
runs/an4_spoken/best.ckpt: | data/an4_spoken/tokenizer.json
	$(PY) train.py --data_root data/an4_spoken --output_dir runs/an4_spoken.part --overwrite --preset small \
	  --precision $(PRECISION) $(AN4_SPOKEN) $(AN4)
	rm -rf runs/an4_spoken
	mv runs/an4_spoken.part runs/an4_spoken

AN4_RUN ?= runs/an4
# In float32 two cores have time for fewer epochs within an hour.
AN4_EPOCHS ?= $(if $(filter 32%,$(PRECISION)),20,32)
AN4_START ?= --init_from runs/an4_spoken/best.ckpt --dropout_rate 0.1 --cr_ctc_weight 0.2

# SOURCE -> data/an4, and synthetic speech of its words -> runs/an4_spoken -> runs/an4/best.ckpt
an4: data/an4/tokenizer.json $(filter runs/an4_spoken/best.ckpt,$(AN4_START))  ## AN4 from nothing to scores, in about an hour on two cores
	$(PY) train.py --data_root data/an4 --output_dir $(AN4_RUN) $(AN4_START) --precision $(PRECISION) \
	  --max_epochs $(AN4_EPOCHS) --check_val_every_n_epoch 4 $(AN4) $(ARGS)
	for chunk in -1 16; do \
	  $(PY) score.py --checkpoint $(AN4_RUN)/best.ckpt --data_root data/an4 --split dev --mode all --chunk_size $$chunk --keep; \
	done
	$(PY) -m tools.compare $(AN4_RUN)

# ---- What training techniques gain: make ablation SOURCES="../shared/speech/an4 ../shared/speech/librispeech_1h"
SOURCES ?=

ablation: .venv/installed  ## table of training techniques in equal time, over night (a try: ARGS="--out runs/try --limit_rows 128 --epochs 3 --seeds 0 --techniques wide_masks")
	$(if $(SOURCES),,$(error SOURCES is not set; name folders, each with train/metadata.csv and dev/metadata.csv))
	$(PY) -m tools.ablate --sources $(SOURCES) $(ARGS)

.PHONY: help setup data train score transcribe live export web parity compare report test lint format \
  smoke bench gpu_check torture clean an4 ablation
