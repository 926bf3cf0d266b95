# make demo   environment, data, training of a dense and an MoE RetinaNet, one table
# make test   the same environment, then the test suite, with a fixed sample of each sweep (pytest.mark.sweep)
# make test-all   the same with every case of the sweeps (pytest --all)
# make look   the same environment, then the experts of a trained detector that ships with the package
# make bench  what got faster or slower since the committed figures (BENCH=--fail, BENCH=--update)
# make gpu    what needs a GPU: checks, and the figures of docs/gpu.md
# make lint   ruff, and mypy on the public API
# make docs   the documentation site in docs/_build/html/; HTML=DIR puts it beside older versions in DIR
# make wheel  wheel and source distribution in dist/
#
# VENV=DIR puts the environment elsewhere; PYTHON=python3.12 makes it of another interpreter.

VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
STAMP := $(VENV)/.mmdet_moe-installed
DOCS_STAMP := $(VENV)/.mmdet_moe-docs-installed
HTML ?= docs/_build/html

.PHONY: demo look test test-all bench gpu lint docs wheel install

demo: $(STAMP)
	$(PY) tools/demo.py

look: $(STAMP)
	$(PY) tools/look.py

test: $(STAMP)
	$(PY) -m pytest -n 2 --dist worksteal

test-all: $(DOCS_STAMP)
	$(PY) -m pytest -n 2 --dist worksteal --all

bench: $(STAMP)
	$(PY) tools/benchmark_moe.py --threads 2 --compare $(BENCH)

gpu: $(STAMP)
	$(PY) tools/gpu.py

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m mypy

# A warning is an error: a broken link, a public name that has no docstring or is not in the reference.
docs: $(DOCS_STAMP)
	rm -rf docs/api/generated
	$(PY) -m sphinx -q -E -W --keep-going -d docs/_build/doctrees docs \
		$(HTML)/$$($(PY) -c "exec(open('mmdet_moe/version.py').read()); print(__version__)")
	@echo "Open $(HTML)/index.html"

# The kernels of the CPU are compiled into the wheel; those of CUDA are there as source, for
# `python -m mmdet_moe.ops --build`.
wheel: $(STAMP)
	MMDET_MOE_CUDA_ARCHITECTURES=';' $(PY) -m build --no-isolation

install: $(STAMP)

$(STAMP): requirements/runtime.txt requirements/dev.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "error: mmdet_moe needs Python 3.10 to 3.13; say which with PYTHON=python3.12" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (about two minutes and 3 GB the first time)"
	$(PY) -m pip install --disable-pip-version-check --progress-bar on -r requirements/dev.txt
# Two packages of the toolboxes bring one variant of OpenCV each; the graphical one needs libGL.
	@$(PY) -c 'import cv2' 2>/dev/null || $(PY) -m pip install --disable-pip-version-check \
		--force-reinstall --no-deps opencv-python-headless==4.12.0.88
	$(PY) -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

$(DOCS_STAMP): $(STAMP) requirements/docs.txt
	$(PY) -m pip install --disable-pip-version-check -r requirements/docs.txt
	@touch $@
