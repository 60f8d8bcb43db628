"""The package: what is in the wheel, that it is built from its own source distribution, and that it works alone."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.release import archive_problems, build, clean_environment, readme_problems, sbom, texts_of, version_problems

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
COMMANDS = PROJECT["scripts"]
TOOLS = pytest.mark.skipif(
    find_spec("setuptools") is None or find_spec("pip") is None, reason="make install brings the tools that build"
)


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """In the folder, without the repository on the path and without a network for pip."""
    words = list(map(str, command))
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=500, env=clean_environment())


def succeeded(folder: Path, *command: str | Path) -> str:
    """What it printed."""
    done = run(folder, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_folder_of_code_is_in_the_package():
    """The list in pyproject.toml; a wing that is missing there would be missing in the wheel alone."""
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "sft").rglob("__init__.py")}
    assert folders | {"staged_sft", "staged_sft.official_content"} == set(SETUPTOOLS["packages"])


def test_every_command_starts_a_program_of_the_repository():
    """staged_sft is the repository's own folder; each program has a function `program`."""
    for target in COMMANDS.values():
        module, _, function = target.partition(":")
        path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
        assert f"def {function}()" in path.read_text(encoding="utf-8")
    promised = {"", "-export", "-chat", "-score", "-prepare", "-compare"}
    assert {f"staged-sft{end}" for end in promised} <= set(COMMANDS)


def test_pip_leaves_another_torch_2_alone():
    """2.11 to 2.14 were run; a later one of a notebook service is used as it is and named by the run."""
    bounds = {each.name: each.specifier for each in map(Requirement, PROJECT["dependencies"])}
    tried = [bounds["torch"].contains(version) for version in ("2.10.0", "2.11.0", "2.14.1", "2.19.0", "3.0.0")]
    assert tried == [False, True, True, True, False]


def test_the_extras_are_those_of_the_contract():
    """gpu, deepspeed, bench, dev; what they bring is not needed to train on a CPU."""
    assert set(PROJECT["optional-dependencies"]) == {"gpu", "deepspeed", "bench", "dev"}
    needed = {Requirement(text).name for text in PROJECT["dependencies"]}
    extra = {Requirement(text).name for texts in PROJECT["optional-dependencies"].values() for text in texts}
    assert needed & extra == set()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source distribution of a copy of this checkout and the wheel made from it, by the tools that are installed."""
    return build(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def wheel(built: tuple[Path, Path]) -> Path:
    return built[1]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands in an environment that has the wheel, and borrows everything else from this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    succeeded(folder, folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    return folder / "bin"


@pytest.mark.slow
@TOOLS
def test_the_wheel_holds_what_a_run_reads(wheel: Path):
    """Every module, template and question, the embedded ladder, launch files and recipes; no test, no cache."""
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "sft").rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    patterns = ["*.env", "configs/*/*", "configs/recipes/*/*", "official_content/demo/data/*", "official_content/*.py"]
    patterns += ["official_content/demo/model/*", "train.py"]
    laid = {f"staged_sft/{path.relative_to(ROOT)}" for each in patterns for path in ROOT.glob(each) if path.is_file()}
    laid -= {name for name in laid if "/.env" in name}
    assert (package | laid) - names == set()
    assert [name for name in names if re.search(r"tests/|__pycache__|mlruns|\.sh$", name)] == []
    assert wheel.stat().st_size < 12 * 2**20


@pytest.mark.slow
@TOOLS
def test_a_stage_is_trained_from_the_wheel_in_an_empty_folder(installed: Path, tmp_path: Path):
    """The demo is written there, its first stage trained, asked, scored and exported; results and MLflow's database
    stand in that folder, and messages name the installed command."""
    assert "staged-sft --stage all" in succeeded(tmp_path, installed / "staged-sft-demo")
    quick = ["SFT_MAX_STEPS=3", "SFT_EVAL_STEPS=3", "SFT_GEN_EVAL_SAMPLES=2", "SFT_GENERAL_EVAL=0"]
    overrides = [word for each in quick for word in ("--set", each)]
    succeeded(tmp_path, installed / "staged-sft", "--stage", "1", *overrides)
    assert (tmp_path / "outputs" / "demo_stage1" / "report.html").is_file()
    assert (tmp_path / "mlruns" / "mlflow.db").is_file()
    again = run(tmp_path, installed / "staged-sft", "--stage", "1", "--set", "SFT_LR=1")
    assert (again.returncode, "staged-sft --stage 1" in again.stderr) == (2, True)
    succeeded(tmp_path, installed / "staged-sft-export", "--checkpoint_dir", "outputs/demo_stage1")
    assert (tmp_path / "outputs" / "demo_stage1" / "merged" / "model.safetensors").is_file()
    for name in COMMANDS:
        assert f"usage: {name}" in succeeded(tmp_path, installed / name, "--help")
    table = succeeded(tmp_path, installed / "staged-sft", "--check")
    assert "make install" not in table
    assert re.search(r"^torch +ok", table, re.MULTILINE)


@pytest.mark.slow
@TOOLS
def test_another_torch_stays_and_a_wheel_without_the_demo_says_so(installed: Path, wheel: Path, tmp_path: Path):
    """pip would install this package alone beside a torch 2.12.1 that it finds; nothing is written where the embedded
    model is not there."""
    packages = next((installed.parent / "lib").glob("python3.*")) / "site-packages"
    (packages / "torch-2.12.1.dist-info").mkdir()
    (packages / "torch-2.12.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.12.1\n"
    )
    again = ["--dry-run", "--force-reinstall", "--no-deps"]
    python = installed / "python"
    assert "torch" not in succeeded(tmp_path, python, "-m", "pip", "install", *again, wheel).split("Would install")[1]
    resolved = succeeded(tmp_path, python, "-m", "pip", "install", "--dry-run", wheel)
    assert "torch" not in resolved.partition("Would install")[2]
    assert "torch<3,>=2.11 in" in resolved
    (packages / "staged_sft" / "official_content" / "demo" / "model" / "model.safetensors").unlink()
    done = run(tmp_path, installed / "staged-sft-demo")
    assert (done.returncode, done.stderr.count("\n"), "no embedded ladder" in done.stderr) == (2, 1, True)
    assert list(tmp_path.iterdir()) == []


def test_the_demo_is_not_written_over_other_files(tmp_path: Path):
    """One line for each file that is another one; files that are the same are kept."""
    command = [sys.executable, ROOT / "official_content" / "copy_demo.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=environment)
    assert (tmp_path / "stage1.env").read_bytes() == (ROOT / "stage1.env").read_bytes()
    (tmp_path / "stage2.env").write_text("SFT_LR=1\n", encoding="utf-8")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "[ERROR] stage2.env: is there and is another file; name another folder\n"


# The release


@pytest.mark.slow
@TOOLS
def test_a_release_would_be_taken(built: tuple[Path, Path]):
    """Metadata as an index reads it, licence, README and version of both archives: nothing to complain about."""
    sdist, wheel = built
    texts = texts_of(sdist, wheel)
    assert [problem for name, found in texts.items() for problem in archive_problems(name, found)] == []
    assert list(version_problems(wheel.name, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))) == []
    broken = {"METADATA": next(iter(texts[wheel.name].values())).replace("Apache-2.0", "None of yours")}
    assert list(archive_problems("broken", broken)) != []


def test_a_readme_that_would_not_render_is_named():
    """An open fence, a table without its blank line, a picture that is not there, a link with a space in its target."""
    good = "# A\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```\nx\n```\n"
    assert list(readme_problems(good)) == []
    faults = {
        "a code block is not closed": good + "```\n",
        "1 of 2 tables are read as tables": good + "```\n|---|---|\n```\n",
        "the picture none.png is not there": good + "![x](none.png)\n",
        "'[x](a b)' is shown as it is typed": good + "[x](a b)\n",
    }
    assert {text: list(readme_problems(text)) for text in faults.values()} == {
        text: [fault] for fault, text in faults.items()
    }
    assert list(version_problems("staged_sft-0.2.0-py3-none-any.whl", "# C\n\n## 0.1.0\n")) != []


def test_the_sbom_names_every_pinned_package():
    """Name, version and address of each in valid CycloneDX; a licence where an installed package states one."""
    found = json.loads(sbom("# note\ntorch==2.13.0\nPyYAML==6.0.3\nnot_here==1.0\n"))
    listed = {part["name"]: part["purl"] for part in found["components"]}
    assert listed == {
        "torch": "pkg:pypi/torch@2.13.0", "PyYAML": "pkg:pypi/pyyaml@6.0.3", "not_here": "pkg:pypi/not-here@1.0",
    }  # fmt: skip
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    whole = json.loads(sbom(pins))["components"]
    assert len(whole) == pins.count("==")
    assert sum("licenses" in part for part in whole) > 20
