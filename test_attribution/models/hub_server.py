"""A stand-in for the Hugging Face hub: repositories in memory, its addresses and headers, its failures."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

# Kept by Git LFS on the hub: answered by a redirect to another host, with the SHA-256 on record.
LARGE = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx", ".gguf")


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Request:
    """What was asked for: the file of a repository, or the path of another address."""

    method: str
    file: str
    range: str | None
    authorization: str | None


@dataclass
class Repository:
    """Commits with their files, and the names of commits."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    # An answer to each question for its list of files, or for its files: status, X-Error-Code.
    refuse_list: tuple[int, str] | None = None
    refuse_files: tuple[int, str] | None = None
    # Sizes that the list gives instead of the true ones.
    sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, files: dict[str, bytes]) -> Repository:
        commit = hashlib.sha1(repr(sorted((name, git_id(each)) for name, each in files.items())).encode()).hexdigest()
        return cls({commit: files}, {"main": commit})

    @property
    def head(self) -> str:
        return self.refs["main"]


@dataclass
class Hub:
    """The server's state, which a test changes while it runs."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    # Files whose connection breaks off before this byte, and how many more times it does.
    cut_at: dict[str, int] = field(default_factory=dict)
    cuts: float = float("inf")
    # Files that arrive with other bytes than the hub has on record.
    wrong: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    bytes_sent: dict[str, int] = field(default_factory=dict)
    endpoint: str = ""

    def files(self, method: str = "GET") -> list[str]:
        """Names of the files that were asked for, in order."""
        return [each.file for each in self.requests if each.method == method and not each.file.startswith("/")]

    @property
    def lists(self) -> int:
        """How often the files of a repository were asked for; the client asks for other things by itself."""
        return sum(each.file.startswith("/api/models/") for each in self.requests)

    def ranges(self, file: str) -> list[str | None]:
        return [each.range for each in self.requests if each.method == "GET" and each.file == file]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Keep standard error for the tests."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            self._note(path)
            self._list(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            name, _, rest = path.removeprefix("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            self._note(file)
            self._resolve(name, revision, file)
        elif path.startswith("/lfs/"):
            file = path.partition("//")[2]
            self._note(file)
            name, _, commit = path.removeprefix("/lfs/").partition("//")[0].rpartition("/")
            self._send(file, self.hub.repositories[name].commits[commit][file], {})
        else:
            self._note(path)
            self._refuse(404, "")

    def _note(self, file: str) -> None:
        headers = self.headers
        self.hub.requests.append(Request(self.command, file, headers.get("Range"), headers.get("Authorization")))

    def _refuse(self, status: int, code: str) -> None:
        body = b'{"error": "no"}'
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _commit(self, repository: Repository, revision: str) -> str | None:
        return revision if revision in repository.commits else repository.refs.get(revision)

    def _list(self, path: str) -> None:
        name, _, revision = path.partition("/revision/")
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._refuse(404, "RepoNotFound")
        if repository.refuse_list:
            return self._refuse(*repository.refuse_list)
        commit = self._commit(repository, revision or "main")
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        siblings = []
        for file, content in repository.commits[commit].items():
            size = repository.sizes.get(file, len(content))
            entry: dict[str, Any] = {"rfilename": file, "size": size, "blobId": git_id(content)}
            if file.endswith(LARGE):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
            siblings.append(entry)
        body = json.dumps({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._refuse(404, "RepoNotFound")
        if repository.refuse_files:
            return self._refuse(*repository.refuse_files)
        commit = self._commit(repository, revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        content = repository.commits[commit].get(file)
        if content is None:
            return self._refuse(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_id(content)}"'}
        if not file.endswith(LARGE):
            return self._send(file, content, headers)
        self.send_response(302)
        headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        headers["X-Linked-Size"] = str(len(content))
        # Another host by name, as the real store is: the client must not send its token there.
        headers["Location"] = f"http://localhost:{self.server.server_address[1]}/lfs/{name}/{commit}//{file}"
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def _send(self, file: str, content: bytes, headers: dict[str, str]) -> None:
        content = self.hub.wrong.get(file, content)
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.send_response(206 if asked else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(content)
        if self.hub.cuts > 0 and file in self.hub.cut_at:
            self.hub.cuts -= 1
            end = self.hub.cut_at[file]
            self.close_connection = True
        part = content[start:end]
        self.wfile.write(part)
        self.hub.bytes_sent[file] = self.hub.bytes_sent.get(file, 0) + len(part)


@contextmanager
def served(**repositories: Repository) -> Iterator[Hub]:
    """Serve a hub until the end of the block; add repositories to it at any time."""
    hub = Hub(dict(repositories))
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
