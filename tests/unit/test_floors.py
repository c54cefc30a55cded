"""Imports go down the floors of docs/architecture.md, and no module's name hides another package."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = {
    "data_prep": 5, "benchmarks": 5, "g3n.train": 5, "g3n.cli": 5, "g3n.report": 5,
    "g3n.sweep": 5, "g3n.compare": 4,
    "g3n.engine": 4, "g3n.evaluate": 4, "g3n.generate": 4, "g3n.outputs": 4, "g3n.tracking": 4, "g3n.doctor": 4,
    "g3n.meters": 4, "g3n.flops": 4, "g3n.levels": 4, "g3n.memory_plan": 4, "g3n.system": 4, "g3n.counterfactual": 4,
    "g3n.export": 4, "g3n.exported": 4,
    "g3n.probing": 4,
    "g3n.tasks": 3,
    "g3n.latent": 2, "g3n.flow": 2, "g3n.models": 2, "g3n.stream": 2, "g3n.nifti": 2, "g3n.templates": 2,
    "g3n.features": 2, "g3n.names": 2,
    "g3n.encoders": 4, "g3n.scans": 4, "g3n.embed": 4,
    "g3n.ops": 1,
    "kernels": 0, "g3n.config": 0,
}  # fmt: skip
OURS = ("g3n", "kernels", "data_prep", "benchmarks")


def room(module: str) -> str | None:
    """The room of the table that a dotted name lies in."""
    matches = [name for name in FLOORS if module == name or module.startswith(name + ".")]
    return max(matches, key=len) if matches else None


def imports(source: str) -> set[str]:
    """Dotted names that a file imports, function bodies included; ``from a import b`` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def wrong(module: str, source: str) -> list[str]:
    """Imports of ``module`` that go up, or break one of the house's other rules."""
    own = room(module)
    found = []
    for name in imports(source):
        other = room(name)
        if other is None or other == own:
            continue
        up = FLOORS[other] > FLOORS[own or ""]
        engine_to_models = own == "g3n.engine" and other == "g3n.models"
        kernels_but_ops = other == "kernels" and own not in ("g3n.ops", "benchmarks")
        if up or engine_to_models or kernels_but_ops:
            found.append(f"{module} imports {name}")
    return found


def modules() -> dict[str, Path]:
    files = [f for package in OURS for f in (ROOT / package).rglob("*.py")]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


@pytest.mark.parametrize("module", [m for m in modules() if m != "g3n"])
def test_imports_go_down(module: str) -> None:
    assert room(module), f"{module} has no floor; give it one here and in docs/architecture.md"
    assert wrong(module, modules()[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("g3n.models.dit", "from g3n.tasks import base"),
        ("g3n.engine.trainer", "from g3n.models.mae import MAE"),
        ("g3n.stream.lanes", "def f():\n    import data_prep.pack"),
        ("g3n.models.mae", "from kernels import patchify3d"),
        ("kernels.adaln", "import g3n.ops"),
    ],
)
def test_the_check_sees_a_wrong_import(module: str, line: str) -> None:
    assert wrong(module, line)


def test_no_module_hides_another() -> None:
    """``deepspeed g3n/train.py`` puts g3n/ on the path, so its modules are top-level names there."""
    foreign = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    for folder in ("g3n", "kernels", "data_prep"):  # benchmarks run by name, python -m
        for file in (ROOT / folder).iterdir():
            if file.suffix == ".py" and file.stem not in ("__init__", "__main__"):
                assert file.stem not in foreign, f"{file} hides the package '{file.stem}'"


@pytest.mark.parametrize("package", ["g3n", "kernels", "data_prep"])
def test_packages_are_this_repository(package: str) -> None:
    module = __import__(package)
    assert Path(str(module.__file__)).is_relative_to(ROOT)
