"""llama.cpp, asked in a process of its own: ``python -m tests.llama_cpp FILE.gguf`` with a question on stdin.

The question is JSON: ``prompts``, lists of token ids, and ``texts``. The answer is, for each prompt, the logarithm of
the probability of each token that may follow, and the ids of each text. It takes the package xllamacpp.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from typing import Any


def asked(path: object, prompts: list[list[int]], texts: list[str], vocabulary: int) -> dict[str, Any]:
    """What llama.cpp answers. It ends its process where a file is not as it expects: AssertionError, with its words."""
    question = json.dumps({"prompts": prompts, "texts": texts, "vocabulary": vocabulary})
    command = [sys.executable, "-m", "tests.llama_cpp", str(path)]
    done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _server(path: str) -> Any:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx, settings.n_parallel, settings.verbosity, settings.cpuparams.n_threads = 512, 1, -1, 1
    settings.warmup = settings.fit_params = False
    # All in float32, as in PyTorch.
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(settings)


def _next(server: Any, prompt: list[int], vocabulary: int, letter: int) -> list[float | None]:
    """The letter is forced to follow, since nothing is told of a token that is half of a character."""
    options = {"temperature": 0.0, "n_predict": 1, "cache_prompt": False, "logit_bias": [[letter, 1000.0]]}
    found = server.handle_completions({"prompt": prompt, "n_probs": vocabulary, "logprobs": vocabulary, **options})
    told: list[float | None] = [None] * vocabulary
    for token in found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        told[token["id"]] = token["logprob"]
    return told


def _cut(server: Any, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        tokens: list[int] = json.load(answer)["tokens"]
    return tokens


def main() -> None:
    question = json.load(sys.stdin)
    server = _server(sys.argv[1])
    letter = _cut(server, "x")[-1]
    following = [_next(server, prompt, question["vocabulary"], letter) for prompt in question["prompts"]]
    print(json.dumps({"following": following, "tokens": [_cut(server, text) for text in question["texts"]]}))


if __name__ == "__main__":
    main()
