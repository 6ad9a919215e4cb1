# make sample   a video from the bundled picture, by the best model that is there
# make test     linters, types, layering, tests
# make demo     the page in a browser
# make bench    this project and diffusers side by side, at full width: minutes, 14 GB
# Each of them first makes .venv, which is kept while requirements.lock is unchanged.
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(firstword $(shell cksum < requirements.lock))
UNFINISHED := $(VENV)/.unfinished

.PHONY: venv sample demo bench lint format test lock clean

venv: $(READY)

# The marker of an unfinished environment becomes the stamp of a ready one as the last step.
$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Python 3.11 or newer is needed, but '$(PYTHON)' is not: make PYTHON=python3.12 $(MAKECMDGOALS)"; \
	    exit 1; }
	@if [ -e $(UNFINISHED) ]; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(UNFINISHED) && rm -f $(VENV)/.ready-*
	@if uv --version >/dev/null 2>&1; then set -ex; \
	    uv venv -q --allow-existing --python "$$(command -v $(PYTHON))" $(VENV); \
	    uv pip install --python $(BIN)/python --no-deps -r requirements.lock; \
	    uv pip install --python $(BIN)/python --no-deps --no-build-isolation -e .; \
	else set -ex; \
	    $(PYTHON) -m venv $(VENV); \
	    $(BIN)/python -m pip install --no-deps -r requirements.lock; \
	    $(BIN)/python -m pip install --no-deps --no-build-isolation -e .; \
	fi
	@mv $(UNFINISHED) $@

sample: venv
	$(BIN)/python scripts/sampling/simple_video_sample.py

demo: venv
	$(BIN)/streamlit run scripts/demo/video_sampling.py

bench: venv
	$(BIN)/python scripts/benchmark.py --preset cpu --out benchmarks/results

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A process for each core, with one thread: threads of several processes wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --maxprocesses 4 --dist worksteal

lock:
	uv pip compile -q --universal --python-version 3.11 --extra dev --upgrade --no-annotate \
	    --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' \
	    -o requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
