# `make` alone lists what there is.
PYTHON ?= python3
# onedl, the maintained forks, or upstream; TORCH=2.1.2 puts another torch in the place of the pinned one.
STACK ?= onedl
TORCH ?=
VENV ?= .venv$(patsubst %,-%,$(filter-out onedl,$(STACK)))$(TORCH:%=-torch%)
JOBS ?= 2
# Recipes quote both, so that spaces do no harm, and the shell then leaves ~ alone.
override PYTHON := $(patsubst ~/%,$(HOME)/%,$(PYTHON))
override VENV := $(patsubst ~/%,$(HOME)/%,$(VENV))
EMPTY :=
export STACK TORCH
STAMP := $(subst $(EMPTY) ,\ ,$(VENV))/.stamp
# Apart from the other packages, since the hosts would import them in every process; torchao needs the pinned torch.
PEERS := $(if $(TORCH),,$(subst $(EMPTY) ,\ ,$(VENV))/peers/.stamp)
DOCS := .venv-docs/.stamp

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)
	@echo '  PYTHON=python3.11 names the Python to start from, VENV=.venv the environment, JOBS=2 how many tests at once, ARGS=... more arguments.'
	@echo '  STACK=upstream takes upstream OpenMMLab in place of its forks, TORCH=2.1.2 another torch than the pinned one.'

demo: $(STAMP)  ## set up on first use, then run the demonstration
	"$(VENV)/bin/python" tools/demo.py $(ARGS)

test: $(STAMP) $(PEERS)  ## the whole test suite
	OMP_NUM_THREADS=1 "$(VENV)/bin/python" -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-gpu: $(STAMP)  ## the tests of a GPU; DEVICE=cpu rehearses them without one
	"$(VENV)/bin/python" -m pytest --no-cov tests/gpu $(ARGS)

lint: $(STAMP)  ## ruff: rules and format
	"$(VENV)/bin/ruff" check .
	"$(VENV)/bin/ruff" format --check .

docs: $(DOCS)  ## the documents as a site, build/docs/index.html; any warning is an error
	.venv-docs/bin/python -m sphinx -E -W --keep-going -q -c docs . build/docs

links: $(DOCS)  ## follow every link of the documents to other sites, which needs a network
	.venv-docs/bin/python -m sphinx -b linkcheck -q -c docs . build/links

setup: $(STAMP)  ## only set up

$(STAMP): requirements/common.txt $(wildcard requirements/$(STACK).txt) dev/setup_venv.sh setup.py pyproject.toml
	@bash dev/setup_venv.sh "$(VENV)" "$(PYTHON)"
	@touch "$@"

$(PEERS): requirements/peers.txt | $(STAMP)
	"$(VENV)/bin/python" -m pip install -q --no-deps --upgrade --target "$(VENV)/peers" -r requirements/peers.txt
	@touch "$@"

$(DOCS): requirements/docs.txt
	"$(PYTHON)" -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip install -q --disable-pip-version-check -r requirements/docs.txt
	@touch "$@"

clean:  ## remove the environment and build leftovers; keeps results and the cached mmcv wheel
	rm -rf "$(VENV)" .venv-docs build dist *.egg-info pvt_mm/.mim .pytest_cache .ruff_cache .coverage
	find benchmarks configs dev examples pvt_mm tests tools -name __pycache__ -exec rm -rf {} +

.PHONY: help demo test test-gpu lint docs links setup clean
