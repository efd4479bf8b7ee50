# make demo   the environment, then three PyTorch tasks made faster
# make test   the environment, then all tests
# make check  the environment, then ruff (make lint) and mypy --strict on the installed package (make types)

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check lint types
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/python scripts/optimize.py softmax bias_gelu matmul_bias_gelu --budget 25

# Threads that wait sleep: there are more of them than cores.
test: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests --numprocesses 4 --dist loadfile --no-loadscope-reorder

check: lint types

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	rm -rf build
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation --upgrade --target build/installed .
	cd build && MYPYPATH=installed ../$(BIN)/mypy --config-file ../pyproject.toml -p ke_gym

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@
