"""Whether a wheel holds what it should and nothing else: `python tests/wheel/contents.py dist/*.whl`.

Needs nothing but Python, so that it also runs where wheels are built. For libraries of Linux it needs readelf.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

BINDING = re.compile(r"pyfasa/_native\.(abi3\.so|pyd)")
LIBRARIES = re.compile(r"pyfasa/libpyfasa(_cuda)?\.so")
SOURCES = re.compile(r"pyfasa/(.*\.(py|pyi|html|css|js|svg)|py\.typed)")
METADATA = re.compile(r"pyfasa-[^/]+\.dist-info/.*")
ROOT = Path(__file__).resolve().parents[2]

# What lies in the folders of people and of build machines, and in this one.
PATHS = re.compile(
    rb"(?:/(?:home|root|tmp|project|__w|Users|private)|%s)/[\w./+-]+" % re.escape(bytes(ROOT))
)


def problems(path: Path, cuda: bool | None) -> list[str]:
    """Sentences about what is wrong with a wheel; cuda: whether it must or must not have kernels, None: either."""
    name = path.name.split("-")
    found = []
    if name[-3:-1] != ["cp310", "abi3"]:
        found.append(
            f"The tag is {'-'.join(name[-3:-1])}, not cp310-abi3: no wheel for Python 3.10 and all later ones."
        )
    with zipfile.ZipFile(path) as wheel:
        files = {
            entry.filename: entry.file_size for entry in wheel.infolist() if not entry.is_dir()
        }
        binaries = {file: wheel.read(file) for file in files if file.endswith((".so", ".pyd"))}
    found += _files(set(files), cuda, linux="linux" in name[-1])
    for file, data in binaries.items():
        if places := sorted({match.decode() for match in PATHS.findall(data)}):
            found.append(f"{file} holds paths of the machine that built it: {', '.join(places)}")
        if data.startswith(b"\x7fELF"):
            found += [f"{file} {problem}" for problem in _dynamic(data)]
    return found


def _files(files: set[str], cuda: bool | None, linux: bool) -> list[str]:
    found = [
        f"{file} does not belong into a wheel."
        for file in sorted(files)
        if not any(kind.fullmatch(file) for kind in (BINDING, LIBRARIES, SOURCES, METADATA))
        or {"tests", "__pycache__"} & set(PurePosixPath(file).parts)
    ]
    needed = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "pyfasa").rglob("*")
        if file.is_file() and file.suffix not in (".pyc", ".so", ".pyd")
    }
    if linux:
        needed.add("pyfasa/libpyfasa.so")
    found += [f"{file} is missing." for file in sorted(needed - files)]
    if not any(BINDING.fullmatch(file) for file in files):
        found.append("The compiled binding pyfasa/_native is missing.")
    if cuda is not None and ("pyfasa/libpyfasa_cuda.so" in files) != cuda:
        found.append(f"libpyfasa_cuda.so is {'missing' if cuda else 'in a wheel for CPUs'}.")
    return found


def _dynamic(data: bytes) -> list[str]:
    """What is wrong with the dynamic section of an ELF library."""
    readelf = shutil.which("readelf")
    if readelf is None:
        return ["cannot be looked into: readelf (binutils) is not on the PATH."]
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(data)
        file.flush()
        text = subprocess.run(
            [readelf, "-d", file.name], capture_output=True, text=True, check=True
        ).stdout
    return [f"has a run path: {line.strip()}" for line in re.findall(r".*R(?:UN)?PATH.*", text)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheels", metavar="WHEEL", nargs="+", type=Path)
    parser.add_argument("--cuda", choices=["ON", "OFF", "AUTO"], default="AUTO")
    arguments = parser.parse_args()
    cuda = {"ON": True, "OFF": False, "AUTO": None}[arguments.cuda]
    failed = False
    for path in arguments.wheels:
        found = problems(path, cuda)
        failed |= bool(found)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {len(found)} problems")
        for problem in found:
            print(f"  {problem}")
        with zipfile.ZipFile(path) as wheel:
            for entry in wheel.infolist():
                if entry.filename.endswith((".so", ".pyd")):
                    print(f"  {entry.file_size / 1e6:6.2f} MB  {entry.filename}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
