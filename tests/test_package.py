"""The package: what is in the wheel, that it is built from its own source distribution, and that it works alone."""

import os
import re
import shutil
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

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
COMMANDS = PROJECT["scripts"]
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "results", "datasets", "mlruns"
)
TOOLS = pytest.mark.skipif(
    find_spec("setuptools") is None or find_spec("pip") is None, reason="make install brings the tools that build"
)


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """In the folder, without the repository on the path and without a network for pip."""
    unwanted = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MLFLOW_TRACKING_URI"}
    environment = {name: value for name, value in os.environ.items() if name not in unwanted} | {"PIP_NO_INDEX": "1"}
    return subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=500, env=environment
    )


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
    assert {"staged-sft", "staged-sft-export", "staged-sft-chat", "staged-sft-score", "staged-sft-prepare"} <= set(
        COMMANDS
    )


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
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked source distribution of a copy of this checkout, with the tools that are installed."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    sdist = "from setuptools import build_meta; build_meta.build_sdist('..')"
    succeeded(folder / "source", sys.executable, "-c", sdist)
    (packed,) = folder.glob("staged_sft-*.tar.gz")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    succeeded(folder, sys.executable, "-m", "pip", "wheel", "--quiet", *options, packed)
    (found,) = folder.glob("staged_sft-*.whl")
    return found


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
