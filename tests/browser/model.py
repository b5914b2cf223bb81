"""A model that says what the test wants, when the test wants it: an OpenAI-compatible server in this process."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATIENCE_SECONDS = 60.0
Piece = "str | Gate | Failure"


class Gate:
    """Holds a reply until the test opens it."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._opened = threading.Event()

    def wait_until_reached(self) -> None:
        """The reply has come as far as this."""
        assert self._reached.wait(PATIENCE_SECONDS), "no reply came to this gate"

    def open(self) -> None:
        """Lets the reply go on."""
        self._opened.set()

    def pass_through(self) -> None:
        """For the server: waits until the gate is open; one that its test forgot opens by itself."""
        self._reached.set()
        self._opened.wait(PATIENCE_SECONDS)


class Failure:
    """The model breaks off here."""


Reply = Sequence["str | Gate | Failure"]


class Model:
    """The server. Without a reply of the test's, it repeats what was said to it."""

    def __init__(self) -> None:
        self._replies: deque[Reply] = deque()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self._pieces))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        """For `LLM_BASE_URL`."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Ends; gates that are still closed do not hold it up."""
        self._server.shutdown()
        self._server.server_close()

    def reset(self) -> None:
        """Forgets what it was to say."""
        self._replies.clear()

    def will_say(self, *pieces: str | Gate | Failure) -> None:
        """The next reply that nothing is planned for yet."""
        self._replies.append(pieces)

    def _pieces(self, said: str) -> Reply:
        return self._replies.popleft() if self._replies else words(f"You said: {said}")


def words(text: str) -> list[str]:
    """A text in the pieces in which a model gives it."""
    return [word + " " for word in text.split(" ")]


def _handler(pieces: Callable[[str], Reply]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = pieces(body["messages"][-1]["content"])
            if reply and isinstance(reply[0], Failure):
                self.send_error(400, explain=f"This was refused: {body['messages']}")  # as providers do
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                for chunk in _chunks(reply):
                    self.wfile.write(chunk)
                    self.wfile.flush()
            except (BrokenPipeError, ConnectionResetError):
                return  # whoever asked has hung up: stopped, or killed

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: pytest shows what matters."""

    return Handler


def _chunks(reply: Reply) -> Iterator[bytes]:
    for piece in reply:
        if isinstance(piece, Gate):
            piece.pass_through()
        elif isinstance(piece, Failure):
            return  # without [DONE], in the middle of a chunk
        else:
            yield _data({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
    yield _data({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    yield b"data: [DONE]\n\n"


def _data(chunk: dict[str, Any]) -> bytes:
    whole = {"id": "reply", "object": "chat.completion.chunk", "created": 0, "model": "test"} | chunk
    return b"data: " + json.dumps(whole).encode() + b"\n\n"
