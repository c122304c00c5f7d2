"""Tells a monitor how a node is: `/health`, and `/metrics` in the format of Prometheus."""

import http.server
import shutil
import threading
import time
from collections import Counter

from keras_mmfnet.node.queue import STATES
from keras_mmfnet.node.service import Node

_HELP = {
    "studies": "Studies by state.",
    "images": "Images that were received.",
    "failed_attempts": "Attempts that failed, of studies that are tried again.",
    "oldest_seconds": "The longest time since the last step of a study that is not done or refused.",
    "free_bytes": "Free bytes on the disk.",
}


def describe(node: Node) -> str:
    """The metrics of a node in the format of Prometheus."""
    studies = node.queue.studies()
    waiting = [study for study in studies if study.state not in ("done", "refused")]
    counts = Counter(study.state for study in studies)
    values = {
        "studies": {f'{{state="{state}"}}': counts[state] for state in STATES},
        "images": {"": sum(study.images for study in studies)},
        "failed_attempts": {"": sum(study.attempts for study in waiting)},
        "oldest_seconds": {"": max((time.time() - study.changed for study in waiting), default=0.0)},
        "free_bytes": {"": shutil.disk_usage(node.folder).free},
    }
    lines = []
    for name, each in values.items():
        lines += [f"# HELP mmfnet_node_{name} {_HELP[name]}", f"# TYPE mmfnet_node_{name} gauge"]
        lines += [f"mmfnet_node_{name}{labels} {value}" for labels, value in each.items()]
    return "\n".join(lines) + "\n"


def find_fault(node: Node) -> str:
    """What keeps a node from its work now, such as a full disk; empty if nothing does."""
    node.queue.studies()  # raises if it cannot be read
    return str(node.faults) or node.store.why_full() or (node.watched.fault() if node.watched else "")


def serve_health(node: Node, port: int) -> http.server.ThreadingHTTPServer:
    """Answers `/health` (200, or 503 with the reason) and `/metrics` on this machine, in a thread of its own.

    Args:
        node: The node.
        port: Port; 0 for a free one.

    Returns:
        The server, with its port in `server_port`, to be ended by `shutdown()` and `server_close()`.

    Raises:
        OSError: The port cannot be used.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, text = 404, "not found\n"
            try:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    status, text = 200, describe(node)
                elif path == "/health":
                    fault = find_fault(node)
                    status, text = (503, f"{fault}\n") if fault else (200, "ok\n")
            except Exception as error:  # a queue or a disk that is damaged is what is asked for
                status, text = 503, f"{error}\n"
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text.encode())

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            """Says nothing of a monitor that does not wait for the answer."""

    server = Server(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
