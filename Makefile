PYTHON_BIN := .venv/bin/python

.PHONY: demo test lint setup fuzz mutations crash isolation churn conformance chaos power-cut protections bench-supply bench-cpu bench-gpu bench-routing bench-front-door bench-router api-docs

demo: setup ## a backend, a node and two questions; ARGS=--once stops after the answers
	@$(PYTHON_BIN) -m r3mes_vllm demo $(ARGS)

test: setup lint ## the whole suite; with ARGS pytest alone, which gets them
	$(if $(ARGS),$(PYTHON_BIN) -m pytest $(ARGS),$(PYTHON_BIN) -m tests.halves)

fuzz: setup ## every parser for SECONDS=3600, keeping what was learnt in fuzz-corpus
	$(PYTHON_BIN) -m tests.fuzz all --seconds $(or $(SECONDS),3600) --corpus fuzz-corpus

mutations: setup ## COUNT=10000 adapters damaged at random: vetted, and the accepted ones asked beside PEFT
	$(PYTHON_BIN) -m tests.engine.mutated --count $(or $(COUNT),10000)

crash: setup ## kill KILLS=2000 fetches at random instants, and look at the store after each
	folder=$$(mktemp -d) && $(PYTHON_BIN) -m tests.adapters.crashing $$folder $(or $(KILLS),2000)

isolation: setup ## REQUESTS=5000 random requests, of an engine and of a node: each must get what it gets alone
	$(PYTHON_BIN) -m tests.engine.isolation --requests $(or $(REQUESTS),5000)
	$(PYTHON_BIN) -m tests.node.isolated --requests $(or $(REQUESTS),5000)

churn: setup ## CYCLES=2000 loads and unloads: the memory must stay where it is
	$(PYTHON_BIN) -m tests.engine.churn --cycles $(or $(CYCLES),2000)

conformance: setup ## REQUESTS=10000 fuzzed requests by the API's own document; SEED=N
	$(PYTHON_BIN) -m tests.conformance.schema --requests $(or $(REQUESTS),10000) \
	  $(if $(SEED),--seed $(SEED))

chaos: setup ## SECONDS=600, or until ANSWERS, of failing nodes, on each database; KILLS=100 before and after a token, and of a lone node; REAL=20 of real nodes
	$(PYTHON_BIN) -m tests.backend.chaos --seconds $(or $(SECONDS),600) --answers $(or $(ANSWERS),0)
	$(PYTHON_BIN) -m tests.backend.chaos --seconds $(or $(SECONDS),600) --answers $(or $(ANSWERS),0) \
	  --database postgresql --routers 2
	$(PYTHON_BIN) -m tests.backend.killing --kills $(or $(KILLS),100)
	$(PYTHON_BIN) -m tests.killed_nodes --kills $(or $(REAL),20)

power-cut: setup ## kill everything CUTS=200 times at random instants, and NODES=3 times with a real node; DATABASE=postgresql
	$(PYTHON_BIN) -m tests.resilience.power_cut --cuts $(or $(CUTS),200) --nodes $(or $(NODES),3) \
	  --database $(or $(DATABASE),sqlite)

protections: setup ## take each protection away, and see that its test fails; ARGS="3 17" some of them
	$(PYTHON_BIN) -m tests.resilience.off $(ARGS)
	$(if $(ARGS),,$(PYTHON_BIN) -m pytest -m control)

bench-cpu: setup ## all suites, for hours; ARGS=--quick shows that they run
	@$(PYTHON_BIN) -m r3mes_vllm bench all $(ARGS)

bench-gpu: setup ## the same with Llama shapes of 1B and 8B and random weights; no network; ARGS=--quick
	@failed=0; for model in llama-1b llama-8b; do \
	  for suite in grid working-set cold-start fairness front-cost; do \
	    $(PYTHON_BIN) -m r3mes_vllm bench $$suite --model $$model $(ARGS) || failed=$$?; \
	    [ $$failed -ne 130 ] || exit 130; done; done; exit $$failed

bench-front-door: setup ## what half-open connections and malformed requests cost everybody else
	$(PYTHON_BIN) -m r3mes_vllm bench half-open $(ARGS)

bench-router: setup ## what the backend adds to a stream, and how it grows
	$(PYTHON_BIN) -m r3mes_vllm bench router $(ARGS)
	$(PYTHON_BIN) -m r3mes_vllm bench scale $(ARGS)

bench-supply: setup ## fetching and vetting against sha256 alone
	$(PYTHON_BIN) -m r3mes_vllm bench fetch $(ARGS)
	$(PYTHON_BIN) -m r3mes_vllm bench vetting $(ARGS)

bench-routing: setup ## what a request waits, by how the router chooses a node
	$(PYTHON_BIN) -m r3mes_vllm bench routing $(ARGS)
	$(PYTHON_BIN) -m r3mes_vllm bench routing-nodes $(ARGS)

api-docs: setup ## the reference of the Python API, as HTML in api-docs
	$(PYTHON_BIN) -m pip --disable-pip-version-check install --quiet 'pdoc>=16'
	$(PYTHON_BIN) -m pdoc --output-directory api-docs r3mes_vllm r3mes_vllm.serving_node r3mes_vllm.adapter_library

lint: setup
	$(PYTHON_BIN) -m ruff check
	$(PYTHON_BIN) -m ruff format --check
	$(PYTHON_BIN) -m mypy

setup:
	@requirements/setup.sh
