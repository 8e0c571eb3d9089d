# make setup   .venv with everything the other commands need
# make demo    corpus, tokenizer, pretraining on 4 ranks, export, generation
# make test    every check: lint, types, tests
# make test-slow, make stress    what takes longer: more cases; killing ranks while they save
# make bench-quick    the main tables of docs/results on small models, into runs/bench
# make bench    everything in docs/results, as root on a quiet Linux machine (an hour)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-slow stress bench-quick bench lint types format clean

setup: $(STAMP)

# torch goes first: deepspeed's build looks for it, and a machine's own wheel of the pinned version
# is then not replaced.
$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make setup PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[dev]'
	touch $(STAMP)

tokenizers/demo/tokenizer.json: $(STAMP)
	test -s data/demo.jsonl || $(BIN)/python data_prep/python_corpus.py --output data/demo.jsonl
	test -s $@ || $(BIN)/python data_prep/train_tokenizer.py --input data/demo.jsonl --vocab_size 4096 --output tokenizers/demo

data/demo/manifest.json: tokenizers/demo/tokenizer.json
	test -s $@ || $(BIN)/python data_prep/tokenize_fineweb.py --source data/demo.jsonl --tokenizer tokenizers/demo --output data/demo --validation_fraction 0.03

# Four ranks need four GPUs; where there are fewer, the CPU takes all of them.
demo: data/demo/manifest.json
	rm -rf runs/demo
	if test $$($(BIN)/python -c 'import torch; print(torch.cuda.device_count())') -lt 4; then \
		echo 'fewer than 4 GPUs: training on the CPU'; export DS_ACCELERATOR=cpu; \
	else echo 'training on 4 GPUs'; fi; \
	$(BIN)/deepspeed --num_accelerators 4 launch/pretrain.py --deepspeed_config configs/demo.json
	$(BIN)/python launch/report.py runs/demo
	$(BIN)/python launch/evaluate.py --deepspeed_config configs/demo.json --model runs/demo/model
	$(BIN)/python launch/generate.py --model runs/demo/model --prompt 'Return the' 'This function' 'Raises'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

test: lint types
	$(BIN)/pytest

test-slow: $(STAMP)
	$(BIN)/pytest -m slow

stress: $(STAMP)
	$(BIN)/python -m tests.stress.kill_during_save --kills 100
	$(BIN)/python -m tests.stress.kill_during_save --kills 40 --world_size 2 --async_save

$(VENV)/.plots: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[plots]'
	touch $@

QUICK := ddp zero2 zero3 fsdp2 sdp:1 sdp:1/2
MODELS := configs/model/llama_
bench-quick: $(VENV)/.plots
	$(BIN)/python benchmarks/step_time.py --model $(MODELS)10m.json --systems $(QUICK) --rounds 5 --output runs/bench/step_time_10m.json
	$(BIN)/python benchmarks/compare.py --model $(MODELS)10m.json --systems $(QUICK) --output runs/bench/compare_10m.json
	$(BIN)/python benchmarks/compare.py --model $(MODELS)60m.json --systems $(QUICK) --output runs/bench/compare_60m.json

# What needs a quiet machine goes first.
bench: $(VENV)/.plots
	$(BIN)/python benchmarks/step_time.py --model $(MODELS)10m.json --rounds 7 --output docs/results/step_time_10m.json
	$(BIN)/python benchmarks/step_time.py --model $(MODELS)10m.json --systems ddp sdp:1 --rounds 25 --steps 2 --output docs/results/step_time_pair_10m.json
	$(BIN)/python benchmarks/collectives.py --output docs/results/collectives.json
	$(BIN)/python benchmarks/overlap.py --model $(MODELS)10m.json --output docs/results/overlap_10m.json
	$(BIN)/python benchmarks/slow_network.py --model $(MODELS)134m.json --sequence_length 4 --gbits 1 --steps 2 --rounds 3 --systems ddp zero2 zero3 fsdp2 sdp:1/2:forward:2 sdp:1/2:forward:2:8 sdp:1:forward:2 --output docs/results/slow_network_134m.json
	$(BIN)/python benchmarks/slow_network.py --model $(MODELS)10m.json --no-bf16 --rounds 2 --systems ddp zero2 zero3 fsdp2 sdp:1/2:forward:2 sdp:1/2:forward:2:8 sdp:1/2:backward:2:8 --output docs/results/slow_network_10m.json
	$(BIN)/python benchmarks/mfu.py --models $(MODELS)10m.json --output docs/results/mfu_cpu.json
	$(BIN)/python benchmarks/compare.py --model $(MODELS)60m.json --output docs/results/compare_60m.json
	$(BIN)/python benchmarks/scaling.py --model $(MODELS)10m.json --output docs/results/scaling.json
	$(BIN)/python benchmarks/memory.py --model $(MODELS)60m.json --bf16 --output docs/results/memory_60m.json
	$(BIN)/python benchmarks/loss_chunk.py --model $(MODELS)134m.json --output docs/results/loss_chunk_134m.json
	$(BIN)/python benchmarks/traffic.py --model $(MODELS)60m.json --bf16 --accumulation 1 2 --output docs/results/traffic_60m.json
	$(BIN)/python benchmarks/checkpoints.py --model $(MODELS)134m.json --output docs/results/checkpoints_134m.json

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build data/demo data/demo.jsonl tokenizers/demo runs/demo
