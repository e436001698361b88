# Everything starts from a fresh clone: each target first sets up .venv and builds the op library, once.
#   make demo    pictures and a table in demo-out/          make test   ruff, mypy, C++ build, pytest
#   make check   lint and the quick tests, in 90 seconds    make lint   ruff, clang-format, mypy
#   make slow    the tests that take minutes                make matrix the wheel under other versions of PyTorch
#   make compare the comparison of methods of docs/results.md (hours; resumable) make bench  timings, to bench/results/
#   make cpp     the C++ library and flowfast-run, tested and installed in build/prefix (PRESET=cuda: with CUDA)
#   make server  the HTTP server of examples/cpp/server: build/server/flowfast-server
#   make docs    the documents as a site, build/site/index.html: every link is checked, no network is needed
PYTHON ?= $(shell command -v python3.11 || command -v python3)
OUT ?= demo-out
COMPARE_OUT ?= compare-out
PRESET ?= cpu
MATRIX ?= 2.11.0 2.15.0
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CPP := $(shell find csrc examples -name '*.cpp' -o -name '*.h' -o -name '*.cu')
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
LIBRARY := flowfast/lib/libflowfast_ops.so
HAS_COMPILER := $(shell command -v c++ g++ 2>/dev/null | head -n 1)

.PHONY: demo test check lint slow compare bench cpp server docs sanitize sanitize-cpp cuda matrix clean setup
.DELETE_ON_ERROR:

setup: .venv/.built

# torch first and by its exact pin, so that nothing else decides which build of it comes.
.venv/.installed: constraints.txt pyproject.toml
	@test -x $(BIN)/python || { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' && $(PYTHON) -m venv .venv; } || { \
	  echo "flowfast needs Python 3.11 or newer with venv: install it or say make PYTHON=/path/to/python3" >&2; exit 1; }
	$(BIN)/python -m pip install -q $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel cmake ninja
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[build,test]'
	@touch $@

# The install has built the library; only later changes of the sources are built here. With a compiler a build that fails
# is an error; without one flowfast runs its ops in plain PyTorch and says so.
.venv/.built: .venv/.installed setup.py csrc/build_backend.py CMakeLists.txt $(SOURCES)
ifneq ($(HAS_COMPILER),)
	@if [ ! -e $(LIBRARY) ] || [ -n "$$(find csrc setup.py CMakeLists.txt -newer $(LIBRARY))" ]; then \
	  $(BIN)/python setup.py -q build_ext --inplace; fi
	@touch $@
else
	@echo "no C++ compiler found: flowfast will run its ops in plain PyTorch, with the same results but more slowly (install g++ for the fast ones)"
endif

demo: setup
	$(BIN)/flowfast generate "three red circles and one blue square" "two yellow crosses and a green triangle" \
	  "a red circle left of a green triangle" --budget 200 --seed 0 --out $(OUT)/generate
	$(BIN)/flowfast compare --limit 8 --methods ode,bon,auto,rbf --budgets 100,200 --seeds 1 --interpolants linear --out $(OUT)/compare

lint: .venv/.installed
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

test: setup lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Before each commit: what most changes break first. CI runs `make test`.
CHECK := tests/flow tests/ops tests/rounds/test_batch.py tests/test_imports.py tests/test_prompts.py tests/test_install.py
check: setup lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --ignore tests/ops/test_triton.py $(CHECK)

slow: setup
	$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

compare: setup
	$(BIN)/flowfast compare --split heldout --limit 60 --methods ode,bon,sop,smc,code,svdd,rbf --budgets 100,200,500 \
	  --seconds 0.25 --seeds 3 --interpolants linear,vp --chunk 20 --micro-batch 32 --workers 2 --out $(COMPARE_OUT)

bench: cpp
	$(BIN)/python -m bench $(BENCH_ARGS)

cpp: setup
	cmake --preset $(PRESET)
	cmake --build --preset $(PRESET)
	ctest --preset $(PRESET)
	cmake --install build/runner-$(PRESET)

server: cpp
	examples/cpp/server/get_boost.sh build/deps
	cmake -S examples/cpp/server -B build/server -G Ninja -DCMAKE_PREFIX_PATH="$(CURDIR)/build/prefix;$(CURDIR)/build/deps/usr"
	cmake --build build/server

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The torch-free maths under ASan and UBSan. Part of `make test`, too, with some of its mutants; `make slow` has all.
sanitize: .venv/.installed
	cmake -S . -B build/sanitize -G Ninja -DFLOWFAST_SANITIZE=ON
	cmake --build build/sanitize
	build/sanitize/flowfast_core_tests

# The C++ runner, its driver and searches on a real archive, under ASan and UBSan and under TSan. Part of `make slow`, too.
sanitize-cpp: setup
	$(BIN)/python -m pytest -q -m slow tests/runner/test_sanitized.py

# The CUDA kernels compiled for sm_80, sm_90 and sm_100; `make test` compiles and checks them for sm_90, `make slow` for all.
# With TORCH=2.11.0 against that version's headers, too, which are fetched once (a gigabyte) and kept in build/.
cuda: setup
	$(BIN)/python -m bench.cuda_objects $(if $(TORCH),--torch $(TORCH))

# 3 to 5 GB and several minutes a version; not part of any test.
matrix: setup
	$(BIN)/python tests/matrix.py $(MATRIX)

clean:
	rm -rf build .venv *.egg-info flowfast/lib demo-out compare-out .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
