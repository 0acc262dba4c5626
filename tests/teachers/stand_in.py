"""A server of each kind in a thread, exact: its rows are those of a model here. It can be told to misbehave."""

import json
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

OWNERS = {"vllm": "vllm", "sglang": "sglang", "llama_cpp": "llamacpp"}
PATHS = {"vllm": "/v1/completions", "sglang": "/generate", "llama_cpp": "/completion"}


class StandIn:
    """`url` while it is open.

    `troubles` are met by the next questions for rows, one each: (status, headers, text), "drop" or a number of seconds
    to sleep. `change` is made to every answer with rows. `asked` holds the questions, `keys` their authorization.
    """

    def __init__(self, kind, model, tokenizer, *, max_log_probs=1000, port=0):
        self.kind, self.model, self.tokenizer, self.max_log_probs = kind, model, tokenizer, max_log_probs
        self.troubles, self.change, self.asked, self.keys = deque(), lambda answer: answer, [], set()
        self.owner, self.can_tokenize, self.num_at_work, self.most_at_work = OWNERS[kind], True, 0, 0
        self.lock, self.delay_s = threading.Lock(), 0.0
        self.port = port

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=lambda: self.server.serve_forever(poll_interval=0.01), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path, body):
        """(status, answer)."""
        if path == "/v1/models":
            card = {"id": "tiny", "owned_by": self.owner} | ({"max_model_len": 256} if self.kind != "llama_cpp" else {})
            return 200, {"object": "list", "data": [card]}
        if path == "/tokenize" and self.can_tokenize:
            text = body["content"] if self.kind == "llama_cpp" else body["prompt"]
            assert body.get("add_special_tokens", body.get("add_special")) is False
            return 200, {"tokens": self.tokenizer(text, add_special_tokens=False)["input_ids"]}
        if path == "/props" and self.kind == "llama_cpp":
            return 200, {"default_generation_settings": {"n_ctx": 256}, "total_slots": 2}
        if path == "/version" and self.kind == "vllm":
            return 200, {"version": "0"}
        if path == "/get_model_info" and self.kind == "sglang":
            return 200, {"model_path": "tiny"}
        if path == PATHS[self.kind]:
            self.asked.append(body)
            status, answer = getattr(self, self.kind)(body)
            return status, self.change(answer) if status == 200 else answer
        return 404, {"error": {"message": "Not Found", "code": 404}}

    def top(self, ids, k):
        """(log-probabilities `[len(ids), vocab]` of what follows, ids of the k likeliest)."""
        with self.lock, torch.no_grad():
            rows = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return rows, rows.topk(k).indices

    def vllm(self, body):
        k, ids = body["prompt_logprobs"], body["prompt"]
        if k > self.max_log_probs:
            said = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_log_probs}"
            return 400, {"error": {"message": said, "type": "BadRequestError", "code": 400}}
        rows, top = self.top(ids, k)
        listed = [None]
        for row, likeliest, there in zip(rows, top.tolist(), ids[1:], strict=False):
            listed.append(
                {str(i): {"logprob": row[i].item(), "decoded_token": self.text(i)} for i in [there, *likeliest]}
            )
        return 200, {"choices": [{"index": 0, "text": "x", "prompt_logprobs": listed}]}

    def sglang(self, body):
        ids, start, k = body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]
        rows, top = self.top(ids, k)
        text = self.text if body["return_text_in_logprobs"] else lambda i: None
        tops = [[[rows[t, i].item(), i, text(i)] for i in top[t].tolist()] for t in range(start, len(ids) - 1)]
        there = [[rows[t, ids[t + 1]].item(), ids[t + 1], text(ids[t + 1])] for t in range(start, len(ids) - 1)]
        first = [None, ids[start], text(ids[start])]
        return 200, {"meta_info": {"input_token_logprobs": [first, *there], "input_top_logprobs": [None, *tops]}}

    def llama_cpp(self, body):
        rows, top = self.top(body["prompt"], body["n_probs"])
        row = [{"id": i, "token": self.text(i), "logprob": rows[-1, i].item()} for i in top[-1].tolist()]
        return 200, {
            "tokens_evaluated": len(body["prompt"]),
            "completion_probabilities": [{"id": row[0]["id"], "top_logprobs": row}],
        }

    def text(self, index):
        return self.tokenizer.decode([index])


def handler(stand_in):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *arguments):
            pass

        def do_GET(self):
            self.reply(*stand_in.answer(self.path, None))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stand_in.keys.add(self.headers.get("Authorization"))
            with stand_in.lock:
                stand_in.num_at_work += 1
                stand_in.most_at_work = max(stand_in.most_at_work, stand_in.num_at_work)
                is_asked_for_rows = self.path == PATHS[stand_in.kind]
                trouble = stand_in.troubles.popleft() if stand_in.troubles and is_asked_for_rows else None
            time.sleep(stand_in.delay_s)
            self.meet(trouble, body)

        def meet(self, trouble, body):
            if trouble == "drop":
                stand_in.num_at_work -= 1
                self.close_connection = True
            elif isinstance(trouble, tuple):
                self.reply(trouble[0], trouble[2], trouble[1])
            else:
                time.sleep(trouble or 0)
                self.reply(*stand_in.answer(self.path, body))

        def reply(self, status, answer, headers=()):
            text = answer if isinstance(answer, str) else json.dumps(answer)
            if self.command == "POST":
                with stand_in.lock:
                    stand_in.num_at_work -= 1
            try:
                self.send_response(status)
                for name, value in dict(headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:  # whoever asked has gone
                self.close_connection = True

    return Handler
