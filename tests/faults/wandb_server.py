"""A stand-in for the server of Weights & Biases, good or bad in one way, on 127.0.0.1 in threads of the test."""

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USER = {
    **{"id": "VXNlcjox", "name": "me", "username": "me", "entity": "me", "flags": "{}", "email": "a@b", "admin": False},
    **{"teams": {"edges": []}, "apiKeys": {"edges": []}},
}
PROJECT = {"name": "p", "id": "p", "entity": {"name": "me", "id": "e"}}
RUN = {
    **{"id": "UnVuOnYx", "name": "abc", "displayName": "abc", "description": "", "config": "{}", "sweepName": None},
    **{"historyLineCount": 0, "logLineCount": 0, "eventsLineCount": 0, "history": "[]", "events": "[]"},
    **{"summaryMetrics": "{}", "tags": [], "wandbConfig": "{}", "project": PROJECT, "stopped": False},
    "files": {"edges": [], "uploadHeaders": [], "uploadUrl": ""},
}
NONE = {"fields": [], "inputFields": []}
ANSWER = {
    **{"viewer": USER, "upsertBucket": {"bucket": RUN, "inserted": True}, "updateRun": {"bucket": RUN}},
    "model": {"name": "p", "entity": {"name": "me"}, "bucket": None, "run": RUN},
    "project": {**PROJECT, "run": {**RUN, "files": {"edges": []}}, "bucket": None},
    "serverInfo": {
        **{"cliVersionInfo": {"max_cli_version": "99.0.0"}, "features": []},
        "latestLocalVersionInfo": None,
    },
    **{"features": [], "entity": {"name": "me", "organization": {"orgEntity": {"name": "me"}}}},
    "createRunFiles": {"runID": "UnVuOnYx", "uploadHeaders": [], "files": []},
    **dict.fromkeys(("__type", "TypeInfo", "QueryType", "MutationType", "ServerInfoType", "UserType"), NONE),
}


class Server(ThreadingHTTPServer):
    """`how` may be changed while it runs; `rows` of figures came, in so many of the requests that it was `asked`.

    Args:
        how: "good", "silent" (it accepts and never answers), or the status of every answer.
    """

    daemon_threads = True

    def __init__(self, how: str | int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.how, self.rows, self.asked = how, 0, 0

    @property
    def env(self) -> dict[str, str]:
        """Variables with which W&B asks this server."""
        key = "0123456789abcdef0123456789abcdef01234567"
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": key}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked += 1
        if self.server.how == "silent":
            return time.sleep(3600)
        if self.server.how != "good":
            return self._send(self.server.how, {"errors": [{"message": "no"}], "error": "no"})
        if "file_stream" in self.path:
            text = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
            files = json.loads(text).get("files") or {}
            self.server.rows += len(files.get("wandb-history.jsonl", {}).get("content", []))
            return self._send(200, {"exitcode": None, "limits": {}})
        return self._send(200, {"data": ANSWER} if "graphql" in self.path else {})

    do_GET = do_POST = do_PUT = do_HEAD = _answer

    def _send(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def serving(how: str | int) -> Iterator[Server]:
    """A server as long as the context lasts."""
    server = Server(how)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
