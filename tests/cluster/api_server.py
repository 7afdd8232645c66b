"""As much of an API server as the driver asks: lists with pages, objects, JSON and merge patches, new objects, tokens.

    api_server.py CERTIFICATE KEY STATE.json

STATE.json is {"token": ..., "objects": {path: object or list of objects}}. Prints its port; every change of an object
is written back to the file.
"""

import json
import pathlib
import ssl
import sys
import urllib.parse
from http.server import ThreadingHTTPServer

from api_handler import ApiHandler, merge

certificate, key, state_path = sys.argv[1:]
STATE = pathlib.Path(state_path)
PAGE = 2


class Handler(ApiHandler):
    def state(self):
        return json.loads(STATE.read_text())

    def find(self):
        """The object that the request names, once its token is right."""
        state = self.state()
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if self.headers["authorization"] != f"Bearer {state['token']}":
            self.refuse(401, "Unauthorized")
        elif url.path not in state["objects"]:
            self.refuse(404, "NotFound")
        else:
            return state, url.path, query
        return None

    def do_GET(self):
        if (found := self.find()) is None:
            return
        state, path, query = found
        wanted = state["objects"][path]
        if isinstance(wanted, dict):
            return self.answer(200, wanted)
        # Real tokens have characters that a query must not carry as they are.
        start = int(query.get("continue", "").removeprefix("from+/=") or 0)
        size = min(int(query["limit"]), PAGE)
        end = start + size
        more = f"from+/={end}" if end < len(wanted) else ""
        self.answer(200, {"metadata": {"continue": more}, "items": wanted[start:end]})

    def do_PATCH(self):
        body = self.body()
        if (found := self.find()) is None:
            return
        state, path, _ = found
        if self.headers["content-type"] == "application/merge-patch+json":
            merge(state["objects"][path], body)
        elif self.headers["content-type"] != "application/json-patch+json":
            return self.refuse(415, "UnsupportedMediaType")
        for change in body if isinstance(body, list) else []:
            *folders, last = change["path"].strip("/").split("/")
            place = state["objects"][path]
            for folder in folders:
                place = place[folder]
            if change["op"] == "test" and place[last] != change["value"]:
                return self.refuse(422, "Invalid")
            if change["op"] in ("add", "replace"):
                place[last] = change["value"]
        self.write(state)
        self.answer(200, state["objects"][path])

    def do_POST(self):
        body = self.body()
        state = self.state()
        path = f"{urllib.parse.urlsplit(self.path).path}/{body['metadata']['name']}"
        if self.headers["authorization"] != f"Bearer {state['token']}":
            return self.refuse(401, "Unauthorized")
        if path in state["objects"]:
            return self.refuse(409, "AlreadyExists")
        state["objects"][path] = body
        self.write(state)
        self.answer(201, body)

    def write(self, state):
        next_state = STATE.with_suffix(".patched")
        next_state.write_text(json.dumps(state))
        next_state.rename(STATE)


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate, key)
server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_port, flush=True)
server.serve_forever()
