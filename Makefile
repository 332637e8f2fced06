PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test

setup: $(STAMP)

# torch, torchvision and torchaudio go together; requirements.txt leaves them to the machine.
$(STAMP): pyproject.toml requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0
	$(BIN)/python -m pip install --quiet --editable ".[train,data]" gguf "pytest>=8"
	$(BIN)/python -m pip install --quiet --editable ".[ray]" || echo "ray is not to be had here: its tests will be skipped"
	touch $@

demo: $(STAMP)
	$(BIN)/mive demo --output out/demo

test: $(STAMP)
	$(BIN)/pytest
