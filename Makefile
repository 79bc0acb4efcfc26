# Each target is complete on a machine that has only Python 3.10+ and make:
#   make compare              examples/sec, plain and fast, on this machine   (COMPARE_ARGS="--quick")
#   make test                 the test suite       (PYTEST_ARGS="-k data"; WORKERS= for one process that shows all)
# Set PYTHON=python3.12 for another Python, CONSTRAINTS=tests/constraints/newest.txt for the exact tested set.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?=
OLDEST_TESTS := $(wildcard $(addprefix tests/test_,$(addsuffix .py,aot block configs division driver few functional first_call first_layer gpu gpu_parts gpu_suite kernels kernel_memory launch_options ops op_gradients compile equivalence module gradients edited inputs interpreter out pool pool_relu programs ptx replay replay_backward replay_record roofline special stem stem_compiled stem_launches stem_layers stem_parts target told transforms widened)))
# A process for each core, up to four: each holds PyTorch, and what a file shares is made once in each. The files come
# in the order of tests/conftest.py, the longest first, not by their number of tests.
WORKERS ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
RUN := $(VENV)/bin/python

# A user's active environment must not leak into this one.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME PIP_USER

.PHONY: compare test test-oldest bench lint format clean
.DELETE_ON_ERROR:

compare: $(VENV)/.installed-test
	$(RUN) bench/compare.py $(COMPARE_ARGS)

test: $(VENV)/.installed-test
	$(RUN) -m pytest $(WORKERS) $(TESTS) $(PYTEST_ARGS)

# On the oldest supported torch and Triton, in an environment of its own.
test-oldest:
	$(MAKE) --no-print-directory test VENV=.venv-oldest CONSTRAINTS=tests/constraints/oldest.txt TESTS="$(OLDEST_TESTS)"

bench: $(VENV)/.installed-test
	$(RUN) -m pytest bench --benchmark-only $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/.installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Which constraints an environment was installed from: a change of CONSTRAINTS changes the file's content, so that
# the stamps below are older than it and pip runs again.
FROM := $(VENV)/.constraints
ifneq ($(CONSTRAINTS),$(shell cat $(FROM) 2>/dev/null))
.PHONY: $(FROM)
endif
$(FROM): | $(VENV)/bin/pip
	@printf '%s\n' '$(CONSTRAINTS)' > $@

# pip is asked for by its file, not python: a venv without ensurepip leaves a python that can install nothing.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "FastInception needs Python 3.10 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; } >&2
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) $(FROM)
	$(RUN) -m pip install --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e ".[$*]"
	@touch $(VENV)/.installed-test $@
