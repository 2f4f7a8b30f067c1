"""A room imports only from rooms above it; the kernels never import the runtime. Read with `ast`."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The road, top to bottom: the order in which to read it. Then the wings: each has an order of its own, stands on
# the road, and knows no other wing. A room that is not built yet may be missing; a file that is not listed has no
# place in the house.
ROAD = """
    errors options progress config rope hold cache attention linear parallel model sampling tokenizer decode
    proposer row batch request llm
""".split()
WINGS = {
    "load": """
        placement backends files families keys reader config_json tensors chat_template tokenizer hub quantize share
        checkpoint writing quantized_copy lora
    """.split(),
    "cli": "flags ranks commands parser process".split(),
    "faster": "compiled steps".split(),
    "ranks": "split joined".split(),
    "speculative": "length verify proposers drafting".split(),
    "serve": "engine".split(),
    "train": "documents packing chat data attention initialize loss optimizer loop lora finetuning".split(),
    "measure": "plot memory bench perplexity describe".split(),
}
ENTRANCES = {"__init__", "__main__"}  # may import anything

# May be imported anywhere at module level; everything else third-party needs a reason to be there.
LIGHT = {"torch", "numpy", "safetensors", "tokenizers", "jinja2", "rich"}


def modules() -> dict[str, Path]:
    """Every module by its dotted name below the package: "cache", "load.hub"."""
    base = ROOT / "minillm"
    return {".".join(p.relative_to(base).with_suffix("").parts): p for p in sorted(base.rglob("*.py"))}


def may_import(room: str) -> set[str]:
    """The dotted names below the package that this room may import."""
    wing, _, name = room.rpartition(".")
    rooms = {other: {f"{other}.{name}" for name in names} for other, names in WINGS.items()}
    if wing:
        above = {*ROAD} | {f"{wing}.{other}" for other in WINGS[wing][: WINGS[wing].index(name)]}
        # the command line calls every wing; what is trained is loaded before, perhaps compiled, and written afterwards
        called = {"cli": [other for other in rooms if other != "cli"], "train": ["load", "faster"]}
        called = {**called, "serve": ["speculative"]}.get(wing, [])
        return above.union(*(rooms[other] for other in called))
    above = set(ROAD[: ROAD.index(room)])
    made_of = rooms["load"] | rooms["faster"] | rooms["ranks"] | rooms["speculative"]
    return above | made_of if room == "llm" else above  # where a model is made


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
            if node.module in {"minillm", *(f"minillm.{wing}" for wing in WINGS)}:  # import x: a room or a public name
                found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
            else:
                found.append((node.module, id(node) in top))
    return found


ROOMS = sorted(name for name in modules() if name.rpartition(".")[2] not in ENTRANCES)


def test_every_file_has_its_place():
    listed = {*ROAD, *(f"{wing}.{name}" for wing, names in WINGS.items() for name in names)}
    assert set(ROOMS) <= listed
    assert "errors" in ROOMS  # the test looks at something
    assert "load.hub" in ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_imports_only_from_above(room):
    allowed = {"minillm.__version__", *(f"minillm.{name}" for name in may_import(room))}
    below = [name for name, _ in imports(modules()[room]) if name.split(".")[0] == "minillm" and name not in allowed]
    assert below == [], f"{room} imports {below}, which do not stand above it"


def test_no_room_is_too_large():
    """A room is read in one sitting; what the road is allowed to grow to is a decision, not an accident."""
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert {name: count for name, count in lines.items() if count > 420} == {}
    assert sum(count for name, count in lines.items() if "." not in name) <= 3300


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
    allowed = {
        "attention",
        "load.backends",
        "linear",
        "sampling",
        "load.quantize",
        "load.lora",
        "train.lora",
        "faster.compiled",
        "faster.steps",
        "speculative.verify",
        "rope",
    }
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
