# Every target sets up what it needs: a fresh clone and a Python from 3.10 to 3.13 are enough.
PYTHON ?= python3
BIN := .venv/bin
# The many processes of the tests share what one of them has compiled, whatever the environment says.
# There are three of them, because many tests wait for processes of their own: two left a third of two cores idle.
TEST := PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 3 --dist worksteal

.PHONY: quickstart test coverage checks format install clean

quickstart: .venv/installed  ## train a small model on the text inside Python, and let it write
	$(BIN)/dsv3 quickstart

test: .venv/installed-dev  ## every test that needs no GPU
	$(TEST)

coverage: .venv/installed-dev  ## the same tests, and the share of the code that they run: at least 90%
	$(TEST) --cov --cov-report=term

checks: .venv/installed-dev  ## lint, format, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed-dev  ## put the code into its one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: .venv/installed  ## only set up the environment, for use by hand

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:  ## remove the environment and caches, never data or checkpoints
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage*
