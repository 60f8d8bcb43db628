"""Looks at what a release would upload: `make release-check`, or `python -m tests.release [FOLDER=dist]`.

Builds the source distribution and, from it, the wheel; reads their metadata as an index does; holds version, licence,
change log and README to what they must be; writes the SBOM of the pinned versions beside them; audits these where the
database can be reached. Ends with 1 where something is wrong, each thing in one line.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.contrib.this.builders import this_component
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from markdown_it import MarkdownIt
from packageurl import PackageURL
from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "constraints.txt"
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "results", "datasets", "mlruns", "staged-sft-work"
)
MOST_BYTES = 12 * 2**20


def clean_environment() -> dict[str, str]:
    """Without the repository on the path, and without a network for pip."""
    unwanted = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MLFLOW_TRACKING_URI"}
    return {name: value for name, value in os.environ.items() if name not in unwanted} | {"PIP_NO_INDEX": "1"}


def build(folder: Path) -> tuple[Path, Path]:
    """Source distribution and wheel in the folder, by the tools of this environment and from a copy of this checkout:
    the wheel from the unpacked source distribution, so that nothing is in it that the other lacks."""
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "source"
        shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
        sdist = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
        _call(["-c", sdist], source)
        (packed,) = folder.glob("staged_sft-*.tar.gz")
        _call(["-m", "pip", "wheel", *options, str(packed)], source)
    (wheel,) = folder.glob("staged_sft-*.whl")
    return packed, wheel


def _call(words: list[str], folder: Path) -> None:
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, env=clean_environment())
    if done.returncode:
        raise SystemExit(f"the build failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def texts_of(sdist: Path, wheel: Path) -> dict[str, dict[str, str]]:
    """{archive: {name: text}} of the files a release is judged by."""
    wanted = re.compile(r"PKG-INFO$|METADATA$|LICENSE$|entry_points\.txt$")
    with tarfile.open(sdist) as packed, zipfile.ZipFile(wheel) as zipped:
        in_sdist = {member.name: packed.extractfile(member) for member in packed if wanted.search(member.name)}
        return {
            sdist.name: {name: file.read().decode() for name, file in in_sdist.items() if file},
            wheel.name: {name: zipped.read(name).decode() for name in zipped.namelist() if wanted.search(name)},
        }


def archive_problems(name: str, texts: dict[str, str]) -> Iterator[str]:
    """What is wrong with the metadata and the licence of one archive."""
    found = next((text for path, text in texts.items() if re.search(r"METADATA$|^[^/]+/PKG-INFO$", path)), "")
    try:
        read = Metadata.from_email(found, validate=True)
    except ExceptionGroup as group:
        yield from (f"{name}: {error}" for error in group.exceptions)
        return
    if read.license_expression != "Apache-2.0" or "LICENSE" not in map(str, read.license_files or []):
        yield f"{name}: its metadata does not name Apache-2.0 and LICENSE"
    if not any(path.endswith("LICENSE") and "Version 2.0, January 2004" in text for path, text in texts.items()):
        yield f"{name}: holds no licence text"
    if read.description_content_type != "text/markdown" or not read.summary:
        yield f"{name}: has no summary, or its description is not Markdown"
    yield from (f"{name}: {text}" for text in readme_problems(read.description or ""))


def readme_problems(text: str) -> Iterator[str]:
    """What would not show as it is meant: an open fence, a table that stays text, a picture that is missing."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    tables = sum(token.type == "table_open" for token in tokens)
    ruled = len(re.findall(r"^\|(?: ?:?-+:? ?\|)+$", text, re.MULTILINE))
    if tables != ruled or not tables:
        yield f"{tables} of {ruled} tables are read as tables"
    if len(re.findall(r"^```", text, re.MULTILINE)) % 2:
        yield "a code block is not closed"
    inline = [child for token in tokens if token.type == "inline" for child in token.children or ()]
    for child in inline:
        if child.type == "image" and not (ROOT / str(child.attrs["src"])).is_file():
            yield f"the picture {child.attrs['src']} is not there"
        if child.type == "text" and re.search(r"\]\(|^#+ ", child.content):
            yield f"{child.content[:60]!r} is shown as it is typed"


def version_problems(wheel: str, changes: str) -> Iterator[str]:
    """The wheel's version is the first heading of the change log."""
    version = wheel.split("-")[1]
    heading = next(iter(re.findall(r"^## (\S+)", changes, re.MULTILINE)), "none")
    if version != heading:
        yield f"{wheel}: the change log begins with {heading}"


def sbom(pins: str) -> str:
    """The pinned packages as CycloneDX, with the licence that an installed one states as an SPDX expression."""
    bom = Bom()
    bom.metadata.tools.components.add(this_component())
    licences = LicenseFactory()
    for name, version in re.findall(r"^([\w.-]+)==([\w.!+]+)", pins, re.MULTILINE):
        purl = PackageURL("pypi", name=re.sub(r"[-_.]+", "-", name).lower(), version=version)
        part = Component(name=name, version=version, type=ComponentType.LIBRARY, purl=purl, bom_ref=str(purl))
        if expression := licence_of(name):
            part.licenses.add(licences.make_with_expression(expression))
        bom.components.add(part)
    written = str(JsonV1Dot6(bom).output_as_string(indent=1))
    if fault := JsonStrictValidator(SchemaVersion.V1_6).validate_str(written):
        raise SystemExit(f"the SBOM is no valid CycloneDX: {fault}")
    return written


def licence_of(name: str) -> str | None:
    """The License-Expression of an installed package."""
    try:
        return metadata.metadata(name).get("License-Expression")
    except metadata.PackageNotFoundError:
        return None


def audit() -> str:
    """What pip-audit says of the pinned versions, in a line; that it could not ask is no fault of theirs."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(PINS), "--no-deps", "--disable-pip"]
    done = subprocess.run(command, capture_output=True, text=True)
    unknown, asked = done.stdout.count("could not be audited"), PINS.read_text(encoding="utf-8").count("==")
    if done.returncode and "vulnerabilit" in done.stderr:
        return f"audit: {done.stderr.strip().splitlines()[-1]}; make audit lists them"
    if done.returncode or unknown == asked:
        return "audit: the database can't be reached from here; make audit where it can"
    return f"audit: no known fault in {asked - unknown} of {asked} packages"


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "dist").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sdist, wheel = build(folder)
    problems = [text for name, texts in texts_of(sdist, wheel).items() for text in archive_problems(name, texts)]
    problems += version_problems(wheel.name, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    problems += [f"{path.name}: {path.stat().st_size:,} bytes" for path in (sdist, wheel) if too_large(path)]
    (folder / "sbom.cdx.json").write_text(sbom(PINS.read_text(encoding="utf-8")), encoding="utf-8")
    print(*(f"{path.stat().st_size:>12,}  {path}" for path in sorted(folder.iterdir())), audit(), sep="\n")
    print(*(f"[ERROR] {text}" for text in dict.fromkeys(problems)), sep="\n", file=sys.stderr)
    print(f"{len(problems)} problems" if problems else "ready")
    return bool(problems)


def too_large(path: Path) -> bool:
    return path.stat().st_size > MOST_BYTES


if __name__ == "__main__":
    raise SystemExit(main())
