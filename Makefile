# make run    set everything up, start the server, transcribe the sample audio
# make run-live   start both archives, that for live speech, too, and let it hear a sample
# make run-proxy  start nginx before what runs: OpenAI's paths, the page and both models at one address
# make check  set everything up, lint, run the tests that need no server
# make test   the same, and every other test
# make stop   stop the server
# make clean  remove what was built (the virtual environment stays)

# The newest Python that is there, unless PYTHON= names another.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3.10 python3; do \
  $$python -c '$(SUITABLE)' 2>/dev/null && echo $$python && break; done)
SUITABLE := import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
# Which model to serve: digits or librispeech; and fp32, bf16 or int8.
MODEL ?= digits
PRECISION ?= fp32
# The first of five ports in a row, if not those of config.properties.
PORT =
# The proxy's; a certificate and its key, if it is to speak TLS.
PROXY_PORT = 8000
CERTIFICATE =
KEY =

BIN := .venv/bin
CHOICE := build/$(MODEL)-$(PRECISION).choice

ifeq ($(shell test -w . && echo yes),)
$(error This folder cannot be written, and everything is built in it: clone it into one of your own)
endif

.PHONY: run run-live run-proxy lint check test stop clean
.DELETE_ON_ERROR:

run: model_store/emformer_asr.mar
	@$(BIN)/python serve.py start $(if $(PORT),--port $(PORT))
	@$(BIN)/python serve.py samples --model $(MODEL)

run-live: model_store/emformer_asr.mar model_store/emformer_asr_live.mar build/config-live.properties
	@$(BIN)/python serve.py start --live --config build/config-live.properties $(if $(PORT),--port $(PORT))
	@$(BIN)/python serve.py samples --live

run-proxy: .venv/installed
	@$(BIN)/python serve.py proxy --port $(PROXY_PORT) $(if $(CERTIFICATE),--certificate "$(CERTIFICATE)" --key "$(KEY)")

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not server and not slow"

# One worker more than two cores have: many tests wait, for Java, for a browser, for speech.
test: lint
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

stop:
	@if [ -x $(BIN)/python ]; then $(BIN)/python serve.py stop; else echo "Nothing is installed here."; fi

clean:
	rm -rf build model_store logs

.venv/bin/python:
	@$(or $(PYTHON),false) -c '$(SUITABLE)' 2>/dev/null || \
	  { echo "A Python of 3.10 to 3.13 that can make virtual environments is needed (on Debian: apt install python3-venv)," \
	    "and '$(PYTHON)' is not one: install it, or name it with make PYTHON=/path/to/python3.12." >&2; exit 1; }
	@echo "Creating .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

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
