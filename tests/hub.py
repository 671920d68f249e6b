"""A stand-in of the Hub on this machine: as much of its HTTP API as the real client needs to create, push and read."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


class Hub:
    """What was pushed: `files` by repository and path, and the summaries of the `commits`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.blobs: dict[str, bytes] = {}

    def commit(self, repo: str, body: bytes) -> dict[str, Any]:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.commits.append(value["summary"])
            elif entry["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.blobs[value["oid"]]
        oid = hashlib.sha1(body).hexdigest()
        return {"success": True, "commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid}


def mistakes(card: str) -> list[str]:
    """What the Hub's validation finds wrong in the metadata of a card, as far as results are concerned."""
    metadata = yaml.safe_load(card.split("---")[1])
    found = [
        f'"{key}" must be a list'
        for key in ("tags", "metrics", "datasets")
        if not isinstance(metadata.get(key, []), list)
    ]
    for index, model in enumerate(metadata.get("model-index", [])):
        for number, result in enumerate(model["results"]):
            place = f'"model-index[{index}].results[{number}]'
            wanted = (("task", "type"), ("dataset", "type"), ("dataset", "name"))
            found += [
                f'{place}.{part}.{key}" is required' for part, key in wanted if not result.get(part, {}).get(key)
            ]
            if not result.get("metrics"):
                found.append(f'{place}.metrics" is required')
            found += [
                f'{place}.metrics" need type and value'
                for m in result.get("metrics", [])
                if {"type", "value"} - m.keys()
            ]
    return found


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            return self._answer({"name": "tester", "type": "user", "orgs": []})
        if path.startswith("/api/models/"):
            repo = "/".join(path.split("/")[3:5])
            if repo in self.hub.files:
                siblings = [{"rfilename": name} for name in self.hub.files[repo]]
                return self._answer({"id": repo, "modelId": repo, "siblings": siblings, "tags": [], "sha": "0" * 40})
        elif "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            content = self.hub.files.get(repo, {}).get(rest.partition("/")[2])
            if content is not None:
                return self._answer(content)
            if repo in self.hub.files:
                return self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def do_PUT(self) -> None:
        self.hub.blobs[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body, path = self._body(), self.path.partition("?")[0]
        repo = "/".join(path.split("/")[3:5])
        if path == "/api/validate-yaml":
            errors = [{"message": text} for text in mistakes(json.loads(body)["content"])]
            self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, [asked.get("organization") or "tester", asked["name"]]))
            self.hub.files.setdefault(name, {})
            self._answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        elif "/preupload/" in path:
            files = [one["path"] for one in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith((".safetensors", ".bin", ".png")) else "regular" for name in files}
            self._answer({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            uploads = [{"upload": {"href": f"{self.hub.url}/blobs/{one['oid']}"}} for one in objects]
            pairs = zip(objects, uploads, strict=True)
            self._answer({"transfer": "basic", "objects": [{**one, "actions": actions} for one, actions in pairs]})
        elif "/commit/" in path:
            self._answer(self.hub.commit(repo, body))
        else:
            self._answer({"error": f"no such route: {path}"}, 404)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(
        self, content: bytes | dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        found = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": "0" * 40, "Content-Type": kind}
        for name, value in {**found, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def local_hub() -> Iterator[Hub]:
    """A Hub that answers on a free port of this machine until the block ends."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield handler.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
