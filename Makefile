# `make demo` runs the method on a real model, `make test` passes the tests. Both set up all they need in .venvs/.
# LATEST=1 takes the newest packages instead of the locked ones; PYTHON=/path/to/python3 another interpreter.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON3 := $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python,$(shell command -v $(p) 2>/dev/null)))
MAIN := $(if $(LATEST),.venvs/main-latest,.venvs/main)
CORES := $(shell getconf _NPROCESSORS_ONLN)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false
# Threads that spin while they wait make a machine with other work on it several times slower.
export OMP_WAIT_POLICY := passive

METHODS := lora,adalora,beamlora,cola,diffora search=4,flat_lora,lora_pro,rm_lora,sora shrinkage=0.1,xgblora blocks=6

# docs: the site, in build/docs; a broken link is an error.
TEST := lint types docs unit integration faults e2e
REST := pip axolotl-0.19 axolotl-0.21

.PHONY: demo compare-small compare-methods evidence-small test test-all test-perturbed $(TEST) $(REST) mutants screenshots gpu environment lock clean
demo: environment
	$(MAIN)/bin/gelora demo

# Everything in the main environment; `make unit` and so on for one stage.
test:
	@$(PYTHON3) .ci/stages.py $(TEST)

# And in the environments of pip's own choice and of both Axolotls.
test-all:
	@$(PYTHON3) .ci/stages.py $(TEST) $(REST)

$(TEST) $(REST):
	@$(PYTHON3) .ci/stages.py $@

# Looks for tests whose outcome depends on the machine; see CONTRIBUTING.md.
test-perturbed: environment
	@$(PYTHON3) .ci/perturbed.py

# The whole protocol of a comparison, in about 115 trainings on 64 rows: the head's rate, two allocations with theirs, their
# neighbours, and the picture of score against rate. What comes out is checked against the record, if there is one.
compare-small: environment
	OMP_NUM_THREADS=1 $(MAIN)/bin/python -m benchmarks.compare.tasks docstrings --train-rows 64 --test-rows 200 --plans budget \
	  --allocations plan,uniform --methods lora --jobs $(CORES) --output compare-small
	if [ -d benchmarks/results/compare-small ]; then $(MAIN)/bin/python -m benchmarks.compare.check compare-small; fi

# Loss against rank on one task, what each rule for it costs, and what moving ranks could win, at the rates of the record.
# Sign and size are checked against the record.
evidence-small: environment
	OMP_NUM_THREADS=1 $(MAIN)/bin/python -m benchmarks.compare.which_r docstrings --only "r = 1" "r = 2" "r = 32" early \
	  --random 3 --recorded-rates --jobs $(CORES) --output evidence-small --check

# Every training method and LoRA, at equal parameters, by the same protocol with three seeds: a first look, not a verdict.
compare-methods: environment
	OMP_NUM_THREADS=1 $(MAIN)/bin/python -m benchmarks.compare.tasks docstrings --train-rows 64 --test-rows 100 --seeds 3 \
	  --rate-seeds 3 --allocations uniform --methods "$(METHODS)" --jobs $(CORES) --output compare-methods

# Which changes of the engine's code no test notices (an hour or two); the answer is in benchmarks/results/mutants.json.
mutants: environment
	OMP_NUM_THREADS=1 $(MAIN)/bin/mutmut run --max-children $(CORES)
	$(MAIN)/bin/python -m benchmarks.mutants

# On a machine with an accelerator: the tests of the engine, of the kinds of LoRA and of the training methods on it, then what
# the probe and each method cost there. Not run on one yet; each command is meant to fit ten minutes of one H100.
gpu: environment
	GELORA_TEST_ACCELERATOR=1 $(MAIN)/bin/python -m pytest -q tests/unit/dimension tests/unit/probe tests/unit/ranks \
	  tests/integration/models/test_matrix.py tests/integration/methods tests/integration/compare/test_compare_quantised.py
	$(MAIN)/bin/python -m benchmarks.speed.accelerator
	$(MAIN)/bin/python -m benchmarks.speed.methods --steps 20 --rows 8 --tokens 512

# The pictures of docs/, by a Chromium that is installed, and what axe-core says of the pages.
screenshots: environment
	VIRTUAL_ENV=$(CURDIR)/$(MAIN) $(MAIN)/bin/uv run --quiet --no-project --with playwright,axe-playwright-python,nbconvert \
	  python benchmarks/screenshots.py

environment:
	@$(PYTHON3) .ci/environments.py main

# Resolves the newest packages that work into .ci/locks/.
lock:
	@$(PYTHON3) .ci/environments.py lock

clean:
	rm -rf .venvs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
