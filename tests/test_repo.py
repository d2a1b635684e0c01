"""The house rules that a program can check: floors, lengths, unread settings, lazy imports."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "hilum"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}

# docs/design.md: a file imports from its own room and from lower floors.
FLOORS = {
    "errors": 1,
    "large": 2,
    "volume": 2,
    "records": 2,
    "settings": 2,
    "metrics": 2,
    "stats": 3,
    "pages": 2,
    "figures": 2,
    "terminal": 2,
    "archive": 3,
    "encode": 4,
    "probe": 5,
    "pretrain": 6,
    "bench": 7,
    "api": 8,
    "demo": 8,
    "demo_report": 8,
    "cli": 8,
    "cli_bench": 8,
    "cli_store": 8,
    "cli_embed": 8,
    "cli_pretrain": 8,
    "cli_models": 8,
    "cli_predict": 8,
}
EXEMPT = {SOURCE / "__init__.py", SOURCE / "__main__.py"}  # the doors: they name what the house offers


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported_rooms(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Rooms of hilum that a file imports, wherever in the file, with the line."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            module = node.module or ""
            names = [f"hilum.{alias.name}" for alias in node.names] if module == "hilum" else [module]
        for name in names:
            if name.startswith("hilum."):
                yield name.split(".")[1], node.lineno


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_file_has_a_floor():
    rooms = {room_of(path) for path in TREES if path not in EXEMPT}
    assert rooms == set(FLOORS)


def test_imports_go_down():
    """From the same room or a lower floor. Top-level files of one floor are one room."""
    upwards = []
    for path, tree in TREES.items():
        if path in EXEMPT:
            continue
        room = room_of(path)
        for other, line in imported_rooms(tree):
            if other in ("__version__", room):
                continue
            top_level = not (SOURCE / room).is_dir() and not (SOURCE / other).is_dir()
            allowed = FLOORS[other] <= FLOORS[room] if top_level else FLOORS[other] < FLOORS[room]
            if not allowed:
                upwards.append(f"{path.relative_to(SOURCE)}:{line} imports {other}")
    assert not upwards


def test_the_archive_does_not_know_torch():
    found = []
    for path, tree in TREES.items():
        if FLOORS.get(room_of(path), 9) > 3:
            continue
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.name}: {n}" for n in names if n.split(".")[0] in ("torch", "safetensors", "tensorboard")]
    assert not found


def run(code: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_archive_loads_no_torch():
    modules = [
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in TREES
        if FLOORS.get(room_of(path), 9) <= 3
    ]
    assert len(modules) > 15
    code = f"import importlib, sys\nfor m in {modules}: importlib.import_module(m)\nprint('torch' in sys.modules)"
    assert run(code).strip() == "False"


def test_help_is_quick_and_loads_nothing_heavy():
    """Processor time, which a busy machine does not stretch; the best of three."""
    code = """
import resource, sys
sys.argv = ["hilum", "--help"]
from hilum.cli import main
try:
    main()
except SystemExit:
    pass
heavy = {"torch", "numpy", "scipy", "sklearn", "pandas", "matplotlib", "pyarrow", "pydicom", "rich"} & sys.modules.keys()
used = resource.getrusage(resource.RUSAGE_SELF)
print("\\n" + str(used.ru_utime + used.ru_stime), *sorted(heavy))
"""
    seconds = []
    for _ in range(3):
        output = run(code)
        assert "pretrain" in output
        last = output.splitlines()[-1].split()
        assert last[1:] == [], "hilum --help loads these"
        seconds.append(float(last[0]))
    assert min(seconds) < 0.5


def test_importing_hilum_is_cheap_and_the_api_offers_the_commands():
    code = """
import sys, hilum
assert "torch" not in sys.modules and "numpy" not in sys.modules
assert hilum.__version__
from hilum import api
print(*[name for name in api.__all__ if callable(getattr(api, name))])
"""
    assert set(run(code).split()) == {
        "bench", "demo", "doctor", "embed", "export", "inspect", "phantom", "plan", "predict", "prepare", "pretrain", "probe",
        "pull", "resample", "scan", "show",
    }  # fmt: skip


def test_files_and_functions_are_short():
    """A file is questioned at 500 lines; a function, its docstring aside, ends before 60."""
    long = [f"{p.relative_to(ROOT)}: {n} lines" for p in TREES if (n := len(p.read_text().splitlines())) > 500]
    long += [
        f"{p.relative_to(ROOT)}: {n} lines"
        for p in sorted(ROOT.glob("tests/**/*.py"))
        if (n := len(p.read_text().splitlines())) > 500
    ]
    for path, tree in TREES.items():
        for function in functions(tree):
            assert function.end_lineno is not None
            first = function.body[0]
            documented = ast.get_docstring(function) is not None
            length = function.end_lineno - function.lineno + 1
            if documented:
                assert first.end_lineno is not None
                length -= first.end_lineno - first.lineno + 1
            if length > 60:
                long.append(f"{path.relative_to(ROOT)}: {function.name} has {length} lines")
    assert not long


# Settings classes, and the names under which the code holds one. A field counts as read when it is taken from such a
# name, or by the class itself.
SETTINGS = {
    "Contract": {"contract"},
    "VolumeContract": {"contract"},
    "IsotropicSettings": {"settings"},
    "How": {"how"},
    "ViTConfig": {"config", "model"},
    "Sampling": {"sampling"},
    "Intensity": {"intensity"},
    "ViewSpec": {"spec", "views"},
    "Objective": {"objective"},
    "Optimiser": {"optimiser", "o"},
    "Run": {"run"},
    "Recipe": {"recipe", "chosen"},
    "Descent": {"descent"},
    "Protocol": {"protocol"},
    "BenchSettings": {"settings"},
    "PhantomSettings": {"settings"},
}


def test_every_setting_is_read():
    def holder(node: ast.expr) -> str:
        return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""

    def reads(tree: ast.AST) -> set[tuple[str, str]]:
        loads = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load))
        return {(holder(n.value), n.attr) for n in loads}

    everywhere = set().union(*map(reads, TREES.values()))
    classes = {n.name: n for tree in TREES.values() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    unread = []
    for name, holders in SETTINGS.items():
        fields = [
            n.target.id for n in classes[name].body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
        ]
        assert fields
        itself = {field for who, field in reads(classes[name]) if who == "self"}
        unread += [f"{name}.{f}" for f in fields if f not in itself and not any((h, f) in everywhere for h in holders)]
    assert not unread


def test_every_setting_is_explained():
    """The docstring of a settings class names each field, or a comment stands beside it; short ones speak for themselves."""
    from hilum.pretrain.recipe import Intensity, Objective, Optimiser, Sampling, ViewSpec

    plain = {"betas", "num_global", "num_local"}
    for cls in (ViewSpec, Sampling, Intensity, Objective, Optimiser):
        assert cls.__doc__ is not None
        missing = [f for f in cls.__dataclass_fields__ if f not in cls.__doc__ and f not in plain]
        assert not missing, cls.__name__


def test_no_path_of_a_machine_is_written_down():
    machines = ["/" + name + "/" for name in ("work", "home", "root", "Users")]
    found = []
    for top in (
        "src",
        "tests",
        "docs",
        "benchmarks",
        "examples",
        "README.md",
        "CONTRIBUTING.md",
        "Makefile",
        "pyproject.toml",
    ):
        for path in [ROOT / top] if (ROOT / top).is_file() else (ROOT / top).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".md", ".toml", ".json", ".jsonl", ".sh", ".csv", ""):
                text = path.read_text(encoding="utf-8", errors="replace")
                found += [f"{path.relative_to(ROOT)}: {m}" for m in machines if m in text]
    assert not found


@pytest.mark.parametrize("path", sorted(TREES), ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_file_says_what_it_is(path):
    if path.name in ("__main__.py",):
        return
    assert ast.get_docstring(TREES[path])
