"""Two processes under FSDP2 take the steps that one process takes with dense logits, wherever the head is sharded."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer
from test_fused import LORA_WARNING, with_lora
from test_trainer import make_trainer
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.profiler import ProfilerActivity, profile

from abkd import InputError
from abkd.data.batches import num_tokens
from abkd.generation import generate
from abkd.head import check_head
from abkd.models.sharding import shard as shard_teacher_by_layers
from abkd.ranks import gather

HERE = Path(__file__)


def whole(model):
    fully_shard(model)


def whole_sharded_after_forward(model):
    fully_shard(model, reshard_after_forward=True)


def blocks(model):
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)


def blocks_and_head(model):
    fully_shard(model.lm_head)
    blocks(model)


def as_accelerate_does(model):
    inner = model.model
    tied = inner.embed_tokens.weight is model.lm_head.weight
    for block in inner.layers:
        fully_shard(block)
    if not tied:
        fully_shard(inner.embed_tokens)
    fully_shard([inner.norm, *([inner.embed_tokens] if tied else []), model.lm_head], reshard_after_forward=False)
    fully_shard(model)


def blocks_and_tied_pair(model):
    fully_shard([model.model.embed_tokens, model.lm_head])
    blocks(model)


def head_with_a_check(model):
    blocks_and_head(model)
    check_head(model)


def bf16(model):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mp_policy=policy)


CASES = {
    "whole": (whole, {}),
    "whole, untied": (whole, {"tied": False}),
    "whole, sharded after the forward": (whole_sharded_after_forward, {}),
    "whole, untied, sharded after the forward": (whole_sharded_after_forward, {"tied": False}),
    "blocks": (blocks, {}),
    "blocks, untied": (blocks, {"tied": False}),
    "blocks and head": (blocks_and_head, {"tied": False}),
    "blocks and tied pair": (blocks_and_tied_pair, {}),
    "as accelerate": (as_accelerate_does, {}),
    "as accelerate, untied": (as_accelerate_does, {"tied": False}),
    "a check after wrapping": (head_with_a_check, {"tied": False}),
    "dense": (blocks, {"logits": "dense"}),
    "reduced once per step": (blocks, {"sync": False}),
    "reduced once per step, head": (blocks_and_head, {"sync": False, "tied": False}),
    "sharded teacher": (blocks, {"shard_teacher": True}),
    "frozen head": (blocks_and_head, {"tied": False, "frozen": True}),
    "LoRA": (whole, {"lora": True}),
    "bf16": (bf16, {}),
}


def make_student(vocab_size, *, tied=True, frozen=False, lora=False):
    student = make_llama(vocab_size, layers=2, tied=tied, seed=3)
    if frozen:
        student.lm_head.requires_grad_(False)
    if lora:
        student = with_lora(student)
    return student


def two_steps(folder, shard, rank, world, *, logits="fused", sync=True, shard_teacher=False, **options):
    """The student after two steps of SGD on 8 examples, each in two micro-batches, through the trainer's loss."""
    tokenizer = make_tokenizer()
    student = make_student(len(tokenizer), **options)
    trainer = make_trainer(tokenizer, folder, student=student, logits=logits)
    shard(student)
    if shard_teacher:
        shard_teacher_by_layers(trainer.teacher.model)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], 0.02)
    examples = trainer.train_dataset
    for _ in range(2):
        for start in (0, 4):
            if not sync:
                student.set_requires_gradient_sync(start == 4)
            batch = trainer.data_collator(examples[start : start + 4][rank::world])
            loss = trainer.compute_loss(student, batch, num_items_in_batch=sum(map(num_tokens, examples)))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


def whole_weights(model):
    return {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()
        for name, tensor in model.state_dict().items()
    }


def num_gathers(folder, shard, logits):
    """All-gathers of one forward and backward."""
    tokenizer = make_tokenizer()
    student = make_student(len(tokenizer), tied=False)
    trainer = make_trainer(tokenizer, folder, student=student, logits=logits)
    shard(student)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        trainer.compute_loss(student, trainer.data_collator(trainer.train_dataset)).backward()
    return sum(event.count for event in profiled.key_averages() if event.key == "fsdp::all_gather_copy_in")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What `main` measured."""
    folder = tmp_path_factory.mktemp("fsdp")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(HERE)]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "measured.pt")


@pytest.mark.filterwarnings(LORA_WARNING)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(two_processes, tokenizer, tmp_path, case):
    options = {name: value for name, value in CASES[case][1].items() if name in ("tied", "frozen", "lora")}
    start = whole_weights(make_student(len(tokenizer), **options))
    alone = whole_weights(two_steps(tmp_path, lambda student: None, 0, 1, logits="dense", **options))
    moved = 0
    for name, found in two_processes[case].items():
        step = (alone[name] - start[name]).norm()
        moved += bool(step > 1e-3)
        assert (found - alone[name]).norm() <= (1e-4 if case != "bf16" else 0.1) * step + 1e-6, name
    assert moved >= 6


@pytest.mark.parametrize("shard", [whole, whole_sharded_after_forward, blocks, blocks_and_head])
def test_the_fused_path_gathers_no_more_than_the_dense_one(two_processes, shard):
    counts = two_processes["gathers", shard.__name__]
    assert 0 < counts["fused"] == counts["dense"]


def evaluated(folder, shard):
    """The trainer's evaluation, of student and teacher both sharded."""
    tokenizer = make_tokenizer()
    trainer = make_trainer(tokenizer, folder, student=make_student(len(tokenizer), tied=False))
    if shard:
        shard(trainer.model)
        shard_teacher_by_layers(trainer.teacher.model)
    return trainer.evaluate()


def test_the_evaluation_is_that_of_the_whole_models(two_processes):
    whole, *sharded = two_processes["evaluated"]
    assert len(sharded) == 2
    for metrics in sharded:
        assert metrics == pytest.approx(whole, rel=1e-5)


PROMPTS = ["The cat", "What does the dog like?"]


def generated(shard, prompts):
    """Of a model in shards, or of a whole one; the second prompt's answer is cut, so that the ranks end apart."""
    tokenizer = make_tokenizer()
    model = make_llama(len(tokenizer), tied=False)
    if shard:
        shard(model)
    length = {PROMPTS[0]: 9, PROMPTS[1]: 3}[prompts[0]]
    return [completion.text for completion in generate(model, tokenizer, prompts, max_new_tokens=length)]


def test_shards_answer_each_rank_its_own_prompts(two_processes):
    assert two_processes["generated"] == [generated(None, [prompt]) for prompt in PROMPTS]


def tensor_parallel(model):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    return parallelize_module(model, mesh, {"lm_head": ColwiseParallel()})


def fsdp_1(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def refusal(split):
    try:
        check_head(split(make_student(300, tied=False)))
    except InputError as error:
        return str(error)


def test_a_head_that_is_split_otherwise_is_refused(two_processes):
    line = (
        "the output head of LlamaForCausalLM is split over ranks, and not by fully_shard alone; "
        "set training.logits=dense"
    )
    assert two_processes["refusals"] == [line, line]


def main(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = torch.distributed.get_rank()
    measured = {}
    for case, (shard, options) in CASES.items():
        measured[case] = whole_weights(two_steps(folder, shard, rank, 2, **options))
    for shard in (whole, whole_sharded_after_forward, blocks, blocks_and_head):
        measured["gathers", shard.__name__] = {
            logits: num_gathers(folder, shard, logits) for logits in ("fused", "dense")
        }
    measured["evaluated"] = [evaluated(folder, shard) for shard in (None, blocks, blocks_and_head)]
    measured["generated"] = gather(generated(blocks, [PROMPTS[rank]]))
    measured["refusals"] = [refusal(tensor_parallel), refusal(fsdp_1)]
    if rank == 0:
        torch.save(measured, Path(folder) / "measured.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
