"""The README's Python runs as it stands, on a small real model in place of the one it names."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.assets
def test_the_python_of_the_readme_runs(assets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 2
    code = "\n".join(blocks)
    named = '"HuggingFaceTB/SmolLM2-135M-Instruct"'
    assert named in code
    namespace: dict = {}
    exec(compile(code.replace(named, repr(str(assets / "models" / "stories260k_hf"))), "README.md", "exec"), namespace)
    assert namespace["small"].config.num_hidden_layers == namespace["result"].plan.num_layers - 1
    assert len(namespace["selection"].layers) == 2


def test_the_readme_names_the_make_targets_and_stays_short():
    text = README.read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text
    assert len(text.splitlines()) < 140
