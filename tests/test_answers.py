import json
from pathlib import Path

import pytest
from conftest import make_llama

from abkd import cli
from abkd.data.instructions import ALPACA, ALPACA_WITH_INPUT, Instruction, prompt_text, read_instructions, row_of
from abkd.models.pretrained import load_tokenizer


@pytest.fixture
def ending_teacher(tmp_path, tokenizer):
    """A teacher whose next token is near enough uniform that most answers end within 400 tokens."""
    folder = tmp_path / "ending"
    model = make_llama(len(tokenizer), layers=1, tied=False)
    model.get_output_embeddings().weight.data.mul_(0.01)
    model.get_output_embeddings().weight.data[tokenizer.eos_token_id] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def generate(recipe_file, teacher, output, *options):
    options = ["--max-new-tokens", "150", "--batch-size", "3", *options, f"teacher.path={teacher}"]
    return cli.main(["generate", str(recipe_file), "--output", str(output), *options])


def rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_answers_are_data_and_a_stopped_run_goes_on_to_the_same_file(recipe_file, ending_teacher, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    assert generate(recipe_file, ending_teacher, output) == cli.DONE
    whole = output.read_bytes()
    made = rows(output)
    said = capsys.readouterr().out
    assert 0 < len(made) <= 8 and f"{len(made)} answers; {8 - len(made)} of those" in said
    assert [row["number"] for row in made] == sorted(row["number"] for row in made)
    assert all(row["prompt"].startswith("What does the") and row["completion"].strip() for row in made)
    assert len(read_instructions(output, "data.train")) == len(made)

    assert generate(recipe_file, ending_teacher, output) == cli.DONE
    assert "finished already" in capsys.readouterr().out and output.read_bytes() == whole

    beside = Path(f"{output}.options.json")
    beside.write_text(beside.read_text().replace('"finished": true', '"finished": false'))
    for cut in (0, 7, len(whole) // 2, len(whole) - 5):
        output.write_bytes(whole[:cut])
        assert generate(recipe_file, ending_teacher, output) == cli.DONE
        assert output.read_bytes() == whole
        beside.write_text(beside.read_text().replace('"finished": true', '"finished": false'))


def test_other_options_cannot_go_on_with_a_file(recipe_file, ending_teacher, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    assert generate(recipe_file, ending_teacher, output) == cli.DONE
    kept = output.read_bytes()
    assert generate(recipe_file, ending_teacher, output, "--temperature", "0.5") == cli.USERS_MISTAKE
    assert "was started with temperature=1.0, not 0.5" in capsys.readouterr().err
    assert generate(recipe_file, ending_teacher, output, "data.max_train_rows=2") == cli.USERS_MISTAKE
    assert "was started with prompts=" in capsys.readouterr().err
    assert output.read_bytes() == kept


def test_a_file_of_another_origin_is_left_alone(recipe_file, ending_teacher, tmp_path, capsys):
    output = tmp_path / "mine.jsonl"
    output.write_text("mine\n")
    assert generate(recipe_file, ending_teacher, output) == cli.USERS_MISTAKE
    assert "was not made by this command" in capsys.readouterr().err and output.read_text() == "mine\n"
    assert generate(recipe_file, ending_teacher, tmp_path / "none" / "x.jsonl") == cli.USERS_MISTAKE
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--top-p", "0"), ("--temperature", "-1"), ("--max-new-tokens", "0")])
def test_a_wrong_option_is_refused(recipe_file, ending_teacher, tmp_path, option):
    with pytest.raises(SystemExit, match="2"):
        generate(recipe_file, ending_teacher, tmp_path / "x.jsonl", *option)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q?", "completion": "A."},
        {"instruction": "Sum up.", "input": "A long text.", "output": "Short."},
        {"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant")]},
    ],
)
def test_a_row_is_read_back_to_the_same_prompt(tmp_path, row, teacher_folder):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    (first,) = read_instructions(file, "data")
    file.write_text(json.dumps(row_of(first, "Another.")))
    (second,) = read_instructions(file, "data")
    assert (second.prompt, second.input, second.completion) == (first.prompt, first.input, "Another.")
    tokenizer = load_tokenizer(str(teacher_folder), "teacher.path")
    for prompt_format in ("chat", "alpaca", "plain") if len(first.prompt) == 1 else ("chat",):
        assert prompt_text(first, tokenizer, prompt_format) == prompt_text(second, tokenizer, prompt_format)


def test_the_alpaca_prompt_survives_the_row():
    row = Instruction(({"role": "user", "content": "Sum up.\n\nText"},), "x", "", "Text")
    assert row_of(row, "y") == {"instruction": "Sum up.", "input": "Text", "output": "y"}
    assert prompt_text(row, None, "alpaca") == ALPACA_WITH_INPUT.format(instruction="Sum up.", input="Text")
    assert prompt_text(Instruction(row.prompt, "x", ""), None, "alpaca") == ALPACA.format(instruction="Sum up.\n\nText")
