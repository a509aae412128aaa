PYTHON_BIN := .venv/bin/python

.PHONY: demo test lint setup fuzz crash isolation churn bench-supply bench-cpu

demo: setup ## a backend, a node and two questions; ARGS=--once stops after the answers
	@$(PYTHON_BIN) -m r3mes_vllm demo $(ARGS)

test: setup lint ## the whole suite; ARGS go to pytest
	$(PYTHON_BIN) -m pytest $(ARGS)

fuzz: setup ## every parser for SECONDS=3600, keeping what was learnt in fuzz-corpus
	$(PYTHON_BIN) -m tests.fuzz all --seconds $(or $(SECONDS),3600) --corpus fuzz-corpus

crash: setup ## kill KILLS=2000 fetches at random instants, and look at the store after each
	folder=$$(mktemp -d) && $(PYTHON_BIN) -m tests.adapters.crashing $$folder $(or $(KILLS),2000)

isolation: setup ## REQUESTS=5000 random requests: each must get what it gets alone
	$(PYTHON_BIN) -m tests.engine.isolation --requests $(or $(REQUESTS),5000)

churn: setup ## CYCLES=2000 loads and unloads: the memory must stay where it is
	$(PYTHON_BIN) -m tests.engine.churn --cycles $(or $(CYCLES),2000)

bench-cpu: setup ## throughput kept, fairness and stalls, beside stock vLLM
	$(PYTHON_BIN) -m benchmarks.cpu_lora
	$(PYTHON_BIN) -m benchmarks.fairness
	$(PYTHON_BIN) -m benchmarks.no_stall

bench-supply: setup ## fetching and vetting against sha256 alone
	$(PYTHON_BIN) -m benchmarks.fetch
	$(PYTHON_BIN) -m benchmarks.vetting

lint: setup
	$(PYTHON_BIN) -m ruff check
	$(PYTHON_BIN) -m ruff format --check
	$(PYTHON_BIN) -m mypy

setup:
	@requirements/setup.sh
