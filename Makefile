# Every target works from nothing: it makes .venv and installs the tested set first, once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
LOCAL  := local
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev run test test-slow test-gpu lint format bench clean

help:
	@echo "make setup      make $(VENV) and install the tested set (PYTHON=$(PYTHON))"
	@echo "make setup-dev  also what tests and lint need"
	@echo "make run        train a 32M GPT whose optimizer states do not fit in its host budget"
	@echo "make test       the suite, without what is slow or needs a GPU"
	@echo "make test-slow  the slow tests        make test-gpu  the tests that need an accelerator"
	@echo "make lint       ruff, format check, types        make format  mend what ruff can"
	@echo "make bench      kernels against memory speed; tokens/s: plain torch, engine in memory and on NVMe"
	@echo "make clean      remove everything that make made"

setup: $(STAMP)

setup-dev: $(DEV)

$(STAMP): requirements.txt pyproject.toml setup.py $(wildcard kernels/native/*.c kernels/native/*.h kernels/native/build.py)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "python %d.%d found, 3.11 or later needed: make setup PYTHON=python3.11" % sys.version_info[:2])'
	@echo "[+] python: $$($(PYTHON) --version 2>&1) ($(PYTHON))"
	@compiler=$$(command -v $${CC:-cc} || command -v gcc || command -v clang); \
	if [ -n "$$compiler" ]; then echo "[+] C compiler: $$compiler"; \
	else echo "[-] no C compiler: kernels run through numba, slower (mend: install gcc or clang, then make clean setup)"; fi
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@command -v $${CC:-cc} >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^numba' requirements-dev.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(BIN)/python -c 'import torch; print("[+] torch", torch.__version__); a = torch.accelerator; print("[+] accelerator:", torch.cuda.get_device_name() if torch.cuda.is_available() else a.current_accelerator()) if a.is_available() else print("[-] no accelerator: compute on the cores")'
	@$(BIN)/python -P -c 'from offload.kernels import dispatch as d; name = d.implementation(); print("[+] kernels: native") if name == "native" else print(f"[-] kernels: {name}, slower:", d.why_not_native())'
	@touch $@

$(DEV): $(STAMP) requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

run: setup
	@mkdir -p $(LOCAL)/run
	$(BIN)/offload train --model small --steps 60 --batch 8 --seq 128 --lr 5e-4 --host-memory 192MiB --nvme $(LOCAL)/run --overwrite --timeline $(LOCAL)/step.html $(ARGS)

test: setup-dev
	@echo "[+] running tests marked neither slow nor gpu"
	@echo "[-] skipped here: slow (make test-slow), gpu (make test-gpu)"
	$(BIN)/pytest -m "not slow and not gpu" $(ARGS)

test-slow: setup-dev
	$(BIN)/pytest -m "slow and not gpu" --timeout 1800 $(ARGS)

test-gpu: setup-dev
	@$(BIN)/python -c 'import torch; print("[+] accelerator found" if torch.accelerator.is_available() else "[-] no accelerator: every test below will skip")'
	$(BIN)/pytest -m "gpu" --timeout 600 $(ARGS)

# The four folders are one package only by way of an installation, so types are checked on a tree of links that has
# the shape of the installed package.
lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/lint && mkdir -p build/lint/offload
	@ln -s $(CURDIR)/offload/* build/lint/offload/
	@ln -s $(CURDIR)/kernels $(CURDIR)/scheduler $(CURDIR)/bench build/lint/offload/
	$(BIN)/mypy

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	@mkdir -p $(LOCAL)/bench
	$(BIN)/offload bench kernels
	$(BIN)/offload bench step --nvme $(LOCAL)/bench $(ARGS)

clean:
	rm -rf $(VENV) build dist $(LOCAL) *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f kernels/native/*.so kernels/native/*.dylib
