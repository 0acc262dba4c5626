"""Two processes under DDP take the step that one process takes, with the fused head and with dense logits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_trainer import make_trainer, weights

HERE = Path(__file__)


@pytest.mark.parametrize("logits", ["fused", "dense"])
def test_two_processes_take_the_step_of_one(tokenizer, tmp_path, logits):
    alone = make_trainer(tokenizer, tmp_path / "one", logits=logits, max_steps=3, learning_rate=0.02)
    alone.train()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(HERE)]
    done = subprocess.run([*command, logits, str(tmp_path)], capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "weights.pt"), weights(alone), rtol=1e-4, atol=1e-5)


def main(logits: str, folder: str) -> None:
    from conftest import make_tokenizer

    trainer = make_trainer(
        make_tokenizer(),
        Path(folder) / "two",
        logits=logits,
        max_steps=3,
        learning_rate=0.02,
        per_device_train_batch_size=4,
    )
    assert trainer.args.world_size == 2
    trainer.train()
    if trainer.args.process_index == 0:
        torch.save(weights(trainer), Path(folder) / "weights.pt")
    trainer.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
