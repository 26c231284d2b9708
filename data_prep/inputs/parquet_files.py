"""Reader of Parquet files: a row is a sample, as Hugging Face's data sets and img2dataset write them.

The picture stands in a column `image` of `{bytes, path}`, or in one of bytes (`image`, `jpg`, `png` …); the other columns of
texts, numbers and lists of texts are the sample's fields, one of which is its caption. The key is the column `__key__` or `key`,
else the row's number. Only bytes in the file are taken: a `path` is never opened.

What a row becomes: exactly one sample or reject. A row group that is damaged gives one reject for each of its rows that could not
be read, and the next one is read on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.common.storage import Unreachable, is_remote, open_seekable
from data_prep.inputs.captions import CaptionChoice
from data_prep.inputs.contents import Contents
from data_prep.inputs.samples import MAX_IMAGE_BYTES, Reject, Sample, make_sample

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "picture", "bytes")
KEY_COLUMNS = ("__key__", "key")
_ROWS = 32  # read together
_BUFFER = 1 << 20  # bytes of a column that are read at once


def read_parquet(
    path: str | Path,
    captions: CaptionChoice,
    contents: Contents | None = None,
    *,
    max_image_bytes: int = MAX_IMAGE_BYTES,
) -> Iterator[Sample | Reject]:
    """Yields each row of a Parquet file once, in order.

    Raises, at the call: FileNotFoundError; ValueError if it is no Parquet file, is cut, or has no column of pictures. At any
    time: OSError if the file cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    if not is_remote(str(path)) and not Path(path).is_file():
        kind = "is no regular file" if Path(path).exists() else "no such file"
        raise (ValueError if Path(path).exists() else FileNotFoundError)(
            f"{path}: {kind}; give the path of a Parquet file"
        )
    file = open_seekable(str(path))
    try:
        table = pyarrow.parquet.ParquetFile(
            file, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
        )
        columns = table.schema_arrow
    except (ValueError, OSError) as error:  # pyarrow's, too, are of these kinds
        file.close()
        if _is_of_storage(error):
            raise
        words = str(error).splitlines()[0]
        raise ValueError(f"{path}: is no whole Parquet file ({words}); fetch or write it again") from error
    try:
        image = _image_column(columns)
    except ValueError as error:
        file.close()
        raise ValueError(f"{path}: {error}") from error
    return _ParquetReader(table, image, captions, Contents() if contents is None else contents, max_image_bytes).read(
        file
    )


def is_list(path: Path) -> bool:
    """Returns whether a local file is a Parquet file without any column of pictures, such as img2dataset's lists of URLs."""
    import pyarrow.parquet

    try:
        return not any(_is_picture(column.type) for column in pyarrow.parquet.read_schema(path))
    except (ValueError, OSError) as error:  # no whole Parquet file: said where it is read
        if _is_of_storage(error):
            raise
        return False


def _is_of_storage(error: ValueError | OSError) -> bool:
    """Returns whether an error is one of a disk or a network: pyarrow's, of what a file holds, are of the same kinds."""
    return isinstance(error, Unreachable) or getattr(error, "errno", None) is not None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns all rows of a Parquet file without pictures. Raises ValueError or OSError."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


class _ParquetReader:
    """One pass over a Parquet file, row group by row group."""

    def __init__(
        self, table: pyarrow.parquet.ParquetFile, image: str, captions: CaptionChoice, contents: Contents, limit: int
    ):
        self._table, self._image, self._captions, self._contents, self._limit = table, image, captions, contents, limit
        names = [field.name for field in table.schema_arrow if field.name == image or _is_field(field.type)]
        self._columns = list(dict.fromkeys(names))
        self._keys: set[str] = set()

    def read(self, file: Any) -> Iterator[Sample | Reject]:
        with file:
            first = 0
            for group in range(self._table.num_row_groups):
                count = self._table.metadata.row_group(group).num_rows
                yield from self._group(group, first, count)
                first += count
        if not first:
            self._contents.incomplete = "it holds no row"

    def _group(self, group: int, first: int, count: int) -> Iterator[Sample | Reject]:
        row, end = first, first + count
        try:
            batches = self._table.iter_batches(_ROWS, row_groups=[group], columns=self._columns, use_threads=False)
            for batch in batches:
                columns: dict[str, list[Any]] = {}
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    columns |= {name: _values(column)} if name == self._image else _fields(name, column)
                for n in range(min(batch.num_rows, end - row)):
                    yield self._sample(row, {name: values[n] for name, values in columns.items()})
                    row += 1
        except (ValueError, OSError) as error:
            if _is_of_storage(error):
                raise
            self._contents.incomplete = f"row group {group} is damaged: {error}".splitlines()[0]
        for missing in range(row, end):
            detail = self._contents.incomplete or f"row group {group} has fewer rows than it says"
            yield Reject(f"{missing:08d}", "damaged_rows", detail)

    def _sample(self, row: int, fields: dict[str, Any]) -> Sample | Reject:
        picture = fields.pop(self._image)
        image, path = (picture.get("bytes"), picture.get("path")) if isinstance(picture, dict) else (picture, None)
        named = next((fields[name] for name in KEY_COLUMNS if fields.get(name) not in (None, "")), None)
        key = f"{row:08d}" if named is None or isinstance(named, bytes) else str(named)
        broken = [name for name, value in fields.items() if isinstance(value, bytes)]
        fields = {name: value for name, value in fields.items() if not isinstance(value, bytes)}
        self._contents.add((), fields)
        if key in self._keys:
            return Reject(key, "duplicate_key", f"row {row}: an earlier row has the same key")
        self._keys.add(key)
        if not image:
            outside = (
                f"the row names {str(path)[:200]!r}, and only bytes in the file are taken" if path else "it is empty"
            )
            return Reject(key, "no_image", f"row {row} has no bytes in {self._image!r}: {outside}")
        if len(image) > self._limit:
            return Reject(key, "oversized_member", f"row {row}: {len(image)} bytes, limit {self._limit}")
        if wrong := [name for name in self._captions.names if name in broken]:
            return Reject(key, "caption_not_utf8", f"row {row}: {wrong[0]}")
        return make_sample(key, image, {}, fields, self._captions, [])


def _fields(name: str, column: pyarrow.Array) -> dict[str, list[Any]]:
    """Returns the values of a column by its name; of a column of objects, those of their fields, such as `text.long`."""
    import pyarrow

    if not pyarrow.types.is_struct(column.type):
        return {name: _values(column)}
    inner = zip(column.type, column.flatten(), strict=True)
    return {f"{name}.{field.name}": _values(values) for field, values in inner if _is_field(field.type)}


def _values(column: pyarrow.Array) -> list[Any]:
    """Returns a column's values; bytes stand for texts that are not UTF-8."""
    import pyarrow

    try:
        return [_plain(value) for value in column.to_pylist()]
    except UnicodeDecodeError:
        if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
            raise
    values = []
    for value in column.cast(pyarrow.large_binary()).to_pylist():
        try:
            values.append(value and value.decode())
        except UnicodeDecodeError:
            values.append(value)
    return values


def _plain(value: Any) -> Any:
    """Returns numbers that json has no name for as floats, and moments as texts."""
    if value is None or isinstance(value, str | int | float | bytes | list | dict):
        return value
    return float(value) if hasattr(value, "as_tuple") else str(value)


def _image_column(schema: pyarrow.Schema) -> str:
    """Returns the name of the column of pictures. Raises ValueError where there is none, or several."""
    found = [field.name for field in schema if _is_picture(field.type)]
    if len(found) > 1:
        found = [name for name in IMAGE_COLUMNS if name in found][:1] or found
    if len(found) != 1:
        names = ", ".join(f"{field.name}: {field.type}" for field in schema)[:400]
        what = (
            f"pictures may be in {' or '.join(found)}: call one of them image"
            if found
            else "no column of pictures; of a list of URLs, fetch them by img2dataset first"
        )
        raise ValueError(f"{what}; expected image: {{bytes, path}}, or bytes; it has {names}")
    return found[0]


def _is_picture(kind: pyarrow.DataType) -> bool:
    import pyarrow

    kind = getattr(kind, "storage_type", kind)
    if pyarrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_picture(kind.field("bytes").type)
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) or pyarrow.types.is_binary_view(kind)


def _is_field(kind: pyarrow.DataType) -> bool:
    """Returns whether a column can be a field: texts, numbers, moments, lists of texts, and objects of such fields."""
    import pyarrow

    types = pyarrow.types
    if types.is_dictionary(kind):
        return _is_field(kind.value_type)
    if types.is_struct(kind):
        return any(_is_field(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_text(kind.value_type)
    return _is_text(kind) or types.is_primitive(kind) or types.is_decimal(kind) or types.is_null(kind)


def _is_text(kind: pyarrow.DataType) -> bool:
    import pyarrow

    types = pyarrow.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
