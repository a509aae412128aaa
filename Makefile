PYTHON_BIN := .venv/bin/python

.PHONY: demo test lint setup

demo: setup ## a backend, a node and two questions; ARGS=--once stops after the answers
	@$(PYTHON_BIN) -m r3mes_vllm demo $(ARGS)

test: setup lint ## the whole suite; ARGS go to pytest
	$(PYTHON_BIN) -m pytest $(ARGS)

lint: setup
	$(PYTHON_BIN) -m ruff check
	$(PYTHON_BIN) -m ruff format --check
	$(PYTHON_BIN) -m mypy

setup:
	@requirements/setup.sh
