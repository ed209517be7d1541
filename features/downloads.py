"""A table of captions and addresses -> picture files, fetched in threads; a kill loses no settled address.

A table is cut into blocks of lines. Each block has a journal with a line for every address that is settled, fetched or
dead; a line is written after the picture's file, so that the file exists. Several processes share the blocks.
"""

import collections
import json
import os
import threading
import time
from pathlib import Path

from features.addresses import BLOCK, add_period
from features.fetching import OF_THE_HOST, Dead, host_of
from features.images import is_readable, reader
from features.sources import Part, Source
from features.store_files import shard_rows
from utils.cli import note
from utils.distributed import all_union
from utils.files import read_json, write_json, write_text
from utils.processes import is_main, share

AHEAD = 1024  # waiting addresses, from which one of a host that is not busy is picked
HOST_TRIES = 3  # unanswered addresses in a row after which a host is taken for gone
HOSTS_LOST = 64  # silent hosts in a row after which the network is taken for down
LAST_WORDS = 0.5  # seconds that the threads, all together, have to finish when the command is stopped
PAUSE = 0.5  # seconds between looks at what another process has fetched
NOT_AN_ADDRESS = "a line without a caption and an address"


class Downloads:
    """Fetches a table's addresses in threads, in order, except that busy hosts are passed over."""

    def __init__(self, table, folder, journals, fetcher, threads=16, per_host=4):
        """Prepare the downloads, which `start` begins.

        Args:
            table: Table.
            folder: for the pictures, `00000012.jpg` of line 12.
            journals: folder for the journals.
            fetcher: has `fetch(address, stopped)`, which returns bytes or raises Dead.
            threads: number that fetch at once.
            per_host: how many of these at one host, at most.
        """
        self.table, self.folder, self.journals, self.fetcher = table, Path(folder), Path(journals), fetcher
        self.threads, self.per_host, self.unsettled = threads, per_host, set()
        self.changed, self.stopped, self.failure = threading.Condition(), threading.Event(), None
        self.open = {}  # {block that is not settled: number of its addresses left, once it has begun}
        self.waiting, self.busy = collections.deque(), collections.Counter()  # jobs; {host: threads at work on it}
        self.lost, self.silent = {}, collections.Counter()  # {host: why it is gone}; {host: failures in a row}
        self.suspects = []  # (block, entry, host) of hosts that do not answer: it may be the network
        self.answered, self.asked = False, 0
        self.feed, self.workers, self.began = iter(()), [], time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.stopped.set()
        with self.changed:
            self.changed.notify_all()
        end = time.monotonic() + LAST_WORDS
        for worker in self.workers:  # daemons: those in the middle of an answer are abandoned
            worker.join(timeout=max(0, end - time.monotonic()))

    def start(self, retry=False):
        """Start fetching this process' share of the blocks, in order.

        Args:
            retry: ask again for dead addresses whose fault may have passed.
        Raises: ValueError where the folders belong to another table.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journals.mkdir(parents=True, exist_ok=True)
        self._check_table()
        blocks = share(range(len(self.table.starts)))
        self.unsettled = all_union({block for block in blocks if self._mend(block, retry)})  # waits for all processes
        self.open = dict.fromkeys(blocks)
        self.feed, self.began = self._jobs(blocks), time.monotonic()
        self.workers = [threading.Thread(target=self._work, daemon=True) for _ in range(self.threads)]
        for worker in self.workers:
            worker.start()

    def file_of(self, line):
        """Return the file of a line's picture."""
        return self.folder / f"{line:08d}.jpg"

    def journal_of(self, block):
        """Return the journal of a block."""
        return self.journals / f"{block:06d}.jsonl"

    def settled(self, block):
        """Return {line: entry} of a block's journal; an entry has `bytes`, or `dead` and perhaps `again`.

        Raises: ValueError where the journal is damaged.
        """
        journal, entries = self.journal_of(block), {}
        data = journal.read_bytes() if journal.is_file() else b""
        for line in data[: data.rfind(b"\n") + 1].splitlines():  # a last line cut short by a kill does not count
            try:
                entry = json.loads(line)
                entries[entry["line"]] = entry
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{journal} is damaged; remove it, and its pictures are fetched again") from None
        return entries

    def _mend(self, block, retry):
        """Repair a block's journal for resuming; returns whether any of its lines is left to settle."""
        journal, entries = self.journal_of(block), self.settled(block)
        kept = {line: entry for line, entry in entries.items() if not (retry and entry.get("again"))}
        if len(kept) < len(entries):
            write_text(journal, "".join(json.dumps(entry) + "\n" for entry in kept.values()))
        elif journal.is_file():  # drops a last line cut short by a kill
            os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)
        return len(kept) < len(self.table.lines_in(block))

    def _check_table(self):
        """Refuse pictures and journals of another table, whose line numbers mean other addresses."""
        stamp = self.journals / "table.json"
        if stamp.is_file() and read_json(stamp) != {"sha256": self.table.sha256}:
            raise ValueError(
                f"{self.folder} holds pictures of another {Path(self.table.path).name} than today's, and line numbers "
                f"name them; move it and {self.journals} away, or pass another --data_root"
            )
        if is_main():
            write_json(stamp, {"sha256": self.table.sha256})

    def wait(self, blocks):
        """Wait until blocks are settled, by this process or the one they belong to.

        Raises: ConnectionError where the network is down; OSError where files cannot be written.
        """
        others = set(blocks) - set(share(range(len(self.table.starts))))
        with self.changed:
            self.changed.wait_for(lambda: self.failure or not any(block in self.open for block in blocks))
            if self.failure:
                raise self.failure
        while not all(len(self.settled(block)) == len(self.table.lines_in(block)) for block in others):
            time.sleep(PAUSE)

    def statistics(self):
        """Return what has become of the table's addresses, as plain data; all must be settled."""
        counts, reasons, size = collections.Counter(), collections.Counter(), 0
        for block in range(len(self.table.starts)):
            for entry in self.settled(block).values():
                counts["fetched" if "bytes" in entry else "dead"] += 1
                size += entry.get("bytes", 0)
                if "dead" in entry:
                    reasons[entry["dead"]] += 1
        seconds = time.monotonic() - self.began
        return {
            "addresses": self.table.lines, "fetched": counts["fetched"], "dead": counts["dead"],
            "dead_by_reason": dict(reasons.most_common()), "bytes": size, "hosts_gone": dict(sorted(self.lost.items())),
            "asked_this_time": self.asked, "addresses_per_s": round(self.asked / max(seconds, 1e-3), 1),
        }  # fmt: skip

    def _jobs(self, blocks):
        """Yield (block, line, address, host) for lines that are not settled; unusable lines are settled here."""
        for block in blocks:
            done = self.settled(block)
            todo = [(line, caption, address) for line, caption, address in self.table.rows(block) if line not in done]
            self.open[block] = len(todo)
            for line, caption, address in todo:
                try:
                    if caption is None:
                        raise Dead(NOT_AN_ADDRESS)
                    yield block, line, address, host_of(address)
                except Dead as dead:
                    self._settle(block, {"line": line, "dead": dead.reason})
            if not todo:
                self._close(block)

    def _next(self):
        """Return the next job of a host that is not busy; None at the end."""
        with self.changed:
            while not self.stopped.is_set() and not self.failure:
                while len(self.waiting) < AHEAD and (job := next(self.feed, None)):
                    self.waiting.append(job)
                for number, (block, line, _, host) in enumerate(self.waiting):
                    if host in self.lost or self.busy[host] < self.per_host:
                        job = self.waiting[number]
                        del self.waiting[number]
                        if host not in self.lost:
                            self.busy[host] += 1
                            return job
                        self._settle(block, {"line": line, "dead": self.lost[host], "again": True})
                        break
                else:
                    if not self.waiting:
                        self._end()
                        return None
                    self.changed.wait()
        return None

    def _end(self):
        """With nothing else left, judge the silent hosts: gone if others have answered, else the network is down."""
        if any(self.busy.values()) or not self.suspects:
            return
        if self.answered:
            self._trust_network()
        else:
            self.failure = self._network_down()
            self.changed.notify_all()

    def _work(self):
        """Fetch until nothing is left; a thread's whole life."""
        try:
            while job := self._next():
                block, line, address, host = job
                entry = {"line": line}
                try:
                    data = self.fetcher.fetch(address, self.stopped)
                    entry["bytes"] = len(data)
                except Dead as dead:
                    entry["dead"] = dead.reason
                    if dead.again:
                        entry["again"] = True
                if self.stopped.is_set():
                    return
                if "bytes" in entry:
                    self._write(line, data)
                self._finish(block, entry, host)
        except Exception as error:  # such as a full disk; `wait` raises it
            with self.changed:
                self.failure = self.failure or error
                self.changed.notify_all()

    def _write(self, line, data):
        """Write a picture; a kill leaves a file of another name, which the next try overwrites."""
        path = self.file_of(line)
        temporary = path.with_suffix(".part")
        temporary.write_bytes(data)
        os.replace(temporary, path)

    def _finish(self, block, entry, host):
        """Record the outcome of an address, and what it says about its host and the network."""
        with self.changed:
            self.busy[host] -= 1
            self.asked += 1
            reason = entry.get("dead")
            if reason in OF_THE_HOST:
                self.silent[host] += 1
                if host not in self.lost and (reason == OF_THE_HOST[0] or self.silent[host] >= HOST_TRIES):
                    self.lost[host] = reason
                    note(f"warning: {host}: {reason}; its other addresses are left out")
                self.suspects.append((block, entry, host))
                if len({host for *_, host in self.suspects}) >= HOSTS_LOST:
                    self.failure = self._network_down()
            else:
                self.silent.pop(host, None)
                self.answered = True
                self._settle(block, entry)
                self._trust_network()
            self.changed.notify_all()

    def _network_down(self):
        hosts = len({host for *_, host in self.suspects})
        return ConnectionError(
            f"none of the last {hosts:,} hosts could be reached: is there a network? Nothing was noted against them; "
            f"the same command goes on from here"
        )

    def _trust_network(self):
        """Settle the addresses of hosts that did not answer, now that another one has."""
        for block, entry, _ in self.suspects:
            self._settle(block, entry)
        self.suspects = []

    def _settle(self, block, entry):
        """Write an address's line into its journal."""
        with open(self.journal_of(block), "ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
        self.open[block] -= 1
        if not self.open[block]:
            self._close(block)

    def _close(self, block):
        self.open.pop(block)
        self.changed.notify_all()


class DownloadedPart(Part):
    """The pictures of some blocks of a table; `read` waits until they are fetched."""

    count = None

    def __init__(self, downloads, blocks):
        """Take blocks.

        Args:
            downloads: Downloads of their table.
            blocks: range of them.
        """
        self.downloads, self.blocks = downloads, blocks

    def made_of(self):
        """See Part."""
        return [self.downloads.table.sha256, self.blocks.start, self.blocks.stop]

    def read(self):
        """See Part.

        Raises: FileNotFoundError where a picture has gone since.
        """
        pictures, downloads = {}, self.downloads
        downloads.wait(self.blocks)
        for block in self.blocks:
            done = downloads.settled(block)
            for line, caption, _ in downloads.table.rows(block):
                if "bytes" in done.get(line, ()):
                    file = downloads.file_of(line)
                    if not file.is_file():
                        raise FileNotFoundError(
                            f"{file} was downloaded and is gone; remove {downloads.journal_of(block)}, and its block "
                            f"is fetched again"
                        )
                    pictures[str(file)] = [{"image_id": f"{line:08d}", "caption": add_period(caption)}]
        return pictures, {}

    def has_readable(self, skipped, then):
        """See Part; also true where a block had lines left to settle when the downloads started."""
        if self.downloads.unsettled.intersection(self.blocks):
            return True
        return then != reader() and any(map(is_readable, skipped))


class DownloadedPictures(Source):
    """The pictures of a table, while they are being fetched."""

    def __init__(self, downloads):
        """Take Downloads."""
        self.downloads = downloads
        self.blocks = range(len(downloads.table.starts))

    def _parts(self, lines):
        """Return parts of `lines` lines, a multiple of BLOCK."""
        size = lines // BLOCK
        return [DownloadedPart(self.downloads, self.blocks[at : at + size]) for at in range(0, len(self.blocks), size)]

    def parts(self):
        """See Source; parts of `shard_rows` lines."""
        return self._parts(shard_rows(self.downloads.table.lines))

    def made_of(self):
        """See Source; the same however the table is cut."""
        return [self.downloads.table.sha256]

    def shares(self, _encoded):
        """See Source; small parts, so that encoding begins with the first pictures."""
        return share(self._parts(BLOCK))

    def has_readable(self, _skipped):
        """See Source; dead addresses stay dead unless they are asked for again."""
        return bool(self.downloads.unsettled)
