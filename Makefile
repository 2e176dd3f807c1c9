# Everything from nothing: each target makes .venv in this checkout first, if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SMOKE := build/smoke
ECOSYSTEM := .venv-ecosystem
MERGEKIT := .venv-mergekit
# Where the version of torch is not what is tested: one that has a small build for CPUs.
PLAIN_TORCH := 2.13.0
DIGITS := --model fixtures/digits_net.py:DigitsNet --data fixtures/digits/train \
	--img-size 8 --crop-pct 1 --mean 0 --std 1 --passes 2 --workers 0

.PHONY: install demo test test-ecosystem formats-table check fix smoke bench bench-full clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt setup.py $(wildcard ckpt_tools/compute/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	@mkdir -p build
	@$(BIN)/ckpt avg fixtures/runs --state raw -o build/average.pth --force
	@$(BIN)/ckpt avg fixtures/runs --state raw --mode ema --decay 0.8 -o build/ema.pth --force
	@$(BIN)/ckpt recal-bn build/average.pth $(DIGITS) --force
	@$(BIN)/ckpt recal-bn build/ema.pth $(DIGITS) --force
	@$(BIN)/python fixtures/demo.py "last checkpoint=fixtures/runs/checkpoint-12.pth" \
		"average of 12, as it is=build/average.pth" "average of 12, recal-bn=build/average-bn.pth" \
		"EMA of 12 (0.8), recal-bn=build/ema-bn.pth"

test: $(INSTALLED)
	$(BIN)/pytest --cov --cov-report=term

# With the real libraries, which agree on an older torch, in an environment of their own.
test-ecosystem: $(ECOSYSTEM)/.installed
	$(ECOSYSTEM)/bin/pytest tests/ecosystem

$(ECOSYSTEM)/.installed: tests/ecosystem/requirements.txt pyproject.toml setup.py $(wildcard ckpt_tools/compute/csrc/*)
	$(PYTHON) -m venv $(ECOSYSTEM)
	$(ECOSYSTEM)/bin/pip install -q -r tests/ecosystem/requirements.txt
	$(ECOSYSTEM)/bin/pip install -q -c tests/ecosystem/requirements.txt -e .
	touch $@

formats-table:
	$(PYTHON) tests/ecosystem/table.py

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The wheel alone, with nothing but what it asks for: no timm, torchvision, pillow, numpy.
smoke: $(INSTALLED)
	rm -rf $(SMOKE) build/wheel build/lib
	CKPT_TOOLS_REQUIRE_NATIVE=1 $(BIN)/pip wheel -q --no-deps -w build/wheel .
	$(PYTHON) -m venv $(SMOKE)
	$(SMOKE)/bin/pip install -q torch==$(PLAIN_TORCH) build/wheel/*.whl
	$(SMOKE)/bin/python tests/smoke.py

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/bench.py

# At full size, beside mergekit too, and the figures of docs/performance.md anew.
bench-full: $(VENV)/.bench $(MERGEKIT)/.installed
	$(BIN)/python benchmarks/bench.py --full --page docs/performance.md

$(VENV)/.bench: $(INSTALLED)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,bench]'
	touch $@

# An older torch, and libraries that ckpt does not need, in an environment of their own.
$(MERGEKIT)/.installed:
	$(PYTHON) -m venv $(MERGEKIT)
	$(MERGEKIT)/bin/pip install -q torch==$(PLAIN_TORCH)
	$(MERGEKIT)/bin/pip install -q mergekit==0.1.5
	touch $@

clean:
	rm -rf $(VENV) $(ECOSYSTEM) $(MERGEKIT) build dist .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
