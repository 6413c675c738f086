# HierKD. `make help` lists the targets; every one of them does its own set-up on a machine with
# Python >= 3.11, make and pip.
#
#   make demo                                    in an environment of its own, .venv (created once)
#   make demo PYTHON=/path/to/env/bin/python     in an environment that exists; nothing is installed into it
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                                                .venv with the much smaller CPU build of PyTorch
#                                                (or another build; read only when .venv is created)

VENV        ?= .venv
PYTHON      ?=
TORCH_INDEX ?=
PYTEST_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

LOCKS := requirements/lock.txt requirements/lock-torch.txt requirements/detectron2.txt

ifeq ($(strip $(PYTHON)),)
  PY    := $(VENV)/bin/python
  SETUP := $(VENV)/.installed
else
  PY    := $(PYTHON)
  SETUP := environment
  # The package itself is found in this checkout, so that nothing has to be installed.
  export PYTHONPATH := $(CURDIR)/projects/HierKD$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

.DEFAULT_GOAL := help
.PHONY: help venv install environment demo test test-slow gpu-pack test-gpu check format format-check lint types clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

# ---------------------------------------------------------------------------------------- set-up

venv: $(VENV)/.installed  ## create .venv with the locked versions (the other targets do it themselves)

# Done again when a locked version or a dependency changes; pip then leaves alone what is right.
$(VENV)/.installed: $(LOCKS) pyproject.toml
	@set -e; suitable='import sys; sys.exit(sys.version_info < (3, 11))'; \
	if $(PY) -c '' 2>/dev/null; then \
	  echo "[1/4] Updating $(VENV)"; \
	  $(PY) -c "$$suitable" || { \
	    echo "error: $(VENV) holds $$($(PY) --version), HierKD needs Python >= 3.11: remove it first." >&2; exit 1; }; \
	  $(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip; \
	  exit 0; \
	fi; \
	for python in python3 python3.14 python3.13 python3.12 python3.11 ''; do \
	  if [ -n "$$python" ] && $$python -c "$$suitable" 2>/dev/null; then break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: HierKD needs Python >= 3.11, but python3 here is: $$(python3 --version 2>&1)" >&2; \
	  echo "Install a newer one, or name an environment that has it: make demo PYTHON=/path/to/env/bin/python" >&2; \
	  exit 1; \
	fi; \
	echo "[1/4] Creating $(VENV) with $$($$python --version)"; \
	$$python -m venv --clear $(VENV) >/dev/null 2>&1 || { \
	  $$python -m venv --clear --without-pip $(VENV); \
	  $$python -m pip --python $(PY) install -q pip; }
	@sed -n '/^setuptools==/,/[^\\]$$/p' requirements/lock.txt > $(VENV)/setuptools.txt
	@$(PY) -m pip install -q --no-deps --require-hashes -r $(VENV)/setuptools.txt
	@echo "[2/4] Installing the locked dependencies"
	@$(PY) -m pip install -q --no-deps --require-hashes --use-pep517 --no-build-isolation \
	  -r requirements/lock.txt
ifeq ($(strip $(TORCH_INDEX)),)
	@echo "[3/4] Installing PyTorch (with its CUDA libraries on Linux: 5 GB on disk)"
	@$(PY) -m pip install $(if $(wildcard $(PY)),-q) --no-deps --require-hashes \
	  -r requirements/lock-torch.txt
else
	@echo "[3/4] Installing PyTorch from $(TORCH_INDEX)"
	@$(PY) -m pip install --index-url $(TORCH_INDEX) \
	  $$(sed -nE 's/^(torch(vision)?==[^ ]+).*/\1/p' requirements/lock-torch.txt)
endif
	@echo "[4/4] Installing detectron2 and HierKD"
	@$(PY) tools/environment.py install
	@touch $@
	@echo "$(VENV) is ready."

environment:
	@command -v $(PY) >/dev/null || { echo "error: PYTHON=$(PY): no such program" >&2; exit 1; }
	@$(PY) tools/environment.py check

install:  ## with PYTHON=...: install into that environment what it lacks
	@if [ -z "$(strip $(PYTHON))" ]; then \
	  echo "error: name the environment: make install PYTHON=/path/to/env/bin/python" >&2; exit 1; fi
	@$(PY) tools/environment.py install

# ----------------------------------------------------------------------------------------- use

demo: $(SETUP)  ## train and evaluate HierKD on the miniature world; writes output/demo/report.html
	@$(PY) tools/run_demo.py --output output/demo

# ---------------------------------------------------------------------------------------- checks

test: $(SETUP)  ## the tests (PYTEST_ARGS="-k name" and the like are passed on)
	@$(PY) -m pytest -m "not slow and not clip" $(PYTEST_ARGS)

test-slow: $(SETUP)  ## the tests that take more than half a minute each
	@$(PY) -m pytest -m "slow and not clip" $(PYTEST_ARGS)

gpu-pack: $(SETUP)  ## fill gpu_pack with the packages that a GPU machine without a network may lack
	@$(PY) tools/environment.py pack

test-gpu: $(if $(strip $(PYTHON)),,$(SETUP))  ## all that a GPU has to show, in 8 minutes; small on a CPU
	@$(PY) tools/test_gpu.py

check: format-check lint types test  ## everything that must pass: format, lint, types, tests

format: $(SETUP)  ## rewrite the sources in the project's format
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

format-check: $(SETUP)
	@$(PY) -m ruff format --check .

lint: $(SETUP)  ## ruff
	@$(PY) -m ruff check .

types: $(SETUP)  ## mypy, strict, on the package and train_net.py
	@$(PY) -m mypy

clean:  ## remove .venv and caches (output/ and datasets/ stay)
	rm -rf $(VENV) gpu_pack build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis projects/HierKD/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
