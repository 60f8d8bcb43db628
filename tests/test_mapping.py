"""docs/mapping.md names settings, files and programs that exist, and leaves out no flag of the documents."""

import re
from pathlib import Path

import pytest

from sft.settings.schema import NAMES

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "mapping.md").read_text(encoding="utf-8")
SEEDS = ROOT.parent / "shared" / "seeds"


def test_every_setting_named_exists():
    """A renamed setting must be renamed here."""
    assert set(re.findall(r"\bSFT_[A-Z0-9_]+\b", TEXT)) <= set(NAMES)


def test_every_file_named_exists():
    """Launch files, recipes, pages and programs."""
    files = set(re.findall(r"\bconfigs/[\w/.-]+\w", TEXT)) | set(re.findall(r"\]\((\w+\.md)\)", TEXT))
    programs = set(re.findall(r"\bofficial_content/\w+\.(?:py|sh)", TEXT))
    files -= {"configs/ds_config_7b.json"}  # the document's own
    missing = [name for name in files | programs if not ((ROOT / name).exists() or (ROOT / "docs" / name).exists())]
    assert missing == []


@pytest.mark.shared
@pytest.mark.skipif(not SEEDS.is_dir(), reason="../shared is not here")
@pytest.mark.parametrize("number", ["001", "003", "004"])
def test_every_long_flag_of_a_document_is_mapped(number):
    """All --flags of the document's own programs, pip and python apart."""
    (document,) = SEEDS.glob(f"{number}_*.txt")
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", document.read_text(encoding="utf-8")))
    # nvidia-smi's own, quoted as `watch nvidia-smi ...`; accelerate's and torchrun's stand in the commands.
    flags -= {"--query-gpu", "--format=csv", "--nproc_per_node"}
    assert [flag for flag in sorted(flags) if flag not in TEXT] == []


@pytest.mark.shared
@pytest.mark.skipif(not SEEDS.is_dir(), reason="../shared is not here")
def test_every_key_of_document_001s_yaml_is_mapped():
    """All keys of the YAML block, nested ones too."""
    (document,) = SEEDS.glob("001_*.txt")
    block = document.read_text(encoding="utf-8").split("```yaml")[1].split("```")[0]
    keys = set(re.findall(r"^\s*(?:- )?([a-z_0-9]+):", block, re.MULTILINE)) - {"use_reentrant", "path"}
    assert [key for key in sorted(keys) if f"{key}" not in TEXT] == []
