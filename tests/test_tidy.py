"""The rules of the house, kept by a test: who may import whom, sizes, names, and packaging."""

import ast
import configparser
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("actors", "adapters", "console", "storage", "transport")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
CHECKED = [
    *SOURCES,
    *sorted(
        path
        for folder in ("tests", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
    ),
]
SHIPPED = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix != ".pyc"
)
METADATA = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")
FUNCTION_LINES_MAX = 70
LINE_CHARS_MAX = 100

DECLARATIONS = ("ksi.actors.owner", "ksi.actors.owners", "ksi.actors.declarations")

# What a file below a folder may import of ours; the longest folder that fits holds.
MAY_IMPORT = {
    "transport": ("ksi.transport",),
    "storage": (
        "ksi.storage",
        "ksi.transport.errors",
        "ksi.transport.limits",
        "ksi.transport.moments",
    ),
    "actors": ("ksi.actors", "ksi.storage", "ksi.transport"),
    "actors/declarations": (
        "ksi.actors.declarations",
        "ksi.actors.entities",
        "ksi.actors.owner",
        "ksi.actors.queries",
        "ksi.transport.errors",
        "ksi.transport.limits",
        "ksi.transport.message",
    ),
    "actors/owners": (
        "ksi.actors.composing",
        "ksi.actors.declarations",
        "ksi.actors.entities",
        "ksi.actors.owner",
        "ksi.actors.owners",
        "ksi.actors.queries",
        "ksi.actors.rendering",
        "ksi.transport.errors",
        "ksi.transport.limits",
        "ksi.transport.message",
        "ksi.transport.moments",
        "ksi.transport.patterns",
    ),
    "console": ("ksi.console", "ksi.transport", "ksi.actors"),
    "adapters": ("ksi.adapters", "ksi.transport", *DECLARATIONS),
}
# The exceptions to the arrows: `read` runs a query in place, where the data is; and `ksi worker`
# and `ksi mcp` are ways to start an adapter.
LATE_IMPORTS = {
    "transport/caller.py": ("ksi.actors.past", "ksi.actors.reading", *DECLARATIONS),
    "console/mcp.py": ("ksi.adapters",),
    "console/worker.py": ("ksi.adapters",),
}

IMPURE = frozenset(
    {
        "asyncio", "concurrent", "datetime.now", "lmdb", "logging", "multiprocessing", "os",
        "pathlib", "psutil", "pykka", "random", "secrets", "select", "shutil", "signal", "socket",
        "structlog", "subprocess", "sys", "tempfile", "threading", "time", "zmq",
    }
)  # fmt: skip
BANNED_WORDS = frozenset({"manager", "helper", "util", "utilitie", "utility"})


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), relative(path))


def imports(tree: ast.AST, *, loaded_only: bool = False) -> Iterator[tuple[str, int]]:
    """Yield every imported module with its line; of `from a import b` it is `a.b`.

    With `loaded_only` those that the import of the module itself loads: not what a function
    imports when it is called, nor what only a type checker sees.
    """
    late = {
        id(node)
        for place in ast.walk(tree)
        if isinstance(place, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(place, ast.If) and ast.unparse(place.test) == "TYPE_CHECKING")
        for node in ast.walk(place)
    }
    for node in ast.walk(tree):
        if loaded_only and id(node) in late:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def allowed(name: str) -> tuple[str, ...]:
    folder = max((f for f in MAY_IMPORT if name.startswith(f + "/")), key=len)
    return MAY_IMPORT[folder]


def test_every_module_imports_only_what_its_folder_may() -> None:
    wrong = []
    for path in SOURCES:
        name, tree = relative(path), parsed(path)
        for module, line in imports(tree):
            if not module.startswith("ksi") or is_within(module, allowed(name)):
                continue
            late = is_within(module, LATE_IMPORTS.get(name, ()))
            if not late or (module, line) in set(imports(tree, loaded_only=True)):
                wrong.append(f"{name}:{line} imports {module}")
    assert not wrong


def test_owners_import_nothing_that_does_input_output_tells_time_or_draws_chance() -> None:
    wrong = [
        f"{relative(path)}:{line} imports {module}"
        for path in (ROOT / "actors" / "owners").rglob("*.py")
        for module, line in [*imports(parsed(path)), *clocks(parsed(path))]
        if module.split(".")[0] in IMPURE or module in IMPURE
    ]
    assert not wrong


def clocks(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield calls that ask what time it is by way of `datetime`, which is otherwise pure."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr in {"now", "utcnow", "today"}
            and isinstance(node.value, ast.Name)
            and node.value.id in {"datetime", "date"}
        ):
            yield "datetime.now", node.lineno


def test_importing_the_declarations_loads_no_engine() -> None:
    code = (
        "import sys; from ksi.actors.owners import load_all; load_all();"
        "print(*{'zmq', 'lmdb', 'pykka', 'psutil', 'structlog'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_no_function_is_longer_than_a_page() -> None:
    wrong = [
        f"{relative(path)}:{node.lineno} {node.name} has {length} lines"
        for path in CHECKED
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES_MAX
    ]
    assert not wrong


def test_no_line_is_too_long_and_no_comment_is_a_banner() -> None:
    banner = re.compile(r"^\s*#\s*[-=#*]{4,}")
    pragma = re.compile(r"\s+# (type|noqa|fmt|pragma)\b.*")
    wrong = [
        f"{relative(path)}:{number}"
        for path in CHECKED
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(pragma.sub("", line)) > LINE_CHARS_MAX or banner.match(line)
    ]
    assert not wrong


def test_no_name_is_a_word_that_fits_everything() -> None:
    wrong = [
        f"{relative(path)}: {name}"
        for path in CHECKED
        for name in [path.stem, *names(parsed(path))]
        if BANNED_WORDS & {word.removesuffix("s") for word in words(name)}
    ]
    assert not wrong


def names(tree: ast.AST) -> Iterator[str]:
    """Yield every name a module gives: classes, functions, arguments, variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", name)]


def test_setup_cfg_names_every_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    declared = setup["options"]["packages"].split()
    folders = dict(line.split(" = ") for line in setup["options"]["package_dir"].split("\n")[1:])
    found = {"ksi." + relative(path.parent).replace("/", ".") for path in SOURCES}
    assert declared == sorted(found)
    assert folders == {f"ksi.{folder}": folder for folder in FOLDERS}
    assert all((ROOT / folder / "py.typed").exists() for folder in FOLDERS)


def test_every_page_has_one_title() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "var" / "README.md"]
    titles = {
        relative(page): re.findall(
            r"^# .+$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), flags=re.M
        )
        for page in pages
    }
    assert {page: found for page, found in titles.items() if len(found) != 1} == {}


def test_no_file_names_a_path_of_one_machine() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    machine = re.compile(rb"(?<![\w.*~-])/(?:" + b"|".join([b"work", b"root", b"home"]) + rb")/\w")
    wrong = [
        f"{name}: {found[0].decode(errors='replace')}"
        for name in listed.split("\0")
        if name
        and (path := ROOT / name).is_file()
        and not path.is_symlink()
        and (found := machine.search(path.read_bytes()))
    ]
    assert not wrong


def test_the_checkout_runs_from_anywhere_and_the_second_time_without_a_network() -> None:
    if not (ROOT / ".venv" / "ksi-stamp").exists():
        pytest.skip("bin/ksi has not made the environment of this checkout")
    done = subprocess.run(
        [ROOT / "bin" / "ksi", "version"],
        cwd="/", env={"PATH": "/nowhere"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("ksi ")
    assert done.stderr == ""


def test_the_wheel_holds_exactly_the_packages_and_works_from_there(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    tree = tmp_path / "tree"
    extra = [ROOT / "console" / "demo_transcript.jsonl"]
    extra += [ROOT / folder / "py.typed" for folder in FOLDERS]
    for path in [*SOURCES, *extra]:
        copy(path, tree)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, tree)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--disable-pip-version-check", "--wheel-dir", tmp_path, tree],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("ksi-*.whl")
    content = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert content == {f"ksi/{relative(path)}" for path in [*SOURCES, *extra]}

    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    code = "import ksi.console.main as m, ksi.transport.errors as e; print(m.__file__, e.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(installed)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.count(str(installed)) == 2


def copy(path: Path, tree: Path) -> None:
    target = tree / path.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(path.read_bytes())
