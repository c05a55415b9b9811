# On a fresh machine: `make demo`, `make test`, `make docs`. Each makes its environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint docs links tutorials format browser clean

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[demo,dev]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/nh2st-pipe demo --out demo

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# One more process than cores: some tests wait more than they work. Those that start Ray are with one of them.
test: lint docs
	$(BIN)/python -m pytest --dist loadgroup --numprocesses $$($(BIN)/python -c 'from nh2st_pipe.core.machine import cores; print(cores() + 1)')

# The site, into docs/_build/html; a warning, a dead link or a page that nothing leads to ends it. `links` asks the web, too.
docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs docs/_build/html

# Each tutorial is executed in an empty folder and keeps its outputs, which the site shows.
tutorials: $(VENV)/.dev
	$(BIN)/python docs/tutorials/run.py

links: $(VENV)/.dev
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/links

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

browser: $(VENV)/.dev
	command -v chromium chromium-browser google-chrome || $(BIN)/playwright install chromium

clean:
	rm -rf $(VENV) build dist demo docs/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis
