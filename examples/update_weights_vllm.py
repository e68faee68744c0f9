"""Give a running vLLM the weights of another checkpoint, as a trainer does after each step.

    python examples/update_weights_vllm.py CHECKPOINT NEXT ['{"dtype": "bfloat16"}']

vLLM's own reload writes the shared expert of NEXT into its slot too. An update is whole experts, or all of
them.
"""

import json
import os
import sys

import fse_patch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def main(checkpoint: str, following: str, arguments: str = "{}") -> int:
    """Answer, update, answer again; exit status 1 if nothing has changed."""
    fse_patch.apply("vllm")

    from vllm import LLM, SamplingParams

    llm = LLM(model=checkpoint, **json.loads(arguments))

    def score() -> float:
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=1, ignore_eos=True)
        (answer,) = llm.generate([{"prompt_token_ids": [5, 6, 7, 8]}], params, use_tqdm=False)
        return max(entry.logprob for entry in answer.outputs[0].logprobs[0].values())

    before = score()
    llm.collective_rpc("reload_weights", kwargs={"weights_path": following})
    after = score()
    print(f"log-probability of the first token: {before:.5f}, after the update {after:.5f}")
    return int(before == after)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
