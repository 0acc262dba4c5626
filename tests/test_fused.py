"""The trainer's two ways to the loss, fused and dense: the same curve for every kind of student, and which is taken."""

import re

import peft
import pytest
import torch
import transformers
from conftest import make_gpt2, make_llama
from test_trainer import make_trainer, weights

from abkd import AlphaBeta, ForwardKL, InputError, Objective
from abkd.calibrations import LSD, Plain
from abkd.divergences import JSD, AlphaBetaSchedule, Ramp
from abkd.head import LMHead
from abkd.models.students import shrink


def make_family(family, vocab_size, **options):
    torch.manual_seed(2)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=0, pad_token_id=1, **options,
    )  # fmt: skip
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


CAPPED = {"final_logit_softcapping": 3.0, "head_dim": 8}
LORA_WARNING = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"  # peft asks transformers for it


def with_lora(model, modules=("q_proj", "down_proj")):
    """An adapter that is not at its first values, where half of it has no gradient."""
    modules = modules if isinstance(modules, str) else list(modules)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=modules, init_lora_weights=False))


OBJECTIVES = {
    "alpha-beta": Objective(AlphaBeta()),
    "with cross-entropy": Objective(AlphaBeta(), ce_weight=0.3),
    "JSD": Objective(JSD(), kd_weight=2.0),
    "at a temperature": Objective(Plain(ForwardKL(), 2.0, temperature_gradient_scale="squared"), ce_weight=0.3),
    "a schedule": Objective(AlphaBetaSchedule(Ramp(1.0, -0.2), 0.7)),
}


STUDENTS = {
    "Llama": lambda vocab: shrink(make_llama(vocab), 2),
    "GPT-2": lambda vocab: shrink(make_gpt2(vocab), 2),
    "Gemma-2, soft-capped": lambda vocab: make_family("Gemma2", vocab, **CAPPED),
    "Cohere, scaled": lambda vocab: make_family("Cohere", vocab, logit_scale=0.25),
    "LoRA": lambda vocab: with_lora(make_llama(vocab)),
    "LoRA beside an untied head": lambda vocab: with_lora(make_llama(vocab, tied=False), "all-linear"),
}
PAIRS = [
    (student, objective)
    for student in STUDENTS
    for objective in OBJECTIVES
    if student in ("Llama", "GPT-2") or objective == "with cross-entropy"
]


@pytest.mark.filterwarnings(LORA_WARNING)
@pytest.mark.parametrize("student, objective", PAIRS, ids=map(", ".join, PAIRS))
def test_fused_and_dense_give_the_same_twenty_steps(tokenizer, tmp_path, student, objective):
    """fp32; the tied head's gradient reaches the embedding whole in both."""
    curves, ends = [], []
    for logits in ("fused", "dense"):
        trainer = make_trainer(
            tokenizer, tmp_path, student=STUDENTS[student](len(tokenizer)), objective=OBJECTIVES[objective],
            logits=logits, max_steps=20, learning_rate=0.02, per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        assert trainer.fused == (logits == "fused")
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        curves.append(torch.tensor([[float(line[name]) for name in ("loss", "kd", "ce")] for line in lines]))
        ends.append(weights(trainer))
    torch.testing.assert_close(*curves, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "family, options", [("Llama", {}), ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8})]
)
def test_both_uses_of_a_tied_weight_are_in_its_gradient_once(tokenizer, tmp_path, tied, family, options):
    gradients = {}
    for logits in ("fused", "dense"):
        student = make_family(family, len(tokenizer), tie_word_embeddings=tied, **options)
        trainer = make_trainer(tokenizer, tmp_path, student=student, logits=logits)
        trainer.compute_loss(student, trainer.data_collator(trainer.train_dataset)).backward()
        gradients[logits] = [p.grad for p in (student.get_input_embeddings().weight, student.lm_head.weight)]
        assert (gradients[logits][0] is gradients[logits][1]) == tied
    for fused, dense in zip(gradients["fused"], gradients["dense"], strict=True):
        assert (fused - dense).norm() < 1e-5 * dense.norm()


def test_fp16_loses_no_small_gradient_that_the_scale_of_the_loss_would_save(tokenizer, tmp_path):
    """What the Trainer's autocast and GradScaler do on a GPU, for a step of a million tokens, by hand on the CPU."""
    scale, gradients = 2.0**16, {}
    for logits in ("fused", "dense"):
        student = shrink(make_llama(len(tokenizer)), 2)
        trainer = make_trainer(tokenizer, tmp_path, student=student, logits=logits)
        batch = trainer.data_collator(trainer.train_dataset)
        if logits == "fused":  # some models' last norm gives fp16 to the head
            student.model.norm.register_forward_hook(lambda norm, inputs, output: output.half())
        with torch.autocast("cpu", dtype=torch.float16, enabled=logits == "fused"):
            loss = trainer.compute_loss(student, batch, num_items_in_batch=1_000_000)
        (loss * scale).backward()
        gradients[logits] = torch.cat([p.grad.flatten() for p in student.parameters()]) / scale
    assert (gradients["fused"] - gradients["dense"]).norm() < 0.02 * gradients["dense"].norm()


@pytest.mark.filterwarnings(LORA_WARNING)
def test_lora_leaves_the_head_alone_and_pays_nothing_for_it(tokenizer, tmp_path):
    student = with_lora(make_llama(len(tokenizer)))
    before = {name: p.clone() for name, p in student.named_parameters()}
    trainer = make_trainer(tokenizer, tmp_path, student=student, max_steps=2)
    assert trainer.fused and not LMHead.read(student).weight.requires_grad
    trainer.train()
    assert student.get_output_embeddings().weight.grad is None
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved == {name for name in before if "lora_" in name}
    assert trainer.evaluate()["validation_num_tokens"] > 0


@pytest.mark.filterwarnings(LORA_WARNING)
@pytest.mark.parametrize(
    "where, layer",
    [
        ({"target_modules": ["q_proj", "lm_head"]}, r"peft\.tuners\.lora\.layer\.Linear"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, r"peft\.utils\.other\.ModulesToSaveWrapper"),
    ],
)
def test_an_adapter_on_the_head_is_dense_and_says_so_or_is_refused(tokenizer, tmp_path, where, layer):
    student = peft.get_peft_model(make_llama(len(tokenizer), tied=False), peft.LoraConfig(**where))
    reason = f"the output head of LlamaForCausalLM is a {layer}, not a linear layer; set training.logits=dense"
    trainer = make_trainer(tokenizer, tmp_path, student=student)
    assert re.fullmatch(f"logits: dense, because {reason}", trainer.how_logits)
    trainer.train()
    with pytest.raises(InputError, match=f"training.logits: {reason}"):
        make_trainer(tokenizer, tmp_path, student=student, logits="fused")


def test_what_the_fused_path_cannot_do_is_dense_and_says_so_or_is_refused(tokenizer, tmp_path):
    for objective, reason in ((Objective(LSD()), "the calibration lsd"),):
        trainer = make_trainer(tokenizer, tmp_path, objective=objective)
        assert trainer.how_logits == f"logits: dense, because of {reason}"
        trainer.train()
        with pytest.raises(InputError, match=f"training.logits=fused cannot do {reason}; set training.logits=auto"):
            make_trainer(tokenizer, tmp_path, objective=objective, logits="fused")
    assert make_trainer(tokenizer, tmp_path).how_logits == "logits: fused with the divergence, chunk by chunk"
    student = make_llama(len(tokenizer))
    student.lm_head = torch.nn.Sequential(student.lm_head)
    assert (
        "the output head of LlamaForCausalLM is a torch.nn.modules.container.Sequential, not a linear layer"
        in make_trainer(tokenizer, tmp_path, student=student).how_logits
    )
    with pytest.raises(
        InputError, match=r"training\.logits: the output head of LlamaForCausalLM is a torch\.nn\..*Sequential"
    ):
        make_trainer(tokenizer, tmp_path, student=student, logits="fused")
