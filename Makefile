# Every target makes the environment it needs when that is not there.
PYTHON ?= python3
SEED ?= 0
BIN := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
RUN := .venv/$(BIN)
FLOOR := .venv-floor
# The oldest torch that the suite passes on, with the torchvision of its time.
FLOOR_PACKAGES := "torch==2.9.0" "torchvision==0.24.0"

.PHONY: demo test test-distributed test-long coverage test-floor test-models test-checkpoints lint types docs bench bench-mnist clean

demo: .venv/ready
	$(RUN)/python examples/quickstart.py --seed $(SEED)

test: .venv/ready
	$(RUN)/python -m pytest

test-distributed: .venv/ready  ## the part of the suite that runs several processes
	$(RUN)/python -m pytest tests/distributed

test-long: .venv/ready  ## 2,000 hypothesis examples a property instead of 60
	HYPOTHESIS_PROFILE=long $(RUN)/python -m pytest tests

coverage: .venv/ready  ## of lines and branches, in all processes that tests start
	$(RUN)/python -m pytest --cov --cov-report=term:skip-covered

test-floor: $(FLOOR)/ready
	$(FLOOR)/$(BIN)/python -m pytest

lint: .venv/ready
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: .venv/ready
	$(RUN)/mypy

docs: .venv/docs
	$(RUN)/mkdocs build --strict

bench: .venv/bench  ## about 35 minutes on two cores; leave the machine alone meanwhile
	$(RUN)/python -m benchmarks

bench-mnist: .venv/ready  ## DATA=folder of MNIST; see CONTRIBUTING.md for how long it takes
	$(RUN)/python -m benchmarks.mnist $(DATA)
	$(RUN)/python -m benchmarks.tickets $(DATA)

test-models: .venv/ready  ## the law of squash on every torchvision model; writes docs/models.md
	$(RUN)/python -m tests.models.zoo

test-checkpoints: .venv/ready  ## the command line on 1 GiB: memory, interruption, a full disk
	$(RUN)/python -m tests.large_checkpoints

clean:
	rm -rf .venv .venv-floor site out

# uv installs torch several times faster than pip; pip brings it from the same registry.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(RUN)/python -m pip install --quiet --disable-pip-version-check uv
	$(RUN)/uv pip install --quiet --python $(RUN)/python --editable ".[test,demo,lint]"
	touch $@

.venv/docs: .venv/ready
	$(RUN)/uv pip install --quiet --python $(RUN)/python --editable ".[docs]"
	touch $@

.venv/bench: .venv/ready
	$(RUN)/uv pip install --quiet --python $(RUN)/python --editable ".[bench]"
	touch $@

$(FLOOR)/ready: .venv/ready
	$(PYTHON) -m venv $(FLOOR)
	$(RUN)/uv pip install --quiet --python $(FLOOR)/$(BIN)/python $(FLOOR_PACKAGES) --editable ".[test]"
	touch $@
