# Each target sets up .venv first if it is not there: `make train` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
ARGS ?=

# The oldest versions that setup.py allows, in an environment of their own
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed

.PHONY: train reproduce test test-processors test-oldest test-gpu lint format bench bench-kernels bench-loaders bench-step \
	bench-ranks bench-compare card \
	inspect faults setup clean

# The embedded digits, unless ARGS names another data set or a row: make train ARGS="data=cifar10 train.epochs=2"
train: $(STAMP)
	$(RUN) -m fastalex.train $(if $(findstring data=,$(ARGS))$(findstring --config-name,$(ARGS)),,data=digits) $(ARGS)

# Trains the rows of the study's table in outputs/reproduction and compares them with results/:
# make reproduce ARGS="rows=alexnet data.root=DATA", or ARGS=--dry-run for the plan
reproduce: $(STAMP)
	$(RUN) -m fastalex.reproduce $(ARGS)

# make test ARGS="-k lrn" runs a part, ARGS="-n 0 --pdb" in one process. Two work side by side, since most tests wait
# for another process; threads that wait for work would take the other's cores. In the order of tests/conftest.py,
# the longest files first: xdist would begin with the files of many tests, and end with slow ones of few.
test: $(STAMP)
	$(call suite,$(RUN))

suite = OMP_WAIT_POLICY=passive $(1) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Numeric tests as on processors with fewer instructions than this one, which add in other orders: by default those
# of tests/processors.py, make test-processors ARGS=tests/kernels/test_lrn.py runs others
test-processors: $(STAMP)
	OMP_WAIT_POLICY=passive $(RUN) -m tests.processors -q $(ARGS)

# The same as `test` with the oldest versions
test-oldest: $(OLDEST_STAMP)
	$(call suite,$(OLDEST)/bin/python)

# What needs a GPU. Test by test over all cores: file by file, one worker would have nearly all of them
test-gpu: $(STAMP)
	OMP_WAIT_POLICY=passive $(RUN) -m pytest -m gpu -n auto --dist load $(ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(STAMP)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

# Measures all that docs/benchmarks.md and docs/scaling.md show on this machine, and writes the pages
bench: bench-kernels bench-loaders bench-step bench-ranks

# Times of the kernels beside PyTorch's: benchmarks/results/lrn_*, augment_*, folded_conv_*, folded_block_*,
# winograd_*, pooled_linear_*, factored_sgd_*, muon_*
KERNEL_BENCHMARKS := $(addprefix benchmarks/test_,lrn.py augment.py folded_conv.py folded_block.py winograd.py \
	pooled_linear.py factored_sgd.py muon.py)
bench-kernels: $(STAMP)
	$(RUN) -m pytest $(KERNEL_BENCHMARKS) --benchmark-enable -s $(ARGS)
	$(RUN) -m benchmarks.docs

# Images a second and memory of the four loaders: benchmarks/results/loaders_*. Installs DALI, and FFCV with the
# libraries that it is built against, for which apt-get wants root
bench-loaders: $(STAMP)
	.ci/install-loaders $(RUN)
	$(RUN) -m pytest benchmarks/test_loaders.py --benchmark-enable -s $(ARGS)
	$(RUN) -m benchmarks.docs

# Training step and ten-crop evaluation beside plain PyTorch: make bench-step ARGS="--data-root DATA --rounds 5"
bench-step: $(STAMP)
	$(RUN) -m pytest benchmarks/test_step.py --benchmark-enable -s $(ARGS)
	$(RUN) -m benchmarks.docs

# Two processes beside one on the same cores, and the bytes they send: benchmarks/results/ranks_cpu.csv
bench-ranks: $(STAMP)
	$(RUN) -m pytest benchmarks/test_ranks.py --benchmark-enable -s $(ARGS)

# Everything worth measuring on a GPU, in phases that each have a limit: benchmarks/results/card/CARD-DATE/.
# make card ARGS="--minutes 8 --data-root DATA"; ARGS=--rehearse tries every phase on a CPU, in three minutes
card: $(STAMP)
	$(RUN) -m benchmarks.card $(ARGS)

# What has moved since the results were last committed; make bench-compare ARGS=REV sets them against a commit
bench-compare: $(STAMP)
	$(RUN) -m benchmarks.compare $(ARGS)

# Machine code and memory traffic of the Triton kernels, without a GPU: benchmarks/results/kernels_inspect.*
inspect: $(STAMP)
	$(RUN) -m fastalex.kernels.inspect $(ARGS)

# What a run survives, and how often: writes the table of docs/reliability.md; make faults ARGS="kill clock" for a part
faults: $(STAMP)
	$(RUN) -m benchmarks.faults $(ARGS)

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml
	@echo "Setting up $(VENV): PyTorch is several gigabytes, this takes some minutes once."
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable ".[dev]"
	@touch $@

# Together, or the newest torchvision would bring the newest torch
$(OLDEST_STAMP): setup.py pyproject.toml
	@echo "Setting up $(OLDEST): PyTorch is several gigabytes, this takes some minutes once."
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --editable ".[dev]" "torch==2.11.*" "torchvision==0.26.*" "triton==3.6.*"
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .mypy_cache .ruff_cache
