"""A Hugging Face Hub on the loopback: serves local folders as model repositories to the unmodified client.

    with HubServer({"user/repo": folder, "user/secret": other}, private={"user/secret": "token"}) as hub:
        subprocess.run([...], env={**os.environ, "HF_ENDPOINT": hub.url})
        assert "config.json" in hub.downloads("user/repo")

The client reads `HF_ENDPOINT` when it is imported, so it belongs in a process of its own. Reading is all that is
served: repository info, file trees and file contents; no file is in LFS or Xet storage. An upload would be a `do_POST`
beside `do_GET`.
"""

import hashlib
import json
import re
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


API_ROUTE = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?")
FILE_ROUTE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class HubError(Exception):
    """An answer other than success, with the headers from which the client chooses its exception."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **headers}
        if code is not None:
            self.headers["X-Error-Code"] = code


@cache
def _git_blob_id(path: Path, size: int, modified_ns: int) -> str:
    """The id git gives to the file; `size` and `modified_ns` only make a changed file a new key of the cache."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """Serves `repos`, repository id → folder or → {branch: folder}, on a free port of 127.0.0.1.

    `private` and `gated` say which token opens a repository of `repos`: without it a private one does not exist, and a
    gated one shows its list of files only. `requests` records every (method, path) in the order of arrival.
    """

    def __init__(self, repos: dict, private: dict | None = None, gated: dict | None = None):
        self.repos = {repo: value if isinstance(value, dict) else {"main": value} for repo, value in repos.items()}
        self.private = private or {}
        self.gated = gated or {}
        self.requests: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def downloads(self, repo: str) -> set[str]:
        """The files of `repo` that were asked for with GET, found or not."""
        routes = (FILE_ROUTE.fullmatch(urlsplit(path).path) for method, path in self.requests if method == "GET")
        return {unquote(route[3]) for route in routes if route and route[1] == repo}

    def commit(self, repo: str, branch: str = "main") -> str:
        """The commit sha of a branch: a digest of its files, so a changed folder is a new commit."""
        listing = "".join(f"{path} {blob_id}\n" for path, blob_id in self.files(repo, branch).items())
        return hashlib.sha1(f"{repo}\n{listing}".encode()).hexdigest()

    def files(self, repo: str, branch: str) -> dict[str, str]:
        """The files of a branch, path → git blob id."""
        folder = Path(self.repos[repo][branch])
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            path.relative_to(folder).as_posix(): _git_blob_id(path, path.stat().st_size, path.stat().st_mtime_ns)
            for path in paths
        }

    def authorize(self, repo: str, token: str | None, contents: bool) -> None:
        """Refuses as the Hub does, which tells a stranger the same of a private repository and of a missing one."""
        if token is not None and token not in {*self.private.values(), *self.gated.values()}:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        if repo not in self.repos or self.private.get(repo, token) != token:
            raise HubError(401 if token is None else 404, "RepoNotFound", "Repository not found")
        if contents and self.gated.get(repo, token) != token:
            raise HubError(401 if token is None else 403, "GatedRepo", f"Access to model {repo} is restricted.")

    def resolve(self, repo: str, revision: str) -> tuple[str, str]:
        """The branch and the commit sha that `revision`, a branch name or a commit sha, stands for."""
        for branch in self.repos[repo]:
            commit = self.commit(repo, branch)
            if revision in (branch, commit):
                return branch, commit
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def info(self, repo: str, revision: str, with_blobs: bool) -> dict:
        branch, commit = self.resolve(repo, revision)
        siblings = [{"rfilename": path} for path in self.files(repo, branch)]
        if with_blobs:
            siblings = [entry for entry in self.tree(repo, revision, "", True) if entry["type"] == "file"]
            siblings = [{"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]} for e in siblings]
        return {
            "_id": commit[:24],
            "id": repo,
            "modelId": repo,
            "author": repo.split("/")[0],
            "sha": commit,
            "lastModified": "2025-01-01T00:00:00.000Z",
            "createdAt": "2025-01-01T00:00:00.000Z",
            "private": repo in self.private,
            "gated": "manual" if repo in self.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": ["diffusers"],
            "siblings": siblings,
        }

    def tree(self, repo: str, revision: str, folder: str, recursive: bool) -> list[dict]:
        branch, commit = self.resolve(repo, revision)
        root = Path(self.repos[repo][branch])
        files = self.files(repo, branch)
        entries = [
            {"type": "file", "oid": blob_id, "size": (root / path).stat().st_size, "path": path}
            for path, blob_id in files.items()
        ]
        folders = {parent.as_posix() for path in files for parent in Path(path).parents} - {"."}
        entries += [{"type": "directory", "oid": commit, "size": 0, "path": path} for path in sorted(folders)]
        if not folder:
            return [entry for entry in entries if recursive or "/" not in entry["path"]]
        if folder not in folders:
            message = f"{folder} does not exist on {revision}"
            raise HubError(404, "EntryNotFound", message, **{"X-Repo-Commit": commit})
        entries = [entry for entry in entries if entry["path"].startswith(f"{folder}/")]
        return [entry for entry in entries if recursive or "/" not in entry["path"][len(folder) + 1 :]]


class _Handler(BaseHTTPRequestHandler):
    """The HTTP side of a `HubServer`: parses the request, asks `self.hub`, and writes the answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: with Nagle each answer waits 40 ms for an ACK

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.hub.requests.append((self.command, self.path))
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        token = token if scheme == "Bearer" else None
        url = urlsplit(self.path)
        try:
            if route := API_ROUTE.fullmatch(url.path):
                self._answer_api(route, parse_qs(url.query), token)
            elif route := FILE_ROUTE.fullmatch(url.path):
                self._answer_file(*(unquote(part) for part in route.groups()), token)
            else:
                raise HubError(404, None, "Not Found")
        except HubError as error:
            self._send(error.status, json.dumps({"error": str(error)}).encode(), error.headers)

    do_HEAD = do_GET

    def _answer_api(self, route: re.Match, query: dict, token: str | None):
        repo, what, revision, folder = route.groups()
        revision = unquote(revision or "main")
        self.hub.authorize(repo, token, contents=False)
        if what == "tree":
            recursive = query.get("recursive", [""])[0].lower() in ("true", "1")
            answer = self.hub.tree(repo, revision, unquote(folder or ""), recursive)
        else:
            answer = self.hub.info(repo, revision, with_blobs="blobs" in query)
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _answer_file(self, repo: str, revision: str, path: str, token: str | None):
        self.hub.authorize(repo, token, contents=True)
        branch, commit = self.hub.resolve(repo, revision)
        blob_id = self.hub.files(repo, branch).get(path)
        if blob_id is None:
            raise HubError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        content = (Path(self.hub.repos[repo][branch]) / path).read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob_id}"', "Accept-Ranges": "bytes"}
        requested = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if requested is None or not any(requested.groups()):
            return self._send(200, content, headers)
        first, last = requested.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= stop:
            headers["Content-Range"] = f"bytes */{len(content)}"
            raise HubError(416, None, "Range Not Satisfiable", **headers)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206, content[start:stop], headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {"Content-Type": "application/octet-stream", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
