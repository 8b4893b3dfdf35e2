"""LiteRT-LM's engine behind a server, since its own takes text alone: a program for the Python of
its environment.

Arguments: model, port, threads and, with drafts, K. The model's tokenizer is the one by ids
(`tokenizer_by_ids` of serve/litert.py), so that text is numbers of tokens. The engine hands out
what a round brought in one piece, which tells how many drafts were accepted; the share of all
drafts it writes into its log when it ends.
"""

import json
import signal
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


def main() -> None:
    import litert_lm

    path, port, threads, *drafts = sys.argv[1:]
    litert_lm.set_min_log_severity(litert_lm.LogSeverity.INFO)
    engine: Any = litert_lm.Engine(
        path, backend=litert_lm.Backend.CPU(thread_count=int(threads)),
        # What it compiles is small, and would stay beside the model.
        cache_dir=":nocache", enable_speculative_decoding=bool(drafts),
    )  # fmt: skip
    greedy = litert_lm.SamplerConfig(top_k=1, temperature=0.0)
    accepted: list[int] = []

    def decode(prompt: list[int], most: int) -> list[int]:
        with engine.create_session(
            apply_prompt_template=False, max_output_tokens=most, sampler_config=greedy
        ) as session:
            session.run_prefill([" ".join(map(str, prompt))])
            pieces = [answer.texts[0].split() for answer in session.run_decode_async()]
        # The newest token waits for the next: the first piece is of the target's own first token
        # and a round, each other of a round, and what waited in the end comes by itself.
        accepted.extend(len(piece) - 1 for piece in pieces[:-1])
        return [int(word) for piece in pieces for word in piece][:most]

    def metrics() -> str:
        """Rounds and accepted drafts by position, as vLLM and llama.cpp name them."""
        lines = [f"litert:spec_decode_num_drafts_total {len(accepted) if drafts else 0}"]
        for k in range(int(drafts[0]) if drafts else 0):
            name = f'litert:spec_decode_num_accepted_tokens_per_pos_total{{position="{k}"}}'
            lines.append(f"{name} {sum(n > k for n in accepted)}")
        return "\n".join(lines)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # /health and /metrics
            self.answer(metrics())

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(json.dumps({"tokens": decode(request["prompt"], request["n_predict"])}))

        def answer(self, text: str) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        HTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
    finally:
        engine.close()  # and it writes its log


if __name__ == "__main__":
    main()
