# make demo: the main job on built-in tiny models. make test: the tests. Both make .venv when needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# For test-transformers: another version than LLaVA's pin, in an environment of its own.
TRANSFORMERS ?= 4.40.2
CORE_TESTS := $(addprefix tests/test_,$(addsuffix .py,spec projectors patching tower truncated_encoder llava_model llava_training load_guard))

# For bench: cpu takes 25 to 45 minutes on two cores, cuda under ten minutes.
DEVICE ?= cpu

.PHONY: demo test test-transformers run-on-transformers lint bench clean

demo: $(STAMP)
	$(BIN)/llava-projectors demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-transformers:
	$(MAKE) VENV=.venv-transformers-$(TRANSFORMERS) TRANSFORMERS=$(TRANSFORMERS) run-on-transformers

run-on-transformers: $(STAMP)
	$(PIP) install -q transformers==$(TRANSFORMERS)
	$(BIN)/python -m pytest $(CORE_TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python -m benchmarks.speed --csv benchmarks/results/$(DEVICE).csv --device $(DEVICE)

# deepspeed's setup imports torch, so it is built without isolation once torch is there. LLaVA goes
# in without its dependencies: its own pins contradict a current torch.
$(STAMP): setup.cfg pyproject.toml constraints.txt build_backend/build_with_pth.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 9) <= v <= (3, 12) else "Python %d.%d cannot hold LLaVA: pass PYTHON=python3.x, 3.9 to 3.12" % v)'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch setuptools wheel
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[llava,demo,test,lint]'
	$(PIP) install -q --no-deps llava-torch==1.2.2.post1
	touch $@

clean:
	rm -rf $(VENV) $(wildcard .venv-transformers-*) runs build dist *.egg-info
