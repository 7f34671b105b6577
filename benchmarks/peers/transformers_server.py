"""`transformers.generate` behind HTTP: one static batch at a time, run to its longest answer.

POST /generate {"prompts": [[id, ...], ...], "lengths": [n, ...]} -> {"answers": [[[id, ...], [logprob, ...]], ...]}

The whole batch is one request: a server that has to collect its batch from many would only be slower.
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig


class StaticBatch:
    """Samples a batch at temperature 1, each row exactly `lengths[i]` tokens."""

    def __init__(self, folder: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._model.generation_config = GenerationConfig(pad_token_id=0)  # the folder's own has end tokens

    @torch.inference_mode()
    def answer(self, prompts: list[list[int]], lengths: list[int]) -> list[tuple[list[int], list[float]]]:
        """Prompts have one length; nothing is padded on the left."""
        ids_BT = torch.tensor(prompts)
        out = self._model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=max(lengths),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            # With eager attention the fastest that was tried: at 256 rows by a sixth before the default.
            cache_implementation="static",
            disable_compile=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        sampled_BN = out.sequences[:, ids_BT.shape[1] :]
        # Step by step: all logits stacked would be hundreds of megabytes.
        logprobs_BN = torch.stack(
            [
                torch.log_softmax(logits_BV, -1).gather(-1, sampled_BN[:, step, None])[:, 0]
                for step, logits_BV in enumerate(out.logits)
            ],
            dim=1,
        )
        rows = zip(sampled_BN.tolist(), logprobs_BN.tolist(), lengths, strict=True)
        return [(ids[:length], logprobs[:length]) for ids, logprobs, length in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    batch = StaticBatch(options.model)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send({})

        def do_POST(self) -> None:
            request: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self._send({"answers": batch.answer(request["prompts"], request["lengths"])})

        def _send(self, document: dict[str, Any]) -> None:
            body = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    HTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
