"""Where rows come from: JSONL, Parquet and Arrow files, folders of them, data sets of a model hub. Imports no torch.

`read_rows` gives rows of text; `read_table` gives cells as they are stored, and what the table says of its columns.

The library `datasets` is imported where JSONL is not enough.
"""

import contextlib
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from abkd.errors import InputError
from abkd.paths import PREFIX, find_path

BATCH_ROWS = 1024
FORMATS = (".jsonl", ".jsonl.gz", ".parquet", ".arrow")
Row = tuple[str, Any]
"""(where it stands, for messages; its content)"""
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""Split -> what folders and files of it are called."""


class Table(NamedTuple):
    """What `read_table` gives."""

    rows: Iterator[Row]
    features: dict[str, Any]
    """Column -> what is said of it beyond its type, as `datasets` writes it: {"names": [...]} of classes. May be {}."""
    origin: str
    """Where it stands, with the split where that decides the rows."""


def read_rows(path: str, field: str, *, subset: str = "", split: str = "train", stream_rows: int = 0) -> Iterator[Row]:
    """Every row of a file, of a folder of files of one format, of what `save_to_disk` wrote, or of a hub's data set.

    Args:
        path: as in a recipe; `owner/name` that is no path here is a hub id.
        subset, split: of what has some: a hub's data set, or a saved `DatasetDict` (split alone).
        stream_rows: above 0, only so many rows, read as they come, without the rest being downloaded; hub ids only.

    Raises:
        InputError: it is missing, torn, of another format, or cannot be reached.
    """
    found = find_path(path, field)
    if not found.exists() and _is_hub_id(path):
        yield from _of_hub(path, field, subset, split, stream_rows)
        return
    if stream_rows:
        raise InputError(
            f"data.stream=true reads a hub's data set, and {field}={path!r} is none; set data.stream=false"
        )
    if found.is_file():
        yield from _of_file(found, field)
    elif found.is_dir():
        yield from _of_folder(found, field, split)
    else:
        raise InputError(
            f"{field}: there is no file {str(found)!r}; give a file or folder ({', '.join(FORMATS)}), or the hub id "
            "owner/name of a data set"
        )


def read_table(path: str, field: str, *, subset: str = "", split: str = "train") -> Table:
    """As `read_rows`, with cells as they are stored: an image is {"bytes": ..., "path": ...}, not decoded.

    Of a folder of files that are named by split, or stand in folders that are (`data/train-00000-of-00002.parquet`,
    `SUBSET/test/0000.parquet`: how hubs store them), those of the split are read.

    Raises:
        InputError: as `read_rows`; the folder has no file of the split.
    """
    found = find_path(path, field)
    if not found.exists() and _is_hub_id(path):
        with _hub_errors(path, field):
            stored = _datasets().load_dataset(path, subset or None, split=split)
        return _stored(stored, f"{path} [{split}]")
    if found.is_dir() and _is_saved(found):
        has_splits = (found / "dataset_dict.json").exists()
        return _stored(_load_saved(found, field, split), f"{found} [{split}]" if has_splits else str(found))
    files, origin = _files_of_split(found, field, subset, split) if found.is_dir() else ([found], str(found))
    if not files[0].is_file():
        raise InputError(f"{field}: there is no file {str(found)!r}; give one, a folder, or the hub id owner/name")
    rows = itertools.chain.from_iterable(_of_file(file, field) for file in files)
    return Table(rows, {} if ".jsonl" in files[0].suffixes else _features(_schema(files[0], field)), origin)


def read_lines(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of a UTF-8 file, gzipped or not. Raises InputError with file and line."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        place = f"byte {error.start + 1} is {error.object[error.start]:#04x}"
        raise InputError(f"{path}:{number}: not UTF-8 text ({place}); save the file as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{field}: {path} cannot be read after line {number} ({error}); copy it again") from None


def _is_hub_id(path: str) -> bool:
    is_path = path.startswith((PREFIX, ".", "/", "~")) or path.endswith((*FORMATS, ".json", ".txt", ".npz", ".gz"))
    return not is_path and path.count("/") == 1 and all(path.split("/"))


def _of_file(path: Path, field: str) -> Iterator[Row]:
    if path.name.endswith(".parquet") or path.name.endswith(".arrow"):
        yield from _numbered(_arrow_rows(path, field), str(path))
        return
    for number, line in read_lines(path, field):
        if line.strip():
            yield f"{path}:{number}", _json(line, f"{path}:{number}")


def _of_folder(folder: Path, field: str, split: str) -> Iterator[Row]:
    if _is_saved(folder):
        yield from _numbered(iter(_load_saved(folder, field, split)), str(folder))
        return
    by_format = {name: sorted(folder.glob(f"*{name}")) for name in FORMATS}
    present = [name for name, files in by_format.items() if files]
    if len(present) != 1:
        found = f"files of {len(present)} formats ({', '.join(present)})" if present else "none of these files"
        raise InputError(f"{field}: {folder} holds {found}; give a folder of one of {', '.join(FORMATS)}, or a file")
    for file in by_format[present[0]]:
        yield from _of_file(file, field)


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _load_saved(folder: Path, field: str, split: str) -> Any:
    datasets = _datasets()
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise InputError(f"{field}: {folder} cannot be read ({_first_line(error)}); save it again") from None
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise InputError(f"{field}: {folder} has no split {split!r}; it has {', '.join(sorted(saved))}: see data.split")
    return saved[split]


def _files_of_split(folder: Path, field: str, subset: str, split: str) -> tuple[list[Path], str]:
    """(table files in the folder and below, of the split where files are named by it; where they stand)."""
    files = sorted(file for file in folder.rglob("*") if file.name.endswith(FORMATS))
    if subset:
        files = [file for file in files if subset in file.relative_to(folder).parts]
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    if not files or (split not in by_split and set(by_split) != {""}):
        has = f"its splits are {', '.join(sorted(name for name in by_split if name))}" if files else "it has none"
        raise InputError(f"{field}: {folder} has no table file of split {split!r}; {has}: see data.split, data.subset")
    chosen = by_split.get(split) or by_split[""]
    folders = sorted({str(file.parent.relative_to(folder)) for file in chosen})
    if len(folders) > 1:
        raise InputError(
            f"{field}: {folder} has tables in {len(folders)} folders, {', '.join(folders)}; give one of them"
        )
    return chosen, f"{folder} [{split}]" if split in by_split else str(folder)


def _split_of(file: Path) -> str:
    """By the start of a file's or of a folder's name, the innermost first; "" where none says."""
    for part in reversed(file.parts):
        for split, names in SPLIT_NAMES.items():
            if re.match(rf"({'|'.join(names)})(?![A-Za-z])", part):
                return split
    return ""


def _stored(dataset: Any, origin: str) -> Table:
    """Of a data set of the library `datasets`, without decoding."""
    batches = dataset.with_format("arrow").iter(batch_size=BATCH_ROWS)
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    return Table(_numbered(rows, origin), _features(dataset.features.arrow_schema), origin)


def _features(schema: Any) -> dict[str, Any]:
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return {name: {} for name in schema.names} | described.get("info", {}).get("features", {})


def _schema(path: Path, field: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_schema(path)
        with contextlib.suppress(pyarrow.ArrowInvalid):
            return pyarrow.ipc.open_file(path).schema
        return pyarrow.ipc.open_stream(path).schema
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{field}: {path} cannot be read ({_first_line(error)}); copy it again") from None


def _of_hub(name: str, field: str, subset: str, split: str, stream_rows: int) -> Iterator[Row]:
    with _hub_errors(name, field):
        loaded = _datasets().load_dataset(name, subset or None, split=split, streaming=stream_rows > 0)
        yield from _numbered(itertools.islice(iter(loaded), stream_rows or None), f"{name} [{split}]")


@contextlib.contextmanager
def _hub_errors(name: str, field: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # nothing of ours runs in there: whatever it is, it is about this data set
        raise InputError(
            f"{field}: the data set {name!r} cannot be read ({_first_line(error)}); check its name, data.subset, "
            "data.split and the connection, or give a file"
        ) from None


def _arrow_rows(path: Path, field: str) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            batches: Any = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=BATCH_ROWS)
        else:
            with contextlib.suppress(pyarrow.ArrowInvalid):
                file = pyarrow.ipc.open_file(path)
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
                yield from (row for batch in batches for row in batch.to_pylist())
                return
            batches = pyarrow.ipc.open_stream(path)
        for batch in batches:
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{field}: {path} cannot be read ({_first_line(error)}); copy it again") from None


def _numbered(rows: Iterator[dict[str, Any]], origin: str) -> Iterator[Row]:
    """An absent field of a row is None in a table: it is left out."""
    for number, row in enumerate(rows, start=1):
        yield f"{origin} row {number}", {name: value for name, value in row.items() if value is not None}


def _json(line: str, origin: str) -> Any:
    try:
        return json.loads(line.strip())
    except (ValueError, RecursionError) as error:
        place = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise InputError(f"{origin}: not valid JSON ({place}); one object a line") from None


def _datasets() -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
