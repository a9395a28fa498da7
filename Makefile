# Two commands: `make demo` and `make test`. Each sets up .venv on a fresh clone; only Python 3.11 and make are needed.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-sat bench-peers browser lint setup clean

demo: $(STAMP)
	$(BIN)/aiba demo

test: $(STAMP) lint
	$(BIN)/python -m pytest

# Libraries that pin versions of their own live in environments that lie over .venv and add them, installed without their
# dependencies: stable-audio-tools (torchaudio breaks other imports on CPU torch), and what aiba bench races against
SAT := .venv-sat
PEERS := .venv-peers
test-sat: $(SAT)/.installed
	$(SAT)/bin/python -m pytest tests/sat

bench-peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m aiba_eval.cli bench --model stable-diffusion-small --model audioldm2-small --model stable-audio-small \
	  --contestant words --contestant tokens --contestant paper --contestant amd-fast --contestant amd-exact --contestant daam \
	  --rounds 3 --steps 4 --threads 1 --out aiba-bench-peers --overwrite

.venv-%/.installed: $(STAMP) constraints-%.txt
	test -x .venv-$*/bin/python || $(BIN)/python -m venv .venv-$*
	base=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	own=$$(.venv-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "import site; site.addsitedir('$$base')" > $$own/base.pth
	.venv-$*/bin/python -m pip install --quiet --no-deps --requirement constraints-$*.txt
	touch $@

# headless Chromium for tests/test_report_browser.py: Debian's packages where there is apt and root, else a message
browser:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then echo "chromium and chromedriver are here"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && apt-get install -y -q --no-install-recommends chromium chromium-driver; \
	else echo "tests/test_report_browser.py is skipped without them: sudo apt-get install chromium chromium-driver"; fi

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(STAMP)

# constraints.txt pins the tested set: an open torch range could pull several GB of CUDA packages
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(SAT) $(PEERS) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist *.egg-info
