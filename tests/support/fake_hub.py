"""As much of the Hugging Face hub as push and pull ask for: repositories in memory, over HTTP, on this machine."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.lfs, self.requests, self.fail = {}, {}, [], None
        """`repos`: {name: {"private", "branches": {branch: sha}, "commits": {sha: {path: bytes}}}}; `fail`: status and
        words for every request that writes."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def create(self, repo, private=False):
        sha = hashlib.sha1(repo.encode()).hexdigest()
        self.repos[repo] = {"private": private, "branches": {"main": sha}, "commits": {sha: {".gitattributes": b""}}}

    def replace(self, repo, files):
        """Somebody else's commit."""
        held, sha = self.repos[repo], hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        held["commits"][sha], held["branches"]["main"] = files, sha

    def files(self, repo, revision="main"):
        held = self.repos[repo]
        return held["commits"][held["branches"].get(revision, revision)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, content=b"", status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def serve(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, path, self.headers, body))
        if (
            hub.fail
            and path != "/api/validate-yaml"
            and (self.command in ("POST", "PUT") or path.endswith("whoami-v2"))
        ):
            return self.answer({"error": hub.fail[1]}, hub.fail[0])
        if path in ("", "/"):
            return self.answer()
        if path == "/api/whoami-v2":
            return self.answer({"name": "ann"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            private = asked.get("visibility") == "private" or asked.get("private", False)  # huggingface_hub 1.3: that
            hub.create(f"{asked['organization']}/{asked['name']}", private)
            return self.answer({"url": f"{hub.url}/{asked['organization']}/{asked['name']}"})
        if path == "/api/validate-yaml":
            wrong = (
                [{"message": '"license" must be a licence'}] if "license: none" in json.loads(body)["content"] else []
            )
            return self.answer({"errors": wrong, "warnings": []}, 400 if wrong else 200)
        if path.startswith("/lfs/"):
            hub.lfs[path.removeprefix("/lfs/")] = body
            return self.answer()
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            where = {o["oid"]: {"actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}} for o in objects}
            actions = [o | ({} if o["oid"] in hub.lfs else where[o["oid"]]) for o in objects]
            return self.answer({"objects": actions, "transfer": "basic"})
        found = re.fullmatch(
            r"/(?:api/models/)?([^/]+/[^/]+)(?:/(revision|tree|preupload|commit|branch|resolve)/([^/]+)(?:/(.*))?)?",
            path,
        )
        repo, action, revision, rest = found.groups()
        if repo not in hub.repos:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        held = hub.repos[repo]
        if action == "branch":
            held["branches"][revision] = json.loads(body)["startingPoint"]
            return self.answer({})
        sha = held["branches"].get(revision or "main", revision)
        if sha not in held["commits"]:
            return self.answer({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
        files = held["commits"][sha]
        return getattr(self, f"on_{action or 'revision'}")(repo, held, sha, files, revision, rest, body)

    do_GET = do_POST = do_PUT = do_HEAD = serve  # noqa: N815

    def on_revision(self, repo, held, sha, files, *_):
        siblings = [{"rfilename": name} for name in files]
        self.answer({"id": repo, "sha": sha, "private": held["private"], "siblings": siblings})

    def on_tree(self, repo, held, sha, files, *_):
        self.answer([{"type": "file", "path": p, "size": len(c), "oid": git_oid(c)} for p, c in files.items()])

    def on_preupload(self, repo, held, sha, files, revision, rest, body):
        def oid(path):
            large = path.endswith(".safetensors")
            return (
                (hashlib.sha256(files[path]).hexdigest() if large else git_oid(files[path])) if path in files else None
            )

        asked = [f["path"] for f in json.loads(body)["files"]]
        modes = {True: "lfs", False: "regular"}
        self.answer({
            "files": [
                {"path": p, "uploadMode": modes[p.endswith(".safetensors")], "shouldIgnore": False, "oid": oid(p)}
                for p in asked
            ]
        })  # fmt: skip

    def on_commit(self, repo, held, sha, files, revision, rest, body):
        lines, new = [json.loads(line) for line in body.splitlines()], dict(files)
        if lines[0]["value"].get("parentCommit") not in (None, sha):
            return self.answer({"error": "a newer commit is there"}, 412)
        for line in lines[1:]:
            value = line["value"]
            new[value["path"]] = (
                self.server.lfs[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
            )
        commit = hashlib.sha1(sha.encode() + body).hexdigest()
        held["commits"][commit], held["branches"][revision] = new, commit
        return self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/{commit}", "commitOid": commit})

    def on_resolve(self, repo, held, sha, files, revision, rest, body):
        if rest not in files:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        return self.answer(files[rest], ETag=f'"{git_oid(files[rest])}"', X_Repo_Commit=sha)
