"""Worker of an encoding: claims tars that no other worker has, and makes each into a part of the data set.

    reader thread    tar → samples; cheap filters; each picture is handed to a decoding process  (pictures/decoders.py)
        │  a bounded queue, in the tar's order
    main thread      a window of samples: captions encoded by length, pictures by shape          (encoder.py)
        │  a bounded queue
    writer thread    records → shards, and the part with its report at the end of its tar        (parts.py)

Reading and decoding run ahead into the next tar while this one is encoded and written, so that the encoders wait for nothing;
at most two tars are open. What is encoded together comes from one tar and follows from its samples alone: the same tar gives
the same bytes, whichever worker encodes it and whatever was killed before.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue

from data_prep import schema
from data_prep.common.storage import Remote
from data_prep.common.words import counted
from data_prep.inputs.contents import Contents
from data_prep.inputs.filters import add_sizes
from data_prep.inputs.finder import counted_inputs
from data_prep.inputs.reader import expected, read_samples
from data_prep.inputs.samples import Reject, Sample
from data_prep.inputs.sources import Job
from data_prep.pictures.decoders import DecoderPool
from data_prep.pictures.images import Cut, Unusable, cut
from data_prep.worker.background import BackgroundThread, empty
from data_prep.worker.claims import Claims
from data_prep.worker.encoder import Encoder, Picture
from data_prep.worker.monitor import EncodingMonitor
from data_prep.worker.parts import PartWriter, whole_parts
from data_prep.worker.report import Tally, estimate, size_text

WINDOW = 256  # samples that are sorted into batches together
AHEAD = 2 * WINDOW  # samples that are read and decoded before the encoders ask for them
OPEN_TARS = 2  # of which one is read ahead


@dataclass(frozen=True)
class _PendingSample:
    """A sample whose picture is being decoded; `number` is its place in its tar, from 0."""

    tally: Tally
    number: int
    sample: Sample
    decoded: Future[Cut]


@dataclass(frozen=True)
class _EndOfTar:
    """The end of a tar: all of it was read, or reading failed with `error`."""

    tally: Tally
    error: OSError | None = None


@dataclass(frozen=True)
class _EncodedWindow:
    """The records of a window; `wait` returns once their copies from the device have arrived."""

    tally: Tally
    records: list[schema.Record]
    wait: Callable[[], None]


@dataclass
class Worker:
    """Makes the missing parts of `jobs`.

    `repeats` gives, for a tar, the keys of the pictures that repeat an earlier one, which is named. `failed` are the tars
    that could not be read, by their parts, with the errors.
    """

    root: Path
    card: schema.Card
    encoder: Encoder
    jobs: list[Job]
    claims: Claims
    pool: DecoderPool
    monitor: EncodingMonitor
    remote: Remote | None = None
    repeats: Callable[[Job], dict[str, str]] = lambda job: {}
    failed: dict[str, OSError] = field(default_factory=dict)

    def run(self) -> None:
        """Returns once every part is there, but for tars that could not be read and parts that other workers make."""
        self._stop = threading.Event()
        self._slots = threading.Semaphore(OPEN_TARS)
        self._read: Queue[_PendingSample | _EndOfTar | None] = Queue(AHEAD)
        self._estimated = False
        writer = BackgroundThread(self._write, ahead=4)
        reader = threading.Thread(target=self._reader, name="reader", daemon=True)
        self._error: BaseException | None = None
        reader.start()
        try:
            self._encode(writer)
            writer.close()
        finally:
            self._stop.set()
            self._slots.release()  # wakes a reader that waits for one
            while reader.is_alive():
                empty(self._read)
                reader.join(0.05)
            writer.abandon()
        if self._error is not None:
            raise self._error

    # ---- reader thread

    def _reader(self) -> None:
        try:
            for job in self._claimed():
                self._read_job(job)
        except BaseException as error:  # raised in the main thread
            self._error = error
        self._read.put(None)

    def _claimed(self) -> Iterator[Job]:
        """Claims jobs one by one; ends where none is left that may be claimed."""
        by_name = {job.name: job for job in self.jobs}

        def encoded() -> set[str]:
            whole = set(whole_parts(self.root)) & by_name.keys()
            self.monitor.set_encoded(sum(by_name[name].bytes for name in whole))
            return whole

        taken = self.claims.take(list(by_name), encoded, keep=True, stop=self._stop)
        while self._slots.acquire() and (name := next(taken, None)) is not None:
            yield by_name[name]

    def _read_job(self, job: Job) -> None:
        tally = Tally(job)
        try:
            tally.expected = expected(job)
        except ValueError as error:
            self.monitor.say(f"warning: {error}")
        try:
            for number, sample in enumerate(self._samples(job, tally.contents)):
                if self._stop.is_set():
                    return
                tally.read += 1
                if isinstance(sample, Reject):
                    tally.drop(number, sample.key, sample.reason, sample.detail)
                    self.monitor.count_sample(True, 0)
                else:
                    settings = self.encoder.settings
                    decoded = self.pool.submit(cut, sample.image, settings.resolutions, settings.buckets)
                    self._read.put(_PendingSample(tally, number, sample, decoded))
        except OSError as error:
            self._read.put(_EndOfTar(tally, error))
        else:
            self._read.put(_EndOfTar(tally))

    def _samples(self, job: Job, contents: Contents) -> Iterator[Sample | Reject]:
        """The samples of an input; those that are dropped without being decoded come as rejects."""
        repeats, wanted = self.repeats(job), job.source.filter.before
        for sample in read_samples(job, contents):
            if isinstance(sample, Reject):
                yield sample
            elif sample.key in repeats:
                yield Reject(sample.key, "duplicate", f"of {repeats[sample.key]}")
            elif refusal := wanted.refusal(sample.metadata):
                yield Reject(sample.key, refusal.reason, refusal.detail)
            else:
                yield sample

    # ---- main thread

    def _encode(self, writer: BackgroundThread) -> None:
        window: list[Picture] = []
        counted_bytes = 0  # of the tar that is being read
        judged = False  # whether the encoders serve such pictures
        while True:
            start = time.monotonic()
            try:
                item = self._read.get(timeout=1.0)
            except Empty:
                writer.check()  # the reader may wait for a part that the writer could not end
                continue
            if isinstance(item, _PendingSample):
                picture = self._picture(item)
                self.monitor.count_waiting(time.monotonic() - start)
                self.monitor.count_sample(picture is None, len(item.sample.image))
                counted_bytes += len(item.sample.image)
                if picture is not None:
                    window.append(picture)
            if isinstance(item, _EndOfTar) or len(window) == WINDOW:
                if window and item is not None:
                    if not judged and (line := self.encoder.unsuited(window)):
                        self.monitor.say(line)
                    judged = True
                    writer.put(
                        _EncodedWindow(item.tally, *self.encoder.encode(window, item.tally.job.name, item.tally))
                    )
                window = []
            if isinstance(item, _EndOfTar):
                if item.error is None:
                    self.monitor.finish_tar(item.tally.job.bytes - counted_bytes)
                counted_bytes = 0
                writer.put(item)
            if item is None:
                return

    def _picture(self, item: _PendingSample) -> Picture | None:
        """Returns the decoded sample, or None where it is dropped."""
        sample = item.sample
        try:
            pictures = item.decoded.result()
        except Unusable as error:
            item.tally.drop(item.number, sample.key, error.reason, error.detail)
            return None
        fields = add_sizes(sample.metadata, pictures.width, pictures.height)
        if refusal := item.tally.job.source.filter.after.refusal(fields):
            item.tally.drop(item.number, sample.key, refusal.reason, refusal.detail)
            return None
        return Picture(item.number, sample.key, sample.caption, pictures, sample.caption_field)

    # ---- writer thread

    def _write(self, messages: Iterator[_EncodedWindow | _EndOfTar]) -> None:
        settings, token = self.encoder.settings, f"{id(self):x}-{time.time_ns():x}"
        for first in messages:
            message, job = first, first.tally.job
            try:
                with PartWriter(
                    self.root, job.name, self.card, token, self.remote, settings.compression, settings.shard_bytes
                ) as part:
                    while isinstance(message, _EncodedWindow):
                        message.wait()
                        for record in message.records:
                            part.write(record)
                            message.tally.write(len(record.text), record.width, record.height)
                        message = next(messages)
                    self._finish_part(message, part)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT) or self.claims.owns(job.name):
                    raise
                self.monitor.say(f"{job.url}: another worker took it over while this one stood still; left to it")
                if not isinstance(message, _EndOfTar):
                    for message in messages:
                        if isinstance(message, _EndOfTar):
                            break
            self.claims.release(job.name)
            self._slots.release()

    def _finish_part(self, end: _EndOfTar, part: PartWriter) -> None:
        tally, job = end.tally, end.tally.job
        if end.error is not None:
            self.failed[job.name] = end.error
            self.monitor.say(f"{end.error}; the tar is left out for now")
            return
        report = tally.report(part, part.finish())
        part.commit(report, tally.rejects())
        said = f"{job.url}: read {tally.read}, dropped {tally.dropped} ({self.monitor.images_per_second:.1f} images/s)"
        if tally.expected is not None and tally.expected != tally.read:
            said += f"; img2dataset wrote {counted(tally.expected, 'sample')}, {tally.read} were found"
        if tally.contents.incomplete:
            said += f"; not whole: {tally.contents.incomplete}"
        if 2 * tally.unwanted > tally.read:
            said = f"WARNING: more than half is dropped ({', '.join(f'{r} {n}' for r, n in tally.reasons.items())}): {said}"
        if not self._estimated:
            self._estimated = True
            size = estimate([report], sum(j.bytes for j in self.jobs))
            said += (
                f"; about {size_text(size)} for all {counted_inputs([j.url for j in self.jobs])}, judged by this one"
            )
        self.monitor.say(said)
