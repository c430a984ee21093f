"""A Hugging Face Hub on the loopback: serves local folders as model repositories to the unmodified client.

    with HubServer({"user/repo": folder, "user/secret": other}, private={"user/secret": "token"}) as hub:
        subprocess.run([...], env={**os.environ, "HF_ENDPOINT": hub.url})
        assert "config.json" in hub.downloads("user/repo")

    with HubServer({}, users={"token": "user"}, store=tmp_path) as hub:
        HfApi(hub.url, "token").create_repo("user/repo")

The client reads `HF_ENDPOINT` when it is imported, so it belongs in a process of its own, unless it is an `HfApi` that
is told the endpoint. Repositories can be read, created, committed to (also by pull requests) and deleted by those who
own them. Weights and pictures lie in LFS storage; Xet, whose client is compiled, is not spoken: `HF_HUB_DISABLE_XET=1`
makes the client upload by LFS.
"""

import base64
import hashlib
import json
import re
import shutil
import socket
import threading
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import yaml  # type: ignore[import-untyped]


API_ROUTE = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit|branch)/([^/]+)(?:/(.+))?)?")
FILE_ROUTE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
LFS_BATCH_ROUTE = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
STORAGE_ROUTE = re.compile(r"/storage/([0-9a-f]{64})")
LFS_SUFFIXES = {".safetensors", ".bin", ".png", ".jpg"}
POINTER_SIZE = 134
LICENCES = {"apache-2.0", "mit", "other", "cc-by-4.0"}  # of those that the Hub knows


class HubError(Exception):
    """An answer other than success, with the headers from which the client chooses its exception."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **headers}
        if code is not None:
            self.headers["X-Error-Code"] = code


@dataclass
class Cut:
    """A fault of the network: requests of this kind lose their connection half-way, or only their answer."""

    method: str
    pattern: str
    times: float
    is_carried_out: bool


@cache
def _digests(path: Path, size: int, modified_ns: int) -> tuple[str, str]:
    """Git's blob id of the file and its SHA-256; `size` and `modified_ns` only make a changed file a new key."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()


def is_lfs(path: str) -> bool:
    return Path(path).suffix in LFS_SUFFIXES


class HubServer:
    """Serves `repos`, repository id → folder or → {branch: folder}, on a free port of 127.0.0.1.

    `private` and `gated` say which token opens a repository of `repos`: without it a private one does not exist, and a
    gated one shows its list of files only. `users`, token → name, may write to what is theirs, for which `store`, an
    empty folder, is needed. `requests` records every (method, path) in the order of arrival.
    """

    def __init__(
        self,
        repos: dict,
        private: dict | None = None,
        gated: dict | None = None,
        users: dict | None = None,
        store: Path | None = None,
    ):
        self.repos = {repo: value if isinstance(value, dict) else {"main": value} for repo, value in repos.items()}
        self.private = private or {}
        self.gated = gated or {}
        self.users = users or {}
        self.store = store
        self.earlier: dict[tuple[str, str], Path] = {}  # (repository, commit) → folder
        self.uploads: dict[str, bytes] = {}  # SHA-256 → content that waits for its commit
        self.cuts: list[Cut] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Another host, as the Hub's storage is: the client must not send it the token.
        self.storage_url = f"http://localhost:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def downloads(self, repo: str) -> set[str]:
        """The files of `repo` that were asked for with GET, found or not."""
        found = set()
        for url in (urlsplit(path) for method, path in self.requests if method == "GET"):
            # A request to the storage names the file's address on the Hub, as the Hub's signed ones do.
            address = parse_qs(url.query).get("resolve", [url.path])[0]
            route = FILE_ROUTE.fullmatch(address)
            if route and route[1] == repo:
                found.add(unquote(route[3]))
        return found

    def writes(self) -> list[str]:
        """What changes repositories, in order: the commits, and repositories and branches made and deleted."""
        kinds = ("/commit/", "/branch/", "/api/repos/")
        return [f"{method} {path}" for method, path in self.requests if any(kind in path for kind in kinds)]

    # ---- Faults ----------------------------------------------------------------------------------------------------

    def cut(self, method: str, pattern: str, times: float = 1, is_carried_out: bool = False) -> None:
        """Loses the connection of the next `times` requests whose path `pattern` is found in."""
        self.cuts.append(Cut(method, pattern, times, is_carried_out))

    def take_cut(self, method: str, path: str) -> Cut | None:
        with self.lock:
            for cut in self.cuts:
                if cut.times > 0 and cut.method == method and re.search(cut.pattern, path):
                    cut.times -= 1
                    return cut
        return None

    # ---- Reading ---------------------------------------------------------------------------------------------------

    def commit(self, repo: str, branch: str = "main") -> str:
        """The commit sha of a branch: a digest of its files, so a changed folder is a new commit."""
        listing = "".join(f"{path} {blob_id}\n" for path, blob_id in self.files(repo, branch).items())
        return hashlib.sha1(f"{repo}\n{listing}".encode()).hexdigest()

    def files(self, repo: str, branch: str) -> dict[str, str]:
        """The files of a branch, path → git blob id, or SHA-256 in LFS: what the client compares with its own."""
        return list_files(Path(self.repos[repo][branch]))

    def authorize(self, repo: str, token: str | None, contents: bool) -> None:
        """Refuses as the Hub does, which tells a stranger the same of a private repository and of a missing one."""
        if token is not None and token not in {*self.private.values(), *self.gated.values(), *self.users}:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        if repo not in self.repos or self.private.get(repo, token) != token:
            raise HubError(401 if token is None else 404, "RepoNotFound", "Repository not found")
        if contents and self.gated.get(repo, token) != token:
            raise HubError(401 if token is None else 403, "GatedRepo", f"Access to model {repo} is restricted.")

    def resolve(self, repo: str, revision: str) -> tuple[Path, str]:
        """The folder and the commit sha that `revision`, a branch name or a commit sha, stands for."""
        for branch, folder in self.repos[repo].items():
            commit = self.commit(repo, branch)
            if revision in (branch, commit):
                return Path(folder), commit
        if (repo, revision) in self.earlier:
            return self.earlier[repo, revision], revision
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def info(self, repo: str, revision: str, with_blobs: bool) -> dict:
        folder, commit = self.resolve(repo, revision)
        siblings = [{"rfilename": path} for path in list_files(folder)]
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
        root, commit = self.resolve(repo, revision)
        files = list_files(root)
        entries = [file_entry(root, path, digest) for path, digest in files.items()]
        folders = {parent.as_posix() for path in files for parent in Path(path).parents} - {"."}
        entries += [{"type": "directory", "oid": commit, "size": 0, "path": path} for path in sorted(folders)]
        if not folder:
            return [entry for entry in entries if recursive or "/" not in entry["path"]]
        if folder not in folders:
            message = f"{folder} does not exist on {revision}"
            raise HubError(404, "EntryNotFound", message, **{"X-Repo-Commit": commit})
        entries = [entry for entry in entries if entry["path"].startswith(f"{folder}/")]
        return [entry for entry in entries if recursive or "/" not in entry["path"][len(folder) + 1 :]]

    def find_object(self, sha256: str) -> Path:
        """A file of this content, in whatever repository."""
        folders = [Path(folder) for branches in self.repos.values() for folder in branches.values()]
        for folder in [*folders, *self.earlier.values()]:
            for path, digest in list_files(folder).items():
                if digest == sha256:
                    return folder / path
        raise HubError(404, None, "Not Found")

    # ---- Writing ---------------------------------------------------------------------------------------------------

    def user(self, token: str | None) -> str:
        if token is None:
            raise HubError(401, None, "Invalid username or password.")
        if token not in self.users:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        return self.users[token]

    def authorize_write(self, repo: str, token: str | None, is_pull_request: bool = False) -> None:
        self.authorize(repo, token, contents=False)
        user = self.user(token)
        if user != repo.split("/")[0] and not is_pull_request:
            message = f"You don't have the rights to push to {repo}: pass `create_pr=1` to open a pull request."
            raise HubError(403, None, message)

    def new_folder(self, source: Path | None) -> Path:
        """A folder in the store, a copy of `source`."""
        folder = self.store / str(len(list(self.store.iterdir())))
        if source is None:
            folder.mkdir()
        else:
            shutil.copytree(source, folder)
        return folder

    def create_repo(self, token: str | None, request: dict) -> dict:
        owner = request["organization"] or self.user(token)
        repo = f"{owner}/{request['name']}"
        if self.user(token) != owner:
            raise HubError(403, None, f"You don't have the rights to create a model under the namespace {owner}")
        if repo in self.repos:
            raise HubError(409, None, "You already created this model repo")
        folder = self.new_folder(None)
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        self.repos[repo] = {"main": folder}
        if request.get("visibility") == "private" or request.get("private"):
            self.private[repo] = token
        return {"url": f"{self.url}/{repo}", "name": repo}

    def delete_repo(self, token: str | None, request: dict) -> None:
        repo = f"{request['organization']}/{request['name']}"
        self.authorize_write(repo, token)
        del self.repos[repo]
        self.private.pop(repo, None)

    def create_branch(self, repo: str, branch: str, request: dict) -> None:
        if branch in self.repos[repo]:
            raise HubError(409, None, f"Reference already exists: {branch}")
        folder, _ = self.resolve(repo, request.get("startingPoint", "main"))
        self.repos[repo][branch] = folder

    def preupload(self, repo: str, revision: str, request: dict) -> dict:
        folder, _ = self.resolve(repo, revision)
        present = list_files(folder)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_lfs(file["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": present.get(file["path"]),
                }
                for file in request["files"]
            ]
        }

    def lfs_batch(self, request: dict) -> dict:
        def answer(item: dict) -> dict:
            try:
                self.find_object(item["oid"])
                return item  # without actions: it is there already
            except HubError:
                upload = {"href": f"{self.storage_url}/storage/{item['oid']}"}
                return item | {"actions": {"upload": upload, "verify": {"href": f"{self.url}/api/lfs-verify"}}}

        return {"transfer": "basic", "objects": [answer(item) for item in request["objects"]]}

    def store_object(self, sha256: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise HubError(400, None, "The content does not have the checksum of its name")
        self.uploads[sha256] = content

    def verify_object(self, request: dict) -> None:
        if len(self.uploads.get(request["oid"], b"")) != request["size"]:
            raise HubError(404, None, "Object not found or of another size")

    def apply_commit(self, repo: str, revision: str, lines: list[dict], is_pull_request: bool) -> dict:
        """One new folder with all changes, or an error and nothing changed."""
        folder, head = self.resolve(repo, revision)
        header, operations = lines[0]["value"], lines[1:]
        if header.get("parentCommit", head) != head and not is_pull_request:
            raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
        changed = self.new_folder(folder)
        for operation in operations:
            self.apply_operation(changed, operation["key"], operation["value"])
        branch = revision
        if is_pull_request:
            number = 1 + sum(name.startswith("refs/pr/") for name in self.repos[repo])
            branch = f"refs/pr/{number}"
        else:
            self.earlier[repo, head] = folder
        self.repos[repo][branch] = changed
        commit = self.commit(repo, branch)
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{repo}/commit/{commit}"}
        if is_pull_request:
            answer["pullRequestUrl"] = f"{self.url}/{repo}/discussions/{number}"
        return answer

    def apply_operation(self, folder: Path, key: str, value: dict) -> None:
        path = folder / value["path"]
        if key == "deletedFile":
            path.unlink()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if key == "file":
            path.write_bytes(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            content = self.uploads.get(value["oid"])
            path.write_bytes(self.find_object(value["oid"]).read_bytes() if content is None else content)
        else:
            raise HubError(400, None, f"Unknown operation {key}")

    def validate_yaml(self, request: dict) -> dict:
        """The rules of the Hub that a model card can break most easily."""
        match = re.match(r"---\n(.*?)\n---\n", request["content"], re.DOTALL)
        if match is None:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        data, errors = yaml.safe_load(match[1]), []
        if data.get("license") not in LICENCES:
            errors.append(f'"license" must be one of {sorted(LICENCES)}')
        if data.get("license") == "other" and not (data.get("license_name") and data.get("license_link")):
            errors.append('"license_name" and "license_link" are needed with license "other"')
        errors += [f'"{repo}" is not a model id' for repo in data.get("base_model", []) if repo.count("/") != 1]
        for entry in data.get("model-index", []):
            for result in entry["results"]:
                if not {"task", "dataset", "metrics"} <= result.keys():
                    errors.append("a result of model-index lacks task, dataset or metrics")
        return {"errors": [{"message": error} for error in errors], "warnings": []}


def list_files(folder: Path) -> dict[str, str]:
    """The files below the folder, path → git blob id, or SHA-256 in LFS."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): _digests(path, path.stat().st_size, path.stat().st_mtime_ns)[is_lfs(path)]
        for path in paths
    }


def file_entry(root: Path, path: str, digest: str) -> dict:
    """A file as the Hub lists it; an LFS file's git blob is its pointer."""
    size = (root / path).stat().st_size
    entry = {"type": "file", "oid": digest, "size": size, "path": path}
    if is_lfs(path):
        pointer = hashlib.sha1(digest.encode()).hexdigest()
        entry |= {"oid": pointer, "lfs": {"oid": digest, "size": size, "pointerSize": POINTER_SIZE}}
    return entry


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
        self.cut = self.hub.take_cut(self.command, self.path)
        if self.cut and self.command != "GET" and not self.cut.is_carried_out:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self._hang_up()
        body = self._read_body()
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        token = token if scheme == "Bearer" else None
        url = urlsplit(self.path)
        try:
            if url.path.startswith("/storage/") and token is not None:
                raise HubError(400, None, "The token was sent to the storage")
            if self.command in ("GET", "HEAD"):
                self._answer_reading(url, token)
            else:
                with self.hub.lock:
                    self._answer_writing(url, body, token)
        except HubError as error:
            self._send(error.status, json.dumps({"error": str(error)}).encode(), error.headers)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _hang_up(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer_reading(self, url, token: str | None):
        if route := API_ROUTE.fullmatch(url.path):
            self._answer_api(route, parse_qs(url.query), token)
        elif route := FILE_ROUTE.fullmatch(url.path):
            self._answer_file(*(unquote(part) for part in route.groups()), token)
        elif route := STORAGE_ROUTE.fullmatch(url.path):
            self._send_content(self.hub.find_object(route[1]).read_bytes(), {"ETag": f'"{route[1]}"'})
        elif url.path == "/api/whoami-v2":
            user = self.hub.user(token)
            self._send_json({"type": "user", "id": user, "name": user, "orgs": [], "auth": {}})
        else:
            raise HubError(404, None, "Not Found")

    def _answer_writing(self, url, body: bytes, token: str | None):
        hub = self.hub
        if route := STORAGE_ROUTE.fullmatch(url.path):  # its address is the permission
            hub.store_object(route[1], body)
            return self._send_json({})
        lines = [json.loads(line) for line in body.splitlines()] or [{}]
        request = lines[0]
        if url.path == "/api/repos/create":
            return self._send_json(hub.create_repo(token, request))
        if url.path == "/api/repos/delete":
            return self._send_json(hub.delete_repo(token, request))
        if url.path == "/api/validate-yaml":
            answer = hub.validate_yaml(request)
            return self._send_json(answer, 400 if answer["errors"] else 200)
        if url.path == "/api/lfs-verify":
            return self._send_json(hub.verify_object(request))
        if route := LFS_BATCH_ROUTE.fullmatch(url.path):
            hub.authorize(route[1], token, contents=False)
            hub.user(token)
            return self._send_json(hub.lfs_batch(request))
        route = API_ROUTE.fullmatch(url.path)
        if route is None or route[2] not in ("preupload", "commit", "branch"):
            raise HubError(404, None, "Not Found")
        repo, what, revision = route[1], route[2], unquote(route[3])
        is_pull_request = "create_pr" in parse_qs(url.query)
        hub.authorize_write(repo, token, is_pull_request)
        if what == "preupload":
            self._send_json(hub.preupload(repo, revision, request))
        elif what == "commit":
            self._send_json(hub.apply_commit(repo, revision, lines, is_pull_request))
        elif self.command == "DELETE":
            del hub.repos[repo][revision]
            self._send_json({})
        else:
            self._send_json(hub.create_branch(repo, revision, request))

    def _answer_api(self, route: re.Match, query: dict, token: str | None):
        repo, what, revision, folder = route.groups()
        revision = unquote(revision or "main")
        self.hub.authorize(repo, token, contents=False)
        if what == "tree":
            recursive = query.get("recursive", [""])[0].lower() in ("true", "1")
            answer = self.hub.tree(repo, revision, unquote(folder or ""), recursive)
        else:
            answer = self.hub.info(repo, revision, with_blobs="blobs" in query)
        self._send_json(answer)

    def _answer_file(self, repo: str, revision: str, path: str, token: str | None):
        self.hub.authorize(repo, token, contents=True)
        folder, commit = self.hub.resolve(repo, revision)
        digest = list_files(folder).get(path)
        if digest is None:
            raise HubError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        content = (folder / path).read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"'}
        if not is_lfs(path):
            return self._send_content(content, headers)
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        location = f"{self.hub.storage_url}/storage/{digest}?{urlencode({'resolve': self.path})}"
        self._send(302, b"", headers | {"Location": location})

    def _send_content(self, content: bytes, headers: dict[str, str]):
        headers["Accept-Ranges"] = "bytes"
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

    def _send_json(self, answer, status: int = 200):
        self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]):
        if self.cut and self.command != "GET":
            return self._hang_up()
        self.send_response(status)
        for name, value in {"Content-Type": "application/octet-stream", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.cut else body)
        if self.cut:
            self._hang_up()
