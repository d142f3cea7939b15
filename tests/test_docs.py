"""The documentation's Python runs as it stands, on a small real model in place of the one it names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NAMED = '"HuggingFaceTB/SmolLM2-135M-Instruct"'


def _python(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.assets
@pytest.mark.parametrize("page", [p for p in PAGES if _python(p)], ids=lambda page: str(page.relative_to(DOCS)))
def test_the_python_of_a_page_runs(page, assets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(_python(page)).replace(NAMED, repr(str(assets / "models" / "stories260k_hf")))
    exec(compile(code, str(page), "exec"), {})


@pytest.mark.parametrize("page", sorted((DOCS / "methods").glob("*.md")), ids=lambda page: page.stem)
def test_a_method_has_its_equation_source_deviations_result_and_use(page):
    text = page.read_text(encoding="utf-8")
    assert "```text\n" in text
    for part in ("**Source.**", "**Deviations.**", "**Result.**", "**Use.**"):
        assert part in text


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert str(page.relative_to(DOCS)) in navigation
