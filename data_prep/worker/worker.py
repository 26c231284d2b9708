"""One worker: from tars that nobody else has claimed to whole parts.

    reader thread    tar → samples; cheap filters; each picture is handed to a decoding process   (decoders.py)
        │  a bounded queue, in the tar's order
    main thread      a window of samples: captions encoded by length, pictures by shape          (encoders.py)
        │  a bounded queue
    writer thread    records → shards, and the part with its report once its tar is through      (shards.py)

Reading and decoding run ahead into the next tar while this one is encoded and written, so that the encoders wait for nothing;
at most two tars are open. What is encoded together comes from one tar and follows from its samples alone: the same tar gives
the same bytes, whoever encodes it and whatever was killed before.
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
from typing import Any

import torch

from data_prep import schema as shards
from data_prep.common.storage import Remote
from data_prep.encoders import (
    DOWNSAMPLE,
    TextEncoder,
    Vae,
    encode_tokens,
    parse_encoders,
    pixels_to_floats,
    tokenize,
)
from data_prep.inputs.filters import with_sizes
from data_prep.inputs.sources import Job
from data_prep.inputs.tars import Reject, Sample, expected_samples, read_tar
from data_prep.pictures.decoders import DecoderPool
from data_prep.pictures.images import Cut, Unusable, cut
from data_prep.worker.claims import Claims
from data_prep.worker.monitor import EncodingMonitor
from data_prep.worker.parts import PartWriter, whole_parts
from data_prep.worker.report import Tally, estimate, size_text

WINDOW = 256  # samples that are sorted into batches together
PIXEL_BUDGET = 1 << 20  # pixels that the VAE encodes together
AHEAD = 2 * WINDOW  # samples that are read and decoded before the encoders ask for them
OPEN_TARS = 2


@dataclass(frozen=True)
class Settings:
    """How samples become records, beyond what each source says."""

    resolutions: tuple[int, ...]
    buckets: bool
    token_cap: int
    drop_long: bool
    posterior: str
    compression: str | None = None
    shard_bytes: int = shards.SHARD_BYTES


@dataclass(frozen=True)
class Picture:
    """A sample that is decoded and cut."""

    number: int
    key: str
    caption: str
    cut: Cut


@dataclass(frozen=True)
class _Item:
    """A sample under way, with its number in its tar."""

    tally: Tally
    number: int
    sample: Sample
    decoded: Future[Cut]


@dataclass(frozen=True)
class _End:
    """A tar is read to its end, or could not be read."""

    tally: Tally
    error: OSError | None = None


@dataclass(frozen=True)
class _Records:
    """An encoded window, and when its copies from the device have arrived."""

    tally: Tally
    records: list[shards.Record]
    ready: Callable[[], None]


class Encoder:
    """Both frozen encoders, and the settings that they are used with."""

    def __init__(self, spec: str, settings: Settings, device: str, compile_: bool = False):
        text, vae = parse_encoders(spec)
        self.text, self.vae, self.settings = TextEncoder(text, device), Vae(vae, device), settings
        self.device = torch.device(device)
        if compile_:
            self.text.model.compile(dynamic=True)
            self.vae.model.encoder.compile()

    def card(self, text_dtype: str) -> shards.Card:
        """The data set's card, its counts still empty."""
        t, v, s = self.text, self.vae, self.settings
        return shards.Card(
            text_encoder={"name": t.name, "width": t.width, "fingerprint": t.fingerprint},
            vae={
                "name": v.name,
                "channels": v.channels,
                "downsample": DOWNSAMPLE,
                "normalisation": v.normalisation,
                "fingerprint": v.fingerprint,
            },
            token_cap=s.token_cap,
            posterior=s.posterior,
            resolutions=sorted(s.resolutions),
            text_dtype=text_dtype,
            buckets=s.buckets,
        )

    def encode(self, window: list[Picture], name: str, tally: Tally) -> tuple[list[shards.Record], Callable[[], None]]:
        """A window's records, and what to call before reading them: on a GPU their copies may still be under way."""
        ids, too_long = tokenize(self.text.tokenizer, [p.caption for p in window], self.settings.token_cap)
        kept = list(range(len(window)))
        if self.settings.drop_long:
            for n, rest in too_long.items():
                detail = f"{self.settings.token_cap} tokens are not enough for {len(rest)} more characters"
                tally.drop(window[n].number, window[n].key, "caption_too_long", detail)
            kept = [n for n in kept if n not in too_long]
        else:
            tally.captions_cut += len(too_long)
        window, ids = [window[n] for n in kept], [ids[n] for n in kept]
        texts = encode_tokens(self.text.model, ids, self.text.tokenizer.pad_token_id, self.device)
        latents = self.latents([p.cut.pictures for p in window])
        ready = _nothing
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            ready = event.synchronize
        return [
            shards.Record(f"{name}/{p.key}", p.caption, text, latent, p.cut.width, p.cut.height, p.cut.bucket)
            for p, text, latent in zip(window, texts, latents, strict=True)
        ], ready

    def latents(self, pictures: list[dict[int, Any]]) -> list[dict[int, shards.Latent]]:
        """The latents of each sample by resolution; pictures of one shape are encoded together."""
        latents: list[dict[int, shards.Latent]] = [{} for _ in pictures]
        shapes: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for n, cuts in enumerate(pictures):
            for resolution, pixels_HW3 in cuts.items():
                shapes.setdefault(pixels_HW3.shape, []).append((n, resolution))
        for (height, width, _), places in sorted(shapes.items()):
            step = max(1, PIXEL_BUDGET // (height * width))
            for some in (places[k : k + step] for k in range(0, len(places), step)):
                pixels_BHW3 = torch.stack([torch.from_numpy(pictures[n][r]) for n, r in some])
                encoded = self.vae.start_encoding(pixels_to_floats(pixels_BHW3, self.device))
                stds = encoded.std if self.settings.posterior == "mean_std" else [None] * len(some)
                for (n, r), mean, std in zip(some, encoded.mean, stds, strict=True):
                    latents[n][r] = shards.Latent(mean, std)
        return latents


def _nothing() -> None: ...


@dataclass
class Worker:
    """Encodes what is missing of `jobs`. `failed` are the tars that could not be read, with their errors."""

    root: Path
    card: shards.Card
    encoder: Encoder
    jobs: list[Job]
    claims: Claims
    pool: DecoderPool
    monitor: EncodingMonitor
    remote: Remote | None = None
    repeats: Callable[[Job], dict[str, str]] = lambda job: {}
    failed: dict[str, OSError] = field(default_factory=dict)

    def run(self) -> None:
        """Returns once no part is missing, but those of tars that failed and those in other workers' hands."""
        self._stop = threading.Event()
        self._slots = threading.Semaphore(OPEN_TARS)
        self._read: Queue[_Item | _End | None] = Queue(AHEAD)
        self._made_one = False
        writer = _Background(self._write, ahead=4)
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
                _drain(self._read)
                reader.join(0.05)
            writer.abandon()
        if self._error is not None:
            raise self._error

    # ---- reader thread

    def _reader(self) -> None:
        try:
            for job in self._claimed():
                self._read_job(job)
        except BaseException as error:  # told to the main thread, which raises it
            self._error = error
        self._read.put(None)

    def _claimed(self) -> Iterator[Job]:
        """Jobs that are now this worker's, one by one; ends where none is left to claim or to wait for."""
        by_name = {job.name: job for job in self.jobs}

        def made() -> set[str]:
            whole = set(whole_parts(self.root)) & by_name.keys()
            self.monitor.set_encoded(sum(by_name[name].bytes for name in whole))
            return whole

        taken = self.claims.take(list(by_name), made, keep=True, stop=self._stop)
        while self._slots.acquire() and (name := next(taken, None)) is not None:
            yield by_name[name]

    def _read_job(self, job: Job) -> None:
        tally = Tally(job)
        try:
            tally.expected = expected_samples(job.url)
        except ValueError as error:
            self.monitor.say(f"warning: {error}")
        try:
            for number, sample in enumerate(self._samples(job)):
                if self._stop.is_set():
                    return
                tally.read += 1
                if isinstance(sample, Reject):
                    tally.drop(number, sample.key, sample.reason, sample.detail)
                    self.monitor.count_sample(True, 0)
                else:
                    settings = self.encoder.settings
                    decoded = self.pool.submit(cut, sample.image, settings.resolutions, settings.buckets)
                    self._read.put(_Item(tally, number, sample, decoded))
        except OSError as error:
            self._read.put(_End(tally, error))
        else:
            self._read.put(_End(tally))

    def _samples(self, job: Job) -> Iterator[Sample | Reject]:
        """A tar's samples, of which those that need not be decoded to be dropped are rejects already."""
        try:
            found = read_tar(job.url, job.source.captions)
        except ValueError as error:  # no tar at all, or one that is compressed
            yield Reject("", "no_tar", str(error))
            return
        repeats, wanted = self.repeats(job), job.source.filter.before
        for sample in found:
            if isinstance(sample, Reject):
                yield sample
            elif sample.key in repeats:
                yield Reject(sample.key, "duplicate", f"of {repeats[sample.key]}")
            elif refusal := wanted.refusal(sample.metadata):
                yield Reject(sample.key, refusal.reason, refusal.detail)
            else:
                yield sample

    # ---- main thread

    def _encode(self, writer: _Background) -> None:
        window: list[Picture] = []
        while True:
            start = time.monotonic()
            try:
                item = self._read.get(timeout=1.0)
            except Empty:
                writer.check()  # the reader may wait for a part that the writer could not end
                continue
            if isinstance(item, _Item):
                picture = self._picture(item)
                self.monitor.count_waiting(time.monotonic() - start)
                self.monitor.count_sample(picture is None, len(item.sample.image))
                if picture is not None:
                    window.append(picture)
            if isinstance(item, _End) or len(window) == WINDOW:
                if window and item is not None:
                    writer.put(_Records(item.tally, *self.encoder.encode(window, item.tally.job.name, item.tally)))
                window = []
            if isinstance(item, _End):
                writer.put(item)
            if item is None:
                return

    def _picture(self, item: _Item) -> Picture | None:
        """The decoded sample; None where it is dropped."""
        sample = item.sample
        try:
            pictures = item.decoded.result()
        except Unusable as error:
            item.tally.drop(item.number, sample.key, error.reason, error.detail)
            return None
        fields = with_sizes(sample.metadata, pictures.width, pictures.height)
        if refusal := item.tally.job.source.filter.after.refusal(fields):
            item.tally.drop(item.number, sample.key, refusal.reason, refusal.detail)
            return None
        return Picture(item.number, sample.key, sample.caption, pictures)

    # ---- writer thread

    def _write(self, messages: Iterator[_Records | _End]) -> None:
        settings, token = self.encoder.settings, f"{id(self):x}-{time.time_ns():x}"
        for first in messages:
            message, job = first, first.tally.job
            try:
                with PartWriter(
                    self.root, job.name, self.card, token, self.remote, settings.compression, settings.shard_bytes
                ) as part:
                    while isinstance(message, _Records):
                        message.ready()
                        for record in message.records:
                            part.write(record)
                            message.tally.write(len(record.text), record.width, record.height)
                        message = next(messages)
                    self._finish(message, part)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT) or self.claims.still_mine(job.name):
                    raise
                self.monitor.say(f"{job.url}: another worker took it over while this one stood still; left to it")
                if not isinstance(message, _End):
                    for message in messages:
                        if isinstance(message, _End):
                            break
            self.claims.release(job.name)
            self._slots.release()

    def _finish(self, end: _End, part: PartWriter) -> None:
        tally, job = end.tally, end.tally.job
        if end.error is not None:
            self.failed[job.name] = end.error
            self.monitor.say(f"{end.error}; the tar is left out for now")
            return
        report = tally.report(part, part.finish())
        part.commit(report, tally.rejects())
        said = f"{job.url}: read {tally.read}, dropped {tally.dropped} ({self.monitor.images_per_second:.1f} images/s)"
        if tally.expected is not None and tally.expected != tally.read:
            said += f"; img2dataset wrote {tally.expected} samples, {tally.read} were found"
        if not self._made_one:
            self._made_one = True
            whole = estimate([report], sum(j.bytes for j in self.jobs))
            said += f"; about {size_text(whole)} for all {len(self.jobs)} tars, judged by this one"
        self.monitor.say(said)


class _Background:
    """A thread that works through messages; its error is raised at the next `put`, or by `close`."""

    def __init__(self, work: Callable[[Iterator[Any]], None], ahead: int):
        self._queue: Queue[Any] = Queue(ahead)
        self._error: BaseException | None = None
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(work,), name="writer", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises the thread's error, if it had one."""
        if self._error is not None:
            raise self._error

    def put(self, message: Any) -> None:
        self.check()
        self._queue.put(message)

    def close(self) -> None:
        """Waits until all messages are worked through."""
        self._queue.put(None)
        self._thread.join()
        self.check()

    def abandon(self) -> None:
        """Ends the thread without the messages that are left; nothing happens after `close`."""
        self._given_up.set()
        while self._thread.is_alive():
            _drain(self._queue)
            self._queue.put(None)
            self._thread.join(0.05)

    def _run(self, work: Callable[[Iterator[Any]], None]) -> None:
        try:
            work(self._messages())
        except _GivenUp:
            pass
        except BaseException as error:  # told to the main thread, which raises it
            self._error = error
            for _ in iter(self._queue.get, None):  # nobody shall wait for room
                pass

    def _messages(self) -> Iterator[Any]:
        while (message := self._queue.get()) is not None:
            yield message
        if self._given_up.is_set():
            raise _GivenUp


class _GivenUp(Exception):
    """The worker stops; half-made parts are removed."""


def _drain(queue: Queue[Any]) -> None:
    while not queue.empty():
        queue.get_nowait()
