.DEFAULT_GOAL := help
.PHONY: setup train compare sweep report eval base test test-slow bench lint check clean help

PYTHON ?= python3
NPROC ?= 1
CKPT ?= $(if $(EXP),runs/$(subst /,_,$(EXP)))
BIN := .venv/bin
INSTALLED := .venv/.installed
CONFIG = experiments/$(EXP).yaml
VARIANTS = $(wildcard experiments/$(EXP)_vanilla.yaml experiments/$(EXP)_cluster.yaml)
# The supervised model of the tldr and prism experiments, made where it is missing.
NEEDS = $(foreach world,tldr prism,$(if $(filter $(world)%,$(EXP)),runs/builtin_$(world)/model/config.json))
EXPERIMENTS = $(patsubst experiments/%.yaml,%,$(shell find experiments -name '*.yaml' -not -path '*/sweeps/*' | sort))

# torch first, so that the package's other requirements are resolved against the version that is wanted.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test]'
	touch $@

# TRL and PEFT, which the benchmark compares with.
.venv/.bench: $(INSTALLED)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test,bench]'
	touch $@

setup: $(INSTALLED) ## Make .venv with the package in it; the other targets do this the first time

runs/builtin_%/model/config.json: | $(INSTALLED)
	$(BIN)/prlhf train experiments/builtin_$*.yaml
	$(BIN)/python -m prlhf.engine.write_builtin runs/builtin_$* --out $(dir $@)

train: require-experiment $(INSTALLED) $(NEEDS) ## Train: make train EXP=psoups [NPROC=2] [ARGS="train.lr=1e-4 --max-restarts 3"]
	$(BIN)/prlhf train $(CONFIG) --nproc $(NPROC) $(ARGS)

compare: require-experiment $(INSTALLED) $(NEEDS) ## Train what is missing of an experiment and its variants, then tabulate: EXP=psoups
	$(BIN)/prlhf compare $(CONFIG) $(VARIANTS) $(ARGS)

sweep: $(INSTALLED) ## Train an experiment at several settings, then tabulate: SWEEP=psoups_alpha [ARGS="train.max_steps=100"]
	$(if $(SWEEP),,$(error sweep: give SWEEP=NAME of experiments/sweeps/NAME.yaml, such as psoups_alpha))
	$(BIN)/prlhf sweep experiments/sweeps/$(SWEEP).yaml $(ARGS)

report: $(INSTALLED) ## Write runs/NAME/report.html: make report RUNS="psoups psoups_vanilla" [ARGS="--out FILE"]
	$(if $(RUNS),,$(error report: give RUNS="NAME ..." for runs/NAME, the page goes to the first))
	$(BIN)/prlhf report $(addprefix runs/,$(RUNS)) $(ARGS)

eval: $(INSTALLED) ## Evaluate a run again: make eval EXP=psoups, or CKPT=a run or checkpoint [ARGS="--data DIR"]
	$(if $(CKPT),,$(error eval: give EXP=psoups for runs/psoups, or CKPT=DIR))
	$(BIN)/prlhf eval $(CKPT) $(ARGS)

base: $(INSTALLED) ## Pretrain the built-in model again and write it into the package (about 45 minutes)
	$(BIN)/prlhf train experiments/builtin_base.yaml
	$(BIN)/python -m prlhf.engine.write_builtin runs/builtin_base --out runs/builtin_base/model
	$(BIN)/prlhf train experiments/builtin_base_second.yaml
	$(BIN)/python -m prlhf.engine.write_builtin runs/builtin_base_second --out runs/builtin_base_second/model
	$(BIN)/prlhf train experiments/builtin_base_third.yaml
	$(BIN)/python -m prlhf.engine.write_builtin runs/builtin_base_third

test: $(INSTALLED) ## Run the tests, without the slow ones, in two processes [ARGS="-k name"]
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: $(INSTALLED) ## Run the slow tests
	$(BIN)/python -m pytest -m slow $(ARGS)

bench: .venv/.bench ## Time training steps, generation and users; tables go to docs/benchmarks.md [ARGS="--repeats 3 --shapes tldr"]
	mkdir -p runs/bench
	$(BIN)/python -m benchmarks.cpu --out runs/bench/steps.json --document docs/benchmarks.md $(ARGS)
	$(BIN)/python -m benchmarks.generation --out runs/bench/generation.json --document docs/benchmarks.md
	$(BIN)/python -m benchmarks.users --directory runs/bench/users --out runs/bench/users.json --document docs/benchmarks.md

lint: $(INSTALLED) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test ## What a change must pass: lint and test

clean: ## Remove caches and build output; runs and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find prlhf tests -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: require-experiment
require-experiment:
	$(if $(wildcard $(CONFIG)),,$(error EXP='$(EXP)' is not an experiment, expected one of: $(EXPERIMENTS)))
