"""A stand-in for the Hugging Face hub: as much of its HTTP interface as huggingface_hub's client
calls, over a folder of repositories, with faults on demand.

    python hub_server.py FOLDER

prints ``{"endpoint": "http://127.0.0.1:PORT"}`` and serves until its stdin is closed. The client is
the real one: give it the endpoint as ``HF_ENDPOINT``.

- ``FOLDER/ORG/NAME/`` holds the files of the model ``ORG/NAME`` at ``main``,
  ``FOLDER/ORG/NAME@REV/`` those of another revision, ``FOLDER/NAME/`` those of a model without an
  owner.
- A file ``.hub.json`` in it says what is known of the model beside its files: ``private``,
  ``gated``, ``granted`` (whether tokens may read a gated one), ``tags``, ``downloads``, ``likes``.
- Tokens are good if they begin with ``hf_good``, and may write unless that is ``hf_good_read``.
- Repositories can be made and committed to, with large files by Git LFS, as the client does over
  HTTP; not by Xet (``HF_HUB_DISABLE_XET``). What was uploaded and is in no commit yet is in
  ``FOLDER/.lfs``.
- Weights are "large files": they have a SHA-256 and come from another origin, as the hub's do.

``POST /faults`` takes a list of faults (fields of ``Fault``) in the place of those before, and
``GET /requests`` tells what was asked: what ``Hub.faults`` and ``Hub.requests`` are in Python.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".onnx")
ABOUT = ".hub.json"
_CHUNK = 64 * 1024


@dataclass
class Fault:
    """What goes wrong.

    Args:
        path: a regular expression that is found in the path of the requests
        kind: ``status`` answers with ``status`` and ``headers``; ``cut`` closes the connection
            after ``after`` bytes of the body, ``reset`` resets it; ``stall`` stops there until the
            client is gone; ``corrupt`` sends other bytes from there on
        method: of the requests; any if it is None
        skip: how many requests are served before
        times: how often, from then on
    """

    path: str
    kind: Literal["status", "cut", "reset", "stall", "corrupt"] = "status"
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    after: int = 0
    method: str | None = None
    skip: int = 0
    times: int = 2**31


@dataclass(frozen=True)
class Request:
    """One that came.

    Args:
        range: its ``Range`` header
        token: its bearer token
        is_cdn: whether it went to the origin that large files come from
        sent: how many bytes of a file it was answered with
    """

    method: str
    path: str
    range: str | None
    token: str | None
    is_cdn: bool
    sent: int = 0


class Hub:
    """The stand-in, which serves while its ``with`` block runs."""

    knows_ranges = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[Fault] = []
        self._requests: list[Request] = []
        self._open = 0
        self._ended = threading.Condition()
        self.stalled = threading.Event()
        self._lock = threading.Lock()
        self._servers = [self._server(is_cdn) for is_cdn in (False, True)]
        self.endpoint, self.cdn = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers
        )

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def answers(self, monkeypatch: Any, home: Path) -> None:
        """Has the client of this process ask here, with an empty cache below ``home``."""
        from huggingface_hub import constants

        for name, value in {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint
            + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)

    def fault(self, method: str, path: str, *, has_body: bool) -> Fault | None:
        """What is to go wrong with this request.

        Args:
            has_body: whether it is about the body of the answer
        """
        with self._lock:
            for fault in self.faults:
                fits = fault.method in (None, method) and (fault.kind != "status") == has_body
                if not fits or not fault.times or not re.search(fault.path, path):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def begin(self) -> None:
        with self._ended:
            self._open += 1

    def note(self, request: Request) -> None:
        with self._ended:
            self._open -= 1
            self._requests.append(request)
            self._ended.notify_all()

    @property
    def requests(self) -> list[Request]:
        """What was asked, in the order in which the answers ended. A client may have its answer a
        moment before that is noted; what hangs is not waited for."""
        with self._ended:
            self._ended.wait_for(lambda: not self._open, 2)
            return self._requests

    @property
    def for_weights(self) -> list[Request]:
        """Those that the bytes of large files came with."""
        return [one for one in self.requests if one.is_cdn]

    def asked(self, pattern: str, method: str = "GET") -> list[Request]:
        """The requests of a path."""
        found = list(self.requests)
        return [one for one in found if one.method == method and re.search(pattern, one.path)]

    def repository(self, name: str, revision: str = "main") -> "Repository | None":
        """A model at a revision: a branch, a tag or a commit."""
        if (found := self._at(name)) is None:
            return None
        for candidate in [found, *self._others(name)]:
            if revision in (candidate.revision, candidate.commit):
                return candidate
        return Repository(found.folder, name, "", found.about)

    def repositories(self) -> Iterator["Repository"]:
        for config in sorted(self.folder.glob("*/*/")):
            if config.is_dir() and "@" not in config.name:
                yield Repository.at(config, f"{config.parent.name}/{config.name}")

    def _at(self, name: str) -> "Repository | None":
        folder = self.folder / name
        return Repository.at(folder, name) if folder.is_dir() else None

    def _others(self, name: str) -> Iterator["Repository"]:
        folder = self.folder / name
        for other in folder.parent.glob(f"{folder.name}@*"):
            yield Repository.at(other, name, other.name.partition("@")[2])

    def _server(self, is_cdn: bool) -> ThreadingHTTPServer:
        hub = self

        class Handler(_Handler):
            def __init__(self, *args: Any) -> None:
                self.hub, self.is_cdn = hub, is_cdn
                super().__init__(*args)

        return _Server(("127.0.0.1", 0), Handler)


@dataclass(frozen=True)
class Repository:
    """The files of one revision; ``revision`` is empty where there is no such."""

    folder: Path
    name: str
    revision: str
    about: Mapping[str, Any]

    @classmethod
    def at(cls, folder: Path, name: str, revision: str = "main") -> Self:
        path = folder / ABOUT
        return cls(folder, name, revision, json.loads(path.read_text()) if path.exists() else {})

    @property
    def paths(self) -> list[str]:
        found = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return [str(path.relative_to(self.folder)) for path in found if path.name != ABOUT]

    @property
    def commit(self) -> str:
        told = [(path, _stat(self.folder / path)) for path in self.paths]
        return hashlib.sha1(repr((self.revision, told)).encode()).hexdigest()  # noqa: S324

    def entry(self, path: str) -> dict[str, Any]:
        """What the hub tells of a file."""
        file = self.folder / path
        size = file.stat().st_size
        if not is_large(path):
            return {"path": path, "size": size, "oid": _git_hash(file)}
        sha256 = _sha256(file)
        lfs = {"oid": sha256, "size": size, "pointerSize": 134}
        # What git has of it is what points to it.
        pointer = hashlib.sha1(sha256.encode()).hexdigest()  # noqa: S324
        return {"path": path, "size": size, "oid": pointer, "lfs": lfs}

    def info(self, *, with_files: bool) -> dict[str, Any]:
        told = {"id": self.name, "sha": self.commit, "private": False, "gated": False, "tags": []}
        told |= {key: value for key, value in self.about.items() if key != "granted"}
        if with_files:
            entries = map(self.entry, self.paths)
            told["siblings"] = [
                {"rfilename": one["path"], "size": one["size"], "blobId": one["oid"]}
                | ({"lfs": {"sha256": one["lfs"]["oid"], **one["lfs"]}} if "lfs" in one else {})
                for one in entries
            ]
        return told


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *request: Any) -> None:
        # Clients are killed by the tests.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*request)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    is_cdn: bool
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._sent = 0
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/requests":
            self._json([asdict(one) for one in self.hub.requests])
            return
        if self.path == "/faults":
            self.hub.faults[:] = [Fault(**one) for one in json.loads(self._body)]
            self._json({})
            return
        self.hub.begin()
        try:
            self._answer()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        self.hub.note(
            Request(
                self.command,
                self.path,
                self.headers.get("Range"),
                self._token,
                self.is_cdn,
                self._sent,
            )
        )

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def _token(self) -> str | None:
        given = self.headers.get("Authorization")
        return given.removeprefix("Bearer ") if given else None

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        if fault := self.hub.fault(self.command, path, has_body=False):
            return self._error(fault.status, headers=fault.headers)
        if self.is_cdn and self.command == "PUT":
            return self._upload(path)
        if self.is_cdn:
            return self._send(self.hub.folder / path.lstrip("/"), {})
        if self._token and not self._token.startswith("hf_good"):
            said = "Invalid credentials in Authorization header"
            return self._error(401, headers={"X-Error-Message": said})
        if self.command == "POST":
            return self._write_to(path)
        if path == "/api/models":
            return self._search({key: values[0] for key, values in query.items()})
        if match := re.fullmatch(r"/api/models/([^/]+(?:/[^/]+)?)/tree/([^/]+)/?", path):
            return self._tree(match[1], unquote(match[2]))
        if match := re.fullmatch(r"/api/models/([^/]+(?:/[^/]+)?)/revision/(.+)", path):
            return self._info(match[1], match[2], query)
        if match := re.fullmatch(r"/api/models/([^/]+(?:/[^/]+)?)", path):
            return self._info(match[1], "main", query)
        small = r"/api/resolve-cache/models/([^/]+(?:/[^/]+)?)/([0-9a-f]{40})/(.+)"
        if match := re.fullmatch(small, path):
            return self._small(match[1], match[2], match[3])
        if match := re.fullmatch(r"/([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)", path):
            return self._resolve(match[1], match[2], match[3])
        return self._error(404)

    def _write_to(self, path: str) -> None:
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if not self._token or self._token.startswith("hf_good_read"):
            return self._error(403 if self._token else 401)
        if path == "/api/repos/create":
            return self._create(json.loads(self._body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            return self._preupload(match[1])
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self._commit(match[1])
        return self._error(404)

    def _create(self, wanted: Mapping[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        folder = self.hub.folder / name
        if folder.exists():
            return self._json({"url": f"{self.hub.endpoint}/{name}"}, 409)
        folder.mkdir(parents=True)
        about = {"private": wanted.get("visibility") == "private"}
        (folder / ABOUT).write_text(json.dumps(about))
        return self._json({"url": f"{self.hub.endpoint}/{name}"})

    def _preupload(self, name: str) -> None:
        repository = self.hub.repository(name)
        if repository is None:
            return self._error(404, "RepoNotFound")
        told = []
        for file in json.loads(self._body)["files"]:
            path = file["path"]
            entry = repository.entry(path) if path in repository.paths else {}
            oid = entry.get("lfs", {}).get("oid") or entry.get("oid")
            mode = "lfs" if is_large(path) else "regular"
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._json({"files": told})

    def _batch(self) -> None:
        told = []
        for one in json.loads(self._body)["objects"]:
            upload = {"href": f"{self.hub.cdn}/.lfs/{one['oid']}"}
            is_here = (self.hub.folder / ".lfs" / one["oid"]).exists()
            told.append(one | ({} if is_here else {"actions": {"upload": upload}}))
        self._json({"transfer": "basic", "objects": told})

    def _upload(self, path: str) -> None:
        file = self.hub.folder / path.lstrip("/")
        if hashlib.sha256(self._body).hexdigest() != file.name:
            return self._error(400)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(self._body)
        return self._json({})

    def _commit(self, name: str) -> None:
        folder = self.hub.folder / name
        for line in self._body.splitlines():
            change = json.loads(line)
            value = change["value"]
            match change["key"]:
                case "file":
                    file = folder / value["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(value["content"]))
                case "lfsFile":
                    file = folder / value["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes((self.hub.folder / ".lfs" / value["oid"]).read_bytes())
        commit = Repository.at(folder, name).commit
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit})

    def _allowed(self, name: str, revision: str) -> Repository | None:
        """The repository, where the token may see it and the revision is there; else an error was
        sent."""
        found = self.hub.repository(name, revision)
        if found is None or (found.about.get("private") and not self._token):
            # The hub does not tell whether a repository is private or not there.
            self._error(404 if self._token else 401, "RepoNotFound")
        elif not found.revision:
            self._error(404, "RevisionNotFound")
        else:
            return found
        return None

    def _search(self, query: Mapping[str, str]) -> None:
        words = query.get("search", "").lower()
        tag = query.get("filter")
        found = [
            one.info(with_files=False)
            for one in self.hub.repositories()
            if words in one.name.lower()
            and one.name.startswith(query.get("author", ""))
            and (tag is None or tag in one.about.get("tags", []))
        ]
        found.sort(key=lambda one: -one.get(query.get("sort", "downloads"), 0))
        self._json(found[: int(query.get("limit", 1000))])

    def _info(self, name: str, revision: str, query: Mapping[str, Any]) -> None:
        if found := self._allowed(name, revision):
            self._json(found.info(with_files="blobs" in query or "full" in query))

    def _tree(self, name: str, revision: str) -> None:
        if found := self._allowed(name, revision):
            self._json([{"type": "file", **found.entry(path)} for path in found.paths])

    def _resolve(self, name: str, revision: str, path: str) -> None:
        found = self._allowed(name, revision)
        if found is None:
            return None
        if found.about.get("gated") and not (self._token and found.about.get("granted")):
            return self._error(403 if self._token else 401, "GatedRepo")
        headers = {"X-Repo-Commit": found.commit}
        if path not in found.paths:
            return self._error(404, "EntryNotFound", headers)
        entry = found.entry(path)
        if not is_large(path):
            headers["ETag"] = f'"{entry["oid"]}"'
            headers["Location"] = f"/api/resolve-cache/models/{name}/{found.commit}/{path}"
            return self._head(307, headers, 0)
        file = (found.folder / path).relative_to(self.hub.folder)
        headers["X-Linked-Size"] = str(entry["size"])
        headers["X-Linked-ETag"] = f'"{entry["lfs"]["oid"]}"'
        headers["Location"] = f"{self.hub.cdn}/{file}"
        return self._head(302, headers, 0)

    def _small(self, name: str, commit: str, path: str) -> None:
        if found := self._allowed(name, commit):
            headers = {"X-Repo-Commit": commit, "ETag": f'"{found.entry(path)["oid"]}"'}
            self._send(found.folder / path, headers)

    def _send(self, file: Path, headers: dict[str, str]) -> None:
        size = file.stat().st_size
        start, end = 0, size
        headers["Accept-Ranges"] = "bytes"
        asked = self.headers.get("Range", "") if self.hub.knows_ranges else ""
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", asked):
            if match[1]:
                start = int(match[1])
                end = min(int(match[2]) + 1, size) if match[2] else size
            else:
                start = max(size - int(match[2]), 0)
            if start >= size:
                return self._error(416, headers={"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._head(206 if match else 200, headers, end - start)
        if self.command == "HEAD":
            return None
        fault = self.hub.fault(self.command, self.path, has_body=True)
        with file.open("rb") as source:
            source.seek(start)
            return self._stream(source.read, end - start, fault)

    def _stream(self, read: Any, size: int, fault: Fault | None) -> None:
        until = min(fault.after, size) if fault else size
        while self._sent < until:
            self._write(read(min(_CHUNK, until - self._sent)))
        if fault is None:
            return
        match fault.kind:
            case "corrupt":
                while self._sent < size:
                    self._write(bytes(255 - byte for byte in read(min(_CHUNK, size - self._sent))))
            case "stall":
                self.wfile.flush()
                self.hub.stalled.set()
                self.connection.recv(1)  # which ends when the client is gone
            case "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if fault.kind != "corrupt":
            self.close_connection = True
            self.connection.close()

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self._sent += len(data)

    def _json(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self._head(status, {"Content-Type": "application/json"}, len(data))
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(
        self, status: int, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        told = dict(headers or {})
        if code:
            told |= {"X-Error-Code": code, "X-Error-Message": code}
        self._head(status, told, 0)

    def _head(self, status: int, headers: Mapping[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def _stat(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


# By path, size and time, because the same files are told of again and again.
_hashes: dict[tuple[str, Path, tuple[int, int]], str] = {}


def _sha256(path: Path) -> str:
    key = ("sha256", path, _stat(path))
    if key not in _hashes:
        with path.open("rb") as file:
            _hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[key]


def _git_hash(path: Path) -> str:
    key = ("git", path, _stat(path))
    if key not in _hashes:
        data = path.read_bytes()
        _hashes[key] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324
    return _hashes[key]


def main(folder: str) -> None:
    with Hub(Path(folder)) as hub:
        print(json.dumps({"endpoint": hub.endpoint}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
