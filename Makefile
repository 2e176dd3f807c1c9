# Everything from nothing: each target makes .venv in this checkout first, if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without compiling all modules at once: Python compiles those that it imports.
PIP_INSTALL := pip install -q --no-compile
INSTALLED := $(VENV)/.installed
ECOSYSTEM := $(VENV)/.ecosystem
SMOKE := build/smoke
MERGEKIT := .venv-mergekit
FUZZ := .venv-fuzz
DOCS := .venv-docs
QUICK := .venv-quick
QUICK_TESTS := tests/storage tests/series/test_align.py tests/series/test_find.py tests/series/test_weighted_sums.py \
	tests/cli/test_avg_command.py tests/test_architecture.py
# Of all targets together; those in FUZZ_TARGETS, or all of fuzz/targets.py.
FUZZ_SECONDS ?= 300
FUZZ_TARGETS ?=
SANITIZE := build/sanitize
# Sanitizers take memory of their own, and nothing is built anew.
WITHOUT_COSTS := --ignore tests/compute/test_costs.py --ignore tests/compute/test_build.py
# Where the version of torch is not what is tested: one that has a small build for CPUs.
PLAIN_TORCH := 2.13.0
DIGITS := --model fixtures/digits_net.py:DigitsNet --data fixtures/digits/train \
	--img-size 8 --crop-pct 1 --mean 0 --std 1 --passes 2 --workers 0

# Compiled modules are kept, whatever the environment asks for: many tests start processes, which would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo evidence test quick coverage test-ecosystem formats-table pictures generated docs check fix smoke fuzz \
	sanitize bench bench-full clean

help:
	@echo "make quick            some tests, in a small environment of their own: the first thing to try"
	@echo "make demo             averages, recalibrates, evaluates and sweeps a small series"
	@echo "make install          .venv with everything for development; the other targets make it, too"
	@echo "make check            format, lint, types; make fix mends the first two"
	@echo "make test             all tests; some of them: make test PYTEST_ARGS='tests/series -x'"
	@echo "make smoke            the wheel in a clean environment"
	@echo "make generated        the signatures of the Python API, and the schemas of --json"
	@echo "make docs             the site, in build/site"
	@echo "make coverage         all tests with branch coverage"
	@echo "make test-ecosystem   with the real libraries: Lightning, transformers, diffusers, DeepSpeed, ..."
	@echo "make bench            speed and memory on this machine; bench-full for the figures of the docs"
	@echo "make evidence         what averaging did for three kinds of series"
	@echo "make fuzz, sanitize   hostile files, and the C extension under sanitizers"
	@echo "make clean            removes what the others have made"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt setup.py $(wildcard ckpt_tools/compute/csrc/*)
	$(PYTHON) -m venv $(VENV)
	rm -f ckpt_tools/compute/_native*.so  # one of another name, from an older build, would be imported first
	$(BIN)/$(PIP_INSTALL) -c constraints.txt -e '.[dev]'
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
	@$(BIN)/ckpt sweep fixtures/runs --state raw --mode uniform,ema --last 3,6,12 --scratch build/sweep --keep 0 \
		--eval fixtures/digits_net.py:val --holdout 0.5 --model fixtures/digits_net.py:DigitsNet \
		--data fixtures/digits_net.py:train --passes 2

# What averaging and recalibration did for three kinds of series, and what tuning does, in about ten minutes.
evidence: $(INSTALLED)
	@$(BIN)/python fixtures/evidence.py
	@$(BIN)/python fixtures/deep_evidence.py
	@$(BIN)/python fixtures/tuning.py

# Some of the tests: make test PYTEST_ARGS="tests/series -x"
test: $(INSTALLED)
	$(BIN)/pytest -n logical --dist worksteal $(PYTEST_ARGS)

# Some of the tests, with what they need and no more.
quick: $(QUICK)/.installed
	$(QUICK)/bin/python -m pytest -n logical --dist loadfile $(QUICK_TESTS) $(PYTEST_ARGS)

# torch has what is largest. A CPU build is taken where pip finds one: see CONTRIBUTING.md.
$(QUICK)/.installed: setup.py pyproject.toml tests/quick.txt $(wildcard ckpt_tools/compute/csrc/*)
	$(PYTHON) -m venv $(QUICK)
	$(QUICK)/bin/$(PIP_INSTALL) torch==$(PLAIN_TORCH) -r tests/quick.txt
	rm -f ckpt_tools/compute/_native*.so
	$(QUICK)/bin/$(PIP_INSTALL) --no-build-isolation -e .
	touch $@

# All of them with branch coverage, which takes longer; fails below 96 %.
coverage: $(INSTALLED)
	$(BIN)/pytest -n logical --dist worksteal --cov --cov-report=term:skip-covered

# With the real libraries, beside which all other tests pass too.
test-ecosystem: $(ECOSYSTEM)
	$(BIN)/pytest -n logical --dist loadfile tests/ecosystem

$(ECOSYSTEM): $(INSTALLED) tests/ecosystem/requirements.txt
	$(BIN)/$(PIP_INSTALL) -c constraints.txt -r tests/ecosystem/requirements.txt
	touch $@

formats-table:
	$(PYTHON) tests/ecosystem/table.py

# The pictures of the docs, made by the tool; tests/jobs/test_pictures.py compares them.
pictures: $(INSTALLED)
	$(BIN)/python docs/pictures/profiles.py

# The site, in build/site: strict, and with the output of all commands in its pages.
docs: $(DOCS)/.installed
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict -q

$(DOCS)/.installed: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/$(PIP_INSTALL) torch==$(PLAIN_TORCH) -r docs/requirements.txt
	touch $@

# The signatures of the Python API, and the schemas of --json; tests compare them.
generated: $(INSTALLED)
	$(BIN)/python docs/stub.py
	$(BIN)/python docs/schemas.py

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The wheel alone, built from the source distribution, with nothing but what it asks for: no timm, torchvision, numpy.
smoke: $(INSTALLED) $(SMOKE)/.torch
	rm -rf build/wheel build/lib
	CKPT_TOOLS_REQUIRE_NATIVE=1 $(BIN)/python -m build -o build/wheel . > build/wheel.log 2>&1 || (cat build/wheel.log; exit 1)
	$(SMOKE)/bin/pip uninstall -q -y ckpt-tools
	$(SMOKE)/bin/$(PIP_INSTALL) build/wheel/*.whl
	$(SMOKE)/bin/python tests/smoke.py

$(SMOKE)/.torch:
	rm -rf $(SMOKE)
	$(PYTHON) -m venv $(SMOKE)
	$(SMOKE)/bin/$(PIP_INSTALL) torch==$(PLAIN_TORCH)
	touch $@

# Coverage-guided fuzzing: each target of fuzz/ in turn; see docs/fuzzing.md. The C extension needs clang.
fuzz: $(FUZZ)/.installed build/sanitized/.built
	$(FUZZ)/bin/python fuzz/run.py fuzz $(FUZZ_TARGETS) --seconds $(FUZZ_SECONDS)

$(FUZZ)/.installed: fuzz/requirements.txt
	$(PYTHON) -m venv $(FUZZ)
	$(FUZZ)/bin/$(PIP_INSTALL) -r fuzz/requirements.txt
	touch $@

build/sanitized/.built: $(FUZZ)/.installed setup.py $(wildcard ckpt_tools/compute/csrc/*)
	CC=clang LDSHARED="clang -shared" CKPT_TOOLS_REQUIRE_NATIVE=1 \
		CFLAGS="-O1 -g -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined" \
		$(FUZZ)/bin/python setup.py -q build_ext --force --build-lib build/sanitized --build-temp build/sanitized/temp
	touch $@

# The tests of sums with a C extension that is checked at each access and operation.
sanitize: $(INSTALLED)
	rm -rf $(SANITIZE)
	mkdir -p $(SANITIZE)
	cp -r ckpt_tools setup.py pyproject.toml README.md LICENSE $(SANITIZE)
	cd $(SANITIZE) && CKPT_TOOLS_REQUIRE_NATIVE=1 \
		CFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
		$(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace --force
	LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libubsan.so) $$(cc -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZE) \
		$(BIN)/pytest -n logical --dist worksteal tests/compute $(WITHOUT_COSTS) $(PYTEST_ARGS)

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/bench.py

# At full size, beside mergekit too, and the figures of docs/performance.md anew.
bench-full: $(VENV)/.bench $(MERGEKIT)/.installed
	$(BIN)/python benchmarks/bench.py --full --page docs/performance.md

$(VENV)/.bench: $(INSTALLED)
	$(BIN)/$(PIP_INSTALL) -c constraints.txt -e '.[dev,bench]'
	touch $@

# An older torch, and libraries that ckpt does not need, in an environment of their own.
$(MERGEKIT)/.installed:
	$(PYTHON) -m venv $(MERGEKIT)
	$(MERGEKIT)/bin/$(PIP_INSTALL) torch==$(PLAIN_TORCH)
	$(MERGEKIT)/bin/$(PIP_INSTALL) mergekit==0.1.5
	touch $@

clean:
	rm -rf $(VENV) $(MERGEKIT) $(FUZZ) $(DOCS) $(QUICK) build dist .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
