# `make parity` proves the model, `make test` runs the tests, `make bench` measures, `make runner` builds the C++ program that
# runs exported ones; each installs what it needs into .venv first. `make bench` leaves build/bench/report.html and the JSON,
# whether or not a row was in parity.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := build/bench

.PHONY: parity test bench runner lint format clean

parity: $(VENV)/installed
	$(BIN)/gemma4 parity

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 8

bench: $(VENV)/installed
	@mkdir -p $(RUN) && rm -f $(RUN)/benchmarks.json
	@$(BIN)/python -m pytest --benchmark-only --benchmark-json=$(RUN)/benchmarks.json --benchmark-columns=median,iqr,rounds; \
		status=$$?; $(BIN)/python -m bench.report $(RUN)/benchmarks.json -o $(RUN)/report.html && exit $$status

runner: $(VENV)/installed
	$(BIN)/python -m gemma4_impl.runner

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python >= 3.11 is needed; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module; on Debian: apt install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build .tox .pytest_cache .ruff_cache .hypothesis .benchmarks *.egg-info
