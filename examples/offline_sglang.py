"""Use SGLang from Python, fused.

    python examples/offline_sglang.py CHECKPOINT ['{"dtype": "bfloat16"}']

The second argument is a JSON object of arguments for SGLang's Engine class. The model runs in a child
process: its log line says what was fused, and why not.
"""

import json
import sys

import fse_patch


def main(checkpoint: str, arguments: str = "{}") -> int:
    """Answer a prompt of token ids."""
    # Before SGLang starts its children: they are patched through the environment.
    print(fse_patch.apply("sglang").summary())

    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(model_path=checkpoint, **json.loads(arguments))
    try:
        params = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
        answer = engine.generate(input_ids=[5, 6, 7, 8], sampling_params=params)
        print("answer:", list(answer["output_ids"]))
    finally:
        engine.shutdown()
    return 0


# SGLang's children import this file again.
if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
