# make demo   environment, install, distil the embedded digits, judge the set, print the table, write a picture
# make test   environment, install, all default tests and checks
# make docs   environment, install, the documents as a site in build/site
# make clean  removes the environment and everything made here

PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo test docs clean

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

demo: .venv/installed
	$(BIN)/condense distill --recipe dm/digits-ipc10 --out $(DEMO)/digits-dm-ipc10.h5 --run-dir $(DEMO)/run --force
	$(BIN)/condense evaluate $(DEMO)/digits-dm-ipc10.h5 --data digits --networks mlp,convnet-d3-w64-bn --runs 3 \
		--protocol quick-v1 --controls random,full --json $(DEMO)/digits-dm-ipc10.json --force
	$(BIN)/condense preview $(DEMO)/digits-dm-ipc10.h5 --out $(DEMO)/digits-dm-ipc10.png --force

test: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --line-length 120 .
	rm -rf build/typed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target build/typed .
	cd build/typed && ../../$(BIN)/mypy -p condense
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=40

.venv/documented: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

docs: .venv/documented
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
