# The commands of this repository. `make help` lists them; a user brings python 3.11 or newer and make.

UV_VERSION := 0.13.9

# Looked up only when a target needs it. Running it is the test: a name on PATH may be a shim for a version that is not installed.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	"$$p" -c 'import sys; sys.version_info >= (3, 11) or sys.exit(1); print(sys.executable)' 2>/dev/null && break; done)
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo .uv/bin/uv)
BIN := .venv/bin
STAMP := .venv/.in-sync

# A test that hangs says so; one thread a process, as tests start several processes on few cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout 300
# Two test processes; each holds up to 2 GB, and the tests of a file stay in one. They begin in the order of collection.
TEST_PROCESSES ?= 2
SIDE_BY_SIDE := -n $(TEST_PROCESSES) --dist loadscope --no-loadscope-reorder
ROOMS := kernels dabnn orchestrator jobs cli.py

# Benchmarks write one JSON file each into the folder that they find under this name.
OUT ?= benchmarks/results/
export OUT
# Compiled bytecode halves the time that every process spends importing torch.
unexport PYTHONDONTWRITEBYTECODE
# By name, since a CUDA machine need not have what the other tests import.
GPU_TESTS = $(shell grep -rlE --include='*.py' 'mark\.gpu' tests/kernels tests/dabnn)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all chaos check check-format check-lint check-types check-style check-repo bench gpu lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv from requirements.lock (the targets below do it themselves)

demo: setup ## run the whole product on this machine, on real images
	$(BIN)/dab demo

test: setup ## the test suite (under 20 minutes on 2 cores)
	$(PYTEST) $(SIDE_BY_SIDE) -m "not slow and not gpu and not chaos"

test-all: setup ## the slow tests too
	$(PYTEST) $(SIDE_BY_SIDE) -m "not gpu and not chaos"

chaos: setup ## break things on a cluster of several machines made of namespaces (needs root), and print what each cost
	DAB_CHAOS_OUT="$$OUT" $(PYTEST) -m chaos --timeout 1800 tests/chaos

check: check-format check-lint check-types check-style check-repo ## format, lint, types, style budget, import directions

check-format: setup
	$(BIN)/ruff format --check .

check-lint: setup
	$(BIN)/ruff check .

check-types: setup
	$(BIN)/mypy

check-style: setup
	$(BIN)/python tools/style_numbers.py --max fn_p90=40 --max nest_max=4 --max file_max=500 --min api_cover=1 --min typed=1 $(ROOMS)

check-repo: setup
	$(PYTEST) -q --noconftest tests/test_rooms.py tests/test_repo.py

bench: setup ## CPU benchmarks beside their peers, JSON into OUT (default benchmarks/results/)
	$(call benchmarks,$(BIN)/python,cpu)

gpu: ## on a CUDA machine, with its own python3 and nothing installed: GPU tests, then GPU benchmarks, JSON into OUT
	@python3 -c 'import torch; assert torch.cuda.is_available()' || \
		{ echo "make gpu: python3 on PATH needs torch and a CUDA device; see the line above." >&2; exit 1; }
	python3 -m pytest -o filterwarnings=default -m gpu $(or $(GPU_TESTS),$(error no test under tests/kernels or tests/dabnn is marked gpu))
	$(call benchmarks,python3,gpu)

lock: $(UV) ## pin requirements.in, and what it needs, in requirements.lock
	$(UV) pip compile --quiet --universal --python-version 3.11 --custom-compile-command "make lock" requirements.in -o requirements.lock

clean: ## remove what these targets made; runs and models under DAB_HOME stay
	rm -rf .venv .uv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call benchmarks,PYTHON,cpu|gpu): runs them all, and fails at the end when one failed.
define benchmarks
@mkdir -p "$$OUT"; failed=; \
for script in benchmarks/*_$(2).py; do \
	echo "$$script" >&2; PYTHONPATH=. $(1) "$$script" || failed="$$failed $$script"; \
done; \
[ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }
endef

# $(PYTHON) is empty when none was found.
define need_python
"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
echo "dab needs python 3.11 or newer, and found $(or $(PYTHON),no python3.13 python3.12 python3.11 or python3 on PATH that is). \
Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
endef

$(STAMP): requirements.lock pyproject.toml | $(UV)
	@$(need_python)
	@test -x $(BIN)/python || { \
	echo "Creating .venv: about 6 GB of packages, minutes the first time, seconds from a warm cache." >&2; \
	$(UV) venv --quiet --clear --python "$(PYTHON)" .venv; }
	$(UV) pip sync --python $(BIN)/python requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

.uv/bin/uv:
	@$(need_python)
	@echo "Fetching uv $(UV_VERSION) into .uv" >&2
	@"$(PYTHON)" -m venv .uv || { rm -rf .uv; \
	echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian: apt install python3-venv)." >&2; exit 1; }
	@.uv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$(UV_VERSION)"
