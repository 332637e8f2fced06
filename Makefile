PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
MOUNT := .venv/mount

.PHONY: setup demo train-demo test test-quick check format fuzz

setup: $(STAMP)

# torch, torchvision and torchaudio go together; requirements.txt leaves them to the machine.
$(STAMP): Makefile pyproject.toml requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0
	$(BIN)/python -m pip install --quiet --editable ".[train,data,formats,dev]" gguf
	$(BIN)/python -m pip install --quiet --editable ".[ray]" || echo "ray is not to be had here: its tests will be skipped"
	touch $@

demo: $(STAMP)
	$(BIN)/mive demo --output out/demo

# docs/make_your_own.md at tiny size: the embedded models stand for the downloads, and learn a look that they do not know.
train-demo: $(STAMP)
	rm -rf out/train-demo && mkdir -p out/train-demo/models out/train-demo/editor
	cp -R mive_core/assets/tiny/dit.safetensors mive_core/assets/tiny/vae.safetensors mive_core/assets/tiny/vlm out/train-demo/models
	$(BIN)/mive data samples --output out/train-demo
	$(BIN)/mive data cache --manifest out/train-demo/pairs --models out/train-demo/models --output out/train-demo/cache
	$(BIN)/mive eval --manifest out/train-demo/heldout --models out/train-demo/models --raw-only --output out/train-demo/before
	$(BIN)/mive train configs/train_demo.yaml --plan
	$(BIN)/mive train configs/train_demo.yaml
	cp -R out/train-demo/models/vae.safetensors out/train-demo/models/vlm out/train-demo/editor
	$(BIN)/mive merge out/train-demo/models/dit.safetensors out/train-demo/lora.safetensors out/train-demo/editor/dit.safetensors
	$(BIN)/mive edit --manifest out/train-demo/heldout --models out/train-demo/editor --output out/train-demo/edited
	$(BIN)/mive eval --manifest out/train-demo/heldout --models out/train-demo/editor --raw-only --before out/train-demo/before --output out/train-demo

test: $(STAMP)
	$(BIN)/pytest

test-quick: $(STAMP)
	$(BIN)/pytest -m "not slow" --ignore=tests/comfyui

fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/run.py --json results/reliability/fuzz.json

# The type checker sees the pack as ComfyUI mounts it, under a name of its own: inside nodes/, imports lead above it.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(MOUNT) && ln -sfn "$(CURDIR)" $(MOUNT)/mive_pack
	cd $(MOUNT) && ../bin/mypy --config-file ../../pyproject.toml

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
