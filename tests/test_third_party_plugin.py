"""A plugin of somebody else: ``examples/aiba-tango``, installed with pip into an environment of its own, found by its entry point.

The package's own tests run there; they hold what is checked of the backbone.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "aiba-tango"


def run(*command, cwd=None):
    """Output of a command that has to succeed, away from the network and from this process's settings."""
    ours = {"AIBA_PLUGINS", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    environment = {
        name: value for name, value in os.environ.items() if name not in ours and not name.startswith("PIP_")
    }
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INDEX": "1",
        "PYTHONIOENCODING": "utf-8",
        "PYTHONNOUSERSITE": "1",
    }
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the example's sources, and the python of an environment where only it is installed.

    What this environment has (torch, diffusers, AIBA itself) is seen there through a path file.
    """
    folder = tmp_path_factory.mktemp("third-party")
    package = shutil.copytree(EXAMPLE, folder / "aiba-tango", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # addsitedir, not the bare path: an editable installation is a path file itself
    lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
    (purelib / "shared.pth").write_text("".join(lines), encoding="utf-8")
    run(python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", package)
    assert (purelib / "aiba_tango.py").is_file()
    return package, python


def test_the_command_lists_it(installed):
    package, python = installed
    command = "import sys; from aiba_eval.cli import main; sys.exit(main())"
    report = json.loads(run(python, "-c", command, "plugins", "--json", cwd=package.parent))
    assert not report["failures"]
    assert any("aiba-tango 0.1.0" in str(plugin) and "tango" in str(plugin) for plugin in report["plugins"]), report


@pytest.mark.slow
def test_its_own_tests_pass(installed):
    package, python = installed
    output = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", package / "tests", cwd=package.parent)
    assert " passed" in output
    assert "skipped" not in output
