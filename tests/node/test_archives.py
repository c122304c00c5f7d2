"""Addresses, archives that speak DICOMweb, and TLS."""

import http.server
import shutil
import socket
import subprocess
import threading

import pytest
from nodes import STUDY, listening, states

from keras_mmfnet.node.network import Archive, Certificates, WebArchive, parse_archive


def test_a_web_archive_that_is_away_or_answers_nonsense(contours, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"

        def nonsense():
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"nonsense\r\n\r\n")

        thread = threading.Thread(target=nonsense)
        thread.start()
        with pytest.raises(OSError, match=rf"{address}: must answer. Received: "):
            WebArchive(address).store([], "MMFNET")
        thread.join()
    with pytest.raises(OSError, match=rf"{address}: must answer. Received: .*refused"):
        WebArchive(address).store([], "MMFNET")


def test_a_web_archive_that_sends_on(monkeypatch):
    """Nothing would be stored, and the password would go to another server."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(301)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        archive = WebArchive(f"http://127.0.0.1:{server.server_port}/dicom-web")
        with pytest.raises(OSError, match=r"must store all objects. Received: status 301"):
            archive.store([], "MMFNET")
        for secret in ("Bearer SECRET\n", "Bearer SECRET\x01"):
            monkeypatch.setenv("MMFNET_NODE_AUTHORIZATION", secret)
            with pytest.raises(OSError, match=r"status 301|printable ASCII") as refused:
                archive.store([], "MMFNET")
            assert "SECRET" not in str(refused.value)
        server.shutdown()
    assert asked == ["/dicom-web/studies"] * 2


@pytest.fixture
def certificates(tmp_path):
    """Those of this machine, checked with themselves."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", tmp_path / "key.pem", "-out", tmp_path / "own.pem"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *names, *files]
    subprocess.run(command, check=True, capture_output=True)
    return Certificates(tmp_path / "own.pem", tmp_path / "key.pem", tmp_path / "own.pem")


def test_connections_by_tls(make_node, images, certificates):
    node = make_node(certificates=certificates)
    with listening(node) as address:
        address.store(images, "SCANNER", certificates)
        with pytest.raises(ConnectionError, match="no connection"):
            address.store(images, "SCANNER")
    assert states(node) == [(STUDY, "receiving", 5)]
    with pytest.raises(ValueError, match=r"a certificate, its key and an authority in PEM are expected: .* Received: "):
        Certificates(images[0], images[0], images[0]).context(server=True)


def test_the_address_of_an_archive():
    assert parse_archive("ORTHANC@localhost:4242") == Archive("ORTHANC", "localhost", 4242)
    assert parse_archive("A B@[::1]:104") == Archive("A B", "::1", 104)
    assert parse_archive("https://archive/dicom-web") == WebArchive("https://archive/dicom-web")
    for text in ("ORTHANC", "ORTHANC@localhost", "@localhost:1", "ORTHANC@localhost:70000", "A@h:x", "ÄRCHIV@h:104"):
        with pytest.raises(ValueError, match=r"TITLE@HOST:PORT is expected. Received: "):
            parse_archive(text)
    for text in (" @h:1", "A\n@h:1", "A\\B@h:1", f"{'A' * 17}@h:1", " A@h:1"):
        with pytest.raises(ValueError, match=r"an AE title of 1 to 16 ASCII characters"):
            parse_archive(text)
    for text in ("http://", "http://archive:port/web", "http://archive/a b"):
        with pytest.raises(ValueError, match=r"the address of a DICOMweb server is expected. Received: "):
            parse_archive(text)
    with pytest.raises(ValueError, match=r"a password is expected in MMFNET_NODE_AUTHORIZATION") as refused:
        parse_archive("https://me:secret@archive/web")
    assert "secret" not in str(refused.value)
