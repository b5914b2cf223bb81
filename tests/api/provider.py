"""An identity provider on this machine, with as many keys and troubles as a test wants."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

AUDIENCE = "https://chat.example.org"
DISCOVERY, KEYS = "/realm/.well-known/openid-configuration", "/realm/keys"


class Key:
    """A key pair; `jwk` is its public half."""

    def __init__(self, name: str, algorithm: str = "RS256", **told: Any) -> None:
        self.name, self.algorithm = name, algorithm
        made: Any = {
            "RS": lambda: rsa.generate_private_key(65537, 2048),
            "PS": lambda: rsa.generate_private_key(65537, 2048),
            "ES": lambda: ec.generate_private_key(ec.SECP256R1()),
            "Ed": ed25519.Ed25519PrivateKey.generate,
        }[algorithm[:2]]()
        self.private = made
        public = jwt.get_algorithm_by_name(algorithm).to_jwk(made.public_key(), as_dict=True)
        self.jwk = public | {"kid": name, "use": "sig", "alg": algorithm} | told


class Provider:
    """What it says can be changed while it runs; `asked` is what it was asked for."""

    def __init__(self, port: int) -> None:
        self.issuer = f"http://127.0.0.1:{port}/realm"
        self.key = Key("first")
        self.keys: list[Any] = [self.key.jwk]
        self.document: Any = {"issuer": self.issuer, "jwks_uri": f"http://127.0.0.1:{port}{KEYS}"}
        self.status = 200
        self.open = threading.Event()
        self.open.set()
        self.asked: list[str] = []

    def claims(self, **changes: Any) -> dict[str, Any]:
        now = int(time.time())
        claims = {"iss": self.issuer, "aud": AUDIENCE, "sub": "ann", "iat": now, "exp": now + 600} | changes
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, key: Key | None = None, *, header: dict[str, Any] | None = None, **changes: Any) -> str:
        """A token of its own, as it should be but for the changes."""
        key = key or self.key
        said = {name: value for name, value in ({"kid": key.name} | (header or {})).items() if value is not None}
        return jwt.encode(self.claims(**changes), key.private, key.algorithm, headers=said)

    def answer(self, path: str) -> tuple[int, bytes]:
        self.asked.append(path)
        self.open.wait(20)
        told = {DISCOVERY: self.document, KEYS: {"keys": self.keys}}.get(path)
        return (404, b"") if told is None else (self.status, json.dumps(told).encode())


@contextmanager
def provider() -> Iterator[Provider]:
    """One that runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = served.answer(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """It keeps quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        served = Provider(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield served
        finally:
            served.open.set()
            server.shutdown()
            thread.join(10)
