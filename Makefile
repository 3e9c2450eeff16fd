# `make train` and `make test` need Python 3.11 with pip, nothing else; they make .venv when it is absent.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train test test-slow test-gpu test-safety test-sim check format bench clean

train: $(READY)
	$(BIN)/sacflow-robot train --env lift $(ARGS)

# First all tests that keep to no clock, in two processes, each of which comes to hold 3 GB; a file's tests stay together, for
# they share what they set up. Then the tests marked realtime, with nothing beside them. Neither part has tests marked gpu or
# slow. Pytest returns 5 where ARGS leave one of the two parts nothing to do.
test: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile -m "not gpu and not slow and not realtime" $(ARGS) || test $$? -eq 5
	$(BIN)/pytest -m "realtime and not gpu and not slow" $(ARGS) || test $$? -eq 5

# All tests marked slow: a cell of real processes that learns while it runs, every algorithm compiled, the whole of bench and of
# the studies, 200 kills of a process that writes a log. Some fifteen minutes.
test-slow: $(READY)
	$(BIN)/pytest -m slow $(ARGS)

test-gpu: $(READY)
	$(BIN)/pytest -m gpu $(ARGS)

# The properties of the safety filter with 10,000 cases each, and 100,000 runs of the state machine of stops: some 40 minutes.
test-safety: $(READY)
	SACFLOW_SAFETY_CASES=10000 SACFLOW_STOP_EXAMPLES=100000 $(BIN)/pytest --timeout 7200 tests/robot/safety $(ARGS)

# Every task, 50 episodes of 200 steps with random, expert and extreme actions, on both engines: some 10 minutes.
test-sim: $(READY)
	$(BIN)/python benchmarks/sim_equality.py --out benchmarks/results/sim_equality.json $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/check_imports.py
	$(BIN)/python .ci/check_links.py
	$(BIN)/pylint --disable=all --enable=duplicate-code sacflow_robot tests benchmarks examples

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/sacflow-robot bench serve --out benchmarks/results/serve.json
	$(BIN)/sacflow-robot bench replay --out benchmarks/results/replay.json
	$(BIN)/sacflow-robot bench log --out benchmarks/results/log.json
	$(BIN)/sacflow-robot bench loop --out benchmarks/results/loop.json
	$(BIN)/sacflow-robot bench train --out benchmarks/results/train.json
	$(BIN)/sacflow-robot bench sim --policy policies/lift.onnx --out benchmarks/results/sim.json

# Made again whenever the requirements change; an interrupted set-up leaves no .ready and is taken up again.
$(READY): pyproject.toml constraints.txt requirements-robomimic.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[train,dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps -r requirements-robomimic.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
