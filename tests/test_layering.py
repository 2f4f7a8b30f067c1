"""A room imports only from rooms above it; the kernels never import the runtime. Read with `ast`."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Top to bottom, the order in which to read them. A room that is not built yet may be missing; a file
# that is not in this list has no place in the house.
ROOMS = """
    errors families config rope cache attention quantize model hub checkpoint tokenizer sampling compiled steps decode
    drafting speculative request llm plot memory parallel finetune bench perplexity describe cli
""".split()
ENTRANCES = ["__init__", "__main__"]  # may import anything

# May be imported anywhere at module level; everything else third-party needs a reason to be there.
LIGHT = {"torch", "numpy", "safetensors", "tokenizers", "jinja2", "rich"}


def modules() -> dict[str, Path]:
    return {path.stem: path for path in sorted((ROOT / "minillm").glob("*.py"))}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted module, whether at module level) of every import, also inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            if node.module == "minillm":  # from minillm import x: x is a room or a public name
                found += [(f"minillm.{alias.name}", id(node) in top) for alias in node.names]
            else:
                found.append((node.module, id(node) in top))
    return found


def test_every_file_has_its_place():
    assert set(modules()) <= set(ROOMS) | set(ENTRANCES)
    folders = {p.name for p in (ROOT / "minillm").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders <= {"demo"}  # the house is flat
    assert "errors" in modules()  # the test looks at something


@pytest.mark.parametrize("room", sorted(set(modules()) - set(ENTRANCES)))
def test_imports_only_from_above(room):
    above = {f"minillm.{name}" for name in ROOMS[: ROOMS.index(room)]}
    below = [name for name, _ in imports(modules()[room]) if name.split(".")[0] == "minillm" and name not in above]
    assert below == [], f"{room}.py imports {below}, which do not stand above it"


def test_an_arrow_back_up_would_be_found(tmp_path):
    """The reader sees every way of writing an import, also inside a function."""
    path = tmp_path / "room.py"
    path.write_text(
        "import minillm.cli\nfrom minillm.llm import LLM\nfrom minillm import decode\n"
        "def f():\n    from minillm.model import Decoder\n    import torch.nn as nn\n"
    )
    found = ["minillm.cli", "minillm.llm", "minillm.decode", "minillm.model", "torch.nn"]
    assert sorted(name for name, _ in imports(path)) == sorted(found)
    assert dict(imports(path))["minillm.model"] is False


def test_kernels_are_called_only_where_the_design_says():
    allowed = {"attention", "quantize", "model", "steps", "parallel"}
    for room, path in modules().items():
        if any(name.split(".")[0] == "minillm_kernels" for name, _ in imports(path)):
            assert room in allowed, f"{room}.py imports minillm_kernels"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_never_import_the_runtime(path):
    assert not [name for name, _ in imports(path) if name.split(".")[0] == "minillm"]


def test_kernels_folder_is_no_package():
    """An installed top-level `kernels` would shadow another project's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("room", sorted(modules()))
def test_heavy_packages_are_imported_where_they_are_used(room):
    """Anything but the standard library and a few light packages is imported inside the function that needs it."""
    for name, at_top in imports(modules()[room]):
        package = name.split(".")[0]
        if at_top and package not in sys.stdlib_module_names | LIGHT | {"minillm", "minillm_kernels"}:
            pytest.fail(f"{room}.py imports {name} at module level")
