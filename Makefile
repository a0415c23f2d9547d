# make run    set everything up, start the server, transcribe the sample audio
# make run-live   start both archives, that for live speech, too, and let it hear a sample
# make test   set everything up, run every test
# make stop   stop the server
# make clean  remove what was built (the virtual environment stays)

PYTHON ?= python3.11
# Which model to serve: digits or librispeech; and fp32, bf16 or int8.
MODEL ?= digits
PRECISION ?= fp32

BIN := .venv/bin
CHOICE := build/$(MODEL)-$(PRECISION).choice

.PHONY: run run-live test stop clean
.DELETE_ON_ERROR:

run: model_store/emformer_asr.mar
	@$(BIN)/python serve.py start
	@$(BIN)/python serve.py samples --model $(MODEL)

run-live: model_store/emformer_asr.mar model_store/emformer_asr_live.mar build/config-live.properties
	@$(BIN)/python serve.py start --live --config build/config-live.properties
	@$(BIN)/python serve.py samples --live

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

stop:
	@if [ -x $(BIN)/python ]; then $(BIN)/python serve.py stop; else echo "Nothing is installed here."; fi

clean:
	rm -rf build model_store logs

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 is needed and '$(PYTHON)' is not it: install it, or name it with make PYTHON=/path/to/python3.11." >&2; exit 1; }
	@echo "Creating .venv"
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "$(PYTHON) could not create a virtual environment (on Debian: apt install python3.11-venv)." >&2; exit 1; }

.venv/installed: requirements.txt | .venv/bin/python
	@echo "Installing requirements.txt (PyTorch is large: some minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# Remembers what was chosen last, so that another MODEL or PRECISION exports anew.
$(CHOICE):
	@mkdir -p build && rm -f build/*.choice && touch $@

build/emformer_rnnt.pt: export_model.py $(wildcard engine/*.py models/digits/*) $(CHOICE) .venv/installed
	@$(BIN)/python export_model.py --model $(MODEL) --precision $(PRECISION) --output $@

model_store/emformer_asr.mar: build/emformer_rnnt.pt handler.py model-config.yaml
	@mkdir -p model_store
	@$(BIN)/torch-model-archiver --model-name emformer_asr --version 1.0 --serialized-file build/emformer_rnnt.pt \
	  --handler handler.py --config-file model-config.yaml --export-path model_store --force

model_store/emformer_asr_live.mar: build/emformer_rnnt.pt handler.py live.py model-config-live.yaml
	@mkdir -p model_store
	@$(BIN)/torch-model-archiver --model-name emformer_asr_live --version 1.0 --serialized-file build/emformer_rnnt.pt \
	  --handler live.py --extra-files handler.py --config-file model-config-live.yaml --export-path model_store --force

# What the page in clients/ may ask for, it alone.
build/config-live.properties: config.properties cors.properties
	@mkdir -p build && cat $^ > $@
