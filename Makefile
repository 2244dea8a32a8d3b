# Every target sets up what it needs: Python >= 3.10 is enough, on macOS and Debian alike.
#   make chat [ARGS="--memory work"]    talk to SmolLM2 with sleep layers
#   make test [ARGS="-m 'not slow'"]    the whole suite, or the quick tests
#   make lint | types | wheel | clean
#   make parity [ARGS="NAME --json"]    compare the architectures with PyTorch's; needs torch
#   make kernel-report                  count what the kernels ask of a GPU, without one
#   make fuzz [ARGS="--count 20000"]    damage files in many ways; none may crash or pass for sound
#   make mutants [ARGS="--sample 20"]   flip the kernels' operators and count what tests catch
#   make figures                        the tables and figures of the pages, from docs/results/
#   make docs                           the pages of docs/ as a site in build/docs, links checked

READY := .venv/.ready
# The tools of tests and checks, which a chat does without.
TEST_READY := .venv/.test-ready

# After a download that failed, as without a network, the next try is an hour later.
chat: $(READY)
	@if [ -d mlx_sleep/adapters/smollm2 ] && [ -z "$$(find .venv/.not-fetched -mmin -60 2>/dev/null)" ]; then \
	  .venv/bin/mlx-sleep models get smollm2 >/dev/null || touch .venv/.not-fetched; fi
	@.venv/bin/mlx-sleep chat $(ARGS)

test: $(TEST_READY)
	@.venv/bin/python -m pytest -q $(ARGS)

lint: $(TEST_READY) types
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .
	@.venv/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@! command -v actionlint >/dev/null || actionlint

# mypy reads the packages where they are imported from: kernels/ and convert/ in mlx_sleep.
types: $(TEST_READY)
	@rm -rf build/types/mlx_sleep && mkdir -p build/types/mlx_sleep
	@ln -s "$(CURDIR)"/mlx_sleep/* "$(CURDIR)/convert" "$(CURDIR)/kernels" build/types/mlx_sleep/
	@cd build/types && ../../.venv/bin/python -m mypy --config-file ../../pyproject.toml -p mlx_sleep

mutants: $(TEST_READY)
	@.venv/bin/python -m tests.metal.mutants $(ARGS)

fuzz: $(TEST_READY)
	@.venv/bin/python -m tests.fuzz $(ARGS)

kernel-report: $(TEST_READY)
	@.venv/bin/python -m tests.metal.report $(ARGS)

parity: $(TEST_READY)
	@.venv/bin/python -m tests.parity $(ARGS)

figures: $(READY)
	@.venv/bin/python -c 'import matplotlib' 2>/dev/null || \
	  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[plot]'
	@for s in tables figures diagram; do .venv/bin/python docs/scripts/$$s.py || exit 1; done

docs: figures
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@.venv/bin/python docs/scripts/cli.py
	@NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --quiet --strict --site-dir build/docs
	@echo "open build/docs/index.html"

wheel: $(READY)
	@.venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist . && ls dist/*.whl

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

.PHONY: chat test lint types parity fuzz kernel-report mutants figures docs wheel clean

# Candidates are run, not only looked up: a version manager's shim can exist and still fail.
FIND_PYTHON = for p in python3.12 python3.11 python3.13 python3.14 python3.10 python3; do \
	  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	    echo $$p; break; fi; done

# Passwordless root, if there is any. "$1" is a Debian package; fails where it can't be had.
APT_INSTALL = apt_install() { \
	  command -v apt-get >/dev/null || return 1; \
	  if [ "$$(id -u)" = 0 ]; then root=; \
	  elif sudo -n true 2>/dev/null; then root="sudo -n"; else return 1; fi; \
	  echo "installing $$1"; \
	  get="$$root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y"; \
	  $$get install $$1 >/dev/null 2>&1 || \
	    { $$get update >/dev/null 2>&1; $$get install $$1 >/dev/null 2>&1; }; }

# Needs no root, but 1 GB. Fails on ARM, for which there is none.
INSTALL_MKL = { [ "$$(uname -m)" = x86_64 ] && echo "installing MKL" && \
	  pip_install -e '.[mkl]'; }

.venv/bin/python:
	@set -e; $(APT_INSTALL); python=$$($(FIND_PYTHON)); \
	mkdir -p .venv || { echo "make sets itself up in this folder: use a clone that you can write to" >&2; \
	  exit 1; }; \
	if [ -z "$$python" ]; then \
	  echo "mlx-sleep needs Python 3.10 or newer: install it (macOS: brew install python)" >&2; \
	  exit 1; fi; \
	if ! $$python -m venv .venv >/dev/null 2>&1; then \
	  rm -rf .venv; \
	  package=$$($$python -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	  apt_install $$package && $$python -m venv .venv || { rm -rf .venv; \
	    echo "$$python has no venv; run: sudo apt-get install $$package" >&2; exit 1; }; fi

# One line of progress on a terminal, in place of pip's many.
PIP_INSTALL = pip_install() { \
	  pip="env PYTHONWARNINGS=ignore .venv/bin/python -m pip install --disable-pip-version-check"; \
	  if ! [ -t 1 ]; then $$pip --quiet "$$@"; return; fi; \
	  rm -f .venv/.failed; \
	  { $$pip --no-color "$$@" || touch .venv/.failed; } | awk \
	    '/^ *(Collecting|Downloading|Building|Installing)/ { printf "\r\033[K%.76s", $$0; fflush() } \
	     END { printf "\r\033[K" }'; \
	  ! [ -e .venv/.failed ]; }

$(READY): pyproject.toml .venv/bin/python
	@set -e; $(APT_INSTALL); $(PIP_INSTALL); \
	echo "installing mlx-sleep and what it needs into .venv"; \
	pip_install -e . || { \
	  echo "what mlx-sleep needs could not be installed: check the network, then run make again" >&2; \
	  exit 1; }; \
	if [ "$$(uname)" = Linux ] && ! .venv/bin/python -c \
	    'import ctypes; ctypes.CDLL("libopenblas.so.0")' 2>/dev/null; then \
	  apt_install libopenblas0-pthread || $(INSTALL_MKL) || \
	    echo "going on without OpenBLAS, up to 30 times slower;" \
	      "on Debian: sudo apt-get install libopenblas0-pthread"; fi; \
	if [ "$$(uname)" = Linux ]; then \
	  echo "measuring which matrix products are fastest here"; \
	  if .venv/bin/mlx-sleep doctor --calibrate 2>/dev/null | grep -q 'mlx-sleep\[mkl\]'; then \
	    $(INSTALL_MKL) && .venv/bin/mlx-sleep doctor --calibrate >/dev/null || true; fi; fi; \
	touch $@

HAS_TEST_TOOLS = .venv/bin/python -c 'import re; from importlib.metadata import requires, version; \
	  [version(re.match(r"[\w.-]+", r)[0]) for r in requires("mlx-sleep") if "test" in r.partition("extra ==")[2]]' 2>/dev/null

$(TEST_READY): $(READY)
	@set -e; $(APT_INSTALL); $(PIP_INSTALL); \
	$(HAS_TEST_TOOLS) || { echo "installing the tools of the tests"; pip_install -e '.[test]'; }; \
	command -v g++ >/dev/null || command -v clang++ >/dev/null || apt_install g++ || \
	  echo "the Metal kernels will not be tested: there is no C++ compiler"; \
	touch $@
