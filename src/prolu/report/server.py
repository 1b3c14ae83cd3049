"""Serves the page of a study in training to browsers on this machine."""

from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from urllib.parse import unquote, urlsplit

from plotly.offline import get_plotlyjs

from prolu.report.latents.browser import FEATURES_FOLDER
from prolu.report.watched_study import WatchedStudy, check_watchable

ADDRESS = "127.0.0.1"
"""The only address on which pages are served: other machines cannot reach it."""

OWN_NAMES = ("127.0.0.1", "localhost", "::1")
"""The host names that are accepted in a request, with any port, since SSH may forward another one. A website whose name
was made to point to this machine has another name, and could otherwise read the study (DNS rebinding)."""

LARGEST_PORT = 65535

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".css": "text/css",
}
"""The kinds of files that pages of latents consist of, by their endings. No others are sent."""


class StudyServer:
    """A server of one study's page."""

    def __init__(self, folder: Path, port: int):
        """Take the port.

        Args:
            folder: the folder of the study, which need not exist yet.
            port: the port; 0 takes any that is free.

        Raises:
            ValueError: the port is none, or is taken, or the folder is a file.
        """
        check_watchable(folder)
        if not 0 <= port <= LARGEST_PORT:
            raise ValueError(f"port {port}: must be from 0 to {LARGEST_PORT}; 0 takes any that is free")
        try:
            self._server = _Server(WatchedStudy(folder), port)
        except OSError as problem:
            raise ValueError(f"port {port}: {problem.strerror}; choose another one with --port") from None

    @property
    def address(self) -> str:
        """The address of the page."""
        return f"http://{ADDRESS}:{self._server.server_address[1]}/"

    def serve(self) -> None:
        """Answer until the process is interrupted, or `close` is called in another thread."""
        try:
            self._server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            pass  # the usual end
        finally:
            self._server.server_close()

    def close(self) -> None:
        """Let `serve` return."""
        self._server.shutdown()


class _Server(ThreadingHTTPServer):
    # A browser opens connections that it does not use yet, so one thread would wait for them.
    daemon_threads = True

    def __init__(self, study: WatchedStudy, port: int):
        super().__init__((ADDRESS, port), _Handler)
        self.study = study
        self.lock = Lock()  # one page is made at a time


class _Handler(BaseHTTPRequestHandler):
    server_version = "prolu"
    sys_version = ""

    def do_GET(self) -> None:
        if not self._is_from_here():
            self.send_error(HTTPStatus.FORBIDDEN, "Only browsers on this machine may ask")
            return
        path = unquote(urlsplit(self.path).path)
        if path == "/":
            with self._own_server.lock:
                page = self._own_server.study.page()
            self._send(page.text.encode(), TYPES[".html"], tag=page.tag)
        elif path == "/plotly.js":
            self._send(_plotly(), TYPES[".js"], lasting=True)
        elif file := self._file_of_latents(path):
            self._send(file.read_bytes(), TYPES[file.suffix])
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_HEAD(self) -> None:
        self.do_GET()

    @property
    def _own_server(self) -> _Server:
        assert isinstance(self.server, _Server)
        return self.server

    def _is_from_here(self) -> bool:
        try:
            return urlsplit(f"//{self.headers.get('Host', '')}").hostname in OWN_NAMES
        except ValueError:  # such as brackets without an address
            return False

    def _file_of_latents(self, path: str) -> Path | None:
        """Return a file of the pages of latents of a run; None if the path names nothing else there."""
        run_id, _, rest = path.removeprefix("/").partition(f"/{FEATURES_FOLDER}/")
        folder = self._own_server.study.latents_folder(run_id)
        if folder is None or not rest or "\0" in rest:
            return None
        file = (folder / rest).resolve()  # links, too, must not lead out of the folder
        is_inside = file.is_relative_to(folder.resolve())
        return file if is_inside and file.suffix in TYPES and file.is_file() else None

    def _send(self, content: bytes, kind: str, *, tag: str = "", lasting: bool = False) -> None:
        is_known = bool(tag) and self.headers.get("If-None-Match") == f'"{tag}"'
        self.send_response(HTTPStatus.NOT_MODIFIED if is_known else HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "max-age=86400" if lasting else "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Frame-Options", "DENY")
        if tag:
            self.send_header("ETag", f'"{tag}"')
        if not is_known:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET" and not is_known:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing, because the page asks every ten seconds."""


@cache
def _plotly() -> bytes:
    return get_plotlyjs().encode()
