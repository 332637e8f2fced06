PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
MOUNT := .venv/mount

.PHONY: setup demo test test-quick check format

setup: $(STAMP)

# torch, torchvision and torchaudio go together; requirements.txt leaves them to the machine.
$(STAMP): pyproject.toml requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0
	$(BIN)/python -m pip install --quiet --editable ".[train,data,dev]" gguf
	$(BIN)/python -m pip install --quiet --editable ".[ray]" || echo "ray is not to be had here: its tests will be skipped"
	touch $@

demo: $(STAMP)
	$(BIN)/mive demo --output out/demo

test: $(STAMP)
	$(BIN)/pytest

test-quick: $(STAMP)
	$(BIN)/pytest -m "not slow" --ignore=tests/comfyui

# The type checker sees the pack as ComfyUI mounts it, under a name of its own: inside nodes/, imports lead above it.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(MOUNT) && ln -sfn "$(CURDIR)" $(MOUNT)/mive_pack
	cd $(MOUNT) && ../bin/mypy --config-file ../../pyproject.toml

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
