"""Conceptual Captions: from a table of addresses, many of them dead or hostile, to captions; kills, two at once."""

import collections
import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, captions_of, run_process, run_script, train
from PIL import Image

from features import addresses, fetching
from features.addresses import Table, add_period
from features.fetching import Dead, Fetcher, host_of, is_public


def picture(seed, size=(40, 32)):
    """Return the bytes of a JPEG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


class Web(BaseHTTPRequestHandler):
    """A server of pictures and of everything else that addresses lead to."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_words):
        pass

    def send(self, status, body=b"", length=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        server, path = self.server, self.path.strip("/").split("/")
        server.asked[self.path] += 1
        server.agents.add(self.headers["User-Agent"])
        kind, number = path[0], int(path[1]) if len(path) > 1 else 0
        with server.counting:
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            time.sleep(server.delay)
            self.answer(kind, number)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with server.counting:
                server.now -= 1

    def answer(self, kind, number):
        server = self.server
        if kind == "ok":
            self.send(200, picture(number), Content_Type="text/plain")  # servers say what they like
        elif kind == "moved":
            self.send(302, Location=f"/ok/{number}")
        elif kind == "busy" and server.asked[self.path] < 3:
            self.send(503, Retry_After="0")
        elif kind == "busy":
            self.send(200, picture(number))
        elif kind in ("404", "500", "429"):
            self.send(int(kind))
        elif kind == "forever":
            self.send(302, Location=f"/forever/{number + 1}")
        elif kind == "inside":
            self.send(302, Location="http://[::1]:1/secret")
        elif kind == "file":
            self.send(302, Location="file:///etc/passwd")
        elif kind == "html":
            self.send(200, b"<!DOCTYPE html><html>gone</html>" * 100, Content_Type="image/jpeg")
        elif kind == "empty":
            self.send(200)
        elif kind == "cut":
            self.send(200, picture(number)[:300], length=5000)
            self.close_connection = True
        elif kind == "gigabyte":
            self.send(200, picture(number), length=1 << 30)
        elif kind == "endless":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            piece = picture(number)
            while True:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        elif kind == "silent":
            server.ended.wait(30)
        elif kind == "drip":
            self.send(200, picture(number)[:100], length=5000)
            server.ended.wait(30)
        elif kind.startswith("trickle"):  # a byte at a time, never as late as a timeout
            self.close_connection = True
            start = {"head": b"HTTP/1.1 200 OK\r\nX-Name: ", "body": b"HTTP/1.1 200 OK\r\n\r\n\xff\xd8\xff"}
            self.wfile.write(start[kind.removeprefix("trickle_")])
            while not server.ended.wait(0.05):
                self.wfile.write(b"x")
        elif kind == "astray":
            self.send(302, Location="http://[")
        elif kind == "forbidden":
            self.send(200, picture(number), X_Robots_Tag="noai, noimageai")
        elif kind == "broken":  # begins as a picture does
            self.send(200, picture(number)[:200])


@pytest.fixture
def web():
    """A running server; `.at(kind, number)` is an address of it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.daemon_threads, server.asked, server.agents = True, collections.Counter(), set()
    server.counting, server.now, server.most, server.delay = threading.Lock(), 0, 0, 0.0
    server.ended = threading.Event()
    server.at = lambda kind, number=0: f"http://127.0.0.1:{server.server_port}/{kind}/{number}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()


def free_port():
    """Return a port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---------------------------------------------------------------- captions and tables
@pytest.mark.parametrize(("before", "after"), [
    ("a dog runs", "a dog runs."), ("a dog runs .", "a dog runs."), ("a dog runs.", "a dog runs."),
    ("  a dog  ", "a dog."), ("wait ...", "wait ..."), ("", ""), (" . ", ""), ("a", "a."),
])  # fmt: skip
def test_full_stops_are_the_predecessors(before, after):
    assert add_period(before) == after


def test_both_orders_of_columns(tmp_path):
    rows = [(f"caption {number}", f"http://host/{number}") for number in range(5)]
    for order in (1, -1):
        (tmp_path / "t.tsv").write_text("".join("\t".join(row[::order]) + "\n" for row in rows))
        read = list(Table(tmp_path / "t.tsv").rows(0))
        assert read == [(number, *row) for number, row in enumerate(rows)]


def test_bad_lines_keep_the_numbers_of_the_others(tmp_path):
    long = b"x" * (addresses.LONGEST_LINE + 5) + b"\thttp://h/1\n"
    lines = [b'"a ""big"" dog"\thttp://h/0\r\n', long, b"no address\n", b"\xff\thttp://h/3\n", b"a cat\thttp://h/4"]
    (tmp_path / "t.tsv").write_bytes(b"".join(lines))
    rows = list(Table(tmp_path / "t.tsv").rows(0))
    assert rows == [(0, 'a "big" dog', "http://h/0"), (1, None, ""), (2, None, ""), (3, None, ""),
                    (4, "a cat", "http://h/4")]  # fmt: skip


def test_a_table_of_neither_kind_is_refused(tmp_path):
    (tmp_path / "t.tsv").write_text("image,caption\na.jpg,a dog\n")
    with pytest.raises(ValueError, match="neither caption<TAB>address nor"):
        Table(tmp_path / "t.tsv")


def test_blocks_follow_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(addresses, "BLOCK", 4)
    (tmp_path / "t.tsv").write_text("".join(f"c {number}\thttp://h/{number}\n" for number in range(10)))
    table = Table(tmp_path / "t.tsv")
    rows = [row for block in range(3) for row in table.rows(block)]
    assert [number for number, *_ in rows] == list(range(10)) and rows[9] == (9, "c 9", "http://h/9")


# ---------------------------------------------------------------- one address
@pytest.mark.parametrize("address", [
    "127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
    "::1", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "2002:7f00:1::", "255.255.255.255",
    "64:ff9b::7f00:1",
])  # fmt: skip
def test_private_addresses_are_told(address):
    assert not is_public(address)


def test_public_addresses_are_told():
    assert is_public("93.184.216.34") and is_public("2606:2800:220:1::1") and is_public("64:ff9b::5db8:d822")


@pytest.mark.parametrize(("address", "reason"), [
    ("ftp://h/a.jpg", "no http or https"), ("file:///etc/passwd", "no http or https"), ("h/a.jpg", "no http or https"),
    ("http://user:word@h/a.jpg", "user name"), ("http://h/a\r\nX: y", "control characters"), ("http://h/a b", "blanks"),
    ("http://h:0/", "cannot be read"), ("http://h:99999/", "cannot be read"), ("http://" + "h" * 9000, "more than"),
    ("", "no http or https"),
])  # fmt: skip
def test_addresses_that_are_not_fetched(address, reason):
    with pytest.raises(Dead) as dead:
        host_of(address)
    assert reason in dead.value.reason


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:{}/ok/1", "http://localhost:{}/ok/1", "http://2130706433:{}/ok/1"]
)
def test_this_machine_is_not_asked(web, address):
    with pytest.raises(Dead) as dead:
        Fetcher(timeout=2).fetch(address.format(web.server_port))
    assert dead.value.reason == "a private address" and not web.asked


def test_a_redirect_to_a_private_address(web, monkeypatch):
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
    with pytest.raises(Dead) as dead:
        Fetcher(timeout=2).fetch(web.at("inside"))
    assert dead.value.reason == "a private address" and web.asked == {"/inside/0": 1}


def test_what_is_checked_is_what_is_connected_to(web, monkeypatch):
    """A name that is public when it is asked for first, and this machine's afterwards, is connected to as checked."""
    answers = iter(["93.184.216.34", "127.0.0.1"])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(socket.AF_INET, 1, 6, "", (next(answers), 80))])
    connected = []
    monkeypatch.setattr(
        fetching.connection,
        "create_connection",
        lambda place, *_: connected.append(place[0]) or (_ for _ in ()).throw(OSError()),
    )
    monkeypatch.setattr(fetching, "TRIES", 1)
    with pytest.raises(Dead):
        Fetcher().fetch(f"http://rebinding.example:{web.server_port}/ok/1")
    assert connected == ["93.184.216.34"]


@pytest.mark.parametrize(("kind", "reason", "asked"), [
    ("404", "HTTP 404", 1), ("500", "HTTP 500", 3), ("429", "HTTP 429", 3), ("forever", "too many redirects", 1),
    ("file", "no http or https address", 1), ("html", "not an image (an HTML page)", 1),
    ("empty", "not an image (an empty file)", 1), ("cut", "truncated", 3), ("gigabyte", "more than 1 MB", 1),
    ("endless", "more than 1 MB", 1), ("silent", "the host does not answer in time", 2), ("drip", "too slow", 3),
    ("forbidden", "its host forbids this use (X-Robots-Tag)", 1), ("trickle_head", "too slow", 1),
    ("trickle_body", "too slow", 1), ("astray", "an address that cannot be read", 1),
])  # fmt: skip
def test_what_is_no_picture(web, monkeypatch, kind, reason, asked):
    monkeypatch.setattr(fetching, "BACKOFF", 0.01)
    began = time.monotonic()
    with pytest.raises(Dead) as dead:
        Fetcher(timeout=0.4, allow_private=True, most_bytes=1 << 20).fetch(web.at(kind))
    assert dead.value.reason == reason and time.monotonic() - began < 8
    assert web.asked[f"/{kind}/0"] == asked


def test_what_is_a_picture(web, monkeypatch):
    monkeypatch.setattr(fetching, "BACKOFF", 0.01)
    fetcher = Fetcher(timeout=2, allow_private=True, user_agent="a name")
    for kind in ("ok", "moved", "busy"):
        assert fetcher.fetch(web.at(kind, 7)) == picture(7)
    assert web.agents == {"a name"}


# ---------------------------------------------------------------- the command
KINDS = ("404", "500", "forever", "file", "html", "empty", "cut", "gigabyte", "forbidden", "astray")


def write_table(root, web, good=40, kinds=KINDS, name="Train_GCC-training.tsv"):
    """Write a table: good addresses, with a dead one of each kind among them; returns the good lines' numbers."""
    captions, lines, kept = captions_of(good), [], []
    for number in range(good):
        kept.append(len(lines))
        lines.append(f"{captions[number].rstrip('.')} \t{web.at(('ok', 'moved')[number % 2], number)}")
        if number < len(kinds):
            lines.append(f"dead\t{web.at(kinds[number], number)}")
    root.mkdir(exist_ok=True)
    (root / name).write_text("\n".join(lines) + "\n")
    return kept


def parse(root, clip_file, *more, runner=run_script, **options):
    """Run parse_conceptual.py with small settings."""
    return runner(
        "parse_conceptual.py", "--data_root", root, "--clip_model_type", clip_file, "--num_workers", 0,
        "--batch_size", 8, "--allow_private", "--per_host", 16, "--timeout", 0.5, "--device", "cpu", *more, **options,
    )  # fmt: skip


def read(root):
    """Return the pickle of the train split."""
    with open(root / "conceptual_clip_clip_train.pkl", "rb") as file:
        return pickle.load(file)


def test_from_addresses_to_captions(web, tmp_path, clip_file, language_model):
    """A table with dead and hostile addresses, to a store, to a captioner, to captions in parquet."""
    root = tmp_path / "cc"
    kept = write_table(root, web)
    with open(root / "Train_GCC-training.tsv", "a") as file:
        file.write(f"gone\thttp://127.0.0.1:{free_port()}/x\nno address\nbroken\t{web.at('broken')}\n")
    done = parse(root, clip_file)
    told = json.loads((root / "train_downloads.json").read_text())
    assert told["fetched"] == 41 and told["dead"] == len(KINDS) + 2 and told["addresses"] == len(KINDS) + 43
    assert told["dead_by_reason"]["HTTP 404"] == 1
    assert told["dead_by_reason"]["a line without a caption and an address"] == 1
    assert told["bytes"] > 0 and told["addresses_per_s"] > 0
    assert f"41 of {len(KINDS) + 43} addresses fetched" in done.stderr
    info = json.loads((root / "conceptual_clip_clip_train.json").read_text())
    assert info["images"] == 40 and info["images_skipped"] == 1
    records = read(root)["captions"]
    assert [record["image_id"] for record in records] == [f"{line:08d}" for line in kept]
    assert all(record["caption"].endswith(".") and not record["caption"].endswith(" .") for record in records)
    assert (root / "train" / f"{kept[3]:08d}.jpg").read_bytes() == picture(3)
    train(root / "conceptual_clip_clip_train.pkl", language_model, tmp_path / "run", "--epochs", 1)
    captions = tmp_path / "captions.json"
    run_script("predict.py", root / "train", "--checkpoint", tmp_path / "run" / "run_latest.pt", "--out", captions,
               "--device", "cpu", check=2)  # fmt: skip  # the broken one is among them
    texts = {row["image_id"]: row["caption"] for row in json.loads(captions.read_text())}
    assert len(texts) == 40
    run_script("predict.py", "--data", root / "conceptual_clip_clip_train.pkl", "--out", f"{tmp_path}/out/",
               "--checkpoint", tmp_path / "run" / "run_latest.pt", "--device", "cpu")  # fmt: skip
    rows = [row for file in sorted((tmp_path / "out").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    assert {int(row["key"]): row["caption"] for row in rows} == texts


def test_a_second_run_asks_for_nothing(web, tmp_path, clip_file):
    write_table(tmp_path / "cc", web, 12, KINDS[:2])
    parse(tmp_path / "cc", clip_file)
    before, asked = read(tmp_path / "cc"), sum(web.asked.values())
    assert "complete" in parse(tmp_path / "cc", clip_file).stderr
    assert sum(web.asked.values()) == asked
    parse(tmp_path / "cc", clip_file, "--retry")
    assert sum(web.asked.values()) == asked + 3  # the one that said 500, three times
    assert read(tmp_path / "cc")["captions"] == before["captions"]


def test_what_was_not_there_may_be_asked_for_again(web, tmp_path, clip_file, monkeypatch):
    write_table(tmp_path / "cc", web, 12, ("500",))
    parse(tmp_path / "cc", clip_file)
    monkeypatch.setattr(Web, "answer", lambda self, kind, number: self.send(200, picture(number)))
    assert len(read(tmp_path / "cc")["captions"]) == 12
    parse(tmp_path / "cc", clip_file, "--retry")
    assert len(read(tmp_path / "cc")["captions"]) == 13


def test_a_picture_that_is_gone_is_named_with_the_remedy(web, tmp_path, clip_file):
    root = tmp_path / "cc"
    write_table(root, web, 12, ())
    parse(root, clip_file)
    (root / "conceptual_clip_clip_train.pkl").unlink()
    (root / "train" / "00000003.jpg").unlink()
    done = parse(root, clip_file, check=2)
    assert "00000003.jpg was downloaded and is gone; remove" in done.stderr and done.stderr.count("\n") == 1
    (root / "train_downloads" / "000000.jsonl").unlink()
    parse(root, clip_file)
    assert len(read(root)["captions"]) == 12


def test_shards_of_both_splits(web, tmp_path, clip_file):
    root = tmp_path / "cc"
    write_table(root, web, 12, KINDS[:1])
    write_table(root, web, 5, (), name="Validation_GCC-1.1.0-Validation.tsv")
    parse(root, clip_file, "--out", f"{tmp_path}/shards/")
    for split, rows in (("train", 12), ("val", 5)):
        assert np.load(tmp_path / "shards" / split / "img_emb" / "img_emb_0000.npy").shape == (rows, 32)


def test_no_more_than_per_host_at_once(web, tmp_path, clip_file):
    web.delay = 0.02
    write_table(tmp_path / "cc", web, 30, ())
    parse(tmp_path / "cc", clip_file, "--per_host", 3)
    assert 1 < web.most <= 3


def test_a_host_that_is_gone_is_asked_no_more(web, tmp_path, clip_file):
    root, port = tmp_path / "cc", free_port()
    write_table(root, web, 12, ())
    with open(root / "Train_GCC-training.tsv", "a") as file:
        file.writelines(f"gone\thttp://localhost:{port}/{number}\n" for number in range(30))
    done = parse(root, clip_file, "--num_threads", 2)
    assert done.stderr.count("the host cannot be reached; its other addresses are left out") == 1
    told = json.loads((root / "train_downloads.json").read_text())
    assert told["dead_by_reason"] == {"the host cannot be reached": 30} and told["asked_this_time"] < 20


def test_without_a_network_nothing_is_noted(web, tmp_path, clip_file):
    root, port = tmp_path / "cc", free_port()
    root.mkdir()
    (root / "Train_GCC-training.tsv").write_text(
        f"a dog\thttp://127.0.0.1:{port}/1\na cat\thttp://localhost:{port}/2\n"
    )
    done = parse(root, clip_file, check=2)
    assert done.stderr.startswith("error: none of the last 2 hosts could be reached: is there a network?")
    assert not [
        line for journal in (root / "train_downloads").glob("*.jsonl") for line in journal.read_text().splitlines()
    ]


def test_addresses_without_a_picture(web, tmp_path, clip_file):
    root = tmp_path / "cc"
    root.mkdir()
    (root / "Train_GCC-training.tsv").write_text(f"a dog\t{web.at('404')}\n")
    assert "none of 1 addresses gave a picture: 1 HTTP 404" in parse(root, clip_file, check=2).stderr


def test_refusals(web, tmp_path, clip_file):
    root = tmp_path / "cc"
    assert "has no Train_GCC-training.tsv and Validation" in parse(root, clip_file, check=2).stderr
    write_table(root, web, 3, ())
    assert "is no folder; end it in /" in parse(root, clip_file, "--out", tmp_path / "x.pkl", check=2).stderr
    assert "has no Validation" in parse(root, clip_file, "--splits", "val", check=2).stderr
    parse(root, clip_file)
    (root / "Train_GCC-training.tsv").write_text(f"another\t{web.at('ok', 1)}\n")
    assert "holds pictures of another Train_GCC-training.tsv" in parse(root, clip_file, check=2).stderr


def command(root, clip_file, *more):
    """Return the words of parse_conceptual.py."""
    words = parse(root, clip_file, *more, runner=lambda *words, **_: words)
    return [sys.executable, *map(str, words)]


@pytest.mark.slow
def test_twenty_kills(web, tmp_path, clip_file):
    """Killed twenty times, it makes what an unbroken run makes."""
    web.delay = 0.05
    write_table(tmp_path / "whole", web, 200, KINDS[:6])
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "Train_GCC-training.tsv").write_bytes(
        (tmp_path / "whole" / "Train_GCC-training.tsv").read_bytes()
    )
    parse(tmp_path / "whole", clip_file, runner=run_process)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for number in range(20):
        process = subprocess.Popen(
            command(tmp_path / "killed", clip_file, "--num_threads", 2),
            cwd=ROOT,
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        pictures, limit = tmp_path / "killed" / "train", time.monotonic() + 60
        have = len(list(pictures.glob("*.jpg"))) if pictures.is_dir() else 0
        while process.poll() is None and time.monotonic() < limit:
            if pictures.is_dir() and len(list(pictures.glob("*.jpg"))) > have + 3 + number % 5:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    parse(tmp_path / "killed", clip_file, runner=run_process)
    for root in ("whole", "killed"):
        assert not list((tmp_path / root / "train").glob("*.part"))
    whole, killed = read(tmp_path / "whole"), read(tmp_path / "killed")
    assert whole["captions"] == killed["captions"]
    np.testing.assert_allclose(whole["clip_embedding"], killed["clip_embedding"], atol=1e-5)
    for file in (tmp_path / "whole" / "train").iterdir():
        assert file.read_bytes() == (tmp_path / "killed" / "train" / file.name).read_bytes()


@pytest.mark.slow
def test_interrupted_and_two_at_once(web, tmp_path, clip_file):
    web.delay = 3  # the first is at work until it is interrupted
    write_table(tmp_path / "cc", web, 100, ())
    words = command(tmp_path / "cc", clip_file, "--num_threads", 2, "--timeout", 20)
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    pictures = tmp_path / "cc" / "train"
    while not (pictures.is_dir() and any(pictures.glob("*.jpg"))):
        assert process.poll() is None
        time.sleep(0.05)
    second = parse(tmp_path / "cc", clip_file, runner=run_process, check=2)
    assert "another run is writing" in second.stderr and second.stderr.count("\n") == 1
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=30)[1]
    assert (process.returncode, told) == (130, "interrupted: the same command goes on from here\n")
    web.delay = 0
    parse(tmp_path / "cc", clip_file)
    assert len(read(tmp_path / "cc")["captions"]) == 100


@pytest.mark.slow
def test_two_processes_share_the_addresses(web, tmp_path, clip_file):
    write_table(tmp_path / "cc", web, 2100, ())  # three blocks
    words = command(tmp_path / "cc", clip_file)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [record["image_id"] for record in read(tmp_path / "cc")["captions"]] == [f"{n:08d}" for n in range(2100)]
    told = json.loads((tmp_path / "cc" / "train_downloads.json").read_text())
    assert told["fetched"] == 2100 and sum(web.asked.values()) == 2100 + 1050  # half of them after a redirect
