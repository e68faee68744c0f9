"""Files of vLLM's own that hold a model as it is in memory: a fused run writes none, and reads none fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ..paired import ALL, environment
from .engine import IN_PROCESS, Checkpoints
from .processes import in_process


def probe(folder: str, load_format: str, save: str, around: str) -> dict[str, Any]:
    """Start an engine on a folder; what it decided, what saving says, and how its start ended.

    Args:
        save: folder for the files; "" for none.
        around: saves past our patch, as if it were not there; "" does not.
    """
    from vllm import LLM
    from vllm.model_executor.model_loader import ShardedStateLoader

    from fse_patch import runtime
    from fse_patch.lab.vllm.verify_arm import DEFAULTS

    def unpatched(worker: Any) -> None:
        ShardedStateLoader.save_model(worker.get_model(), save)

    found = {"error": "", "said": ""}
    try:
        llm = LLM(model=folder, dtype="float32", load_format=load_format, **DEFAULTS)
        if save:
            Path(save).mkdir()
            (Path(save) / "config.json").write_bytes((Path(folder) / "config.json").read_bytes())
            try:
                llm.collective_rpc(
                    unpatched if around else "save_sharded_state", args=() if around else (save,)
                )
            except Exception as error:
                found["said"] = str(error)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return {**found, "reasons": [decision["reason"] for decision in runtime.decisions()]}


def run(
    patched: str, folder: Path, load_format: str = "auto", save: str = "", around: str = "", **env: str
) -> Any:
    env |= {"FSE_PATCH": patched, "HF_HUB_OFFLINE": "1", **IN_PROCESS}
    return in_process(f"{__name__}:probe", str(folder), load_format, save, around, **env)


def held(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.mark.long
def test_sharded_state(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoints.path("qwen2_moe")
    stock_files, fused_files = tmp_path / "stock", tmp_path / "fused"
    fused = run("vllm", folder, save=str(tmp_path / "none"))
    assert (fused["reasons"], fused["error"]) == (["ok"], "")
    assert "start with FSE_PATCH=0 to save the model" in fused["said"]
    assert not list((tmp_path / "none").glob("*.safetensors"))
    # The control: stock writes them.
    stock = run("0", folder, save=str(stock_files))
    assert (stock["reasons"], stock["said"], stock["error"]) == ([], "", "")
    assert list(stock_files.glob("*.safetensors"))
    # Paired layers are stock's in memory, and so are their files.
    paired = run("vllm", folder, save=str(tmp_path / "paired"), **environment(ALL))
    assert (paired["reasons"], paired["said"], paired["error"]) == (["ok"], "", "")
    assert held(tmp_path / "paired") == held(stock_files)
    # A fused run builds no slots for them, and ends or serves as stock does.
    read, plain = (run(patched, stock_files, "sharded_state") for patched in ("vllm", "0"))
    assert read["reasons"] == ["load.format"]
    assert read["error"] == plain["error"]
    # Files of a fused run, had it written any, are not read in silence.
    assert run("vllm", folder, save=str(fused_files), around="yes")["said"] == ""
    assert list(fused_files.glob("*.safetensors"))
    ended = run("0", fused_files, "sharded_state")["error"]
    assert ended
    assert ended != plain["error"]
