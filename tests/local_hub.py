"""A server on this machine that speaks as much of the Hugging Face Hub's interface as its client needs for models.

Repositories, branches, private repositories and tokens, commits with regular and LFS files, downloads by branch and by
commit. It is written after the requests of `huggingface_hub`, which are the test: nothing of the client is replaced.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

OWNER = "hf_anna0000000000000000"  # the token of the user anna
STRANGER = "hf_bert0000000000000000"
USERS = {OWNER: "anna", STRANGER: "bert"}


@dataclass
class Repository:
    """Commits are whole trees, path to bytes."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(tree))).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = tree, sha
        return sha

    def resolve(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.branches.get(revision, revision))


class LocalHub:
    """The state of the server.

    Attributes:
        url: its address.
        repositories: by id.
        log: method and path of every request.
        refuse_commits: whether commits are answered with an error.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.log: list[str] = []
        self.refuse_commits = False
        self.url = ""

    def add(self, name: str, files: dict[str, str | bytes], *, private: bool = False) -> str:
        """A repository with these files on its main branch; returns the commit."""
        repository = self.repositories.setdefault(name, Repository(private))
        tree = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
        return repository.commit("main", tree)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        found = self.repositories[name].resolve(revision)
        assert found is not None
        return found


class Refusal(Exception):  # noqa: N818
    """An answer with an error."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message or code}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *args: Any) -> None:
        """Write nothing to the terminal."""

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(f"{self.command} {path}")
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        try:
            status, headers, content = self._answer(path, body)
        except Refusal as refusal:
            status, headers = refusal.status, refusal.headers
            content = json.dumps({"error": refusal.headers["X-Error-Message"]}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    # -- what is asked -------------------------------------------------------------------------------------------------

    def _answer(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            header = json.loads(body)["content"].split("---\n")[1]
            assert isinstance(yaml.safe_load(header), dict)
            return _json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path):
            name, what, revision = found.groups()
            repository = self._repository(name, write=True)
            if what == "branch":
                repository.branches.setdefault(revision, repository.branches["main"])
                return _json({})
            if what == "preupload":
                return self._preupload(json.loads(body)["files"])
            return self._commit(name, repository, revision, body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._repository(found[1], write=True)
            uploads = [
                {**given, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{given['oid']}"}}}
                for given in json.loads(body)["objects"]
            ]
            return _json({"transfer": "basic", "objects": uploads})
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.hub.lfs[found[1]] = body
            return _json({})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*found.groups())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path):
            repository = self._repository(found[1], write=False)
            tree = repository.resolve(found[2] or "main")
            if tree is None:
                raise Refusal(404, "RevisionNotFound")
            sha = repository.branches.get(found[2] or "main", found[2])
            siblings = [{"rfilename": name} for name in tree]
            return _json({"id": found[1], "sha": sha, "siblings": siblings, "private": repository.private})
        raise Refusal(404, "", f"not spoken here: {self.command} {path}")

    def _user(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        user = USERS.get(given.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return user

    def _repository(self, name: str, *, write: bool) -> Repository:
        user, found = self._user(), self.hub.repositories.get(name)
        mine = user == name.partition("/")[0]
        if found is None or (found.private and not mine):
            raise Refusal(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if write and not mine:
            raise Refusal(401 if user is None else 403, "", "you have no right to write here")
        return found

    def _create(self, asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        user = self._user()
        if user is None:
            raise Refusal(401, "", "Invalid username or password.")
        owner = asked.get("organization") or user
        if owner != user:
            raise Refusal(403, "", f"you don't have the rights to create a model under the namespace {owner}")
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repositories:
            return 409, {}, json.dumps({"url": f"{self.hub.url}/{name}", "error": "You already created it"}).encode()
        private = asked.get("visibility") == "private"
        self.hub.add(name, {".gitattributes": "*.safetensors filter=lfs\n"}, private=private)
        return _json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _preupload(self, files: list[dict[str, Any]]) -> tuple[int, dict[str, str], bytes]:
        large = (".safetensors", ".png", ".bin")
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(large) else "regular", "shouldIgnore": False}
            for f in files
        ]
        return _json({"files": modes})

    def _commit(self, name: str, repository: Repository, branch: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if self.hub.refuse_commits:
            raise Refusal(400, "", "this commit is not accepted")
        if branch not in repository.branches:
            raise Refusal(404, "RevisionNotFound")
        tree = dict(repository.commits[repository.branches[branch]])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                tree[value["path"]] = self.hub.lfs[value["oid"]]
            else:
                assert entry["key"] == "header"
        sha = repository.commit(branch, tree)
        return _json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def _resolve(self, name: str, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        repository = self._repository(name, write=False)
        tree = repository.resolve(revision)
        if tree is None:
            raise Refusal(404, "RevisionNotFound")
        commit = {"X-Repo-Commit": repository.branches.get(revision, revision)}
        if path not in tree:
            refusal = Refusal(404, "EntryNotFound")
            refusal.headers |= commit
            raise refusal
        content = tree[path]
        return 200, {**commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content


def _json(data: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(data).encode()


@contextmanager
def running_hub(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A running server, which the client of this process takes for the hub; nobody is logged in.

    Args:
        cache: an empty folder for the client's cache.
        patch: undoes all of it.
    """
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    constants = "huggingface_hub.constants."
    patch.setattr(f"{constants}ENDPOINT", hub.url)
    patch.setattr(f"{constants}HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(f"{constants}HF_HUB_OFFLINE", False)
    patch.setattr(f"{constants}HF_HUB_DISABLE_XET", True)
    patch.setattr(f"{constants}HF_HUB_CACHE", str(cache))
    patch.setattr(f"{constants}HF_TOKEN_PATH", str(cache / "token"))
    patch.setattr("transformers.utils.hub._hf_api", None)  # it keeps the first address that it was made with
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def main(folders: list[str]) -> None:
    """Serve until killed: `python local_hub.py [USER/NAME=FOLDER ...]` prints the address first."""
    hub = LocalHub()
    for given in folders:
        name, _, folder = given.partition("=")
        hub.add(name, {path.name: path.read_bytes() for path in Path(folder).iterdir()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    print(hub.url, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
