"""Use vLLM from Python, fused, and look at what was fused.

    python examples/offline_vllm.py CHECKPOINT ['{"dtype": "bfloat16"}']

The second argument is a JSON object of arguments for vLLM's LLM class.
"""

import json
import os
import sys

import fse_patch

# So that this process can answer for the model: vLLM's engine runs in another one otherwise.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def main(checkpoint: str, arguments: str = "{}") -> int:
    """Answer a prompt of token ids; exit status 1 if nothing was fused."""
    print(fse_patch.apply("vllm").summary())

    from vllm import LLM, SamplingParams

    llm = LLM(model=checkpoint, **json.loads(arguments))
    prompt = {"prompt_token_ids": [5, 6, 7, 8]}
    (answer,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    print("answer:", list(answer.outputs[0].token_ids))
    roles = fse_patch.status()["vllm"]["roles"]
    for role in roles:
        print(
            f"{role['role']} model: layers {role['fused_layers']} are fused; proof: {role['canary']['state']}"
        )
    return 0 if roles else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
