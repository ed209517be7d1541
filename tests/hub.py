"""A stand-in for the Hugging Face Hub, as far as huggingface_hub speaks to it: repositories of commits, in memory."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests_0123456789"
LARGE = (".safetensors", ".onnx", ".bin", ".pt")  # what the hub keeps outside git


@dataclass(repr=False)
class Repository:
    """Commits, oldest first: [(hash, {path: bytes})]; tags: {name: hash}."""

    private: bool = False
    gated: bool = False
    commits: list = field(default_factory=lambda: [("0" * 40, {})])
    tags: dict = field(default_factory=dict)

    def commit(self, files):
        """Add a commit of these files over the last one's; returns its hash."""
        number = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits.append((number, {**self.commits[-1][1], **files}))
        return number

    def at(self, revision):
        """Return (hash, {path: bytes}) of a revision, or None."""
        if revision == "main":
            return self.commits[-1]
        revision = self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit[0] == revision), None)


class Hub(ThreadingHTTPServer):
    """Serves `repositories`, {ORG/NAME: Repository}, on a port of its own.

    `cut`: a file whose transfer breaks off half-way. `asked`: [(method, path)]. `uploads`: {sha256: bytes}.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.uploads, self.asked, self.cut = {}, {}, [], None
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.store = f"http://localhost:{self.server_port}"  # of large files, which is another host

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status=200, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code=None):
        self.answer(status, b"", **({"X-Error-Code": code} if code else {}))

    def repository(self, name):
        """Return a repository that the caller may read; answers and returns None where there is none."""
        found, known = self.server.repositories.get(name), self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if found is None or (found.private and not known):
            return self.refuse(404 if found is None else 401, "RepoNotFound" if found is None else None)
        if found.gated:
            return self.refuse(403, "GatedRepo")
        return found

    def revision(self, name, revision):
        """Return (hash, {path: bytes}); answers and returns None where there is none."""
        found = self.repository(name)
        if found and not found.at(revision):
            return self.refuse(404, "RevisionNotFound")
        return found and found.at(revision)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        if path == "/":
            return self.answer()
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            return self.answer(200, {"name": "me", "type": "user", "orgs": []}) if known else self.refuse(401)
        if path.startswith("/stored/"):
            return self.send_stored(path.removeprefix("/stored/"))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.send_file(*found.groups())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(tree|revision)/([^/]+))?", path):
            return self.describe(*found.groups())
        return self.refuse(404)

    do_HEAD = do_GET

    def send_file(self, name, revision, path):
        commit = self.revision(name, revision)
        if not commit:
            return None
        number, files = commit
        if path not in files:
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=number)
        content, told = files[path], {"X_Repo_Commit": number}
        if not path.endswith(LARGE):
            return self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', **told)
        key = hashlib.sha256(content).hexdigest()
        self.server.uploads[key] = content
        place = f"{self.server.store}/stored/{key}/{path}"
        return self.answer(302, b"", Location=place, X_Linked_ETag=f'"{key}"', X_Linked_Size=len(content), **told)

    def send_stored(self, place):
        assert "Authorization" not in self.headers  # the token is the hub's alone
        key, _, path = place.partition("/")
        content = self.server.uploads[key]
        if path != self.server.cut or self.command == "HEAD":
            return self.answer(200, content, ETag=f'"{key}"')
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True
        return None

    def describe(self, name, what, revision):
        commit = self.revision(name, revision or "main")
        if not commit:
            return None
        number, files = commit
        if what != "tree":
            told = {"id": name, "sha": number, "private": self.server.repositories[name].private}
            return self.answer(200, told | {"siblings": [{"rfilename": path} for path in files]})
        entries = []
        for path, content in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
            entries.append(entry)
        return self.answer(200, entries)

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.take_large(json.loads(body)["objects"])
        name, what = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path).groups()
        if what == "commit":
            return self.commit(name, [json.loads(line) for line in body.splitlines()])
        files = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
             "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]  # fmt: skip
        return self.answer(200, {"files": files})

    def create(self, asked):
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        if name.startswith("others/"):
            return self.refuse(403)
        if name in self.server.repositories:
            return self.answer(409, {"url": f"{self.server.address}/{name}"})
        self.server.repositories[name] = Repository(
            private=asked.get("private") or asked.get("visibility") == "private"  # as the library's version has it
        )
        return self.answer(200, {"url": f"{self.server.address}/{name}", "name": name})

    def take_large(self, objects):
        uploads = {"href": f"{self.server.address}/upload/%s"}
        answer = [
            {"oid": one["oid"], "size": one["size"], "actions": {"upload": {"href": uploads["href"] % one["oid"]}}}
            for one in objects
        ]
        return self.answer(200, {"transfer": "basic", "objects": answer}, Content_Type="application/json")

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/upload/")
        self.server.uploads[self.path.removeprefix("/upload/")] = content
        self.answer()

    def commit(self, name, lines):
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
        number = self.server.repositories[name].commit(files)
        self.answer(200, {"commitUrl": f"{self.server.address}/{name}/commit/{number}", "commitOid": number})
