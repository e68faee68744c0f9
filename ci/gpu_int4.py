"""4-bit routed experts beside a plain shared expert, paired, through `verify` on a GPU.

    python ci/gpu_int4.py ENGINE OUT [--kinds gptq awq auto_round packed] [--sizes tiny real] [--layers 4]

In an environment with a CUDA build of the engine, transformers, pytest and fse_patch; run it from the
repository's root. First the kernels' own tests on this GPU; then checkpoints of each kind: tiny ones, and
ones of Qwen3-Next's widths with 512 experts (0.9 GB a layer). Each is served by stock and paired up to 16
tokens; answers are compared, and a control (the shared expert's weight at 0) must be seen. Each job has a
line with passed or FAILED, and one with what was read and how far the proof at start found both from float32.
Exit status 1 if one fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_groups import GDN, GRAPHS, MORE_CACHE, SGLANG, SGLANG_GRAPHS, VLLM, Group, paired
from gpu_verify import passes

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("gptq", "awq", "auto_round", "packed")
SIZES = ("tiny", "real")
# More than a group of 128: of no more than that, both engines bring scales for Marlin in a wrong order.
WIDTH = 256
KERNEL_TESTS = ("tests/kernels/test_int4_readers.py", "tests/kernels/test_experts_once_int4.py")
ARGUMENTS: dict[str, Mapping[str, Any]] = {
    "vllm": {**VLLM, **GDN, **GRAPHS, **MORE_CACHE},
    "sglang": {**SGLANG, **SGLANG_GRAPHS},
}


def group(engine: str, kinds: list[str], size: str) -> Group:
    """Return the jobs of one size."""
    # SGLang allocates GPTQ's scales in float16, and its Marlin ends where states are in another dtype.
    half = engine == "sglang" and set(kinds) <= {"gptq", "auto_round"}
    jobs = {f"{size}_{kind}": (f"{size}_{kind}", ARGUMENTS[engine]) for kind in kinds}
    return paired(jobs, "float16" if half else "bfloat16")


def groups(engine: str, kinds: list[str], size: str) -> dict[str, Group]:
    """Return the groups of one size, by name: kinds that run in one dtype together."""
    ours = {"": kinds}
    if engine == "sglang":
        gptq = [kind for kind in kinds if kind in ("gptq", "auto_round")]
        ours = {"_float16": gptq, "": [kind for kind in kinds if kind not in gptq]}
    return {f"int4_{size}{name}": group(engine, some, size) for name, some in ours.items() if some}


def checkpoint(size: str, kind: str, folder: Path, layers: int) -> Path:
    """Write a checkpoint unless it is there."""
    from checkpoints import gpu, int4
    from checkpoints.make import make

    if (folder / "config.json").exists():
        return folder
    if size == "tiny":
        gpu.enlarge(WIDTH)
        return make(f"int4_{kind}", folder, "bfloat16")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from checkpoint import write

    write(folder, "qwen3_next", layers, packer=int4.Packed(int4.KINDS[kind]))
    return folder


def told(report: Mapping[str, Any]) -> str:
    """Say what the pass read, and what its proof found."""
    (role, *_) = [role for role in report.get("roles", ()) if role["role"] == "main"] or [{}]
    now = role.get("paired")
    if now is None:
        return "nothing was paired"
    proof = now["proof"]
    why = f"{now['reason']}: {now['detail']}" if now["reason"] else f"up to {now['threshold']} tokens"
    return (
        f"{'; '.join(now['formats'])}; {why}; proof {proof['state']}: ours {proof['ours']:.2g} off float32, "
        f"stock {proof['stock']:.2g}, {proof['between']:.2g} apart"
    )


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("engine", choices=ARGUMENTS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--layers", type=int, default=4, help="of the real ones, a multiple of 4")
    parser.add_argument("--skip-kernels", action="store_true", help="leave out the kernels' own tests")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = False
    if not args.skip_kernels:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *KERNEL_TESTS]
        ended = subprocess.run(command, cwd=ROOT, env=dict(os.environ), check=False).returncode
        print(f"kernels: {'passed' if ended == 0 else 'FAILED'}", flush=True)
        failed = ended != 0
    for size in args.sizes:
        names = {f"{size}_{kind}": kind for kind in args.kinds}
        folders = {name: checkpoint(size, kind, args.out / name, args.layers) for name, kind in names.items()}
        for name, jobs in groups(args.engine, args.kinds, size).items():
            failed |= not passes(args.engine, name, jobs, folders, args.out, told)
    print(f"{args.engine}: {'FAILED' if failed else 'passed'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
