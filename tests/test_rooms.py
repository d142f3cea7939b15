"""The structure that the rest relies on: data flows one way, and importing hf_cka stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_cka"

# A room imports only from rooms above it.
ROOMS = (
    "lookup",
    "similarity",
    "anatomy",
    "data",
    "modeling",
    "representations",
    "selection",
    "lora",
    "pruning",
    "training",
    "evaluation",
    "hub",
    "cli",
)
# The remote-code file imports nothing of hf_cka, so that it can go with a checkpoint: any room may import it.
LEAF = "hf_cka.modeling.modeling_hf_cka"
HEAVY = (
    *("peft", "trl", "datasets", "matplotlib", "jinja2", "gguf", "pandas", "sklearn", "lm_eval", "codecarbon"),
    *("PIL", "soundfile", "jiwer"),
)


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _imports(file: Path) -> set[str]:
    """Modules and names of hf_cka that a file imports; of `from hf_cka.a import b` both, unless b is the leaf."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names == {LEAF} else {node.module} | names
    return {name for name in found if name.startswith("hf_cka.")}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_above(file):
    relative = file.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    if own == "__init__":
        pytest.skip("the front door names every room")
    assert own in ROOMS, f"{own} is not a room of the design"
    allowed = {*ROOMS[: ROOMS.index(own) + 1], ""}
    # names taken from the package itself (hf_cka.__version__) are no room
    below = {name for name in _imports(file) if _room(name) in ROOMS and _room(name) not in allowed}
    assert not {name for name in below if name != LEAF and not name.startswith(f"{LEAF}.")}


def test_the_remote_code_file_imports_nothing_of_hf_cka():
    assert not _imports(PACKAGE / "modeling" / "modeling_hf_cka.py")


def test_importing_hf_cka_is_light():
    code = f"import sys, hf_cka; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_documented():
    import hf_cka

    for name in hf_cka.__all__:
        value = getattr(hf_cka, name)
        assert name == "__version__" or (value.__doc__ or "").strip(), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_cka.nothing
