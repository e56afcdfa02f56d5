# make study:      set up, fetch MNIST, execute every notebook, rebuild figures/
# make test:       set up, then every test (code, notebooks, style, types)
# make evidence:   set up, then measure what is too dear for a notebook (results/*.toml), over an hour
# make processors: the numerical tests as other processors would run them
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q

.PHONY: study test evidence processors setup lab refresh lint clean
.DELETE_ON_ERROR:

study: setup
	$(BIN)/python -m svdlib run

evidence: setup
	$(BIN)/python -m svdlib sweep

# Two processes with two spinning OpenMP threads each crawl on two cores; one thread each does not.
# Both parts run, whatever becomes of the first; either can fail the target.
test: export OMP_NUM_THREADS = 1
test: setup lint
	$(PYTEST) -n 2 --dist loadfile; code=$$?; \
	$(PYTEST) -n 2 --dist loadfile --nbval --nbval-current-env -p no:cacheprovider notebooks; \
	notebooks=$$?; \
	if [ $$code$$notebooks != 00 ]; then \
		echo "make test: exit status $$code of the code's tests, $$notebooks of the notebooks'"; \
		exit 1; \
	fi

# Kernels that MKL and torch take on processors without AVX2, with AVX2, and on this one.
NUMERICAL := tests/linalg tests/layers tests/ensemble tests/ranks tests/study/test_theory.py
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

lab: setup
	$(BIN)/jupyter lab notebooks

# Execute the notebooks in place, at their own parameters, before committing them.
refresh: setup
	$(BIN)/python -m svdlib refresh

setup: .venv/ready

.venv/ready: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

# After a change of pyproject.toml's dependencies; versions move only here.
.PHONY: pin
pin: setup
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-header \
		pyproject.toml --output-file requirements.txt

clean:
	rm -rf .venv runs
