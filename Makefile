# `make demo` and `make test` work in a fresh clone with nothing but python3 (>= 3.11), pip and make.

PYTHON ?= python3
# Test processes; each is given one thread, so this is also the number of cores in use.
TEST_PROCESSES ?= 2
PYTEST_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
EXAMPLE := src/omnimamba/assets/nano/example.png
# A file whose name begins with _ is shared code, not a benchmark; plot.py and page.py show results.
BENCHMARKS = $(filter-out benchmarks/_% benchmarks/plot.py benchmarks/page.py,$(wildcard benchmarks/*.py))

.DELETE_ON_ERROR:
.PHONY: help venv demo test check format bench plots lock clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

venv: $(STAMP) ## set up .venv with the locked versions

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "omnimamba needs Python 3.11 or newer; name one, as in: make PYTHON=python3.11")'
	@echo "setting up .venv: about 6 GB, most of it torch's CUDA libraries"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(STAMP) ## paint an image with the shipped model, describe a real one
	@rm -rf demo && mkdir demo
	$(BIN)/omnimamba generate "red apple" -o demo/apple.png --num-images 4 --seed 3 --model nano
	$(BIN)/omnimamba describe $(EXAMPLE) --question "What is this?" --model nano > demo/description.txt
	@echo "painted 'red apple':"; ls demo/*.png
	@echo "described $(EXAMPLE):"; cat demo/description.txt

test: $(STAMP) ## run the whole CPU test suite
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not weights" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: $(STAMP) ## ruff, pyright, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(STAMP) ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## run every benchmark; figures go to runs/bench/*.json
	@test -n "$(BENCHMARKS)" || { echo "no benchmark in benchmarks/"; exit 1; }
	@mkdir -p runs/bench
	set -e; for script in $(BENCHMARKS); do \
		$(BIN)/python $$script --json runs/bench/$$(basename $$script .py).json || test $$? = 2; \
	done # 2: it has said what it needs and this computer lacks

plots: $(STAMP) ## show benchmarks/results: docs/images/*.png, docs/performance.md
	$(BIN)/python benchmarks/plot.py
	$(BIN)/python benchmarks/page.py

# Newest versions that fit together, but for torch and torchvision: a torchvision release works with one torch release only.
# Not the eval extra: lmms-eval brings a large tree that no test uses; what else of it tests use is in dev.
LOCKED = torch==2.14.1 torchvision==0.29.1
# torch's CUDA libraries and triton exist for Linux only.
LINUX_ONLY = s/^((nvidia|cuda)-[^=]*|triton)==.*/&; sys_platform == "linux"/

lock: ## resolve the dependencies anew into requirements.lock
	set -e; tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	$(PYTHON) -m venv "$$tmp"; \
	"$$tmp/bin/python" -m pip install --quiet --editable '.[train,serve,ray,dev]' $(LOCKED); \
	"$$tmp/bin/python" -m pip freeze --all --exclude-editable --exclude pip > "$$tmp/frozen"; \
	if grep -vE '^[A-Za-z0-9._-]+==[A-Za-z0-9.]+$$' "$$tmp/frozen"; then echo "not a plain name==version"; exit 1; fi; \
	{ echo '# Written by `make lock`.'; sed -E '$(LINUX_ONLY)' "$$tmp/frozen"; } > requirements.lock

clean: ## remove .venv, caches and outputs
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist demo src/*.egg-info
