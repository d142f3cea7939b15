import json

import pytest
import torch
from safetensors.torch import save_file

from hf_cka.hub import find_private

TOKEN = "hf_" + "x" * 34


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("config.json", '{"a": {"b": ["/fsx/team/model"]}}', "config.json, a.b[0]: path /fsx/team/model"),
        ("config.json", '{"a": "/odd/place/model"}', "config.json, a: path /odd/place/model"),
        ("config.json", '{"a": "C:\\\\Users\\\\me\\\\model"}', "config.json, a: path C:\\Users\\me\\model"),
        ("config.json", '{"a": "file:///etc/hosts"}', "config.json, a: path file:///etc/hosts"),
        ("code.py", "x = 1\npath = '/home/me/x.txt'", "code.py, line 2: path /home/me/x.txt"),
        ("README.md", "run it with --model=/tmp/out now", "README.md, line 1: path /tmp/out"),
        ("sub/run.sh", f"export HF_TOKEN={TOKEN}", "sub/run.sh, line 1: token hf_xxx..."),
        ("tokenizer.json", '{"post": {"a": "/home/me/tok"}}', "tokenizer.json, post.a: path /home/me/tok"),
        ("broken.json", "{ /home/me/x", "broken.json, line 1: path /home/me/x"),
    ],
)
def test_what_must_not_leave_is_found_and_located(tmp_path, file, text, found):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert [str(finding) for finding in find_private(tmp_path)] == [found]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("README.md", "see https://example.org/home/page and [x](https://hub/data/y) or a/tmp/b, layers/mlp, 1/2"),
        ("README.md", "regular expression /(?i:x)/ and and/or, TCP/IP, model.layers.0, </details>, // comment"),
        ("tokenizer.json", '{"model": {"vocab": {"/home/user": 1}, "merges": ["/home /user"]}, "added_tokens": []}'),
        ("vocab.json", '{"/home/user/": 1}'),
        ("template.jinja", "Q:\\nwhat\\nA:\\n{{ answer }}"),
        ("config.json", '{"base_model": "user/model", "url": "https://x.org/home/a", "pattern": "/think"}'),
        ("code.py", "hf_quantizer_with_a_long_name_that_goes_on_and_on = hf_cka"),
        ("weights.bin", "/home/me/in/a/binary"),
    ],
)
def test_what_only_looks_like_it_passes(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    assert find_private(tmp_path) == []


def test_this_machine_s_own_folders_are_known(tmp_path):
    (tmp_path / "log.txt").write_text(f"wrote,{tmp_path}!")
    assert [finding.kind for finding in find_private(tmp_path)] == ["path"]


def test_the_header_of_the_weights_is_read(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt", "from": "/home/me/x"})
    assert [str(f) for f in find_private(tmp_path)] == ["model.safetensors, __metadata__.from: path /home/me/x"]


def test_ignored_files_and_given_secrets(tmp_path):
    (tmp_path / "notes.json").write_text(json.dumps({"key": "s3cret-value"}))
    assert find_private(tmp_path) == []
    assert [f.kind for f in find_private(tmp_path, tokens=("s3cret-value",))] == ["token"]
    assert find_private(tmp_path, tokens=("s3cret-value",), ignored=("notes.*",)) == []
