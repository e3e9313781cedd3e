"""One-way floors: a file imports only from lower floors, or from its own floor without going round in a circle."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sparselora_hf"

FLOORS = {
    "cache": 0,
    "families": 0,
    "files": 0,
    "hooks": 0,
    "layers": 0,
    "presets": 0,
    "shapes": 0,
    "config": 0,
    "versions": 0,
    "kernels": 0,
    "ops": 1,
    "calibration": 2,
    "channels": 2,
    "cost": 2,
    "criteria": 2,
    "distributed": 2,
    "factors": 2,
    "reservoir": 2,
    "standin": 2,
    "svd": 2,
    "svd_cache": 2,
    "views": 2,
    "worth": 2,
    "counting": 3,
    "decoder": 3,
    "graphs": 3,
    "meter": 3,
    "plan": 3,
    "schedule": 3,
    "state": 3,
    "modules": 4,
    "placement": 4,
    "attach": 5,
    "handle": 5,
    "parts": 5,
    "selfcheck": 5,
    "callback": 6,
    "integrations": 7,
    "checkpoints": 6,
    "collator": 6,
    "trainer": 7,
    "comparison": 8,
    "arc": 0,
    "formats": 0,
    "evaluation": 8,
    "labels": 8,
    "measure": 8,
    "prompts": 8,
    "world": 8,
    "cli": 8,
}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module_of(path: Path) -> str:
    """Dotted name inside the package: ``ops.rows``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, those inside functions included."""
    here = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("sparselora_hf.") for a in node.names if a.name.startswith("sparselora_hf")}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = here[: len(here) - node.level + 1]
                module = ".".join((*base, *filter(None, [module])))
            elif module.split(".")[0] == "sparselora_hf":
                module = module.removeprefix("sparselora_hf").lstrip(".")
            else:
                continue
            found |= {f"{module}.{a.name}".lstrip(".") for a in node.names} if is_folder(module) else {module}
    return found


def is_folder(module: str) -> bool:
    return (PACKAGE / module.replace(".", "/")).is_dir()


def floor(module: str) -> int:
    return 0 if module == "__version__" else FLOORS[module.split(".")[0]]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_from_no_higher_floor(path):
    module = module_of(path)
    above = {other for other in imports(path) if floor(other) > floor(module)}
    assert not above, f"{module} (floor {floor(module)}) imports {sorted(above)}"


def test_no_circles():
    graph = {module_of(path): imports(path) for path in FILES}

    def visit(module, trail):
        assert module not in trail, " -> ".join((*trail, module))
        for other in graph.get(module, ()):
            visit(other, (*trail, module))

    for module in graph:
        visit(module, ())


def test_every_floor_has_its_file():
    there = {module_of(path).split(".")[0] for path in FILES}
    assert there <= FLOORS.keys()


@pytest.mark.parametrize("module", ["config", "layers", "presets", "families", "shapes", "cost"])
def test_no_torch_on_the_ground_floor(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
    assert not {name.split(".")[0] for name in names} & {"torch", "transformers", "peft", "trl"}
