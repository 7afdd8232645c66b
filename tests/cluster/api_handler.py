"""What the stand-ins for an API server share: requests and responses in JSON, and merge patches."""

import json
from http.server import BaseHTTPRequestHandler


class ApiHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def content(self):
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def body(self):
        return json.loads(self.content() or b"{}")

    def answer(self, code, document):
        body = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, code, reason):
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code}
        self.answer(code, status | {"message": f"{self.command} {self.path}: {reason}"})


def merge(target, patch):
    """Applies a merge patch (RFC 7386)."""
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            if not isinstance(target.get(key), dict):
                target[key] = {}
            merge(target[key], value)
        else:
            target[key] = value
