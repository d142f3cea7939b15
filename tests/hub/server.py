"""A Hub on the loopback interface, for tests with the real client: repositories, commits, LFS, downloads.

It speaks what `huggingface_hub` 2.4 and transformers ask of the Hub for models, over `http.server`, and keeps
everything in memory. `HF_ENDPOINT` must be set before the client is imported, so clients run in processes of their
own, with the variables that `LoopbackHub.environment` returns. Xet storage is left out (`HF_HUB_DISABLE_XET=1`): the
client then uploads large files through LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "user"
# not written out in one piece, so that no scanner takes it for a token that leaked
TOKEN = "hf_" + "LoopbackHubTestTokenAbcdefghijklmn"
_LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".png")


@dataclass
class Repo:
    """One repository: its commits, and what its branches point to."""

    private: bool
    commits: dict[str, dict[str, str]] = field(default_factory=dict)  # commit -> path -> oid of the content
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, ref: str, files: dict[str, str], message: str, parent: str | None) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files.items())} {parent}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        self.messages.append(message)
        return oid

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class HubError(Exception):
    """Becomes an answer with a status and, where the Hub has one, an error code."""

    def __init__(self, status: int, message: str, code: str = "", **more: str) -> None:
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


class LoopbackHub:
    """Runs while it is used as a context manager; `repos` and `contents` can be looked at at any time."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.contents: dict[str, bytes] = {}  # by git blob id, or by sha256 for LFS files
        self.lfs: set[str] = set()
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def __enter__(self) -> LoopbackHub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        # the client follows redirects on the Hub itself, and takes those to another host for the download
        self.storage = f"http://localhost:{port}/storage"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Environment variables of a client process with an HF_HOME of its own."""
        dropped = ("HF_", "HUGGING", "TRANSFORMERS_")
        rest = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        proxies = ("http_proxy", "https_proxy", "all_proxy")
        rest = {name: value for name, value in rest.items() if name.lower() not in proxies}
        return {
            **rest,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            **({"HF_TOKEN": token} if token else {}),
        }

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a repository."""
        repo = self.repos[name]
        return {path: self.contents[oid] for path, oid in repo.commits[repo.find(revision)].items()}

    # ---- what the endpoints do ----

    def repo(self, name: str, authorized: bool) -> Repo:
        repo = self.repos.get(name)
        if repo is None or (repo.private and not authorized):
            # the Hub answers 401 to strangers, so that they cannot tell a private repository from none
            raise HubError(404 if authorized else 401, "Repository not found", "RepoNotFound")
        return repo

    def tree(self, name: str, revision: str, authorized: bool) -> tuple[str, dict[str, str]]:
        repo = self.repo(name, authorized)
        commit = repo.find(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repo.commits[commit]

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        name = f"{body.get('organization') or USER}/{body['name']}"
        if name in self.repos:
            raise HubError(409, "You already created this model repo", url=f"{self.endpoint}/{name}")
        self.repos[name] = repo = Repo(private=body.get("visibility") == "private" or bool(body.get("private")))
        repo.commit("main", {".gitattributes": self.store(b"*.safetensors filter=lfs\n")}, "initial commit", None)
        return {"url": f"{self.endpoint}/{name}", "name": name, "id": name}

    def store(self, content: bytes) -> str:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.contents[oid] = content
        return oid

    def entry(self, path: str, oid: str) -> dict[str, Any]:
        size = len(self.contents[oid])
        pointer = hashlib.sha1(b"blob " + oid.encode()).hexdigest() if oid in self.lfs else oid
        found: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": pointer}
        if oid in self.lfs:
            found["lfs"] = {"oid": oid, "size": size, "pointerSize": 134}
        return found

    def info(self, name: str, revision: str, authorized: bool) -> dict[str, Any]:
        commit, files = self.tree(name, revision, authorized)
        readme = self.contents[files["README.md"]].decode() if "README.md" in files else ""
        metadata = re.match(r"---\n(.*?)\n---", readme, re.DOTALL)
        return {
            "_id": "0" * 24,
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": self.repos[name].private,
            "cardData": yaml.safe_load(metadata.group(1)) if metadata else None,
            "siblings": [{"rfilename": path} for path in files],
            "tags": [],
        }

    def commit(self, name: str, revision: str, lines: list[dict[str, Any]], create_pr: bool) -> dict[str, Any]:
        repo = self.repo(name, True)
        parent, before = self.tree(name, revision, True)
        files, message = dict(before), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = self.store(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.contents:
                    raise HubError(400, f"{value['path']}: the LFS object {value['oid']} was not uploaded")
                files[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise HubError(400, f"unknown operation {line['key']!r}")
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        oid = repo.commit(f"refs/pr/{number}" if create_pr else revision, files, message, parent)
        return {
            "commitUrl": f"{self.endpoint}/{name}/commit/{oid}",
            "commitOid": oid,
            "pullRequestUrl": f"{self.endpoint}/{name}/discussions/{number}" if create_pr else None,
        }


def _check_card(content: str) -> list[str]:
    """What the Hub refuses in the metadata of a card, as far as the tests need it."""
    match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
    try:
        data = yaml.safe_load(match.group(1)) if match else {}
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    errors = []
    for name in ("base_model", "datasets"):
        values = data.get(name) or []
        for value in [values] if isinstance(values, str) else values:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(value)):
                errors.append(f'"{name}" with value "{value}" is not valid')
    if data.get("base_model_relation", "finetune") not in ("adapter", "finetune", "merge", "quantized"):
        errors.append(f'"base_model_relation" with value "{data["base_model_relation"]}" is not valid')
    return errors


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self._chunks()
        url = urlsplit(self.path)
        self.path_only, self.query = url.path, parse_qs(url.query)
        self.authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.hub.requests.append(f"{self.command} {self.path}")
        try:
            with self.hub.lock:
                self._route()
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)} if error.code else {}
            self._json({"error": str(error), **error.more}, error.status, headers)

    def _chunks(self) -> bytes:
        parts = []
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        return b"".join(parts)

    def _route(self) -> None:
        for method, pattern, handler in _ROUTES:
            match = re.fullmatch(pattern, self.path_only)
            if match and self.command in method.split():
                return handler(self, **{name: unquote(value) for name, value in match.groupdict().items()})
        raise HubError(404, f"no such endpoint: {self.command} {self.path}")

    def _write_access(self) -> None:
        if not self.authorized:
            raise HubError(401, "Invalid username or password.")

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})

    # ---- endpoints ----

    def whoami(self) -> None:
        self._write_access()
        self._json({"type": "user", "id": "1", "name": USER, "fullname": USER, "orgs": [], "auth": {}})

    def create(self) -> None:
        self._write_access()
        self._json(self.hub.create(json.loads(self.body)))

    def validate_yaml(self) -> None:
        errors = [{"message": message} for message in _check_card(json.loads(self.body)["content"])]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def branch(self, name: str, branch: str) -> None:
        self._write_access()
        repo = self.hub.repo(name, True)
        if branch in repo.refs:
            raise HubError(409, f"Reference already exists: {branch}")
        repo.refs[branch] = repo.refs["main"]
        self._json({"ref": f"refs/heads/{branch}"}, 201)

    def preupload(self, name: str, revision: str) -> None:
        self._write_access()
        _, files = self.hub.tree(name, revision, True)
        found = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                **({"oid": files[file["path"]]} if file["path"] in files else {}),
            }
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": found})

    def lfs_batch(self, name: str) -> None:
        self._write_access()
        self.hub.repo(name, True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            found = dict(asked)
            if asked["oid"] not in self.hub.contents:
                base = f"{self.hub.endpoint}/{name}.git/lfs/{asked['oid']}"
                found["actions"] = {"upload": {"href": base}, "verify": {"href": f"{base}/verify"}}
            objects.append(found)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, name: str, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "the content does not have the hash that was announced")
        self.hub.contents[oid] = self.body
        self.hub.lfs.add(oid)
        self._json({})

    def lfs_verify(self, name: str, oid: str) -> None:
        size = json.loads(self.body)["size"]
        if len(self.hub.contents.get(oid, b"")) != size:
            raise HubError(400, "the size differs")
        self._json({})

    def commit(self, name: str, revision: str) -> None:
        self._write_access()
        lines = [json.loads(line) for line in self.body.splitlines()]
        self._json(self.hub.commit(name, revision, lines, "create_pr" in self.query))

    def info(self, name: str, revision: str = "main") -> None:
        self._json(self.hub.info(name, revision, self.authorized))

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        _, files = self.hub.tree(name, revision, self.authorized)
        inside = {path: oid for path, oid in files.items() if path.startswith(f"{folder}/") or not folder}
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        self._json([self.hub.entry(path, oid) for path, oid in inside.items()])

    def paths_info(self, name: str, revision: str) -> None:
        _, files = self.hub.tree(name, revision, self.authorized)
        asked = json.loads(self.body)["paths"]
        self._json([self.hub.entry(path, files[path]) for path in asked if path in files])

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit, files = self.hub.tree(name, revision, self.authorized)
        common = {"X-Repo-Commit": commit}
        if path not in files:
            headers = {**common, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self._json({"error": "Entry not found"}, 404, headers)
        oid = files[path]
        content = self.hub.contents[oid]
        if oid in self.hub.lfs:
            headers = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            return self._send(302, b"", {**common, **headers, "Location": f"{self.hub.storage}/{oid}"})
        return self._send(200, content, {**common, "ETag": f'"{oid}"', "Content-Type": "text/plain"})

    def storage(self, oid: str) -> None:
        content = self.hub.contents[oid]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self._send(200, content, {"ETag": f'"{oid}"'})
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        headers = {"ETag": f'"{oid}"', "Content-Range": f"bytes {start}-{end}/{len(content)}"}
        return self._send(206, content[start : end + 1], headers)


_NAME = r"(?P<name>[^/]+/[^/]+)"
_ROUTES: tuple[tuple[str, str, Any], ...] = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"/api/models/{_NAME}/branch/(?P<branch>[^/]+)", _Handler.branch),
    ("POST", f"/api/models/{_NAME}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", f"/api/models/{_NAME}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", f"/api/models/{_NAME}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("GET", f"/api/models/{_NAME}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", f"/api/models/{_NAME}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", f"/api/models/{_NAME}/tree/(?P<revision>[^/]+)/(?P<folder>.+)", _Handler.tree),
    ("GET", f"/api/models/{_NAME}", _Handler.info),
    ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/(?P<name>[^/]+/[^/]+)\.git/lfs/(?P<oid>\w+)", _Handler.lfs_put),
    ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/lfs/(?P<oid>\w+)/verify", _Handler.lfs_verify),
    ("HEAD GET", f"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("HEAD GET", r"/storage/(?P<oid>\w+)", _Handler.storage),
)
