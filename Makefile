# Every target does its own set-up in .venv. `make` alone lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTEST_WORKERS ?= 2
# One intra-op thread per process: several processes share the cores (see docs/performance.md).
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
# Python keeps what it compiled, also where the environment says no, as images of containers do: each of the many
# processes that a target starts would compile the project again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install quickstart quickstart-real learn-search-real learn-code-real test test-recipes test-real sglang test-sglang test-ray test-fakecuda chaos lint coverage smoke-gsm8k smoke-geo3k smoke-geo3k-tools smoke-search smoke-retool learn-gsm8k learn-vision learn-code learn-search bench bench-quick gpu-check docs clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1|/' | awk -F'|' '{printf "  %-18s %s\n", $$1, $$2}'

install: $(STAMP) ## create .venv and install agentloop with its test tools (CPU torch)

$(STAMP): pyproject.toml constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt --editable '.[dev]'
	@touch $@

SEED ?= 0

quickstart: $(STAMP) ## teach a small model to use a calculator, on two cores, in minutes
	$(BIN)/agentloop train --config recipes/quickstart/recipe.yaml $(ARGS)

REAL_MODEL := outputs/models/smollm2-135m
REAL_BOUNDS ?= --evaluated-from 0.1 --evaluated-to 0.95
# Runs that were stopped are continued; each seed has runs of its own.
REAL_SUFFIX := $(if $(filter-out 0,$(SEED)),-seed$(SEED))
REAL_RUN = model.path=$(REAL_MODEL) seed=$(SEED) run.name=$(1)$(REAL_SUFFIX) $(if $(wildcard outputs/$(1)$(REAL_SUFFIX)/config),--resume)

quickstart-real: $(STAMP) ## teach a real language model of 135 M parameters the same, on two cores, in 15 minutes: SEED=0
	$(BIN)/python recipes/smollm2/model.py --out $(REAL_MODEL)
	test -f outputs/smollm2-pretrained/eval.json || $(BIN)/agentloop eval --config recipes/smollm2/recipe.yaml \
	  model.path=$(REAL_MODEL) --out outputs/smollm2-pretrained $(EVAL_ARGS)
	$(BIN)/agentloop sft --config recipes/smollm2/sft.yaml $(call REAL_RUN,smollm2-sft) $(SFT_ARGS)
	$(BIN)/agentloop train --config recipes/smollm2/recipe.yaml $(call REAL_RUN,smollm2) \
	  trainer.lora.adapters=outputs/smollm2-sft$(REAL_SUFFIX) $(ARGS)
	$(BIN)/agentloop report outputs/smollm2$(REAL_SUFFIX) --picture outputs/smollm2$(REAL_SUFFIX)/curve.svg
	$(BIN)/python -m recipes.bounds outputs/smollm2$(REAL_SUFFIX) $(REAL_BOUNDS)

# Serves an index on a free port, or on PORT, until the recipe's line ends; the tool's YAML reads SEARCH_PORT.
SERVE_INDEX = $(BIN)/agentloop search serve $(1) --port $(or $(PORT),0) >$(1).served & server=$$!; trap "kill $$server" EXIT; \
	until grep -qs http $(1).served; do kill -0 $$server || exit 1; sleep 0.2; done; \
	export SEARCH_PORT=$$(sed -n 's,.*http://[^:]*:\([0-9]*\)/.*,\1,p' $(1).served);

FROM_ADAPTERS = trainer.lora.adapters=outputs/$(1)-sft$(REAL_SUFFIX)
SKILL_BOUNDS ?= --evaluated-from 0.2 --evaluated-to 0.8

learn-search-real: $(STAMP) ## SmolLM2-135M learns to search instead of guessing, on two cores: SEED=0
	$(BIN)/python recipes/smollm2/model.py --out $(REAL_MODEL)
	$(BIN)/agentloop prepare recipes/search/smollm2 --out outputs/search-smollm2-data
	$(BIN)/agentloop search index outputs/search-smollm2-data/corpus.jsonl --out outputs/search-smollm2-data/index
	$(BIN)/agentloop sft --config recipes/search/smollm2/sft.yaml $(call REAL_RUN,search-smollm2-sft) $(SFT_ARGS)
	$(call SERVE_INDEX,outputs/search-smollm2-data/index) \
	$(BIN)/agentloop train --config recipes/search/smollm2/recipe.yaml $(call REAL_RUN,search-smollm2) $(call FROM_ADAPTERS,search-smollm2) $(ARGS)
	$(BIN)/agentloop report outputs/search-smollm2$(REAL_SUFFIX) --picture outputs/search-smollm2$(REAL_SUFFIX)/curve.svg
	$(BIN)/python -m recipes.bounds outputs/search-smollm2$(REAL_SUFFIX) $(SKILL_BOUNDS)

# Serves a sandbox on a free port until the recipe's line ends; the tool's YAML reads SANDBOX_URL.
SERVE_SANDBOX = rm -f $(1); $(BIN)/agentloop sandbox serve --port 0 >$(1) & server=$$!; trap "kill $$server" EXIT; \
	until grep -qs http $(1); do kill -0 $$server || exit 1; sleep 0.2; done; \
	export SANDBOX_URL=$$(sed -n 's/^sandbox: *//p' $(1));

learn-code-real: $(STAMP) ## SmolLM2-135M learns to write programs instead of guessing, on two cores: SEED=0
	$(BIN)/python recipes/smollm2/model.py --out $(REAL_MODEL)
	$(BIN)/agentloop sft --config recipes/retool/smollm2/sft.yaml $(call REAL_RUN,retool-smollm2-sft) $(SFT_ARGS)
	$(call SERVE_SANDBOX,outputs/retool-smollm2-sandbox.txt) \
	$(BIN)/agentloop train --config recipes/retool/smollm2/recipe.yaml $(call REAL_RUN,retool-smollm2) $(call FROM_ADAPTERS,retool-smollm2) $(ARGS)
	$(BIN)/agentloop report outputs/retool-smollm2$(REAL_SUFFIX) --picture outputs/retool-smollm2$(REAL_SUFFIX)/curve.svg
	$(BIN)/python -m recipes.bounds outputs/retool-smollm2$(REAL_SUFFIX) $(SKILL_BOUNDS)

# What takes minutes, or an environment of its own, has a target of its own.
SUITE := "not gpu and not ray and not fakecuda and not sglang and not real and not chaos and not benchmark and not recipe"

test: $(STAMP) ## run the test suite
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile -m $(SUITE) $(ARGS)

test-recipes: $(STAMP) ## run the commands of the recipes' READMEs, shortened, in the folder of a newcomer
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile -m recipe $(ARGS)

test-real: $(STAMP) ## run the tests with a real pretrained model (SmolLM2-135M, from the package index)
	$(BIN)/python -m pytest -m "real and not sglang" $(ARGS)

SGLANG_VENV ?= .venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.installed

$(SGLANG_STAMP): constraints/sglang.txt
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install --quiet uv
	$(SGLANG_VENV)/bin/uv pip install --quiet --python $(SGLANG_VENV)/bin/python --requirement constraints/sglang.txt
	@touch $@

sglang: $(SGLANG_STAMP) ## create .venv-sglang, the environment of rollout.python (10 GB)

test-sglang: $(STAMP) $(SGLANG_STAMP) ## run the suite marked sglang against a real SGLang, on the CPU
	AGENTLOOP_SGLANG_PYTHON=$(CURDIR)/$(SGLANG_VENV)/bin/python $(BIN)/python -m pytest -m sglang $(ARGS)
	AGENTLOOP_TEST_TRAINER_PYTHON=$(CURDIR)/$(SGLANG_VENV)/bin/python $(BIN)/python -m pytest tests/rollout_server/test_broadcast.py

# CUDA's runtime without a card (tests/fakecuda/runtime.c), compiled with the headers that SGLang's environment brings.
FAKECUDA := $(SGLANG_VENV)/libfakecuda.so

$(FAKECUDA): tests/fakecuda/runtime.c $(SGLANG_STAMP)
	$(CC) -shared -fPIC -O1 -Wl,-soname,libcuda.so.1 $$(printf -- '-I%s ' $(SGLANG_VENV)/lib/python*/site-packages/nvidia/cu*/include) -o $@ $<

test-ray: $(STAMP) ## run the tests that start Ray: runs over two nodes, and over two network namespaces (as root)
	$(BIN)/python -m pytest -m ray $(ARGS)

test-fakecuda: $(FAKECUDA) ## run the CUDA code on fake cards, without one: devices, dtypes and shapes, at full model sizes
	LD_PRELOAD=$(abspath $(FAKECUDA)) $(SGLANG_VENV)/bin/python -m pytest -o addopts="-ra --strict-markers --import-mode=importlib" \
	  -p no:cacheprovider -W ignore::pytest.PytestConfigWarning -m fakecuda tests/fakecuda $(ARGS)

RUN_CHAOS_S ?= 600
SERVER_CHAOS_S ?= 120

chaos: $(STAMP) ## ten minutes of kills, stops, damage and a full disk on a whole run, two on a server: nothing may be lost
	CHAOS_SECONDS=$(RUN_CHAOS_S) $(BIN)/python -m pytest tests/chaos/test_run_chaos.py -s $(ARGS)
	CHAOS_SECONDS=$(SERVER_CHAOS_S) $(BIN)/python -m pytest tests/chaos/test_chaos.py -s $(ARGS)

lint: $(STAMP) ## ruff, mypy, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

coverage: $(STAMP) ## tests with line coverage of agentloop/, at least 90 %
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile -m $(SUITE) --cov=agentloop --cov-report=term-missing:skip-covered --cov-fail-under=90 $(ARGS)

GSM8K := outputs/smoke-gsm8k

smoke-gsm8k: $(STAMP) ## the gsm8k recipe on a CPU, two steps with the tool and one with a simulated user: make smoke-gsm8k [SOURCE=<folder with train.jsonl and test.jsonl>]
	rm -rf $(GSM8K)
	$(BIN)/agentloop prepare gsm8k --source $(or $(SOURCE),generated) --out $(GSM8K)/data
	$(BIN)/agentloop train --config recipes/gsm8k/smoke.yaml run.dir=$(GSM8K)/tool \
	  data.train=$(GSM8K)/data/train.parquet data.val=$(GSM8K)/data/test.parquet $(ARGS)
	$(BIN)/agentloop train --config recipes/gsm8k/smoke.yaml run.dir=$(GSM8K)/user run.name=gsm8k-smoke-user run.steps=1 \
	  tools=null reward=null interactions=recipes/gsm8k/interactions.yaml \
	  data.train=$(GSM8K)/data/user_train.parquet data.val=$(GSM8K)/data/user_test.parquet $(ARGS)

GEO3K := outputs/smoke-geo3k
GEO3K_MODEL := $(GEO3K)/model

$(GEO3K_MODEL)/config.json: recipes/geo3k/model.py recipes/geo3k/chat_template.jinja | $(STAMP)
	rm -rf $(GEO3K_MODEL)
	$(BIN)/python recipes/geo3k/model.py --out $(GEO3K_MODEL)

smoke-geo3k: $(STAMP) $(GEO3K_MODEL)/config.json ## geometry3k with images on a CPU, three steps: make smoke-geo3k [SOURCE=<folder of geometry3k>]
	rm -rf $(GEO3K)/plain
	$(BIN)/agentloop prepare geo3k --source $(or $(SOURCE),generated) --out $(GEO3K)/plain/data
	$(BIN)/agentloop train --config recipes/geo3k/smoke.yaml run.dir=$(GEO3K)/plain/run model.path=$(GEO3K_MODEL) \
	  data.train=$(GEO3K)/plain/data/train.parquet data.val=$(GEO3K)/plain/data/test.parquet $(ARGS)

smoke-geo3k-tools: $(STAMP) $(GEO3K_MODEL)/config.json ## the same with the tool that checks an answer: make smoke-geo3k-tools [SOURCE=<folder of geometry3k>]
	rm -rf $(GEO3K)/tools
	$(BIN)/agentloop prepare geo3k --source $(or $(SOURCE),generated) --out $(GEO3K)/tools/data
	$(BIN)/agentloop train --config recipes/geo3k/smoke_tools.yaml run.dir=$(GEO3K)/tools/run model.path=$(GEO3K_MODEL) \
	  data.train=$(GEO3K)/tools/data/tools_train.parquet data.val=$(GEO3K)/tools/data/tools_test.parquet $(ARGS)

SEARCH := outputs/smoke-search

smoke-search: $(STAMP) ## questions with a search server on a CPU, two steps: make smoke-search [SOURCE=<folder with corpus.jsonl and questions>]
	rm -rf $(SEARCH)
	$(BIN)/agentloop prepare search --config recipes/search/smoke_prompt.yaml --source $(or $(SOURCE),generated) --out $(SEARCH)/data
	$(BIN)/agentloop search index $(or $(SOURCE),$(SEARCH)/data)/corpus.jsonl --out $(SEARCH)/index
	$(BIN)/agentloop sft --config recipes/search/smoke_sft.yaml run.dir=$(SEARCH)/sft $(SFT_ARGS)
	$(call SERVE_INDEX,$(SEARCH)/index) \
	$(BIN)/agentloop train --config recipes/search/smoke.yaml run.dir=$(SEARCH)/run model.path=$(SEARCH)/sft/model \
	  data.train=$(SEARCH)/data/train.parquet data.val=$(SEARCH)/data/test.parquet $(ARGS)

RETOOL := outputs/smoke-retool

# The small model is taught by the generated conversations: the published ones are too long for it.
smoke-retool: $(STAMP) ## mathematics with a Python interpreter on a CPU, two steps through the sandbox: make smoke-retool [SOURCE=<folder with DAPO-Math-17k and AIME 2024>]
	rm -rf $(RETOOL)
	$(BIN)/agentloop prepare retool --source generated --out $(RETOOL)/taught
	$(BIN)/agentloop prepare retool --source $(or $(SOURCE),generated) --out $(RETOOL)/data
	$(BIN)/agentloop sft --config recipes/retool/smoke_sft.yaml run.dir=$(RETOOL)/sft stages.0.data=$(RETOOL)/taught/sft.jsonl $(SFT_ARGS)
	$(call SERVE_SANDBOX,$(RETOOL)/sandbox.txt) \
	$(BIN)/agentloop train --config recipes/retool/smoke.yaml run.dir=$(RETOOL)/run model.path=$(RETOOL)/sft/model \
	  data.train=$(RETOOL)/data/train.parquet data.val=$(RETOOL)/data/aime_2024.parquet $(ARGS)

TWIN = outputs/learn-gsm8k/seed$(SEED)
TWIN_BOUNDS ?= --starts-below 0.35 --ends-above 0.8

learn-gsm8k: $(STAMP) ## the small twin of gsm8k learns in minutes on two cores: make learn-gsm8k [SEED=1]
	rm -rf $(TWIN)
	$(BIN)/agentloop train --config recipes/gsm8k/twin/recipe.yaml seed=$(SEED) run.dir=$(TWIN) $(ARGS)
	$(BIN)/agentloop report $(TWIN) --picture $(TWIN)/curve.svg
	$(BIN)/python -m recipes.bounds $(TWIN) $(TWIN_BOUNDS)

bench-quick: $(STAMP) ## each benchmark at a small size: its workload is what it says; no time is judged
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) -m benchmark $(ARGS)

VISION = outputs/learn-vision/seed$(SEED)
VISION_BOUNDS ?= --starts-below 0.3 --ends-above 0.8
CONTROL_BOUNDS ?= --ends-below 0.2
CONTROL := data.train=recipes/vision/data.py:blank_train_rows data.val=recipes/vision/data.py:blank_val_rows

learn-vision: $(STAMP) ## a small vision-language model learns where to look, and does not with blank pictures: make learn-vision [SEED=1]
	rm -rf $(VISION)
	$(BIN)/agentloop train --config recipes/vision/recipe.yaml seed=$(SEED) run.dir=$(VISION)/pictures $(ARGS)
	$(BIN)/agentloop train --config recipes/vision/recipe.yaml seed=$(SEED) run.dir=$(VISION)/blank $(CONTROL) $(ARGS)
	$(BIN)/agentloop report $(VISION)/pictures $(VISION)/blank --picture $(VISION)/curve.svg
	$(BIN)/python -m recipes.bounds $(VISION)/pictures $(VISION_BOUNDS)
	$(BIN)/python -m recipes.bounds $(VISION)/blank $(CONTROL_BOUNDS)

LEARN_CODE = outputs/learn-code/seed$(SEED)
CODE_BOUNDS ?= --starts-below 0.3 --ends-above 0.8

learn-code: $(STAMP) ## a small model learns which program solves which problem, through the real sandbox: make learn-code [SEED=1]
	rm -rf $(LEARN_CODE)
	mkdir -p $(dir $(LEARN_CODE))
	$(call SERVE_SANDBOX,$(LEARN_CODE).sandbox.txt) \
	$(BIN)/agentloop train --config recipes/retool/twin/recipe.yaml seed=$(SEED) run.dir=$(LEARN_CODE) $(ARGS)
	$(BIN)/agentloop report $(LEARN_CODE) --picture $(LEARN_CODE)/curve.svg
	$(BIN)/python -m recipes.bounds $(LEARN_CODE) $(CODE_BOUNDS)

LEARN_SEARCH = outputs/learn-search/seed$(SEED)
SEARCH_BOUNDS ?= --starts-below 0.3 --ends-above 0.8
SEARCH_CONTROL_BOUNDS ?= --ends-below 0.3

# $(call learn_from,CORPUS,RUN): index a corpus, serve it on a free port, and train a run that searches it.
define learn_from
$(BIN)/agentloop search index $(LEARN_SEARCH)/data/$(1).jsonl --out $(LEARN_SEARCH)/data/$(1)
$(call SERVE_INDEX,$(LEARN_SEARCH)/data/$(1)) \
$(BIN)/agentloop train --config recipes/search/twin/recipe.yaml seed=$(SEED) run.dir=$(LEARN_SEARCH)/$(2) $(ARGS)
endef

learn-search: $(STAMP) ## a small model learns to search a generated knowledge base, and does not where passages are random: make learn-search [SEED=1]
	rm -rf $(LEARN_SEARCH)
	$(BIN)/agentloop prepare recipes/search/twin --out $(LEARN_SEARCH)/data
	$(call learn_from,corpus,search)
	$(call learn_from,shuffled,control)
	$(BIN)/agentloop report $(LEARN_SEARCH)/search $(LEARN_SEARCH)/control --picture $(LEARN_SEARCH)/curve.svg
	$(BIN)/python -m recipes.bounds $(LEARN_SEARCH)/search $(SEARCH_BOUNDS)
	$(BIN)/python -m recipes.bounds $(LEARN_SEARCH)/control $(SEARCH_CONTROL_BOUNDS)

bench: $(STAMP) ## benchmarks on this machine; peers get environments of their own
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/token_law.py
	$(BIN)/python benchmarks/loop_overhead.py
	$(BIN)/python benchmarks/router.py
	$(BIN)/python benchmarks/sandbox.py
	$(BIN)/python benchmarks/publish.py
	$(BIN)/python benchmarks/retrieval.py
	$(BIN)/python benchmarks/rollout.py
	$(BIN)/python benchmarks/matmul.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/async.py --curve
	$(BIN)/python benchmarks/step.py

gpu-check: $(STAMP) ## all that only a card can show, in twelve minutes of one: make gpu-check [ARGS=--dry-run]
	$(BIN)/python benchmarks/card_check.py $(ARGS)

docs: $(STAMP) ## write docs/config.md from the config models
	$(BIN)/python docs/make_config.py

clean: ## remove the environment, caches and outputs
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache htmlcov .coverage* outputs
