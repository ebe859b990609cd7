"""Downloads: the whole file, verified, through servers that misbehave; never a half file under the final name."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from protformer.cli import run
from protformer.corpus import download as downloads

CONTENT = np.random.default_rng(0).bytes(1_500_000)
FILE = "uniprot_sprot.fasta.gz"
METALINK = """<?xml version="1.0" encoding="UTF-8"?>
<metalink version="3.0" xmlns="http://www.metalinker.org/">
 <version>2025_04</version>
 <files>
  <file name="other.gz"><size>3</size><verification><hash type="md5">{wrong}</hash></verification></file>
  <file name="{file}"><size>{size}</size><verification><hash type="md5">{md5}</hash></verification></file>
 </files>
</metalink>
"""


class Server:
    """A mirror on this machine; each test changes how it behaves."""

    def __init__(self):
        self.md5, self.size = hashlib.md5(CONTENT).hexdigest(), len(CONTENT)
        self.content, self.has_range, self.break_after, self.metalink = CONTENT, True, [], METALINK
        self.answers = []  # status codes to give before the file
        self.content_range = None
        self.ranges = []  # what was asked for
        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_of_test": self}))
        self.httpd.handle_error = lambda request, client_address: None  # clients that leave early are part of the tests
        self.url = f"http://127.0.0.1:{self.httpd.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server_of_test: Server

    def log_message(self, *words):
        pass

    def do_GET(self):  # noqa: N802
        server = self.server_of_test
        if self.path == "/knowledgebase/complete/RELEASE.metalink":
            body = server.metalink.format(file=FILE, size=server.size, md5=server.md5, wrong="0" * 32).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)
        elif self.path != f"/knowledgebase/complete/{FILE}":
            self.send_error(404)
        elif server.answers:
            self.send_error(server.answers.pop(0))
        else:
            self.send_file(server)

    def send_file(self, server):
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.has_range else 0
        body = server.content[start:]
        self.send_response(206 if asked and server.has_range else 200)
        self.send_header("Content-Length", str(len(body)))
        if asked and server.has_range:
            whole = f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
            self.send_header("Content-Range", server.content_range or whole)
        self.end_headers()
        cut = server.break_after.pop(0) if server.break_after else len(body)
        self.wfile.write(body[:cut])
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "FIRST_PAUSE_SECONDS", 0.001)
    server = Server()
    thread = threading.Thread(target=server.httpd.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.httpd.shutdown()
    thread.join()
    server.httpd.server_close()


def fetch(server, out, *options):
    return run(["data", "download", "swissprot", "--out", str(out), "--mirror", server.url, *options])


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_comes_whole_and_is_verified(server, tmp_path, capsys):
    assert fetch(server, tmp_path / "new" / "s.gz") == 0
    assert (tmp_path / "new" / "s.gz").read_bytes() == CONTENT
    assert left(tmp_path / "new") == ["s.gz"]
    assert f"release 2025_04, 1,500,000 bytes, MD5 {server.md5}" in capsys.readouterr().out


def test_dropped_connections_are_continued_where_they_broke(server, tmp_path, capsys):
    server.break_after = [400_000, 0, 300_000, 1]
    server.answers = [503, 429]
    assert fetch(server, tmp_path / "s.gz") == 0
    assert (tmp_path / "s.gz").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=400000-", "bytes=400000-", "bytes=700000-", "bytes=700001-"]
    assert "ended after 400,000 of 1,500,000 bytes; trying again" in capsys.readouterr().err


def test_a_server_without_ranges_is_asked_for_the_whole_file_again(server, tmp_path, capsys):
    server.has_range, server.break_after = False, [400_000]
    assert fetch(server, tmp_path / "s.gz") == 0
    assert (tmp_path / "s.gz").read_bytes() == CONTENT
    assert "does not continue files; starting again" in capsys.readouterr().err


def test_the_next_call_goes_on_with_what_an_earlier_one_brought(server, tmp_path, capsys):
    server.break_after = [400_000, *[0] * downloads.MAX_FRUITLESS]
    assert fetch(server, tmp_path / "s.gz", "-q") == 1
    told = capsys.readouterr().err
    assert "gave up after 6 attempts that got no further; the same command goes on" in told
    assert told.count("\n") == 1
    assert left(tmp_path) == [f"s.gz.{server.md5}.partial"]
    assert (tmp_path / f"s.gz.{server.md5}.partial").stat().st_size == 400_000
    server.ranges.clear()
    assert fetch(server, tmp_path / "s.gz") == 0
    assert server.ranges == ["bytes=400000-"]
    assert (tmp_path / "s.gz").read_bytes() == CONTENT
    assert left(tmp_path) == ["s.gz"]


def test_a_partial_file_of_another_release_is_not_gone_on_with(server, tmp_path):
    (tmp_path / f"s.gz.{'0' * 32}.partial").write_bytes(b"old")
    assert fetch(server, tmp_path / "s.gz") == 0
    assert server.ranges == [None]


@pytest.mark.parametrize("earlier", [CONTENT, CONTENT + b"more"])
def test_a_partial_file_that_is_whole_or_too_long_does_no_harm(server, tmp_path, earlier):
    (tmp_path / f"s.gz.{server.md5}.partial").write_bytes(earlier)
    assert fetch(server, tmp_path / "s.gz") == 0
    assert (tmp_path / "s.gz").read_bytes() == CONTENT


def test_a_wrong_checksum_is_an_error_and_leaves_nothing(server, tmp_path, capsys):
    server.content = CONTENT[:-1] + b"?"
    assert fetch(server, tmp_path / "s.gz", "-q") == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {server.url}/knowledgebase/complete/{FILE}: the checksum is wrong (MD5 ")
    assert told.count("\n") == 1
    assert left(tmp_path) == []


def test_a_server_that_sends_more_than_the_release_has_is_an_error(server, tmp_path, capsys):
    server.content = CONTENT + b"more"
    assert fetch(server, tmp_path / "s.gz", "-q") == 1
    assert "sends more than the 1,500,000 bytes that the release gives" in capsys.readouterr().err
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("has_range", "message"), [(True, "another part of a file"), (False, "gave up after 6 attempts")]
)
def test_a_server_whose_file_is_shorter_than_the_release_says_is_an_error(server, tmp_path, capsys, has_range, message):
    server.content, server.has_range = CONTENT[:1000], has_range
    assert fetch(server, tmp_path / "s.gz", "-q") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s.gz").exists()


def test_an_answer_with_another_part_is_an_error(server, tmp_path, capsys):
    server.break_after, server.content_range = [400_000], "bytes 7-99/100"
    assert fetch(server, tmp_path / "s.gz", "-q") == 1
    assert "answers with another part of a file (Content-Range 'bytes 7-99/100')" in capsys.readouterr().err
    assert not (tmp_path / "s.gz").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": [403]}, "the server answers 403"),
        ({"metalink": "<html>Maintenance"}, "RELEASE.metalink: not a metalink"),
        ({"metalink": "<metalink/>"}, f"gives no size and MD5 of {FILE}; try another --mirror"),
        ({"size": "many"}, f"gives no size and MD5 of {FILE}"),
        ({"md5": "abc"}, f"gives no size and MD5 of {FILE}"),
    ],
)
def test_what_will_not_pass_is_told_at_once(server, tmp_path, capsys, change, message):
    for name, value in change.items():
        setattr(server, name, value)
    assert fetch(server, tmp_path / "s.gz", "-q") == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert left(tmp_path) == []


def test_an_existing_file_is_not_replaced(server, tmp_path, capsys):
    (tmp_path / "s.gz").write_text("mine")
    assert fetch(server, tmp_path / "s.gz") == 1
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "s.gz").read_text() == "mine"


@pytest.mark.parametrize("mirror", ["nowhere", "file:///etc", "ftp://ftp.uniprot.org/x"])
def test_a_mirror_must_be_known_or_an_address(tmp_path, capsys, mirror):
    assert run(["data", "download", "trembl", "--out", str(tmp_path / "t.gz"), "--mirror", mirror]) == 1
    assert "is neither uniprot, ebi, expasy nor an address" in capsys.readouterr().err


def test_a_server_that_cannot_be_reached_is_given_up_on(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(downloads, "MAX_FRUITLESS", 2)
    assert run(["data", "download", "trembl", "--out", str(tmp_path / "t.gz"), "--mirror", "http://127.0.0.1:1"]) == 1
    assert "gave up after 2 attempts that got no further" in capsys.readouterr().err
