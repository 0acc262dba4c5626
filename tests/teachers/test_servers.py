"""What is sent to each kind of server, and what is made of its answer, by servers that are exact."""

import pytest
import torch
from conftest import make_llama
from stand_in import StandIn

from abkd import InputError
from abkd.teachers.connection import Connection, Malformed
from abkd.teachers.servers import DIALECTS, find_dialect

KINDS = sorted(DIALECTS)
IDS = [5, 17, 100, 3, 42, 260, 7]


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_llama(len(tokenizer))


@pytest.fixture(params=KINDS)
def server(request, model, tokenizer):
    with StandIn(request.param, model, tokenizer) as stand_in:
        yield stand_in


def connect(server):
    return Connection(server.url, num_connections=2, timeout_s=5, patience_s=1, api_key=None)


def test_rows_are_the_models(server, model):
    dialect, places, k = find_dialect(connect(server), "tiny", "auto"), [2, 3, 6], 4
    truth = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    for place, entries in zip(places, dialect.rows(IDS, places, k), strict=True):
        found = {entry.id: entry.log_prob for entry in entries}
        expected = set(truth[place - 1].topk(k).indices.tolist())
        expected |= {IDS[place]} if server.kind != "llama_cpp" else set()
        assert set(found) == expected and len(entries) == len(expected)
        for index, log_prob in found.items():
            assert log_prob == pytest.approx(truth[place - 1, index].item(), abs=1e-5)


def test_what_is_sent(server):
    dialect = find_dialect(connect(server), "tiny", server.kind)
    list(dialect.rows(IDS, [2, 3], 4))
    expected = {
        "vllm": [{"model": "tiny", "prompt": IDS[:4], "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 4}],
        "sglang": [
            {
                "input_ids": IDS[:4],
                "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
                "return_logprob": True,
                "logprob_start_len": 1,
                "top_logprobs_num": 4,
                "return_text_in_logprobs": False,
            }
        ],
        "llama_cpp": [
            {
                "model": "tiny",
                "prompt": IDS[:place],
                "n_predict": 1,
                "temperature": 1.0,
                "n_probs": 4,
                "post_sampling_probs": False,
                "cache_prompt": True,
                "logit_bias": [["a", 1e6]],
            }
            for place in (2, 3)
        ],
    }
    assert server.asked == expected[server.kind]


@pytest.mark.parametrize("says_owner", [True, False])
def test_the_kind_is_found_by_what_the_server_says(server, says_owner):
    server.owner = server.owner if says_owner else "me"
    dialect = find_dialect(connect(server), "tiny", "auto")
    assert type(dialect) is DIALECTS[server.kind]
    assert (("owned by" if says_owner else dialect.fact[0]) in dialect.known_by) and dialect.models() == ["tiny"]
    assert dialect.longest() == (256 if server.kind == "llama_cpp" else 255)


def test_a_server_of_no_known_kind(model, tokenizer):
    with StandIn("vllm", model, tokenizer) as stand_in:
        answer = stand_in.answer
        stand_in.owner = "somebody"
        stand_in.answer = lambda path, body: (404, "no") if path == "/version" else answer(path, body)
        with pytest.raises(InputError, match="set it to one of vllm, sglang, llama_cpp"):
            find_dialect(connect(stand_in), "tiny", "auto")


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_wrong_is_said_before_the_kind_is_guessed(server, status):
    server.answer = lambda path, body: (status, {"error": "Unauthorized"})
    with pytest.raises(
        InputError, match=rf"teacher\.api_key: {server.url} answers {status}: Unauthorized; give another"
    ):
        find_dialect(connect(server), "tiny", "auto")


def test_tokenizing(server, tokenizer):
    dialect = find_dialect(connect(server), "tiny", server.kind)
    assert dialect.tokenize("The cat<|end|> likes") == tokenizer("The cat<|end|> likes")["input_ids"]
    server.can_tokenize = False
    assert dialect.tokenize("The cat") is None


def test_rows_that_are_shifted_are_seen(server):
    """Each list of a server's rows says where it is, by the token that is there or by how many were read."""

    def shift(answer):
        if server.kind == "vllm":
            rows = answer["choices"][0]["prompt_logprobs"]
            answer["choices"][0]["prompt_logprobs"] = [rows[0], *rows[2:], rows[1]]
        elif server.kind == "sglang":
            rows = answer["meta_info"]["input_token_logprobs"]
            answer["meta_info"]["input_token_logprobs"] = [*rows[1:], rows[0]]
        else:
            answer["tokens_evaluated"] += 1  # it puts a token of its own first
        return answer

    server.change = shift
    dialect = find_dialect(connect(server), "tiny", server.kind)
    with pytest.raises(Malformed):
        list(dialect.rows(IDS, [2, 3], 4))
