# Everything runs in a virtual environment that is made here; nothing else is needed but Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
# One process for each core; the tests of a file stay in one process, which makes its models and studies once.
IN_PARALLEL := -n auto --maxprocesses 8 --dist loadfile
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: help demo test test-full test-room test-browser lint format docs package oldest builtin-lm real bench bench-stream quality interop crash fuzz datasets-fuzz cases ray distributed calibrate clean

help:  ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)  ## train the demo's SAEs on the built-in language model; its report is runs/demo/report.html
	$(BIN)/prolu demo --out runs/demo

test: lint  ## checks and the fast tests, offline
	$(BIN)/python -m pytest $(IN_PARALLEL) -m 'not slow and not browser' --durations=15

test-full: lint  ## all tests: also the slow ones, and every command and example of the README and the docs
	$(BIN)/python -m pytest $(IN_PARALLEL) --durations=15

test-room: $(INSTALLED)  ## the fast tests of one room: make test-room ROOM=sae
	$(BIN)/python -m pytest -m 'not slow and not browser' --durations=5 tests/$(ROOM)

test-browser: $(INSTALLED)  ## the report and the pages of latents in chromium; installs it where it is missing, if root (Debian)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,browser]'
	@command -v chromium >/dev/null || { \
	  test "$$(id -u)" = 0 || { echo "chromium is missing: as root, apt-get install chromium"; exit 1; }; \
	  apt-get update -qq && apt-get install -y -qq chromium; }
	$(BIN)/python -m pytest -m browser tests/report

lint: $(INSTALLED)  ## style, types, layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(INSTALLED)  ## put the code into shape
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(INSTALLED)  ## the documentation site, build/docs/index.html; warnings are errors, and nothing is fetched
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs

package: $(INSTALLED)  ## wheel and sdist in build/package, checked, and the wheel used in an environment of its own
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,package]'
	rm -rf build/package
	$(BIN)/python -m build --outdir build/package .
	$(BIN)/twine check --strict build/package/*
	$(BIN)/python scripts/try_wheel.py build/package/*.whl

oldest:  ## the fast tests with the oldest versions that pyproject.toml allows, in .venv-oldest (Python 3.11; 5 GB, torch's CUDA build)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --constraint constraints-oldest.txt --editable . pytest hypothesis beartype ipykernel nbclient
	@# Without shapes enforced: the import hook of old jaxtyping wraps what numba compiles.
	.venv-oldest/bin/python -m pytest -m 'not slow and not browser' -o addopts='-q --strict-markers -p no:cacheprovider'

builtin-lm: $(INSTALLED)  ## train the built-in language model anew (45 minutes)
	$(BIN)/python scripts/train_builtin.py

real: $(INSTALLED)  ## SAEs on SmolLM2-135M, from PyPI: make real DATA=my_text.parquet (hours on a CPU; SCALE=0.1 for less)
	$(BIN)/python scripts/real_model.py --data "$(DATA)" --scale $(or $(SCALE),1) --out runs/real

bench: $(INSTALLED)  ## time the training steps against the floor and the peers, with both allocators; and how a sweep grows
	$(BIN)/python -m pytest -m 'not slow' tests/training/test_dense_step.py tests/training/test_sparse_steps.py tests/training/test_adam.py
	$(BIN)/python benchmarks/step.py --peers --json benchmarks/step.json
	$(BIN)/python benchmarks/step.py --peers --heap-reuse --json benchmarks/step-heap-reuse.json
	$(BIN)/python benchmarks/step.py --peers --batch 1024 --l0 100 --json benchmarks/step-1024.json
	$(BIN)/python benchmarks/step.py --variants dense,autograd --l0 6144 --json benchmarks/step-half.json
	$(BIN)/python benchmarks/step.py --variants dense,autograd --l0 6144 --heap-reuse --json benchmarks/step-half-heap-reuse.json
	$(BIN)/python benchmarks/sweep.py --json benchmarks/sweep.json
	$(BIN)/python benchmarks/figure.py benchmarks/step.json benchmarks/step-heap-reuse.json docs/figures/speed.png

bench-stream: $(INSTALLED)  ## the activation stream against the bare model, the training step and the disk
	$(BIN)/python -m pytest -m 'not slow' tests/activations/test_store.py tests/activations/test_stream.py
	$(BIN)/python benchmarks/stream.py --json benchmarks/stream.json
	$(BIN)/python benchmarks/caching.py --json benchmarks/caching.json

quality: $(INSTALLED)  ## Gated, JumpReLU and TopK against dictionary_learning's own trainers, at equal L0 (10 minutes)
	$(BIN)/python -m pytest -m 'not slow' tests/training/test_baselines.py tests/training/test_target_l0.py
	$(BIN)/python benchmarks/quality.py --json benchmarks/quality.json

interop: $(INSTALLED)  ## other libraries' own code beside ours, each in an environment that this makes once
	$(BIN)/python checks/interop.py --json benchmarks/interop.json
	$(BIN)/python checks/interop_transcoders.py --json benchmarks/interop_transcoders.json
	$(BIN)/python checks/saelens_registry.py
	$(BIN)/python checks/saebench_core.py
	$(BIN)/python checks/saebench_absorption.py
	$(BIN)/python checks/sae_probes.py
	$(BIN)/python checks/dashboards.py

crash: $(INSTALLED)  ## kill a sweep at every disk operation and at 40 random moments; each must end as if nothing had happened
	$(BIN)/python checks/crash.py

ray: $(INSTALLED)  ## a sweep on a Ray cluster of two workers, whole and killed, against the local engine (in .venv-ray)
	$(BIN)/python checks/ray_cluster.py

fuzz: $(INSTALLED)  ## malformed inputs, some hundreds, against everything that reads
	$(BIN)/python checks/fuzz.py

datasets-fuzz: $(INSTALLED)  ## 200 folders and files composed at random, read by us and by the datasets library
	HF_HUB_OFFLINE=1 $(BIN)/python checks/datasets_fuzz.py

cases: $(INSTALLED)  ## text and models as people have them, with what was expected of each and what came
	$(BIN)/python checks/cases.py

distributed: $(INSTALLED)  ## one SAE on several processes against one; a sweep on a Ray cluster, its workers and its driver killed
	$(BIN)/python -m pytest tests/training/test_mesh.py tests/studies/test_mesh_commands.py tests/studies/test_groups.py tests/studies/test_ray_cluster.py
	$(BIN)/python checks/ray_cluster.py --json build/ray.json && $(BIN)/python checks/distributed.py build/ray.json

calibrate: $(INSTALLED)  ## remake the table that decides between dense and sparse steps
	$(BIN)/python benchmarks/calibrate.py

clean:  ## remove the environment and all runs
	rm -rf $(VENV) .venv-oldest .venv-peers .venv-saebench .venv-dashboards .venv-delphi .venv-transformer-lens .venv-trackers .venv-ray build runs
