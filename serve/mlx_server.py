"""mlx-vlm's decoding loop behind a server, since its own takes text alone: a program for the Python
of its environment.

Arguments: model, port and, with drafts, the head and K.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any


def main() -> None:
    import mlx.core as mx
    from mlx_vlm.generate.ar import generate_step
    from mlx_vlm.speculative.drafters import load_drafter
    from mlx_vlm.utils import load_model

    path, port, *drafts = sys.argv[1:]
    model, drafting, accepted = load_model(Path(path)), dict[str, Any](), list[int]()
    if drafts:
        head, kind = load_drafter(drafts[0])
        head.prefer_requested_block_size = True  # else K is raised only where the drafts are right
        drafting = {"draft_model": head, "draft_kind": kind, "draft_block_size": int(drafts[1]) + 1}

    def decode(prompt: list[int], most: int, stop_ids: list[int]) -> list[int]:
        tokens: list[int] = []
        if drafting:
            head.accept_lens = []
        for token, _ in generate_step(
            mx.array([prompt]), model, None, None, max_tokens=most, temperature=0.0, **drafting
        ):
            tokens.append(int(token))
            if tokens[-1] in stop_ids or len(tokens) == most:
                break
        if drafting:
            accepted.extend(map(int, head.accept_lens))
        return tokens

    def metrics() -> str:
        """Rounds and accepted drafts by position, as vLLM and llama.cpp name them."""
        lines = [f"mlx:spec_decode_num_drafts_total {len(accepted)}"]
        for k in range(int(drafts[1]) if drafts else 0):
            name = f'mlx:spec_decode_num_accepted_tokens_per_pos_total{{position="{k}"}}'
            lines.append(f"{name} {sum(n > k for n in accepted)}")
        return "\n".join(lines)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # /health and /metrics
            self.answer(metrics())

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            tokens = decode(request["prompt"], request["n_predict"], request["stop_ids"])
            self.answer(json.dumps({"tokens": tokens}))

        def answer(self, text: str) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

    HTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
