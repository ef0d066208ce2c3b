# Every target installs what it needs into .venv first: a clean clone needs Python ≥ 3.11 and make only.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Two workers and the processes that tests start all import the package: bytecode is kept, whatever the environment says.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal

OLDEST := .venv-oldest
OLDEST_TESTS := tests/test_extras.py tests/test_showing.py tests/tables tests/denoisers tests/models tests/digits \
	tests/files tests/evaluation tests/runs/trackers tests/commands/finetune/test_finetune.py tests/commands/sample \
	tests/commands/pretrain/test_image_files.py

.PHONY: demo test test-all test-oldest lint types docs bench clean

demo: $(READY)  ## fine-tune the shipped digits model for brightness
	$(BIN)/implicit-diffusion finetune --model digits --reward brightness --kl-weight 2.6 \
		--out runs/demo-$$(date -u +%Y%m%dT%H%M%SZ)

test: $(READY)  ## the tests, without the slow ones and without drawing most pictures
	$(PYTEST) -m "not slow" --sketch

test-all: $(READY)  ## all of the tests, with all of their pictures, and test-oldest
	$(PYTEST)
	$(MAKE) test-oldest

test-oldest: $(OLDEST)/.ready  ## some tests with the oldest versions that pyproject.toml allows; Python 3.11 or 3.12
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -m "not slow" --sketch $(OLDEST_TESTS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/mypy src

docs: $(READY)  ## docs/_build/index.html
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build

bench: $(READY)  ## everything under benchmarks/, with the peers that it compares with; hours
	$(BIN)/python -m pip install -c constraints.txt -e ".[bench]"
	for script in chains stationary ebm queue_bias time_to_target digits tilted; do $(BIN)/python benchmarks/$$script.py || exit 1; done

clean:
	rm -rf .venv $(OLDEST) build dist docs/_build docs/api .mypy_cache .pytest_cache .ruff_cache

.PHONY: .venv
.venv: $(READY)

# The environment variables carry the constraints into the isolated build as well (older and newer pip).
$(READY): export PIP_CONSTRAINT = constraints.txt
$(READY): export PIP_BUILD_CONSTRAINT = constraints.txt
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev,docs]"
	touch $@

# Several gigabytes where torch comes with CUDA. The tools are those of the day: they are not what is tested.
$(OLDEST)/.ready: pyproject.toml tests/helpers/lower_bounds.py
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python tests/helpers/lower_bounds.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install -c $(OLDEST)/constraints.txt -e ".[all,wandb]" beartype hatchling pytest sybil
	touch $@
