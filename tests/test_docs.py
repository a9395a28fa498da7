"""The documentation: its code runs, what it shows is what comes out, its links resolve, and every public name is in it.

How pages are written (CONTRIBUTING.md says the same): the blocks ``python`` of a page run top to bottom as one module, in an
empty folder. ``python raises=NAME`` has to raise that exception, ``python warns=NAME`` to warn so. A block ``text output``
is what the block before it printed, raised or warned: ``...`` stands for anything, spaces and line ends are alike, and a
number of two decimals or more may be off by one in the last. ``python no-run: REASON`` is not run. ``$ aiba ...`` and ``$ make ...`` in a block ``console`` are commands, options and targets
that exist; the commands of ``console run`` are run, and those of ``console fails`` have to fail.

``python -m tests.test_docs PAGE`` runs a page and prints what its blocks give.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import io
import json
import pickle
import pkgutil
import re
import shlex
import sys
import traceback
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aiba_eval
import aiba_hooks
from aiba_hooks import errors, interception, specs
from aiba_hooks.plugins import manager

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PACKAGES = ("aiba_hooks", "aiba_plugins", "aiba_eval")
MOST_NOT_RUN = 4


# ---- pages and their blocks


@dataclass(frozen=True)
class Block:
    """A fenced block. ``line`` is that of its first line of text, from 1."""

    page: str
    line: int
    language: str
    option: str
    text: str

    @property
    def runs(self) -> bool:
        if self.language == "console":
            return self.option in ("run", "fails")
        return self.language == "python" and not self.option.startswith("no-run")

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<text>.*?)^(?P=fence)[ \t]*$", re.M | re.S)


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def blocks_of(page: Path) -> list[Block]:
    source = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(source):
        language, _, option = match["info"].strip().partition(" ")
        line = source.count("\n", 0, match.start("text")) + 1
        found.append(Block(name_of(page), line, language, option.strip(), match["text"]))
    return found


def prose_of(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def everything() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in pages())


# ---- running them


class Namespace(types.ModuleType):
    """A page as a module of that name, so that kernels bound in it are found as in a script."""

    def __init__(self, page: str) -> None:
        super().__init__("docs_" + re.sub(r"\W", "_", page.removesuffix(".md")))
        sys.modules[self.__name__] = self


def run_block(block: Block, namespace: Namespace) -> str:
    """Run one block; what it printed, or ``Name: message`` of what it was to raise or warn."""
    if block.language == "console":
        return run_commands(block)
    kind, _, wanted = block.option.partition("=")
    if block.option and kind not in ("raises", "warns"):
        raise ValueError(f"{block.place}: unknown option {block.option!r}")
    code = compile("\n" * (block.line - 1) + block.text, block.page, "exec", dont_inherit=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            exec(code, vars(namespace))
        except Exception as error:
            if kind != "raises" or type(error).__name__ != wanted:
                raise
            return f"{wanted}: {error}"
    if kind == "raises":
        raise AssertionError(f"{block.place}: nothing was raised, {wanted} was to be")
    if kind == "warns":
        messages = [f"{wanted}: {w.message}" for w in caught if type(w.message).__name__ == wanted]
        if not messages:
            raise AssertionError(f"{block.place}: no {wanted} among the warnings {[str(w.message) for w in caught]}")
        return "\n".join(messages)
    return printed.getvalue()


def commands_of(block: Block) -> list[list[str]]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.split(line[2:]) for line in lines if line.startswith("$ ")]


def run_commands(block: Block) -> str:
    """Run ``$ aiba`` commands in this process; what they printed on stdout, or on stderr where they are to fail."""
    from typer.testing import CliRunner

    from aiba_eval.cli.app import app

    printed = []
    for program, *arguments in commands_of(block):
        if program != "aiba":
            raise ValueError(f"{block.place}: only aiba is run here, not {program}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"}, catch_exceptions=False)
        if result.exit_code != (2 if block.option == "fails" else 0):
            raise AssertionError(f"{block.place}: exit code {result.exit_code}\n{result.output}")
        printed.append(result.stderr if block.option == "fails" else result.stdout)
    return "".join(printed)


def run_page(page: Path) -> Iterator[tuple[Block, str, Block | None]]:
    """Run a page: (block, what it gave, the ``text output`` that follows it)."""
    blocks = blocks_of(page)
    namespace = Namespace(name_of(page))
    try:
        for block, after in zip(blocks, [*blocks[1:], None], strict=True):
            if block.runs:
                shown = after if after is not None and (after.language, after.option) == ("text", "output") else None
                yield block, run_block(block, namespace), shown
    finally:
        del sys.modules[namespace.__name__]
        manager.cache_clear()  # plugins that the page registered


def check_output(block: Block, shown: Block, given: str) -> None:
    if not matches(shown.text, given):
        raise AssertionError(f"{shown.place} shows\n{shown.text}\nbut {block.place} gives\n{given}")


_VARIES = re.compile(r"( ?\.{3} ?|\d+\.\d{2,})")


def matches(shown: str, given: str) -> bool:
    """``...`` matches anything, white space any other, and a number of two decimals or more one that is off by a unit."""
    pattern, numbers = "", []
    for i, part in enumerate(_VARIES.split(" ".join(shown.split()))):
        if i % 2 == 0:
            pattern += re.escape(part)
        elif part.strip() == "...":
            pattern += ".*?"
        else:
            pattern += r"(\d+\.\d+)"
            numbers.append((float(part), 1.01 * 10.0 ** -len(part.partition(".")[2])))
    found = re.fullmatch(pattern, " ".join(given.split()))
    if found is None:
        return False
    return all(abs(float(got) - wanted) <= unit for got, (wanted, unit) in zip(found.groups(), numbers, strict=True))


def test_outputs_are_compared():
    assert matches("a ...\nb", "a 1 2 3\n  b\n")
    assert matches("0.50 1.234", "0.51 1.233")
    assert matches("x", "x\n")
    assert matches("a\n...\nb", "a\nb\n")
    for shown, given in (("0.50", "0.52"), ("1.0", "0.9"), ("3", "4"), ("a b", "ab"), ("a", "a b"), ("a...", "b")):
        assert not matches(shown, given), (shown, given)


@pytest.fixture(autouse=True)
def _one_thread():
    """The tiny models of these pages gain nothing from a second thread, and lose much where another process runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", [page for page in pages() if any(b.runs for b in blocks_of(page))], ids=name_of)
def test_the_code_of_the_page_runs_and_gives_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block, given, shown in run_page(page):
        if shown is not None:
            check_output(block, shown, given)
    assert interception.ACTIVE.get() == ()
    assert not interception.PATCHES._table


def test_few_blocks_are_not_run_and_each_says_why():
    skipped = [block for page in pages() for block in blocks_of(page) if block.option.startswith("no-run")]
    assert len(skipped) <= MOST_NOT_RUN, [block.place for block in skipped]
    assert all(re.fullmatch(r"no-run: \w.{10,}", block.option) for block in skipped), [b.option for b in skipped]


def test_every_fence_is_read():
    """An indented or unclosed fence would hide code from the tests above."""
    for page in pages():
        fences = [line for line in page.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith("```")]
        assert all(line.startswith("```") for line in fences), name_of(page)
        assert len(fences) == 2 * len(blocks_of(page)), name_of(page)


def test_every_output_follows_the_block_that_gives_it():
    for page in pages():
        blocks = blocks_of(page)
        for before, block in zip([None, *blocks], blocks, strict=False):
            if block.option == "output":
                assert before is not None and before.runs, block.place


_FAILING_PAGES = {
    "wrong output": "```python\nprint(1)\n```\n\n```text output\n2\n```\n",
    "wrong exception": "```python raises=KeyError\nraise ValueError\n```\n",
    "no exception": "```python raises=KeyError\npass\n```\n",
    "no warning": "```python warns=UserWarning\npass\n```\n",
    "exception": "```python\n1 / 0\n```\n",
    "command that fails": "```console run\n$ aiba run no-such-model --prompt x\n```\n",
    "command that does not fail": "```console fails\n$ aiba plugins\n```\n",
    "unknown option": "```python rasies=KeyError\npass\n```\n",
    "names of another page": "```python\nblocks_of\n```\n",
}


@pytest.mark.parametrize("kind", _FAILING_PAGES)
def test_a_page_that_is_wrong_is_found(kind, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(_FAILING_PAGES[kind])
    with pytest.raises((AssertionError, ValueError, KeyError, ZeroDivisionError, NameError)):
        for block, given, shown in run_page(page):
            if shown is not None:
                check_output(block, shown, given)


# ---- what has to be in it


def hooks() -> dict[str, Any]:
    return {n: f for n, f in vars(specs).items() if n.startswith("aiba_") and hasattr(f, "aiba_spec")}


def signature_of(function: Any) -> str:
    return str(inspect.signature(function)).replace("'", "")


def test_every_hook_is_documented_with_its_signature():
    page = (DOCS / "hooks.md").read_text(encoding="utf-8")
    assert hooks()
    for name, function in hooks().items():
        assert f"\n## {name}\n\n`{name}{signature_of(function)}`\n" in page, f"{name}{signature_of(function)}"
        assert len(inspect.getdoc(function) or "") > 40, name
    assert set(re.findall(r"^## (aiba_\w+)$", page, re.M)) == set(hooks())


def error_classes() -> list[type]:
    """The exceptions of ``errors.py``, and the warnings of every module of the core."""
    modules = [importlib.import_module(f"aiba_hooks.{info.name}") for info in pkgutil.iter_modules(aiba_hooks.__path__)]
    own = [v for m in modules for v in vars(m).values() if inspect.isclass(v) and v.__module__ == m.__name__]
    found = [v for v in own if issubclass(v, errors.AibaError if v.__module__ == errors.__name__ else Warning)]
    return [error for error in found if error is not errors.AibaError]


def kebab(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


@pytest.mark.parametrize("error", error_classes(), ids=lambda error: error.__name__)
def test_every_error_has_a_page_that_shows_it_and_is_linked(error):
    page = DOCS / "errors" / f"{kebab(error.__name__)}.md"
    assert page.is_file()
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {error.__name__}\n")
    assert "\n## What it means\n" in text
    assert "\n## What to do\n" in text
    blocks = blocks_of(page)
    raised = [i for i, b in enumerate(blocks) if b.option in (f"raises={error.__name__}", f"warns={error.__name__}")]
    assert raised, "no block raises it"
    assert blocks[raised[0] + 1].option == "output", "its message is not shown"
    assert f"({page.name})" in (DOCS / "errors" / "index.md").read_text(encoding="utf-8")
    assert (inspect.getdoc(error) or "") != inspect.getdoc(error.__base__)


def test_there_is_no_page_of_an_error_that_does_not_exist():
    expected = {f"{kebab(error.__name__)}.md" for error in error_classes()} | {"index.md"}
    assert {page.name for page in (DOCS / "errors").glob("*.md")} == expected


def public() -> dict[str, Any]:
    """Everything that a reader may import, by dotted name."""
    found: dict[str, Any] = {}
    for package in (aiba_hooks, aiba_eval):
        found |= {f"{package.__name__}.{name}": getattr(package, name) for name in package.__all__}
    for path in ("aiba_eval.metrics", "aiba_eval.references", "aiba_eval.templates"):
        module = importlib.import_module(path)
        found |= {
            f"{path}.{name}": value
            for name, value in vars(module).items()
            if not name.startswith("_") and inspect.isroutine(value) and value.__module__ == path
        }
    return found


@pytest.mark.parametrize("name", public())
def test_every_public_name_is_documented(name):
    value = public()[name]
    assert len(inspect.getdoc(value) or "") >= 20, "no docstring"
    short = name.rpartition(".")[2]
    assert re.search(rf"`[^`\n]*\b{short}\b[^`\n]*`", everything()), f"{short} is in no page"


@pytest.mark.parametrize("name", [n for n, v in public().items() if inspect.isclass(v)])
def test_every_public_method_has_a_docstring(name):
    value = public()[name]
    missing = [
        attribute
        for attribute, member in vars(value).items()
        if not attribute.startswith("_")
        and (inspect.isroutine(member) or isinstance(member, (property, classmethod, staticmethod)))
        and not inspect.getdoc(getattr(value, attribute))
    ]
    assert not missing


def members(cls: type) -> list[str]:
    """Public attributes, fields and methods that a class adds to its base."""
    inherited = set(dir(cls.__base__))
    named = {*vars(cls), *getattr(cls, "__annotations__", {})}
    return sorted(name for name in named if not name.startswith("_") and name not in inherited)


#: their members are what a reader of the pages writes; others (Intervention) add none of their own
_CLASSES = "AttentionCall AttentionMaps Backbone Capture Conditioning Dataset Kernel Lattice Model Site SiteCall Step Tag TokenStream"


@pytest.mark.parametrize("name", _CLASSES.split())
def test_every_member_of_a_class_that_readers_use_is_documented(name):
    internal = {"Capture": {"observe", "method_called", "listening", "target", "backbone"}}.get(name, set())
    spans = " ".join(re.findall(r"`([^`\n]+)`", everything()) + [b.text for p in pages() for b in blocks_of(p)])
    found = members(getattr(aiba_hooks, name))
    assert found
    assert not [member for member in found if member not in internal and not re.search(rf"\b{member}\b", spans)]


def test_every_argument_of_capture_is_documented():
    spans = " ".join(re.findall(r"`([^`\n]+)`", everything()))
    parameters = list(inspect.signature(aiba_hooks.capture).parameters)[1:]
    assert not [name for name in parameters if f"{name}=" not in spans and f"`{name}`" not in everything()]


def test_the_picture_of_the_house_has_every_module():
    """A module is named, or its folder is (``kernels/*.py``); what is named is there."""
    picture = (DOCS / "architecture.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^### (aiba_\w+)\n(.*?)(?=^##)", picture, re.M | re.S))
    assert set(parts) == set(PACKAGES)
    for package, part in parts.items():
        patterns = re.findall(r"`([\w/*]+\.py)`", part)
        files = [file.relative_to(ROOT / package).as_posix() for file in (ROOT / package).rglob("*.py")]
        modules = [file for file in files if not file.endswith("__init__.py")]
        assert not [m for m in modules if not any(fnmatch(m, p) for p in patterns)], f"not in the picture of {package}"
        assert not [p for p in patterns if not any(fnmatch(f, p) for f in files)], f"not in {package}"


# ---- commands


def console_lines() -> list[tuple[str, list[str]]]:
    blocks = [block for page in pages() for block in blocks_of(page) if block.language == "console"]
    return [(block.place, words) for block in blocks for words in commands_of(block)]


def commands() -> dict[str, set[str]]:
    """Every command of ``aiba`` and the options that it takes: ``{"stems render": {"--jobs", ...}}``."""
    from typer.main import get_command

    from aiba_eval.cli.app import app

    found = {}

    def visit(name: str, command: Any) -> None:
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("-")}
        found[name] = options | {"--help"}
        for child, below in getattr(command, "commands", {}).items():
            visit(f"{name} {child}".strip(), below)

    visit("", get_command(app))
    return found


def unknown_in(words: list[str]) -> list[str]:
    """What of an ``aiba`` command line does not exist: the command, or options of it."""
    known, rest = commands(), words[1:]
    depth = max(n for n in range(len(rest) + 1) if " ".join(rest[:n]) in known)
    name = " ".join(rest[:depth])
    group = any(other.startswith(f"{name} ".lstrip()) and other != name for other in known)
    if group and rest[depth:] and not rest[depth].startswith("-"):
        return [rest[depth]]
    return [word for word in rest[depth:] if word.startswith("-") and word.partition("=")[0] not in known[name]]


def test_commands_on_the_pages_exist():
    lines = [(place, words) for place, words in console_lines() if words[0] == "aiba"]
    assert lines
    assert not {place: unknown for place, words in lines if (unknown := unknown_in(words))}
    assert unknown_in(["aiba", "plugins", "--json"]) == []
    assert unknown_in(["aiba", "plugin"]) == ["plugin"]
    assert unknown_in(["aiba", "stems", "bake", "here"]) == ["bake"]
    assert unknown_in(["aiba", "run", "demo:random", "--promt", "x"]) == ["--promt"]


def test_every_command_and_option_is_on_the_page_of_the_command_line():
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    parts = re.split(r"^## ", page, flags=re.M)
    for name, options in commands().items():
        if any(other.startswith(f"{name} ".lstrip()) and other != name for other in commands()):
            continue  # a group: its commands have their parts
        part = next((part for part in parts if part.startswith(f"aiba {name}\n")), None)
        assert part is not None, f"aiba {name}"
        assert not [option for option in options - {"--help"} if not re.search(rf"`{option}\b", part)], name


def test_console_blocks_hold_known_programs():
    assert {words[0] for _, words in console_lines()} <= {"aiba", "make"}


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def check_make(words: list[str]) -> None:
    unknown = [word for word in words[1:] if word not in targets()]
    assert not unknown, f"no make target {unknown}"


def test_make_targets_exist():
    lines = [words for _, words in console_lines() if words[0] == "make"]
    assert lines
    for words in lines:
        check_make(words)
    with pytest.raises(AssertionError):
        check_make(["make", "coffee"])


# ---- the picture


def test_the_picture_in_the_readme_is_made_by_its_script(tmp_path):
    path = ROOT / "examples" / "readme_picture.py"
    spec = importlib.util.spec_from_file_location("readme_picture", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = script.main(["--draws", "1", "--out", str(tmp_path / "picture.png")]).read_bytes()
    shown = script.OUT.read_bytes()
    assert made.startswith(b"\x89PNG") and made[16:24] == shown[16:24]  # width and height
    assert f"]({name_of(script.OUT)})" in (ROOT / "README.md").read_text(encoding="utf-8")


# ---- links and places

_LINK = re.compile(r"\]\(([^()\s]+)\)")
#: hosts that the documentation may point to
_HOSTS = {
    "arxiv.org",
    "keepachangelog.com",
    "semver.org",
    "pytorch.org",
    "www.apache.org",
    "www.contributor-covenant.org",
}


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in _LINK.findall(prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if (
            not file.exists()
            or not file.is_relative_to(ROOT)
            or (anchor and anchor not in {slug(h) for h in re.findall(r"^#+ (.+?)\s*$", prose_of(file), re.M)})
        ):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", [*pages(), ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_resolve(page):
    assert not broken_links(page)


def test_a_broken_link_is_found():
    page = DOCS / "errors" / "index.md"
    assert _LINK.findall("[a](b.md#c), ![d](e.png)") == ["b.md#c", "e.png"]
    assert slug("What `capture` keeps, per step") == "what-capture-keeps-per-step"
    assert not (page.parent / "no-such-page.md").exists()


def test_every_page_can_be_reached_from_the_readme():
    reached: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = [t.partition("#")[0] for t in _LINK.findall(prose_of(page)) if not re.match(r"[a-z]+:", t)]
        waiting += [(page.parent / target).resolve() for target in targets if target.endswith(".md")]
    assert set(pages()) <= reached


def texts() -> dict[str, str]:
    """Every text file that is published, by path; tests are left out, which may name paths to be refused."""
    files = [
        ROOT / n
        for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "constraints.txt")
    ]
    for folder in (*PACKAGES, "docs", "examples", ".github", ".ci"):
        files += [
            f for f in (ROOT / folder).rglob("*") if f.suffix in {".py", ".md", ".yml", ".yaml", ".toml", ".sh", ""}
        ]
    return {name_of(file): file.read_text(encoding="utf-8") for file in files if file.is_file()}


_MACHINE = re.compile(
    r"(?<![\w.<>*)/-])/(?:home|root|work|Users|tmp|mnt|media|private|scratch)/\w|\b[A-Z]:\\\\?Users\b"
)


def test_no_path_of_one_machine():
    assert _MACHINE.search('open("/home/me/x")')
    assert not _MACHINE.search("see docs/home/x and https://arxiv.org/root/x")
    found = {name: match.group() for name, text in texts().items() if (match := _MACHINE.search(text))}
    assert not found


def test_the_documentation_points_to_known_hosts_only():
    found = {
        name: [host for host in re.findall(r"https?://([\w.-]+)", text) if host not in _HOSTS]
        for name, text in texts().items()
        if name.endswith(".md")
    }
    assert not {name: hosts for name, hosts in found.items() if hosts}


# ---- nothing that runs code from a file

_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}


def unsafe(source: str) -> list[str]:
    """What in a Python source could run code that a data file holds: ``line: what``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in _MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        given = {k.arg for k in node.keywords}
        if called in ("eval", "exec") or re.search(r"(^|\.)(read|to)_pickle$", called):
            found.append(f"{node.lineno}: {called}")
        elif called == "torch.load" and options.get("weights_only") is not True:
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        elif "allow_pickle" in given and options.get("allow_pickle") is not False:
            found.append(f"{node.lineno}: {called}(allow_pickle=...)")
        elif called == "yaml.load" or (called.startswith("yaml.") and called.endswith(("unsafe_load", "full_load"))):
            found.append(f"{node.lineno}: {called}")
        elif "trust_remote_code" in given and options.get("trust_remote_code") is not False:
            found.append(f"{node.lineno}: {called}(trust_remote_code=...)")
    return found


def test_no_package_reads_code_from_data():
    for bad in (
        "import pickle",
        "from dill import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "yaml.load(f, Loader=yaml.Loader)",
        "yaml.unsafe_load(f)",
        "eval(text)",
        "pd.read_pickle(f)",
        "X.from_pretrained(n, trust_remote_code=True)",
    ):
        assert unsafe(bad), bad
    for good in (
        "torch.load(f, weights_only=True)",
        "np.load(f)",
        "np.load(f, allow_pickle=False)",
        "yaml.safe_load(f)",
    ):
        assert not unsafe(good), good
    files = [file for folder in (*PACKAGES, "examples") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 20
    found = {name_of(file): problems for file in files if (problems := unsafe(file.read_text(encoding="utf-8")))}
    assert not found


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("place", ["filter", "compressor", "behind a string filter"])
def test_maps_from_a_stranger_are_refused_where_they_hold_a_pickle(place, tmp_path):
    zarr = pytest.importorskip("zarr")
    store, touched = tmp_path / "maps.zarr", tmp_path / "touched"
    root = zarr.open_group(store, mode="w", zarr_format=2)
    root.attrs["aiba_maps"] = 1
    group = root.create_group("0000 site")
    group.attrs["site"] = "site"
    array = group.create_array("attention", shape=(1,), dtype="f4", chunks=(1,), compressors=None)
    array[:] = 1
    array.attrs["_ARRAY_DIMENSIONS"] = ["word"]
    described = store / "0000 site" / "attention" / ".zarray"
    codec = {"id": "pickle", "protocol": 4}
    changes = {
        "filter": {"filters": [codec]},
        "compressor": {"compressor": codec},
        "behind a string filter": {"dtype": "|O", "fill_value": "", "filters": [{"id": "vlen-utf8"}, codec]},
    }
    described.write_text(json.dumps(json.loads(described.read_text()) | changes[place]))
    payload = np.empty(1, object)
    payload[0] = _Payload(touched)
    (described.parent / "0").write_bytes(pickle.dumps(payload))
    with pytest.raises(ValueError, match="no maps that AttentionMaps.save wrote"):
        aiba_hooks.AttentionMaps.load(store)
    assert not touched.exists()
    pickle.loads(pickle.dumps(payload))
    assert touched.exists()  # the payload works where it is unpickled


if __name__ == "__main__":
    import os
    import tempfile

    os.chdir(tempfile.mkdtemp())
    _failed = 0
    for _page in [(Path(__file__).parents[1] / argument).resolve() for argument in sys.argv[1:]]:
        try:
            for _block, _given, _shown in run_page(_page):
                print(f"---- {_block.place}\n{_given}", end="")
                if _shown is not None:
                    check_output(_block, _shown, _given)
        except Exception:
            traceback.print_exc()
            _failed = 1
    sys.exit(_failed)
