"""A Hugging Face hub and a Zenodo on 127.0.0.1 that speak the few calls which publishing and opening need."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from fake_xet import chunks_of, files_of

LARGE = (".safetensors", ".lz4")


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        repositories: Files by their names, by ``models/owner/name`` or ``datasets/owner/name``.
        stored: Contents of large files by their SHA-256, which a commit then gives names to.
        xorbs: Chunks of large files that came by Xet, by name of their xorb.
        deposits: Files by their names, of each Zenodo deposit.
        described: Metadata of each Zenodo deposit.
        calls: Methods and paths, in order.
        refuses: A status with which everything is answered, with a reason.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.stored: dict[str, bytes] = {}
        self.xorbs: dict[str, list[bytes]] = {}
        self.deposits: list[dict[str, bytes]] = []
        self.described: list[dict] = []
        self.calls: list[str] = []
        self.refuses: tuple[int, str] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Run a hub for as long as it is needed."""
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args) -> None:
        pass

    def _any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.server.calls.append(f"{self.command} {path}")
        if self.server.refuses is not None:
            status, reason = self.server.refuses
            return self._json({"error": reason}, status, {"X-Error-Message": reason})
        for method, pattern, answer in _ROUTES:
            if method == self.command.replace("HEAD", "GET") and (found := re.fullmatch(pattern, path)):
                return answer(self, body, *found.groups())
        return self._json({"error": f"no such call: {self.command} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = _any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, obj, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(json.dumps(obj).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    # -- the hub

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        kind = f"{asked.get('type') or 'model'}s"
        url = f"{self.server.address}/{'' if kind == 'models' else kind + '/'}{name}"
        is_new = f"{kind}/{name}" not in self.server.repositories
        self.server.repositories.setdefault(f"{kind}/{name}", {})
        self._json({"url": url, "name": name, "id": name}, 200 if is_new else 409)

    def _branch(self, body: bytes, repo: str, branch: str) -> None:
        self._json({"error": "Reference already exists"}, 409)

    def _validate(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def _preupload(self, body: bytes, repo: str) -> None:
        files = json.loads(body)["files"]
        modes = [
            {"path": f["path"], "shouldIgnore": False, "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular"}
            for f in files
        ]
        self._json({"files": modes})

    def _batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**thing, "actions": {"upload": {"href": f"{self.server.address}/lfs/{thing['oid']}"}}}
            for thing in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, body: bytes, oid: str) -> None:
        right = hashlib.sha256(body).hexdigest() == oid
        self.server.stored[oid] = body
        self._json({}, 200 if right else 400)

    def _xet_token(self, body: bytes, repo: str) -> None:
        if repo.endswith("/read-only"):
            return self._json({"error": "no write access"}, 403)
        until = int(time.time()) + 3600
        self._json({"accessToken": "xet_not_a_token", "exp": until, "casUrl": f"{self.server.address}/xet"})

    def _xorb(self, body: bytes, name: str) -> None:
        self.server.xorbs[name] = chunks_of(body)
        self._json({"was_inserted": True})

    def _shard(self, body: bytes) -> None:
        files = files_of(body, self.server.xorbs)
        right = all(hashlib.sha256(content).hexdigest() == oid for oid, content in files.items())
        self.server.stored |= files
        self._json({"result": 1}, 200 if right else 400)

    def _commit(self, body: bytes, repo: str) -> None:
        files = self.server.repositories[repo]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        sha = self._sha(repo)
        self._json({"commitUrl": f"{self.server.address}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def _sha(self, repo: str) -> str:
        content = b"".join(name.encode() + data for name, data in sorted(self.server.repositories[repo].items()))
        return hashlib.sha1(content).hexdigest()

    def _info(self, body: bytes, repo: str, *_: str) -> None:
        if repo not in self.server.repositories:
            return self._missing()
        files = [{"rfilename": name} for name in sorted(self.server.repositories[repo])]
        self._json(
            {"id": repo.split("/", 1)[1], "sha": self._sha(repo), "siblings": files, "tags": [], "private": False}
        )

    def _tree(self, body: bytes, repo: str) -> None:
        files = self.server.repositories[repo]
        self._json(
            [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in sorted(files.items())
            ]
        )

    def _file(self, body: bytes, repo: str, name: str) -> None:
        repo = repo if repo.startswith("datasets/") else f"models/{repo}"
        data = self.server.repositories.get(repo, {}).get(name)
        if data is None:
            return self._missing("EntryNotFound" if repo in self.server.repositories else "RepoNotFound")
        self._answer(data, headers={"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self._sha(repo)})

    def _missing(self, code: str = "RepoNotFound") -> None:
        self._json({"error": "Repository not found"}, 404, {"X-Error-Code": code})

    # -- Zenodo

    def _deposit(self, body: bytes) -> None:
        number, address = len(self.server.deposits), self.server.address
        self.server.deposits.append({})
        self.server.described.append({})
        links = {name: f"{address}/zenodo/{name}/{number}" for name in ("html", "latest_draft", "bucket", "discard")}
        self._json({"id": number, "links": links})

    def _describe(self, body: bytes, number: str) -> None:
        self.server.described[int(number)] = json.loads(body)["metadata"]
        self._json({})

    def _put(self, body: bytes, number: str, name: str) -> None:
        self.server.deposits[int(number)][name] = body
        self._json({})


_REPO = r"((?:models|datasets)/[^/]+/[^/]+)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", f"/api/{_REPO}/branch/([^/]+)", _Handler._branch),
    ("POST", "/api/validate-yaml", _Handler._validate),
    ("POST", f"/api/{_REPO}/preupload/main", _Handler._preupload),
    ("POST", r"/(.+)\.git/info/lfs/objects/batch", _Handler._batch),
    ("PUT", "/lfs/([0-9a-f]{64})", _Handler._store),
    ("GET", f"/api/{_REPO}/xet-write-token/main", _Handler._xet_token),
    ("POST", "/xet/v1/xorbs/default/([0-9a-f]{64})", _Handler._xorb),
    ("POST", "/xet/v1/shards", _Handler._shard),
    ("POST", f"/api/{_REPO}/commit/main", _Handler._commit),
    ("GET", f"/api/{_REPO}(?:/revision/([^/]+))?", _Handler._info),
    ("GET", f"/api/{_REPO}/tree/[^/]+", _Handler._tree),
    ("GET", r"/((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", _Handler._file),
    ("POST", "/api/deposit/depositions", _Handler._deposit),
    ("PUT", r"/zenodo/latest_draft/(\d+)", _Handler._describe),
    ("PUT", r"/zenodo/bucket/(\d+)/(.+)", _Handler._put),
]
