import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from abkd import InputError, cli
from abkd.data.instructions import read_instructions
from abkd.data.sources import read_rows, read_table

ROWS = [{"prompt": f"Q{n}?", "completion": f"A{n}."} for n in range(5)]
CHATS = [
    {"messages": [{"role": "user", "content": f"Q{n}?"}, {"role": "assistant", "content": f"A{n}."}]} for n in range(5)
]


def write(folder, form, rows=ROWS):
    """The rows in one of the forms; what a recipe would name."""
    table = pyarrow.Table.from_pylist(rows)
    if form == "jsonl":
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / "rows.jsonl"
    if form == "parquet":
        pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=2)
        return folder / "rows.parquet"
    if form in ("arrow stream", "arrow file"):
        make = pyarrow.ipc.new_stream if form == "arrow stream" else pyarrow.ipc.new_file
        with make(folder / "rows.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        return folder / "rows.arrow"
    if form == "folder of parquet":
        (folder / "parts").mkdir()
        pyarrow.parquet.write_table(table.slice(0, 2), folder / "parts" / "a.parquet")
        pyarrow.parquet.write_table(table.slice(2), folder / "parts" / "b.parquet")
        return folder / "parts"
    saved = datasets.Dataset.from_list(rows)
    saved = datasets.DatasetDict({"train": saved, "test": saved.select([0])}) if form == "saved splits" else saved
    saved.save_to_disk(folder / "saved")
    return folder / "saved"


FORMS = ["jsonl", "parquet", "arrow stream", "arrow file", "folder of parquet", "saved", "saved splits"]


@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["prompts", "chats"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_instructions(tmp_path, form, rows):
    found = read_instructions(write(tmp_path, form, rows), "data.train")
    assert [(row.prompt[0]["content"], row.completion) for row in found] == [(f"Q{n}?", f"A{n}.") for n in range(5)]
    assert len({row.origin for row in found}) == 5 and str(tmp_path) in found[0].origin


def test_a_split_is_chosen_by_name(tmp_path):
    path = write(tmp_path, "saved splits")
    assert len(read_instructions(path, "data.validation", split="test")) == 1
    with pytest.raises(InputError, match=r"has no split 'dev'; it has test, train: see data\.split"):
        read_instructions(path, "data.validation", split="dev")


def test_an_absent_field_of_a_table_is_no_field(tmp_path):
    rows = [{"instruction": "Do.", "input": None, "output": "x"}, {"instruction": "Do.", "input": "y", "output": "x"}]
    found = read_instructions(write(tmp_path, "parquet", rows), "data.train")
    assert [row.input for row in found] == ["", "y"]


def test_a_bad_row_of_a_table_is_named(tmp_path):
    path = write(tmp_path, "parquet", [*ROWS, {"prompt": "Q?", "completion": None}])
    with pytest.raises(InputError, match=r"rows\.parquet row 6: field 'completion' is missing"):
        read_instructions(path, "data.train")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda f: f / "none.parquet", "there is no file"),
        (lambda f: (f / "torn.parquet").write_bytes(b"PAR1 torn") and f / "torn.parquet", "cannot be read"),
        (lambda f: (f / "torn.arrow").write_bytes(b"torn") and f / "torn.arrow", "cannot be read"),
        (lambda f: f, "holds none of these files"),
        (lambda f: (write(f, "parquet"), write(f, "jsonl")) and f, r"holds files of 2 formats \(\.jsonl, \.parquet\)"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, make, message):
    with pytest.raises(InputError, match=message):
        read_instructions(make(tmp_path), "data.train")


@pytest.fixture
def hub(monkeypatch):
    """`datasets.load_dataset` as a hub that has one data set; the rows it handed out."""
    handed = []

    def load_dataset(name, subset, *, split, streaming):
        if name != "someone/things":
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub")
        if not streaming:
            handed.append((subset, split, "all"))
            return datasets.Dataset.from_list(ROWS)

        def rows():
            for row in ROWS:
                handed.append((subset, split, row["prompt"]))
                yield row

        return rows()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return handed


def test_a_hubs_data_set_is_read_whole_or_as_far_as_needed(hub):
    found = list(read_rows("someone/things", "data.train", subset="s", split="dev"))
    assert (
        [row for _, row in found] == ROWS
        and found[0][0] == "someone/things [dev] row 1"
        and hub == [("s", "dev", "all")]
    )
    hub.clear()
    assert [row for _, row in read_rows("someone/things", "data.train", stream_rows=2)] == ROWS[:2]
    assert hub == [(None, "train", "Q0?"), (None, "train", "Q1?")]


def test_a_data_set_that_cannot_be_reached_is_one_line(hub):
    with pytest.raises(
        InputError, match=r"data.train: the data set 'no/such' cannot be read \(Couldn't reach 'no/such'"
    ):
        list(read_rows("no/such", "data.train"))


def test_a_stream_is_of_a_hub(hub, tmp_path):
    with pytest.raises(InputError, match=r"data\.stream=true reads a hub's data set"):
        list(read_rows(str(write(tmp_path, "jsonl")), "data.train", stream_rows=3))


def test_a_run_trains_on_a_stream(recipe_file, tmp_path, hub, capsys):
    options = ["data.train=someone/things", "data.stream=true", "data.max_train_rows=2", "data.num_held_out=2"]
    assert cli.main(["train", str(recipe_file), *options]) == cli.DONE
    assert len(hub) == 4 and "train: 2 examples" in capsys.readouterr().out


def test_a_stream_without_an_end_is_refused(recipe_file, capsys):
    assert cli.main(["check", str(recipe_file), "data.stream=true"]) == cli.USERS_MISTAKE
    assert "data: stream=true reads the first max_train_rows rows; set it above 0" in capsys.readouterr().err


def test_the_rows_of_the_docs_are_read(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    block = text.split("```json\n")[1].split("```")[0]
    (tmp_path / "rows.jsonl").write_text(block, encoding="utf-8")
    found = read_instructions(tmp_path / "rows.jsonl", "data.train")
    assert len(found) == len(block.splitlines()) == 8


@pytest.mark.parametrize("form", FORMS)
def test_a_table_has_the_rows_of_every_form_and_says_where_it_stands(tmp_path, form):
    path = write(tmp_path, form)
    table = read_table(str(path), "data.train")
    assert [row for _, row in table.rows] == ROWS
    assert table.features.keys() == (set() if form == "jsonl" else {"prompt", "completion"})
    assert table.origin == f"{path} [train]" if form == "saved splits" else table.origin == str(path)
