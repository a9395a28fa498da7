# Two commands: `make demo` and `make test`. Each sets up .venv on a fresh clone; only Python 3.11 and make are needed.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-sat browser lint setup clean

demo: $(STAMP)
	$(BIN)/aiba demo

test: $(STAMP) lint
	$(BIN)/python -m pytest

# stable-audio-tools pins versions of its own, and torchaudio breaks other imports on CPU torch: an environment that lies
# over .venv and adds them, installed without their dependencies
SAT := .venv-sat
test-sat: $(SAT)/.installed
	$(SAT)/bin/python -m pytest tests/sat

$(SAT)/.installed: $(STAMP) constraints-sat.txt
	test -x $(SAT)/bin/python || $(BIN)/python -m venv $(SAT)
	base=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	own=$$($(SAT)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "import site; site.addsitedir('$$base')" > $$own/base.pth
	$(SAT)/bin/python -m pip install --quiet --no-deps --requirement constraints-sat.txt
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
	rm -rf $(VENV) $(SAT) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist *.egg-info
