# make help lists the targets. A fresh machine needs Python 3.11-3.13 with venv, and make.
#
#   PYTHON  the interpreter that makes the environment    make test PYTHON=python3.12
#   VENV    the environment; made and kept up to date; empty = use PYTHON as it is, install nothing
#                                                         make test VENV= PYTHON=python
#   ARGS    more arguments for the command                make test ARGS="-k oracle"
VENV = .venv
PYTHON = $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell \
	$(p) -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) and print("$(p)")' 2>/dev/null)) python3)
ARGS =

ifeq ($(strip $(VENV)),)
PY = $(PYTHON)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY = $(VENV)/bin/python
TRAIN_READY = $(VENV)/.ready-train
DEV_READY = $(VENV)/.ready-dev
endif

.PHONY: help train test test-gpu test-titan sanitize lint format types aot wheel-smoke clean
.DEFAULT_GOAL = help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(TRAIN_READY) ## train a small MoE on real text in PyTorch and in Flax, in bf16 and in fp8, and draw the curves
	$(PY) -m xmoe train --framework both --recipe bf16,fp8_rowwise --out runs/demo $(if $(filter --resume,$(ARGS)),,--overwrite) $(ARGS)

# The kernels run in Triton's CPU interpreter and JAX stays on the CPU, also on a machine with a GPU. OpenMP threads that
# spin while they wait for work would take the cores from XLA's. Two processes: the interpreter uses one core each. Each
# begins with a half of the files in their order, which keeps what a module's tests share in one process, and takes from
# the other's end when it is done.
test: $(DEV_READY) ## the tests, on the CPU
	CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 JAX_PLATFORMS=cpu OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -n 2 --dist worksteal -m "not gpu" $(ARGS)

test-gpu: $(DEV_READY) ## the tests that need a GPU
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(PY) -m pytest -m gpu $(ARGS)

# Not in .ci/run: torchtitan brings datasets, pyarrow and wandb, its two lines exclude each other, and each is written for
# a PyTorch nightly. One environment for each, with the PyTorch of constraints-cpu.txt.
TITANS = 0.2.2 0.3.0
test-titan: ## torchtitan's trainer with xmoe, on the CPU, in an environment for each version of it
	set -e; for version in $(TITANS); do \
		venv=.venv-titan-$$version; \
		test -e $$venv/.ready || { $(PYTHON) -m venv $$venv; \
			$$venv/bin/pip install -c constraints-cpu.txt $(TITAN_INDEX) torchtitan==$$version torch triton .[test]; \
			touch $$venv/.ready; }; \
		PYTHONPATH=$(CURDIR) $$venv/bin/python -m pytest tests/integrations/test_titan.py $(ARGS); \
	done
TITAN_INDEX = --extra-index-url https://download.pytorch.org/whl/cpu

# Every access is checked, which is slow, so it gets few tests: all recipes on uneven groups, bad offsets, no tokens.
sanitize: $(DEV_READY) ## compute-sanitizer (CUDA toolkit) looks for bad memory accesses of the kernels, on a GPU
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --target-processes all --error-exitcode 1 \
		$(PY) -m pytest --timeout 1800 -m gpu tests/kernels/test_pipeline.py tests/kernels/test_experts.py \
		-k "test_recipes and uneven or bad_offsets or no_tokens or router and 2" $(ARGS)

lint: $(DEV_READY) ## ruff: rules and format
	$(PY) -m ruff check
	$(PY) -m ruff format --check

format: $(DEV_READY) ## let ruff fix what it can
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

types: $(DEV_READY) ## pyright
	$(PY) scripts/check_types.py

aot: $(DEV_READY) ## compile every Triton kernel for sm_89, sm_90 and sm_100 (no GPU needed) and look at the result
	$(PY) scripts/aot_check.py $(ARGS)

wheel-smoke: $(DEV_READY) ## build the wheel, install it in a fresh environment, use it from elsewhere
	$(PY) scripts/wheel_smoke.py $(ARGS)

clean: ## remove what the other targets made, the environment and runs/ excepted
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(VENV)/.ready-train: pyproject.toml constraints.txt constraints-cpu.txt scripts/setup_env.py
	@$(PYTHON) scripts/setup_env.py --venv $(VENV) --extras flax,train --stamp $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt constraints-cpu.txt scripts/setup_env.py
	@$(PYTHON) scripts/setup_env.py --venv $(VENV) --extras flax,train,dev --stamp $@
