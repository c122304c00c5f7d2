"""A review that is served, and what a program gets from it."""

import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request

from keras_mmfnet.review.server import Review, make_server


class Client:
    """Asks a review under an address."""

    def __init__(self, address):
        self.address = address

    def get(self, path, data=None, status=200):
        """The body and the headers of an answer."""
        try:
            answer = urllib.request.urlopen(self.address + path, data, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            assert answer.status == status, path
            return answer.read(), answer.headers

    def json(self, path, data=None, status=200):
        return json.loads(self.get(path, data, status)[0])


@contextlib.contextmanager
def served(patients, folder):
    """A `Client` of a review with the token `secret`."""
    review = Review(patients, folder, "me")
    server = make_server(review, "secret")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Client(f"http://127.0.0.1:{listening.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join()
            review.close()
