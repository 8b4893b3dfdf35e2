"""A stand-in for the Hub's HTTP interface: as much of it as creating, committing and reading take.

Faults are asked for by method and path, and last for a number of requests.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "x" * 34  # of the form that tokens have; no logs may show it


@dataclass
class Repository:
    """Private or not, and the files of each revision; a commit's name is that of its content."""

    visibility: str
    license: str | None = None
    """That its card names."""
    revisions: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})

    def commit(self, revision: str) -> str:
        """The 40 hex digits of what a revision holds."""
        files = self.revisions[revision]
        content = json.dumps({p: hashlib.sha256(b).hexdigest() for p, b in sorted(files.items())})
        return hashlib.sha1(content.encode()).hexdigest()

    def files(self, revision: str) -> dict[str, bytes]:
        """Of a branch, or of a commit."""
        for name, files in self.revisions.items():
            if revision in (name, self.commit(name)):
                return files
        raise KeyError(revision)


@dataclass
class Fault:
    method: str
    path: str
    """Searched for in the path."""
    what: int | str
    """A status, or "cut": the connection ends within the request."""
    times: int = 1


class Hub:
    """Up within `with`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault(self, method: str, path: str) -> int | str | None:
        """What this request meets, if anything."""
        for one in self.faults:
            if one.times and one.method == method and re.search(one.path, path):
                one.times -= 1
                return one.what
        return None

    def commits(self, repo_id: str, revision: str, lines: list[dict[str, Any]]) -> None:
        """Take what a commit brings."""
        files = self.repositories[repo_id].revisions.setdefault(revision, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "deletedFile":
                del files[value["path"]]
            if line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one(self, method: str) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{method} {path}")
        fault = self.hub.fault(method, path)
        if fault == "cut":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0))))
            self.connection.close()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if isinstance(fault, int):
            return self.answer(fault, {"error": "as asked for"})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/lfs/"):
            return self.answer(401, {"error": "Invalid credentials"})
        getattr(self, f"on_{method.lower()}")(path, body)

    def do_GET(self) -> None:
        self.handle_one("GET")

    def do_HEAD(self) -> None:
        self.handle_one("HEAD")

    def do_POST(self) -> None:
        self.handle_one("POST")

    def do_PUT(self) -> None:
        self.handle_one("PUT")

    def on_post(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = name in hub.repositories
            hub.repositories.setdefault(name, Repository(asked.get("visibility", "public")))
            return self.answer(409 if there else 200, {"url": f"{hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/(\S+/\S+)\.git/info/lfs/objects/batch", path):
            return self.answer(200, {"objects": list(map(self._lfs, json.loads(body)["objects"]))})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/]+)", path)
        assert found, path
        repo_id, what, revision = found.groups()
        repository = hub.repositories[repo_id]
        if what == "branch":
            there = revision in repository.revisions
            repository.revisions.setdefault(revision, dict(repository.revisions["main"]))
            return self.answer(409 if there else 200, {})
        if what == "preupload":
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        request = "create_pr=1" in self.path
        revision = "refs/pr/1" if request else revision
        hub.commits(repo_id, revision, list(map(json.loads, body.decode().splitlines())))
        oid = repository.commit(revision)
        url = f"{hub.url}/{repo_id}/commit/{oid}"
        pull = {"pullRequestUrl": f"{hub.url}/{repo_id}/discussions/1"} if request else {}
        return self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url} | pull)

    def _lfs(self, wanted: dict[str, Any]) -> dict[str, Any]:
        oid = wanted["oid"]
        known = {"oid": oid, "size": wanted["size"]}
        if oid in self.hub.large:
            return known
        return known | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{oid}"}}}

    def on_put(self, path: str, body: bytes) -> None:
        oid = path.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "another content"})
        self.hub.large[oid] = body
        return self.answer(200, {})

    def on_get(self, path: str, _: bytes) -> None:
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            repo_id, revision = found.group(1), found.group(2) or "main"
            repository = self.hub.repositories.get(repo_id)
            if repository is None:
                return self.answer(404, {"error": "Repository not found"}, "RepoNotFound")
            siblings = [{"rfilename": name} for name in repository.files(revision)]
            sha = revision if len(revision) == 40 else repository.commit(revision)
            content = {
                "id": repo_id, "sha": sha, "siblings": siblings, "tags": [], "downloads": 0,
                "likes": 0, "private": repository.visibility == "private",
                "cardData": {"license": repository.license} if repository.license else None,
            }  # fmt: skip
            return self.answer(200, content)
        return self._file(path, True)

    def on_head(self, path: str, _: bytes) -> None:
        self._file(path, False)

    def _file(self, path: str, whole: bool) -> None:
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not found or found.group(1) not in self.hub.repositories:
            return self.answer(404, {"error": "Repository not found"}, "RepoNotFound")
        repo_id, revision, name = found.groups()
        repository = self.hub.repositories[repo_id]
        try:
            files = repository.files(revision)
        except KeyError:
            return self.answer(404, {"error": "Invalid rev"}, "RevisionNotFound")
        if name not in files:
            return self.answer(404, {"error": "Entry not found"}, "EntryNotFound")
        content = files[name]
        commit = revision if len(revision) == 40 else repository.commit(revision)
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if whole:
            self.wfile.write(content)

    def answer(self, status: int, content: dict[str, Any], code: str | None = None) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(text)
