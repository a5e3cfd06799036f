# The versions everything here was run with; torch comes first, since pip would otherwise take a build with CUDA.
TORCH := torch==2.13.0
PINNED := trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 datasets==5.2.0 deepspeed==0.19.8
DOCS := 'mkdocs-material>=9.6,<10' 'mkdocstrings[python]>=1.0,<2' 'latex2mathml>=3.77,<4'
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SEED := $(shell date +%s)
CASES := 20000

export SETS INTERPRETER
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help demo docs format quick test faults kernels shuffle fuzz audit lint contract matrix axolotl benchmark clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml Makefile
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --no-compile $(TORCH)
	$(PYTHON) -m pip install --quiet --no-compile $(PINNED) -e ".[dev]"
	-$(PYTHON) -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib  # on all cores, where pip would take one
	touch $(STAMP)

demo: $(STAMP) ## Compare methods on the playground: tables and pictures (7 minutes on 2 idle cores)
	$(VENV)/bin/trl-ext demo

lint: $(STAMP) ## Check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP) ## Bring sources into the house's style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

quick: $(STAMP) ## Run the fast tier of the tests: no process, no trainer, under five minutes on 2 cores
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist worksteal -m "not slow and not distributed"

test: lint ## Check style and types and run the test-suite
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist worksteal

shuffle: $(STAMP) ## Run the test-suite in a random order; it prints the SEED, which `make shuffle SEED=...` repeats
	@echo "SEED=$(SEED)"
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist worksteal --random-order-seed=$(SEED)

faults: $(STAMP) ## Kill runs, damage their checkpoints, fill their disks: 108 kills and more (as root: full disks too)
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.faults

kernels: $(STAMP) ## The GPU kernels compiled for sm_90, every case of them in Triton's interpreter and of sharded optimizers and compiled models, and the GPU script dry (10 minutes)
	$(PYTHON) -m tests.benchmarks.kernel_registers
	TRITON_INTERPRET=1 $(PYTHON) -m tests.optim.plan_cases --all
	$(PYTHON) -m tests.gpu.run --dry --output_dir outputs/gpu_dry --seconds 1800
	OMP_NUM_THREADS=1 TRL_EXT_ALL_CASES=1 $(PYTHON) -m pytest tests/distributed/test_optimizer_shards.py tests/optim/test_kernels.py
	OMP_NUM_THREADS=1 TRL_EXT_ALL_CASES=1 $(PYTHON) -m pytest -k compiled tests/constrained_ppo/test_other_means.py tests/optim/test_training.py tests/sparse_po/test_sparse_po_trainer.py

fuzz: $(STAMP) ## Try 20,000 random recipes, configurations, constraints, rows and token weights (10 minutes); CASES=n for others
	OMP_NUM_THREADS=1 TRL_EXT_FUZZ_CASES=$(CASES) $(PYTHON) -m pytest tests/fuzz

# Without --strict a package that PyPI does not answer for is skipped, and all is said to be well
audit: $(STAMP) ## Look up known vulnerabilities of the pinned versions and what came with them (needs pypi.org)
	$(PYTHON) -m pip freeze --exclude-editable | sed 's/+.*//' > $(VENV)/pinned.txt
	test -x $(VENV)/audit/bin/pip-audit || (python3 -m venv $(VENV)/audit && $(VENV)/audit/bin/pip install --quiet pip-audit)
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement $(VENV)/pinned.txt

contract: ## Run the contract tests and the trainers' on the lowest, the usual and the newest versions (SETS=newest for one, INTERPRETER=python3.13)
	bash tests/contract/run_matrix.sh contract "$(TORCH)" "$(PINNED)"

matrix: ## Run the fast tier on the lowest, the usual and the newest versions, each in its own environment (SETS=newest for one, INTERPRETER=python3.13)
	bash tests/contract/run_matrix.sh quick "$(TORCH)" "$(PINNED)"

axolotl: ## Train with the plugin in axolotl 0.19.0 as released, in an environment of its own
	test -x $(VENV)-axolotl/bin/python || (python3 -m venv $(VENV)-axolotl && $(VENV)-axolotl/bin/pip install --quiet $(TORCH) axolotl==0.19.0 && $(VENV)-axolotl/bin/pip install --quiet -e .)
	OMP_NUM_THREADS=1 $(VENV)-axolotl/bin/python -m tests.integrations.axolotl_run

benchmark: $(STAMP) ## Measure each method against TRL's trainer or another implementation
	$(PYTHON) -m tests.benchmarks.sparse_po
	$(PYTHON) -m tests.benchmarks.constrained_ppo
	$(PYTHON) -m tests.benchmarks.optimizers
	$(VENV)/bin/torchrun --standalone --nproc_per_node 2 -m tests.benchmarks.optimizer_exchange
	$(PYTHON) -m tests.benchmarks.equilibrium

docs: ## Build the documentation as a site in outputs/site, strictly: a broken link or reference fails
	test -x $(VENV)/docs/bin/mkdocs || (python3 -m venv $(VENV)/docs && $(VENV)/docs/bin/pip install --quiet $(DOCS))
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --quiet

clean: ## Remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache *.egg-info
