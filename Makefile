# The two commands are `make train` and `make test`. Both work in a fresh clone with nothing but Python 3.11 or
# newer and a package index: they make .venv and install the versions of constraints.txt into it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help train test check format soak bench clean

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3.14 python3,\
    $(if $(shell $(name) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(name))))
BIN := .venv/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
ARGS ?=
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check install -c .venv/constraints.txt

help:
	@echo "make train   train the quickstart model on the Python standard library (ARGS='--train.steps 50' overrides)"
	@echo "make test    the whole test suite"
	@echo "make check   lint, format, types, layering"
	@echo "make format  rewrite the files as 'make check' wants them"
	@echo "make soak    the long test campaigns"
	@echo "make bench   step time and memory beside DeepSpeed, FSDP2 and DDP"
	@echo "make clean   remove .venv (runs/ stays)"

train: .venv/installed
	@$(BIN)/minizero train launch/configs/quickstart.toml --nproc auto $(ARGS)

# Two halves side by side, since ranks often wait for each other: in one many ranks, in the other hardly more than one
# busy process at a time. What ARGS name is run as pytest does it.
FEW := $(foreach name,kernels_* hf pretrained train launch deadline harness pipeline_schedules weights refusals observe,\
    tests/test_$(name).py)
FEW := $(filter-out tests/test_kernels_training.py,$(wildcard $(FEW)))

test: .venv/installed-dev
ifneq ($(ARGS),)
	$(BIN)/python -m pytest -q $(ARGS)
else
	@echo "Two halves side by side; the second one writes to .venv/few.txt, shown when both have ended."
	@$(BIN)/python -m pytest -q $(FEW) > .venv/few.txt 2>&1 & few=$$!; code=0; \
	  $(BIN)/python -m pytest -q $(addprefix --ignore=,$(FEW)) || code=$$?; \
	  wait $$few || code=$$?; cat .venv/few.txt; exit $$code
endif

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

soak: .venv/installed-dev
	$(BIN)/python -m pytest -q -m soak $(ARGS)

bench: .venv/installed-dev
	$(BIN)/python -m benchmarks.zero_step $(ARGS)

clean:
	rm -rf .venv

# A stamp is written only after every install before it succeeded, so a failed install is tried again.
# torch goes first and pinned. Without a GPU its CPU build is taken where one is to be had, since the default
# Linux build brings gigabytes of CUDA libraries, and a Triton of its own, which is then the one to take.
.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "minizero needs Python 3.11 or newer on PATH (or PYTHON=/path/to/python)"; exit 1; }
	@echo "Installing minizero into .venv ($(if $(GPU),CUDA,CPU) build of torch $(TORCH)); this takes a minute or two."
	@rm -f .venv/installed .venv/installed-dev
	@$(PYTHON) -m venv .venv
	@grep -v '^triton==' constraints.txt > .venv/constraints.txt
	@$(PIP) setuptools numpy
ifeq ($(GPU),)
	@$(PIP) "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(PIP) "torch==$(TORCH)+cpu" --extra-index-url $(TORCH_CPU_INDEX) 2>/dev/null \
	  || $(PIP) "torch==$(TORCH)"
else
	@$(PIP) "torch==$(TORCH)"
endif
	@if ls .venv/lib/python*/site-packages | grep -q '^torch-.*+cpu\.dist-info'; then cp constraints.txt .venv/; fi
	@$(PIP) --no-build-isolation -e .
	@touch $@

# DeepSpeed builds from source and imports torch to do so: without isolation it sees the torch installed above.
.venv/installed-dev: .venv/installed
	@echo "Installing the test and development tools into .venv."
	@rm -f $@
	@DS_ACCELERATOR=cpu $(PIP) --no-build-isolation -e '.[dev]'
	@touch $@
