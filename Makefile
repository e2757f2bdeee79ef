# Every target makes the environment it needs when that is not there.
PYTHON ?= python3
SEED ?= 0
BIN := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
RUN := .venv/$(BIN)
UV := $(RUN)/uv pip
# Two workers, each with one thread, are the fastest on two cores. Tests that start groups of
# processes go to one of them, so that each group is started once.
SUITE := -m pytest -n 2 --dist loadgroup
# Other versions of packages warn of other things: there a warning is no failure.
UNLOCKED := -W default
EXTRAS := --extra test --extra demo --extra lint --extra docs --extra bench --extra zoo
LOCK := $(UV) compile --quiet --universal --python-version 3.11 --no-annotate --custom-compile-command "make lock"

.PHONY: demo test test-distributed test-long coverage test-floor test-newest lock test-models test-zoo test-blocks test-shrink test-operators test-checkpoints lint types docs bench bench-mnist clean

demo: .venv/ready
	$(RUN)/python examples/quickstart.py --seed $(SEED)

test: .venv/ready
	$(RUN)/python $(SUITE)

test-distributed: .venv/ready  ## the part of the suite that runs several processes
	$(RUN)/python -m pytest tests/distributed

test-long: .venv/ready  ## 2,000 hypothesis examples a property instead of 60
	HYPOTHESIS_PROFILE=long $(RUN)/python $(SUITE) tests

coverage: .venv/ready  ## of lines and branches, in all processes that tests start
	$(RUN)/python $(SUITE) --cov --cov-report=term:skip-covered

test-floor: .venv-floor/ready  ## the oldest versions that pyproject.toml allows
	.venv-floor/$(BIN)/python $(SUITE) $(UNLOCKED)

test-newest: .venv/ready  ## whatever is newest today, in an environment made anew
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	$(UV) install --quiet --python .venv-newest/$(BIN)/python --editable ".[test,demo]"
	.venv-newest/$(BIN)/python $(SUITE) $(UNLOCKED)

lock: .venv/ready  ## the newest versions into constraints.txt, the oldest into constraints-floor.txt
	$(LOCK) --upgrade $(EXTRAS) pyproject.toml --output-file constraints.txt
	$(LOCK) --upgrade --resolution lowest-direct --extra test pyproject.toml --output-file constraints-floor.txt

lint: .venv/ready
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: .venv/ready
	$(RUN)/mypy

docs: .venv/docs
	$(RUN)/mkdocs build --strict

bench: .venv/bench  ## some hours on two cores; leave the machine alone meanwhile
	$(RUN)/python -m benchmarks

bench-mnist: .venv/ready  ## DATA=folder of MNIST; see CONTRIBUTING.md for how long it takes
	$(RUN)/python -m benchmarks.mnist $(DATA)
	$(RUN)/python -m benchmarks.mnist_compact $(DATA)
	$(RUN)/python -m benchmarks.tickets $(DATA)

test-models: .venv/ready  ## the law of squash on every torchvision model; writes docs/models.md
	$(RUN)/python -m tests.long.torchvision_models

test-zoo: .venv/zoo  ## the laws on every model type of transformers, and on timm; writes docs/zoo.md
	$(RUN)/python -m tests.long.zoo_transformers
	$(RUN)/python -m tests.long.zoo_timm
	$(RUN)/python -m tests.long.zoo.page

test-blocks: .venv/zoo  ## prune_blocks on every model type of transformers
	$(RUN)/python -m tests.long.blocks_zoo

test-checkpoints: .venv/ready  ## the command line on 1 GiB: memory, interruption, a full disk
	$(RUN)/python -m tests.long.large_checkpoints

test-shrink: .venv/zoo  ## shrink, and others, on the models of seven libraries; writes docs/shrink-zoo.md
	for zoo in torchvision timm transformers others; do \
		$(RUN)/python -m tests.long.shrink_zoo $$zoo || exit 1; \
		$(RUN)/python -m tests.long.shrink_peers torch_pruning $$zoo || exit 1; \
		$(RUN)/python -m tests.long.shrink_peers kirigami $$zoo || exit 1; \
	done
	$(RUN)/python -m tests.long.zoo.shrink_page

test-operators: .venv/zoo  ## shrink around the operators and modules of torch
	$(RUN)/python -m tests.long.shrink_operators

clean:
	rm -rf .venv .venv-floor .venv-newest site out

# uv installs torch several times faster than pip; pip brings it from the same registry.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN)/python -m pip install --quiet --disable-pip-version-check uv
	$(UV) install --quiet --python $(RUN)/python --constraint constraints.txt --editable ".[test,demo,lint]"
	touch $@

.venv/docs: .venv/ready
	$(UV) install --quiet --python $(RUN)/python --constraint constraints.txt --editable ".[docs]"
	touch $@

.venv/zoo: .venv/ready
	$(UV) install --quiet --python $(RUN)/python --constraint constraints.txt --editable ".[zoo]"
	touch $@

.venv/bench: .venv/ready
	$(UV) install --quiet --python $(RUN)/python --constraint constraints.txt --editable ".[bench]"
	touch $@

.venv-floor/ready: .venv/ready constraints-floor.txt
	$(PYTHON) -m venv .venv-floor
	$(UV) install --quiet --python .venv-floor/$(BIN)/python --constraint constraints-floor.txt --editable ".[test]"
	touch $@
