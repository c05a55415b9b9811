"""A stand-in for the Hugging Face hub: a small server on this machine, asked by the hub's own client."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """What the stand-in serves: repositories with their files, and those that are gated."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    """Each with its repository, message, the paths of its files, and whether it was proposed."""
    private: set[str] = field(default_factory=set)
    refuses: bool = False
    """Whether it takes no commit."""


def _handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(self.path.split("?")[0]).strip("/")
            hub.asked.append(path)
            if not path:
                return self._answer(200)
            repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
            if repo not in hub.repos:
                return self._answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            if repo in hub.gated:
                return self._answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            rest = path.removeprefix("api/models/").split("/")[2:]
            if rest[:1] == ["resolve"] and rest[1] not in ("main", COMMIT, "v1"):
                return self._answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev")
            if path.startswith("api/"):
                if "tree" in rest:
                    entries = [
                        {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                        for name, data in hub.repos[repo].items()
                    ]
                    return self._answer(200, json.dumps(entries).encode(), Content_Type="application/json")
                siblings = [{"rfilename": name} for name in hub.repos[repo]]
                info = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
                return self._answer(200, json.dumps(info).encode(), Content_Type="application/json")
            data = hub.repos[repo].get("/".join(rest[2:]))
            if data is None:
                return self._answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
            return self._answer(200, data, ETag=f'"{hash(data) & 0xFFFFFFFF:x}"')

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path, _, query = unquote(self.path).strip("/").partition("?")
            if path == "api/validate-yaml":
                return self._json({"warnings": [], "errors": []})
            if path == "api/repos/create":
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                there = json.dumps({"url": f"{hub.url}/{repo}", "name": repo, "id": repo}).encode()
                if repo in hub.repos:
                    return self._answer(409, there, Content_Type="application/json")
                hub.repos[repo] = {}
                if asked.get("private") or asked.get("visibility") == "private":
                    hub.private.add(repo)
                return self._answer(200, there, Content_Type="application/json")
            repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
            if hub.refuses or repo in hub.gated:
                return self._answer(403, b'{"error": "you may not write here"}', Content_Type="application/json")
            if repo not in hub.repos:
                return self._answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            if "/preupload/" in path:
                asked = json.loads(body)["files"]
                modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
                return self._json({"files": modes})
            assert "/commit/" in path
            said = [json.loads(line) for line in body.splitlines()]
            files = {
                each["value"]["path"]: base64.b64decode(each["value"]["content"])
                for each in said
                if each["key"] == "file"
            }
            proposed = "create_pr=1" in query
            message = next(each["value"]["summary"] for each in said if each["key"] == "header")
            hub.commits.append({"repo": repo, "message": message, "files": sorted(files), "proposed": proposed})
            if not proposed:
                hub.repos[repo].update(files)
            url = f"{hub.url}/{repo}/commit/{COMMIT}"
            request = {"pullRequestUrl": f"{hub.url}/{repo}/discussions/1"} if proposed else {}
            return self._json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": "", **request})

        def _json(self, value: Any) -> None:
            self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    return Handler


@contextmanager
def standing_in(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """Serve a hub, and point the hub's client at it, its cache in `cache`."""
    from huggingface_hub import constants

    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    old = constants.ENDPOINT
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(old, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
