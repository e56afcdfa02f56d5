# make study: set up, fetch MNIST, execute every notebook, rebuild figures/
# make test:  set up, then every test (code, notebooks, style, types)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: study test setup lab refresh lint clean
.DELETE_ON_ERROR:

study: setup
	$(BIN)/python -m svdlib run

# Two processes with two spinning OpenMP threads each crawl on two cores; one thread each does not.
test: export OMP_NUM_THREADS = 1
test: setup lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --nbval --nbval-current-env -p no:cacheprovider notebooks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: setup
	$(BIN)/jupyter lab notebooks

# Execute the notebooks in place, at their own parameters, before committing them.
refresh: setup
	$(BIN)/python -m svdlib refresh

setup: .venv/ready

.venv/ready: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

# After a change of pyproject.toml's dependencies; versions move only here.
.PHONY: pin
pin: setup
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-header \
		pyproject.toml --output-file requirements.txt

clean:
	rm -rf .venv runs
