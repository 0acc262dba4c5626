"""Two processes under DDP take the steps that one process takes with dense logits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer
from test_fused import LORA_WARNING, with_lora
from test_trainer import corpus, make_trainer, weights

from abkd.data.rollouts import OnPolicy
from abkd.generation import Sampling

HERE = Path(__file__)
ROLLOUTS = OnPolicy(Sampling(6))
CASES = {
    "tied": {},
    "untied": {"tied": False},
    "LoRA": {"lora": True},
    "dense": {"logits": "dense"},
    "corpus": {"lm_weight": 1.5},
}


def train(folder, *, batch_size, logits="fused", tied=True, lora=False, rollouts=None, lm_weight=0.0):
    tokenizer = make_tokenizer()
    student = make_llama(len(tokenizer), layers=2, tied=tied, seed=3)
    student = with_lora(student) if lora else student
    trainer = make_trainer(
        tokenizer,
        folder,
        student=student,
        logits=logits,
        rollouts=rollouts,
        lm_weight=lm_weight,
        corpus=corpus(tokenizer) if lm_weight else None,
        max_steps=3,
        learning_rate=0.02,
        per_device_train_batch_size=batch_size,
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """Case -> weights of the student."""
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(HERE)]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "weights.pt")


@pytest.mark.filterwarnings(LORA_WARNING)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(of_two_processes, tmp_path, case):
    alone = train(tmp_path, batch_size=8, **CASES[case] | {"logits": "dense"})
    torch.testing.assert_close(of_two_processes[case], weights(alone), rtol=1e-4, atol=1e-5)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    found = {}
    trainer = train(Path(folder) / "run", batch_size=4, rollouts=ROLLOUTS)
    theirs = trainer.accelerator.gather(weights(trainer)).view(2, -1)
    assert torch.equal(theirs[0], theirs[1])
    for case, options in CASES.items():
        trainer = train(Path(folder) / "run", batch_size=4, **options)
        assert trainer.args.world_size == 2
        found[case] = weights(trainer)
    if trainer.args.process_index == 0:
        torch.save(found, Path(folder) / "weights.pt")
    trainer.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
