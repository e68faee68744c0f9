"""Give a running SGLang the weights of another checkpoint, as a trainer does after each step.

    python examples/update_weights_sglang.py CHECKPOINT NEXT ['{"dtype": "bfloat16"}']

SGLang's own update writes the shared expert of NEXT into its slot too. `update_weights_from_tensor` does the
same with tensors in memory.
"""

import json
import sys
import time

import fse_patch


def main(checkpoint: str, following: str, arguments: str = "{}") -> int:
    """Answer, update, answer again; exit status 1 if nothing has changed."""
    fse_patch.apply("sglang")

    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(model_path=checkpoint, **json.loads(arguments))

    def score() -> float:
        params = {"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True}
        answer = engine.generate(input_ids=[5, 6, 7, 8], sampling_params=params, return_logprob=True)
        return answer["meta_info"]["output_token_logprobs"][0][0]

    try:
        before = score()
        # An update empties the cache, and for that SGLang must have wound up the last answer.
        while not engine.flush_cache().success:
            time.sleep(0.05)
        done, message = engine.update_weights_from_disk(following)[:2]
        if not done:
            print(message, file=sys.stderr)
            return 1
        after = score()
    finally:
        engine.shutdown()
    print(f"log-probability of the first token: {before:.5f}, after the update {after:.5f}")
    return int(before == after)


# SGLang's children import this file again.
if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
