"""Reader of any input: the samples and rejects of a tar, a Parquet file, or some pictures of a folder."""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.common.storage import is_remote
from data_prep.inputs.contents import Contents
from data_prep.inputs.finder import is_parquet, last_change
from data_prep.inputs.folders import read_folder
from data_prep.inputs.parquet_files import read_parquet
from data_prep.inputs.samples import Reject, Sample
from data_prep.inputs.sources import Job
from data_prep.inputs.tars import expected_samples, read_tar


def read_samples(job: Job, contents: Contents | None = None, *, hold: bool = True) -> Iterator[Sample | Reject]:
    """Yields each sample of an input once; an input that cannot be read at all is one reject.

    What the samples have is counted in `contents`; for `hold` see `read_tar`.

    Raises OSError at any time if the input cannot be read for now, or was changed while it was read.
    """
    contents = Contents() if contents is None else contents
    try:
        samples = _reader(job, contents, hold)
    except ValueError as error:
        contents.incomplete = str(error).removeprefix(f"{job.url}: ")
        samples = iter([Reject("", "no_parquet" if is_parquet(job.url) else "no_tar", str(error))])
    yield from samples
    if job.changed and not is_remote(job.url) and last_change(job.url, job.files) != (job.bytes, job.changed):
        raise OSError(f"{job.url} was changed while it was read")


def expected(job: Job) -> int | None:
    """Returns the number of samples that is written beside a tar, as `expected_samples` does; None for other inputs."""
    return None if job.files or is_parquet(job.url) else expected_samples(job.url)


def _reader(job: Job, contents: Contents, hold: bool) -> Iterator[Sample | Reject]:
    captions = job.source.captions
    if job.files:
        return read_folder(job.url, job.files, captions, contents)
    if is_parquet(job.url):
        return read_parquet(job.url, captions, contents)
    return read_tar(job.url, captions, contents, hold=hold)
