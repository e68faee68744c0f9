"""Files of vLLM's own that hold a model as it is in memory: a fused run writes none, and reads none fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .engine import IN_PROCESS, VOCAB, Checkpoints
from .processes import in_process

PROMPTS = [[3 + (step * place) % (VOCAB - 3) for place in range(32)] for step in (5, 7)]


def probe(folder: str, load_format: str, save: str, around: str) -> dict[str, Any]:
    """Start an engine on a folder; what it decided and answers, and what saving says.

    Args:
        save: folder for the files; "" for none.
        around: saves past our patch, as if it were not there; "" does not.
    """
    from vllm import LLM
    from vllm.model_executor.model_loader import ShardedStateLoader

    from fse_patch import runtime
    from fse_patch.lab.vllm.verify_arm import DEFAULTS, score

    def unpatched(worker: Any) -> None:
        ShardedStateLoader.save_model(worker.get_model(), save)

    said = ""
    try:
        llm = LLM(model=folder, dtype="float32", load_format=load_format, **DEFAULTS)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if save:
        Path(save).mkdir()
        try:
            llm.collective_rpc(unpatched if around else "save_sharded_state", args=() if around else (save,))
        except Exception as error:
            said = str(error)
        (Path(save) / "config.json").write_bytes((Path(folder) / "config.json").read_bytes())
    return {
        "reasons": [decision["reason"] for decision in runtime.decisions()],
        "answers": score(llm, PROMPTS, 1, batched=True)["logprobs"],
        "said": said,
    }


def run(patched: str, folder: Path, load_format: str = "auto", save: str = "", around: str = "") -> Any:
    arguments = (str(folder), load_format, save, around)
    return in_process(f"{__name__}:probe", *arguments, FSE_PATCH=patched, HF_HUB_OFFLINE="1", **IN_PROCESS)


@pytest.mark.long
def test_sharded_state(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoints.path("qwen2_moe")
    stock_files, fused_files = tmp_path / "stock", tmp_path / "fused"
    fused = run("vllm", folder, save=str(tmp_path / "none"))
    assert fused["reasons"] == ["ok"]
    assert "start with FSE_PATCH=0 to save the model" in fused["said"]
    stock = run("0", folder, save=str(stock_files))
    assert (stock["reasons"], stock["said"]) == ([], "")
    # A fused run reads them as stock does.
    read = run("vllm", stock_files, "sharded_state")
    assert read["reasons"] == ["load.format"]
    assert read["answers"] == stock["answers"] != fused["answers"]
    # The control: files of a fused run, had it written any, end a stock run; they are not read in silence.
    assert run("vllm", folder, save=str(fused_files), around="yes")["said"] == ""
    assert "error" in run("0", fused_files, "sharded_state")
