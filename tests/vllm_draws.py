"""Samples of one vLLM engine, as JSON: python tests/vllm_draws.py MODEL OVERRIDE ... (test_vllm.py)."""

import json
import sys
from dataclasses import replace
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import models  # noqa: E402
from launch import settings  # noqa: E402
from launch.policies import read_config  # noqa: E402
from sampling import backends, samples  # noqa: E402


def main() -> None:
    folder, overrides = Path(sys.argv[1]), sys.argv[2:]
    config = settings.typed(read_config(folder, ["template=chat", *overrides]))
    tokenizer = models.load_tokenizer(folder)
    records = samples.records_to_sample(config)
    backend = backends.VLLMBackend(config, folder, tokenizer, ())
    own = samples.decoding_of(config)
    requests = [one for draw in (0, 1) for one in backend.requests(records, [1.0] * len(records), draw)]
    greedy = backend.requests(records, [0.0] * len(records), 0)
    stops = replace(own, stop=(" the", "\n"))

    def drawn(by, requests, how):
        found = {
            place: (own.text, own.finish_reason) for part in by.complete(requests, how) for place, own in part.items()
        }
        return [found[place] for place in range(len(requests))]

    found = {
        "together": drawn(backend, requests, own),
        "alone": drawn(backend, requests[::-1][:3], own),
        "other seed": drawn(backend, requests, replace(own, seed=2)),
        "stopped": drawn(backend, greedy, stops),
    }
    model = backends.load_policy(config, folder, None, len(tokenizer))
    found["stopped by transformers"] = drawn(backends.TransformersBackend(config, model, tokenizer), greedy, stops)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
