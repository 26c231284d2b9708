"""Storage that tars come from and shards go to: local paths, and `s3://`, `gs://` or `http(s)://` through fsspec.

    remote_files  lists the files that a remote pattern or folder names, each with its size
    open_file     opens a file for reading forwards; a remote one is opened again where the connection broke
    open_seekable opens a file for reading at any place
    Remote        is a folder on object storage that finished files are uploaded to

Nothing else is opened: webdataset's `pipe:` commands and fsspec's chained URLs (`a::b`) are refused.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import fsspec
import tenacity

SCHEMES = ("s3", "gs", "gcs", "http", "https")
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_BLOCK_BYTES = 8 << 20  # requested at once
_SILENCE = 60.0  # seconds after which a server counts as dead


class Unreachable(OSError):
    """A tar or folder that could not be read or written for now: says nothing about its content."""


# The only policy of waiting: what raises `Unreachable` is tried five times, after 1, 2, 4 and 8 seconds.
_retried = tenacity.retry(
    retry=tenacity.retry_if_exception_type(Unreachable),
    stop=tenacity.stop_after_attempt(5),
    wait=tenacity.wait_exponential(),
    reraise=True,
)


def is_remote(url: str) -> bool:
    """True where `url` names object storage or a web server. Raises ValueError for every other scheme."""
    scheme, separator, _ = url.partition("://")
    if "::" in url or url.startswith("pipe:") or (separator and scheme not in SCHEMES):
        raise ValueError(
            f"{url}: give a local path, or {', '.join(f'{s}://' for s in SCHEMES)}; commands are never run"
        )
    return bool(separator)


def file_system(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system for a remote URL, and the path within it. Raises ValueError where its package is missing."""
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES[url.partition("://")[0]]
        raise ValueError(f"{url}: this needs the package {package}; run pip install {package}") from error
    if url.startswith("http"):
        from aiohttp import ClientTimeout

        # Its default ends every answer after five minutes, and so a tar that is sent while it is encoded.
        fs.client_kwargs.setdefault("timeout", ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE))
    return fs, path


def remote_files(pattern: str, endings: Sequence[tuple[str, ...]]) -> dict[str, tuple[int, str]]:
    """Finds the files that a URL, a pattern or a folder names; returns size and last change of each, sorted by URL.

    A folder gives its files with the first of `endings` of which it has any. The size is 0, the change "" where it is not known.
    """
    fs, path = file_system(pattern)
    try:
        names = [path]
        if fsspec.core.has_magic(path):
            names = fs.glob(path)
        # A web server would be asked for the whole file by isdir.
        elif not path.lower().endswith(tuple(end for some in endings for end in some)) and fs.isdir(path):
            there = fs.glob(f"{path.rstrip('/')}/*")
            names = next((found for some in endings if (found := [n for n in there if n.lower().endswith(some)])), [])
        about = {fs.unstrip_protocol(name): fs.info(name) for name in sorted(names)}
    except Exception as error:  # each back end raises its own kinds
        reason = _reason(error, pattern)
        if _is_absence(reason):
            return {}
        raise Unreachable(
            f"{pattern} cannot be listed ({_line(reason)}); check the address and the credentials"
        ) from error
    # The tags of web servers differ between machines that send the same file.
    tag = "" if pattern.startswith("http") else "ETag"
    return {url: (int(info["size"] or 0), str(info.get(tag) or "").strip('"')) for url, info in about.items()}


def _reason(error: BaseException, url: str) -> BaseException:
    """Returns the real cause: fsspec raises FileNotFoundError even where a web server is down, busy or refuses."""
    return error.__cause__ or error if isinstance(error, FileNotFoundError) and url.startswith("http") else error


def _is_absence(reason: BaseException) -> bool:
    return isinstance(reason, FileNotFoundError) or getattr(reason, "status", None) in (404, 410)


def open_file(url: str) -> BinaryIO:
    """Opens a file for reading forwards. Raises FileNotFoundError, or Unreachable for a remote one."""
    return cast("BinaryIO", _ResumedFile(url)) if is_remote(url) else open(url, "rb")


def open_seekable(url: str) -> BinaryIO:
    """Opens a file for reading at any place. Raises FileNotFoundError, or Unreachable for a remote one."""
    return cast("BinaryIO", io.BufferedReader(_RangedFile(url), _BLOCK_BYTES)) if is_remote(url) else open(url, "rb")


class _RangedFile(io.RawIOBase):
    """A remote file, of which the bytes that are asked for are fetched; each request is tried again after an error."""

    def __init__(self, url: str):
        self._url, self._offset = url, 0
        self._fs, self._path = file_system(url)
        self._size = int(self._request(lambda: self._fs.info(self._path)["size"]) or 0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._offset = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._size}[whence]
        return self._offset

    def tell(self) -> int:
        return self._offset

    def readinto(self, buffer: Any) -> int:
        end = min(self._offset + len(buffer), self._size)
        if end <= self._offset:
            return 0
        data = self._request(lambda: self._fs.cat_file(self._path, start=self._offset, end=end))
        if len(data) != end - self._offset:
            raise Unreachable(
                f"{self._url} cannot be read at byte {self._offset}: the server sends other bytes than asked"
            )
        buffer[: len(data)] = data
        self._offset = end
        return len(data)

    @_retried
    def _request(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # each back end raises its own kinds
            reason = _reason(error, self._url)
            if _is_absence(reason):
                raise FileNotFoundError(f"{self._url}: no such file") from error
            raise Unreachable(f"{self._url} cannot be read at byte {self._offset}: {_line(reason)}") from error


class _ResumedFile:
    """A remote file, read forwards; after an error it is opened again at the same byte."""

    def __init__(self, url: str):
        self._url, self._offset = url, 0
        self._file: IO[bytes] | None = None
        self._from_start = False  # whether the server sends files from their first byte only

    @_retried
    def read(self, size: int) -> bytes:
        """Returns `size` bytes, fewer only at the end of the file. Raises FileNotFoundError or Unreachable."""
        try:
            data = self._read_or_restart(size)
        except Exception as error:  # each back end raises its own kinds
            self.close()
            reason = _reason(error, self._url)
            if _is_absence(reason):
                raise FileNotFoundError(f"{self._url}: no such file") from error
            raise Unreachable(f"{self._url} cannot be read at byte {self._offset}: {_line(reason)}") from error
        self._offset += len(data)
        return data

    def _read_or_restart(self, size: int) -> bytes:
        try:
            return self._read(size)
        except ValueError:  # fsspec's, of a server that ignores which bytes it was asked for
            if self._from_start or not self._url.startswith("http"):
                raise
        self.close()
        self._from_start = True
        return self._read(size)

    def _read(self, size: int) -> bytes:
        if self._file is None:
            self._file = self._open()
        return _read_up_to(self._file, size)

    def _open(self) -> Any:
        """Opens the file at `_offset`."""
        fs, path = file_system(self._url)
        file = fs.open(path, "rb", block_size=0 if self._from_start else _BLOCK_BYTES, cache_type="readahead")
        if file.size is not None:
            file.seek(self._offset)
        else:  # a server that sends the whole file at each request, or does not say how long it is
            for start in range(0, self._offset, _BLOCK_BYTES):
                _read_up_to(file, min(_BLOCK_BYTES, self._offset - start))
        return file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> _ResumedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _read_up_to(file: Any, size: int) -> bytes:
    """Reads `size` bytes, fewer only at the end of the file. Raises OSError where the connection ended before."""
    pieces, left = [], size
    while left and (piece := file.read(left)):
        pieces.append(piece)
        left -= len(piece)
    if left and file.size is not None and file.tell() < file.size:
        raise OSError(f"the connection ended before byte {file.size}")
    return b"".join(pieces)


class Remote:
    """A folder on object storage. Objects appear whole: an interrupted upload leaves nothing, or the old object."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._fs, self._path = file_system(self.url)

    def upload(self, local: Path, name: str) -> None:
        """Uploads a file, or all files of a folder, to `name` within this folder. Raises Unreachable."""
        files = [local] if local.is_file() else sorted(p for p in local.rglob("*") if p.is_file())
        for file in files:
            target = name if file == local else f"{name}/{file.relative_to(local).as_posix()}"
            self._request(
                lambda file=file, target=target: self._fs.put_file(str(file), f"{self._path}/{target}"), target
            )

    def download(self, name: str, local: Path) -> bool:
        """Downloads a file; returns False where there is none. Raises Unreachable."""
        if not self._request(lambda: self._fs.exists(f"{self._path}/{name}"), name):
            return False
        local.parent.mkdir(parents=True, exist_ok=True)
        self._request(lambda: self._fs.get_file(f"{self._path}/{name}", str(local)), name)
        return True

    def sizes(self, name: str) -> dict[str, int]:
        """Returns the sizes in bytes of the files under `name`, by their names within this folder. Raises Unreachable."""
        start = len(self._path) + 1
        found = self._request(lambda: self._fs.find(f"{self._path}/{name}", detail=True), name)
        return {path[start:]: about["size"] for path, about in found.items()}

    def remove(self, name: str) -> None:
        """Removes a file or folder, if it is there. Raises Unreachable."""
        if self._request(lambda: self._fs.exists(f"{self._path}/{name}"), name):
            self._request(lambda: self._fs.rm(f"{self._path}/{name}", recursive=True), name)

    @_retried
    def _request(self, action: Callable[[], Any], name: str) -> Any:
        try:
            return action()
        except Exception as error:  # each back end raises its own kinds
            self._fs.invalidate_cache()
            raise Unreachable(
                f"{self.url}/{name}: {_line(error)}; check the address, the credentials and the network"
            ) from error


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
