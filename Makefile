# Everything starts from python3 and pip; `make up` installs the rest into .venv.
PYTHON ?= python3
BOOTSTRAP = $(PYTHON) scripts/bootstrap.py
export MODEL

BENCH_TRANSPORT = .venv/bin/python -m benchmarks.transport --target-gpu 1
BENCH_GPU = .venv/bin/python -m benchmarks.gpu --model $(MODEL) --prefill-gpu 0 --decode-gpu 1 --together --budget-s 900 \
	--output-alone 16 --push-blocks 2 --vllm-args="--max-num-batched-tokens 8192 --max-num-seqs 64"

.DEFAULT_GOAL := help
.PHONY: help up down status install lint test test-cluster gpu matrix soak faults mutants lock clean

help:  ## Show this
	@echo "TwoLane: make WORD, where WORD is one of"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile
	@echo "Settings by environment, as in: make up MODEL=/models/qwen3-4b HTTP_PROXY_PORT=8080"

up:  ## Install what is missing, start all services, send a first request through both lanes
	@$(BOOTSTRAP) up

down:  ## Stop all services
	@$(BOOTSTRAP) down

status:  ## Show what runs
	@$(BOOTSTRAP) status

install:  ## Install only, with the development tools
	@$(BOOTSTRAP) install --dev

lint: install  ## ruff and mypy
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

test: lint  ## lint, then all tests (they start real engines: under 30 minutes on 2 cores)
	.venv/bin/python -m pytest

test-cluster: install  ## P and D on hosts made of network namespaces, and `twolane up --ray` there; needs root and Ray (.venv/bin/pip install -e '.[ray]')
	timeout --foreground -s INT -k 120 1800 .venv/bin/python -m pytest -m cluster tests/cluster tests/network

gpu: install  ## All that needs GPUs, in an hour: tests, link, benchmark. TINY=/models/tiny for the tests, MODEL=/models/qwen3-4b to measure
	timeout --foreground -s INT -k 60 900 .venv/bin/python -m pytest -s --durations=0 tests/contract -k gpu
	TWOLANE_GPU_MODEL=$(TINY) timeout --foreground -s INT -k 120 2400 .venv/bin/python -m pytest -s --durations=0 tests/gpu
	$(BENCH_TRANSPORT) --transport cuda_ipc,nccl,shm,nccl@NCCL_P2P_DISABLE=1,nccl@NCCL_P2P_DISABLE=1@NCCL_SHM_DISABLE=1 --out link.json
	$(BENCH_GPU) --setups plain,plain_graphs,cuda_ipc,nccl,shm,nixl,aggregated --link link.json

matrix:  ## Try every vLLM release in VERSIONS (default: all), write the table in README; needs 15 GB the first time
	$(PYTHON) scripts/matrix.py $(VERSIONS)

soak: install  ## The connector under fire: 2,000 requests, instances killed all the time (22 minutes of load at most)
	.venv/bin/python -m benchmarks.soak

faults: install  ## New random faults in the simulated conversation between P and D, 5,000 runs of them
	TWOLANE_CONVERSATION=long .venv/bin/python -m pytest tests/connector/test_conversation.py

mutants: install  ## Break the connector's rules one at a time and see which test notices (docs/RELIABILITY.md)
	.venv/bin/python scripts/mutate.py

lock:  ## Resolve requirements/*.in into the lock files again
	$(PYTHON) scripts/lock.py

clean:  ## Stop all services, remove .venv, logs and caches in this folder
	@$(BOOTSTRAP) down
	rm -rf .venv .twolane logs build requirements/vllm-name/build requirements/vllm-name/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
