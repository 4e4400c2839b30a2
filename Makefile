# `make demo` and `make test` are all a new machine needs; both make the environment themselves and can be repeated.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
BIN = $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup environments demo check test test-oldest architectures figures docs clean

setup: $(VENV)/ready

# torch comes first and under a constraint, so that nothing pulls in another build of it.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/rankfold demo

check: setup
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

$(OLDEST)/ready: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet -c constraints.txt torch
	$(OLDEST)/bin/pip install --quiet -c constraints.txt -c constraints-oldest.txt -e '.[test]'
	touch $@

# Both at once: `make -j2 environments`.
environments: $(VENV)/ready $(OLDEST)/ready

# Left out is what does not touch transformers, or is the same again.
NOT_OLDEST = tests/factorization tests/allocation tests/golden tests/exploration tests/harness tests/reports \
	tests/quality/test_sandbox.py tests/test_examples.py tests/test_docs.py tests/measurement/test_warning_signs.py \
	tests/pipeline/test_resume.py tests/pipeline/test_workers.py tests/recovery/test_scales.py tests/test_devices.py

test-oldest: $(OLDEST)/ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest -n 2 $(addprefix --ignore=,$(NOT_OLDEST)) \
		--deselect tests/quantization/test_embeddings.py::test_a_limit_on_the_loss_is_shared_with_the_embeddings tests

# Every architecture at both ends of the supported range, and docs/architectures.md; an interrupted run resumes.
architectures: $(VENV)/ready $(OLDEST)/ready
	$(OLDEST)/bin/python experiments/architectures.py
	$(BIN)/python experiments/architectures.py

# What README and docs show, from nothing (docs/figures.md); an interrupted run resumes. ASSETS is a folder of real weights and data.
figures: setup
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,peers]'
	$(BIN)/python experiments/figures.py $(if $(ASSETS),--assets $(ASSETS))

# The site: guides, API reference and command line; any warning is an error.
docs: setup
	$(BIN)/mkdocs build --strict --quiet --site-dir site

clean:
	rm -rf $(VENV) $(OLDEST) demo-checkpoint site
