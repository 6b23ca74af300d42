"""A server on this machine that speaks as much of the Hugging Face Hub's protocol as downloads use."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves the repositories root/models/ORG/NAME and root/datasets/ORG/NAME. `gated` names some that need a token;
    of files whose names are in `broken` the connection drops in the middle, as often as it says."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.asked = root, list[str]()
        self.gated: set[str] = set()
        self.broken: dict[str, int] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.server.asked.append(f"{self.command} {path}")
        if path.startswith("api/"):
            kind, organisation, name, what, *file = path.removeprefix("api/").split("/")
        else:
            kind, _, rest = path.partition("/") if path.startswith("datasets/") else ("models", "", path)
            organisation, name, what, _, *file = rest.split("/")
        repository = f"{organisation}/{name}"
        folder = self.server.root / kind / repository
        if not folder.is_dir():
            return self.send(404, error="RepoNotFound")
        if repository in self.server.gated and "authorization" not in self.headers:
            return self.send(401, error="GatedRepo")
        files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
        if what == "revision":
            return self.send(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": []}).encode())
        if what == "tree":
            tree = [
                {"type": "file", "path": name, "size": p.stat().st_size, "oid": oid(p)} for name, p in files.items()
            ]
            return self.send(200, json.dumps(tree).encode())
        found = files.get("/".join(file))
        if found is None:
            return self.send(404, error="EntryNotFound")
        return self.send_file(found)

    def send_file(self, path: Path) -> None:
        content = path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        body = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{oid(path)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.broken.get(path.name, 0) > 0:
            self.server.broken[path.name] -= 1
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(body)

    def send(self, status: int, body: bytes = b"{}", error: str = "") -> None:
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
