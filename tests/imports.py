#!/usr/bin/env python3
"""Whether every package that a script imports is named by the requirements that its README tells people to install.

It reads the files' syntax trees and package files; it installs and runs nothing, and needs Python alone. A module of ours is followed into
its own imports, as `bench/peers/worker.py` needs what `goldens/tokens.py` imports. What a package needs itself is pip's and npm's business.

    python3 tests/imports.py            # prints what is missing, and exits with 1 where anything is
"""

import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Scripts, folders in which their modules of ours are found, and the requirements that have to suffice.
PYTHON = [
    (["goldens/*.py"], ["goldens"], "goldens/requirements.txt"),
    (["bench/fidelity/*.py"], ["bench/fidelity", "goldens"], "goldens/requirements.txt"),
    (["bench/peers/worker.py", "bench/peers/run"], ["bench/fidelity", "goldens"], "bench/peers/requirements.txt"),
    (["training/*.py"], ["training"], "training/requirements.txt"),
    (["tests/clients/python/*.py", "tests/clients/examples/*.py"], ["tests/clients/python"], "tests/clients/python/requirements.in"),
    (["tests/*.py"], [], None),
]
NODE = [
    (["training/*.mjs"], "training/package.json"),
    (["tests/clients/node/*.mjs", "tests/clients/node/test/*.mjs"], "tests/clients/node/package.json"),
]
# Packages that are not called as the module that they bring.
PACKAGES = {"PIL": "pillow", "open_clip": "open-clip-torch"}


def normal(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def named(path: Path) -> dict[str, str]:
    """Packages of a requirements file, each with its version."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    pins = dict(re.fullmatch(r"([\w.-]+)==(\S+)", line).groups() for line in lines if line)
    return {normal(name): version for name, version in pins.items()}


def imported(path: Path) -> set[str]:
    """First names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), path.name)):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def needed(path: Path, folders: list[str], seen: set[Path]) -> dict[str, Path]:
    """Modules of others that a file needs, each with the file that imports it."""
    seen.add(path)
    modules = {}
    for name in imported(path) - sys.stdlib_module_names:
        ours = next((file for folder in folders if (file := ROOT / folder / f"{name}.py").exists()), None)
        if ours is None:
            modules.setdefault(name, path)
        elif ours not in seen:
            modules = {**needed(ours, folders, seen), **modules}
    return modules


def files(patterns: list[str]) -> list[Path]:
    """What the patterns stand for; one that stands for nothing is a mistake here."""
    found = [(pattern, sorted(ROOT.glob(pattern))) for pattern in patterns]
    assert all(paths for _, paths in found), f"nothing there: {[pattern for pattern, paths in found if not paths]}"
    return [path for _, paths in found for path in paths]


def python_findings() -> list[str]:
    findings = set()
    for patterns, folders, requirements in PYTHON:
        packages = named(ROOT / requirements) if requirements else {}
        for path in files(patterns):
            for module, by in needed(path, folders, set()).items():
                if normal(PACKAGES.get(module, module)) not in packages:
                    wanted = requirements or "no requirements file"
                    findings.add(f"{by.relative_to(ROOT)} imports {module}, for {patterns[0]}, and {wanted} does not name it")
    return sorted(findings)


def node_findings() -> list[str]:
    findings = []
    modules = re.compile(r"""(?:from|require\(|require\.resolve\(|import\()\s*["'](?!\.|node:)((?:@[\w.-]+/)?[\w.-]+)""")
    for patterns, package in NODE:
        known = {*json.loads((ROOT / package).read_text())["dependencies"], *BUILT_IN}
        for path in files(patterns):
            missing = sorted({*modules.findall(path.read_text())} - known)
            findings += [f"{path.relative_to(ROOT)} imports {name}, which {package} does not name" for name in missing]
    return findings


# Modules of Node itself that our files import without `node:`.
BUILT_IN = {"fs", "module", "path"}


def lock_findings() -> list[str]:
    """The list with everything in it must hold what was asked for, in the same versions."""
    folder = ROOT / "tests/clients/python"
    locked = named(folder / "requirements.txt")
    return [
        f"tests/clients/python/requirements.txt does not hold {name}=={version} of requirements.in"
        for name, version in named(folder / "requirements.in").items()
        if locked.get(name) != version
    ]


def main() -> None:
    findings = [*python_findings(), *node_findings(), *lock_findings()]
    print("\n".join(findings) or "every import is named by its requirements")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
