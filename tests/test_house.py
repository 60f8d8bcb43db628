"""The house is kept: imports go one way, files and functions stay small, nothing of a machine or a person is inside."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sft"
HEAVY = {
    "accelerate", "bitsandbytes", "datasets", "deepspeed", "huggingface_hub", "matplotlib", "mlflow", "pandas", "peft",
    "pyarrow", "torch", "transformers", "trl",
}  # fmt: skip
LIGHT = ("sft.settings", "sft.stages", "sft.storage", "sft.scoring", "sft.cli", "sft.errors", "sft.distributed.signals")
# From the top of the house to its ground: a wing imports only what stands after it, types included.
WINGS = (
    "variants", "cli", "run", "planning", "programs", "reporting", "training", "evaluation", "merging", "stages",
    "models", "environment", "data", "distributed", "settings", "storage", "scoring", "errors", "heap",
)  # fmt: skip
READS_ENVIRONMENT = {
    "sft.settings.schema": "the settings",
    "sft.distributed.launch": "what a launcher says to the processes it starts",
    "sft.stages.launch_checks": "whether that agrees with the settings",
    "sft.environment": "variables of the hub client, CUDA and compilers, before the libraries are imported",
    "sft.heap": "what glibc was told when the process started",
}
# Where a broad `except` stands, and what it answers with.
CATCHES_EVERYTHING = {
    "sft/cli.py": "one plain message and error.log, for whatever a library raised",
    "sft/reporting/tracker.py": "a warning; what was missed is sent later",
    "sft/models/model.py": "a problem of the tokenizer's folder: its library raises nothing but Exception",
    "sft/scoring/own.py": "a warning that names line and row: a person's own measure never ends a run",
    "sft/variants.py": "the end of one variant, for whatever a library raised; the others go on",
    "sft/planning/plan.py": "a problem: --check --json gives its document whatever is wrong",
}
SILENCED_CHECKERS = 16
# A path that people type in the project they come from, and the form of a name.
NOT_OURS = {
    "docs/mapping.md: configs/ds_config_7b.json",
    "tests/test_mapping.py: configs/ds_config_7b.json",
    "tests/test_house.py: configs/ds_config_7b.json",
    "tests/test_house.py: sft.wing.module.name",
}
FILES_OF_A_WING, FILES_AT_THE_TOP = 15, 6
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, PARAMETERS = 400, 50, 8
DEMO_BYTES = 12 * 2**20
# Hosts anybody can reach, and stand-ins of tests, which have no dot.
PUBLIC_HOSTS = {
    "127.0.0.1", "arxiv.org", "download.pytorch.org", "github.com", "huggingface.co", "www.apache.org", "www.w3.org",
}  # fmt: skip
FORBIDDEN = {
    "a path of a machine": re.compile(r"(?<![\w.~])/(?:work|root|home|Users|mnt|tmp)/[\w.-]"),
    "a token": re.compile(r"\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_\w{30,}|\bsk-[\w-]{30,}|\bAKIA[0-9A-Z]{16}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE" + " KEY"),
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
PROGRAMS = [ROOT / "train.py", *sorted((ROOT / "official_content").rglob("*.py"))]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def at_import(node: ast.AST, *, types: bool = False) -> Iterator[ast.stmt]:
    """The imports that run when a module is imported: not those in functions, with `types` those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for part in [*child.orelse, *(child.body if types else [])]:
                yield from at_import(ast.Module([part], []), types=types)
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_import(child, types=types)


def names_of(statement: ast.stmt) -> set[str]:
    """Dotted names an import asks for: `from sft.storage import atomic` is `sft.storage.atomic`, as is a name of it."""
    if isinstance(statement, ast.Import):
        return {alias.name for alias in statement.names}
    assert isinstance(statement, ast.ImportFrom)
    assert statement.level == 0, "imports name the whole path"
    paths = {f"{statement.module}.{alias.name}" for alias in statement.names}
    return {path if path in MODULES else statement.module or "" for path in paths}


@cache
def imported(module: str) -> frozenset[str]:
    found = {name for statement in at_import(tree_of(MODULES[module])) for name in names_of(statement)}
    return frozenset(found)


@cache
def closure(module: str) -> frozenset[str]:
    """Every module of ours that importing this one imports, itself included."""
    seen, waiting = {module}, [module]
    while waiting:
        fresh = (imported(waiting.pop()) & MODULES.keys()) - seen
        seen |= fresh
        waiting += fresh
    return frozenset(seen)


def outside(modules: frozenset[str]) -> set[str]:
    """Packages of others that these modules import."""
    return {name.split(".")[0] for module in modules for name in imported(module)} - {"sft"}


def wing(module: str) -> str:
    """The folder, or the file directly in sft/, that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def is_light(module: str) -> bool:
    return module in LIGHT or module.startswith(tuple(f"{name}." for name in LIGHT))


@pytest.mark.parametrize("module", [name for name in MODULES if is_light(name)])
def test_light_rooms_import_nothing_heavy(module: str):
    """Settings, stages, storage, scoring and the command line answer without torch, transformers, datasets, numpy."""
    assert outside(closure(module)) & {*HEAVY, "numpy"} == set()


def test_a_process_that_has_read_the_settings_has_loaded_no_heavy_package():
    """The same by trying: lazily loaded packages would show here."""
    program = "import sys, sft.cli, sft.settings, sft.stages.stage, sft.scoring.score, train; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert set(loaded.split()) & HEAVY == set()


def test_wings_import_downwards_only():
    """Types and imports inside functions included; every wing has its place in the order."""
    found = []
    for module, path in MODULES.items():
        statements = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Import | ast.ImportFrom)]
        targets = {name for statement in statements for name in names_of(statement) if name in MODULES}
        for name in targets - {"sft"}:
            if wing(module) != wing(name) and WINGS.index(wing(module)) >= WINGS.index(wing(name)):
                found.append(f"{module} imports {name}")
    assert found == []


def test_contributing_lists_the_wings_in_their_order():
    """The page that sends people around the house is the house's own plan."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `sft/(\w+)(?:/|\.py)` \|", text, re.MULTILINE)
    assert listed == list(WINGS)


def test_imports_run_in_no_circle():
    """Types included; graphlib raises CycleError otherwise. Imports inside functions wait on purpose."""
    graph = {}
    for module, path in MODULES.items():
        names = {name for statement in at_import(tree_of(path), types=True) for name in names_of(statement)}
        graph[module] = (names & MODULES.keys()) - {module}
    TopologicalSorter(graph).prepare()


def test_a_room_can_be_overlooked():
    """At most 15 files in a folder, and the way in directly below sft/."""
    counts = Counter(path.parent for path in (*MODULES.values(), *(ROOT / "benchmarks").rglob("*.py")))
    assert {str(folder): count for folder, count in counts.items() if count > FILES_OF_A_WING} == {}
    assert counts[PACKAGE] - 1 <= FILES_AT_THE_TOP  # __init__.py aside


def test_nobody_imports_the_programs():
    """train.py and official_content are entries, not libraries; the demo's scripts share their own records.py."""
    programs = {program.stem for program in PROGRAMS} - {"records"} | {"official_content"}
    found = []
    for path in (*MODULES.values(), *PROGRAMS):
        imports = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Import | ast.ImportFrom)]
        heads = {name.split(".")[0] for statement in imports for name in names_of(statement)}
        found += [f"{path.relative_to(ROOT)} imports {name}" for name in heads & programs]
    assert found == []


def reads_environment(tree: ast.Module) -> list[int]:
    """Lines where the process environment is read; `setdefault` and assignments only write."""
    writes = {
        id(node.value)
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr == "setdefault")
        or (isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load))
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
        and (node.attr == "getenv" or (node.attr == "environ" and id(node) not in writes))
    ]


def test_only_the_settings_read_the_environment():
    """With the exceptions named above, each with its reason."""
    readers = {name for name, path in MODULES.items() if reads_environment(tree_of(path))}
    assert readers - READS_ENVIRONMENT.keys() == set()


def test_the_search_for_reads_tells_reading_from_writing():
    """Three reads, three writes."""
    reads = "import os\nos.environ['A']\nos.getenv('A')\n'A' in os.environ\n"
    writes = "os.environ['A'] = '1'\nos.environ.setdefault('A', '1')\ndel os.environ['A']\n"
    assert reads_environment(ast.parse(reads + writes)) == [2, 3, 4]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many there are, self and cls left out."""
    taken = function.args
    named = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs]
    return len([each for each in named if each.arg not in ("self", "cls")]) + bool(taken.vararg) + bool(taken.kwarg)


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Triton's: every pointer, size and stride is an argument of its own, and no object holds them."""
    return "triton.jit" in map(ast.unparse, function.decorator_list)


def test_files_functions_and_parameter_lists_stay_small():
    """400 lines a file, 50 a function, 8 parameters but for kernels."""
    found = []
    for path in (*MODULES.values(), *PROGRAMS):
        name = path.relative_to(ROOT)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LINES_OF_A_FILE:
            found.append(f"{name}: {lines} lines")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                many = parameters(node) > PARAMETERS and not is_kernel(node)
                if lines > LINES_OF_A_FUNCTION or many:
                    found.append(f"{name}: {node.name} has {lines} lines, {parameters(node)} parameters")
    assert found == []


def catches_everything(handler: ast.ExceptHandler) -> bool:
    """`except:`, or one that names Exception or BaseException."""
    names = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} if handler.type else set()
    return handler.type is None or bool(names & {"Exception", "BaseException"})


def test_only_the_two_ends_of_the_line_catch_everything():
    """What can be answered is caught by name; a run's end becomes one message, and tracking never ends a run."""
    found = Counter(
        str(path.relative_to(ROOT))
        for path in (*MODULES.values(), *PROGRAMS)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler) and catches_everything(node)
    )
    assert found.keys() <= CATCHES_EVERYTHING.keys()
    assert max(found.values()) == 1


def test_the_checkers_are_silenced_rarely_and_never_wholesale():
    """Each `noqa` and `type: ignore` names its rule; there are no more of them than today."""
    marks = re.compile(r"# (?:noqa|type: ignore)(.?)")
    found = [mark for path in (*MODULES.values(), *PROGRAMS) for mark in marks.findall(path.read_text("utf-8"))]
    assert set(found) <= {":", "["}
    assert len(found) <= SILENCED_CHECKERS


def test_every_test_states_its_claim():
    """A docstring: what a reader of a failure should know without reading the test."""
    without = [
        f"{path.name}: {node.name}"
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert without == []


def names_in(path: Path) -> set[str]:
    """Every name that a module defines, imports or assigns, attributes included."""
    found = set()
    for node in ast.walk(tree_of(path)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name) | ast.Attribute(attr=name):
                found.add(name)
            case ast.alias(name=name, asname=other):
                found.add((other or name).split(".")[0])
    return found


@cache
def is_there(named: str) -> bool:
    """Whether a path, or dotted `sft.wing.module.name`, leads to a file, a folder or a name in a module."""
    if "/" in named:
        return (ROOT / named).exists()
    parts = named.split(".")
    for length in range(len(parts), 0, -1):
        path, rest = ROOT.joinpath(*parts[:length]), parts[length:]
        if path.is_dir() and not rest:
            return True
        for module in (path.with_suffix(".py"), path / "__init__.py"):
            if module.is_file():
                return not rest or rest[0] in names_in(module)
    return False


def test_whatever_a_text_names_of_ours_is_there():
    """Imports, dotted names and paths, in strings, embedded scripts, comments and pages too: a move that forgot one
    shows here."""
    dotted = re.compile(r"from (sft[\w.]*) import (\w+(?:, \w+)*)|(?<![\w./-])(sft(?:\.[a-z]\w+){2,}(?:\.\w+)?)")
    paths = re.compile(
        r"(?<![\w./{-])(?:sft|tests|benchmarks|configs|docs)/[\w/-]+\.(?:py|sh|md|env|json|yaml|jinja)\b"
    )
    missing = set()
    for name, text in texts():
        found = {f"{module}.{each}" if module else whole
                 for module, names, whole in dotted.findall(text) for each in names.split(", ")}  # fmt: skip
        missing |= {f"{name}: {each}" for each in found | set(paths.findall(text)) if not is_there(each)}
    assert missing - NOT_OURS == set()


@cache
def tracked() -> tuple[Path, ...]:
    """The files git keeps; a copy without git skips what needs them."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return tuple(path for name in listed.split("\0") if name and (path := ROOT / name).is_file())


def texts() -> Iterator[tuple[str, str]]:
    for path in tracked():
        content = path.read_bytes()
        if b"\0" not in content[:1024]:
            yield str(path.relative_to(ROOT)), content.decode("utf-8")


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_tracked_file_holds(what: str):
    """Paths of a machine, tokens, private keys."""
    pattern = FORBIDDEN[what]
    found = [f"{name}: {match.group()}" for name, text in texts() for match in pattern.finditer(text)]
    assert found == []


def test_the_forbidden_patterns_find_what_they_are_for():
    """One example each, put together here so that this file does not hold them."""
    examples = ["/" + "home/me/rows", "hf_" + "a1" * 17, "-----BEGIN RSA PRIVATE" + " KEY-----"]
    found = [bool(pattern.search(text)) for pattern, text in zip(FORBIDDEN.values(), examples, strict=True)]
    assert found == [True, True, True]


def test_every_host_named_is_a_public_one():
    """No package registry, mirror or tracking server of one workplace; stand-ins have no dot or end in .invalid."""
    urls = re.compile(r"\bhttps?://(?:[^\s/@\"'`)]*@)?([A-Za-z0-9.-]+)")
    hosts = {(host.rstrip("."), name) for name, text in texts() for host in urls.findall(text)}
    assert {(host, name) for host, name in hosts if "." in host and not host.endswith(".invalid")} - {
        (h, n) for h, n in hosts if h in PUBLIC_HOSTS
    } == set()


def test_the_constraints_are_exact_versions_and_nothing_else():
    """`name==version` on every line: no address of an index, no path."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.!+]+", line)] == []


def test_the_embedded_demo_stays_small():
    """Model, tokenizer and data together at most 12 MB."""
    files = [path for path in (ROOT / "official_content" / "demo").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if "__pycache__" not in path.parts) <= DEMO_BYTES


def test_the_licence_is_the_plain_apache_text():
    """201 lines, its appendix not filled in."""
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 201
    assert "Version 2.0, January 2004" in text
    assert "Copyright [yyyy] [name of copyright owner]" in text
