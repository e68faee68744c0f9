"""Guards cover what is called: each name of an engine in the serving path has a fingerprint, or is public.

The names are found in the syntax tree (engine_names.py). Tables below say what that cannot tell.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from fse_patch import adapters
from fse_patch.adapters.patching import ledger
from fse_patch.adapters.patching.source import nodes, source_file, split
from fse_patch.adapters.vllm.formats import DENSE, FP8
from fse_patch.fusion_core.checkpoint.families import family_files
from fse_patch.patches import ENGINES, FOLDER

from .engine_names import EngineName, engine_names, is_covered
from .test_engine_ledgers import installed

BOOKS = {engine: ledger.load(engine) for engine in ENGINES}
LISTED = [(engine, release) for engine in ENGINES for release in BOOKS[engine].listed]
VLLM, SGLANG, RUNNER = "vllm.model_executor", "sglang.srt", "sglang.srt.model_executor"

# Names that others build on too: they stay, and say in their own words when they go.
PUBLIC = {
    "vllm:envs": "environment variables, by the names that users set",
    "vllm.platforms:current_platform": "every plugin of vLLM asks it what runs here",
    "vllm.config:set_current_vllm_config": "whoever builds or runs a layer outside of the engine needs it",
    "sglang.srt.environ:envs": "environment variables, by the names that users set",
    "sglang.srt.utils:is_cpu": "asks what runs here, as every file of SGLang does",
    "sglang.srt.utils:is_cuda": "as is_cpu",
    "sglang.srt.utils:is_hip": "as is_cpu",
    "sglang.srt.utils:cpu_has_amx_support": "as is_cpu",
    "sglang.srt.utils:get_device_name": "as is_cpu",
}
# Names that are imported from elsewhere than where they are defined, which is what a fingerprint is of.
DEFINED_IN = {
    "vllm.distributed.get_tensor_model_parallel_world_size": "vllm.distributed.parallel_state",
    "vllm.distributed.tensor_model_parallel_all_reduce": "vllm.distributed.communication_op",
    f"{SGLANG}.layers.moe.get_moe_a2a_backend": f"{SGLANG}.layers.moe.utils",
    f"{SGLANG}.layers.moe.get_moe_runner_backend": f"{SGLANG}.layers.moe.utils",
    f"{RUNNER}.runner.get_is_capture_mode": f"{RUNNER}.runner_utils.capture_mode",
    f"{RUNNER}.runner.model_capture_mode": f"{RUNNER}.runner_utils.capture_mode",
    f"{SGLANG}.models.glm4_moe.should_skip_post_experts_all_reduce": f"{SGLANG}.layers.moe.utils",
    f"{SGLANG}.models.glm4_moe.reduce_moe_output": f"{SGLANG}.layers.moe.utils",
    f"{SGLANG}.models.glm4_moe.tensor_model_parallel_all_reduce": f"{SGLANG}.distributed.communication_op",
}
# Private names of objects: whose they are, None where they are no engine's; and why the tree cannot tell.
PRIVATE = {
    "._allocate_buffers": (
        f"{VLLM}.layers.fused_moe.modular_kernel.FusedMoEKernelModularImpl._allocate_buffers",
        "the kernel comes out of a layer's quantisation method",
    ),
    "._defer_moe_finalize": (
        f"{VLLM}.layers.fused_moe.config.FusedMoEConfig._defer_moe_finalize",
        "the experts come out of a layer's quantisation method",
    ),
    "._weight_fp32": (f"{SGLANG}.models.glm4_moe.Glm4MoeGate._weight_fp32", "the gate comes out of a block"),
    "._forward_router_experts": (
        f"{SGLANG}.models.qwen2_moe.Qwen2MoeSparseMoeBlock._forward_router_experts",
        "self is the block in whose class the function is put",
    ),
    "._shared_experts": (
        f"{VLLM}.layers.fused_moe.runner.moe_runner.MoERunner",
        "the runner comes out of a block; its constructor sets it",
    ),
    "._forward_impl": (
        f"{VLLM}.layers.fused_moe.runner.moe_runner.MoERunner._forward_impl",
        "the runner comes out of a block",
    ),
    "._maybe_apply_routed_scale_to_output": (
        f"{VLLM}.layers.fused_moe.runner.moe_runner.MoERunner._maybe_apply_routed_scale_to_output",
        "the runner comes out of a block",
    ),
    "._layer": (f"{VLLM}.layers.fused_moe.runner.shared_experts.SharedExperts", "as _shared_experts"),
    "._forward_shared_experts": (
        f"{SGLANG}.models.qwen2_moe.Qwen2MoeSparseMoeBlock._forward_shared_experts",
        "the block comes out of a model",
    ),
    "._expert_map": (
        f"{VLLM}.layers.fused_moe.expert_map_manager.ExpertMapManager",
        "the layer factory makes the manager and hands it on",
    ),
    "._local_num_experts": (
        f"{VLLM}.layers.fused_moe.expert_map_manager.ExpertMapManager",
        "as _expert_map",
    ),
    "._apply_head": (
        f"{VLLM}.layers.logits_processor.LogitsProcessor._apply_head",
        "the logits processor comes out of a model",
    ),
    "._compute_lm_head": (
        f"{SGLANG}.layers.logits_processor.LogitsProcessor._compute_lm_head",
        "as _apply_head",
    ),
    "._replace": (None, "a method of every named tuple"),
}
# Names that only a run tells, as far as the tree tells them: what our own data can make of them.
AT_RUN_TIME = {
    f"{VLLM}.layers.quantization.utils.quant_utils.{{key}}": {
        f"{VLLM}.layers.quantization.utils.quant_utils.{key}"
        for weights, activations, _ in FP8.values()
        for key in (weights, *activations.values())
    },
    f"{SGLANG}.models.{{block}}.can_fuse_shared_expert": {
        f"{SGLANG}.models.{row.block}.can_fuse_shared_expert"
        for file in family_files()
        for row in file.native.get("sglang", ())
        if row.block
    },
}
# Modes on CUDA: releases in which the forward of SGLang's blocks is replaced.
MODES = next(p.versions[0] for p in BOOKS["sglang"].patches if p.id == "qwen2-moe-router-experts")
HEAD = next(p.versions[0] for p in BOOKS["vllm"].patches if p.id == "lm-head")
# Code that runs in some releases only, by file or name: elsewhere its names need not be there.
ONLY_IN = {
    "sglang/run.py": MODES,
    "sglang/experts.py": MODES,
    "vllm/head.py": HEAD,
    "._weight_fp32": MODES,
    # Classes of later releases are asked by a method.
    f"{SGLANG}.runtime_context.get_exec": SpecifierSet("<0.5.18"),
    # How the GLM block sums over processes, which is asked of its forward.
    f"{SGLANG}.models.glm4_moe.should_skip_post_experts_all_reduce": SpecifierSet("<0.5.21"),
    f"{SGLANG}.models.glm4_moe.tensor_model_parallel_all_reduce": SpecifierSet("<0.5.21"),
    f"{SGLANG}.models.glm4_moe.reduce_moe_output": SpecifierSet(">=0.5.21,<0.5.22"),
}


@cache
def serving_path() -> tuple[EngineName, ...]:
    """Every name of an engine in the serving path."""
    root = Path(adapters.__file__).parent
    files = [file for folder in (".", *ENGINES) for file in sorted((root / folder).glob("*.py"))]
    return tuple(
        name for file in files for name in engine_names(file.read_text(), str(file.relative_to(root)))
    )


def paths(name: EngineName) -> set[str]:
    """What a name can stand for; nothing if it is no engine's."""
    if name.path in PRIVATE:
        owned = PRIVATE[name.path][0]
        return set() if owned is None else {owned}
    home = DEFINED_IN.get(name.path)
    path = name.path if home is None else f"{home}.{name.path.rpartition('.')[2]}"
    return AT_RUN_TIME.get(path, {path})


def runs_in(book: ledger.Ledger, release: str, name: EngineName) -> bool:
    """Whether the code that uses a name runs in a release of ``book``."""
    known = [part for part in (name.path.partition(".")[0], name.file.partition("/")[0]) if part in ENGINES]
    # A file of both engines has neither in its name.
    if known and known[0] != book.engine:
        return False
    return all(release in ONLY_IN[key] for key in (name.file, name.path) if key in ONLY_IN)


def missing(book: ledger.Ledger, release: str, names: Iterable[EngineName]) -> list[str]:
    """Names that neither a guard of a release covers nor the table of public ones."""
    found: list[str] = []
    covered = cache(lambda file: guarded_in(book, release, file) | PUBLIC.keys())
    for name in names:
        guarded = covered(name.file)
        left = [path for path in sorted(paths(name)) if not is_covered(path, guarded)]
        if left and runs_in(book, release, name):
            found += [f"{name} ({path})" if path != name.path else str(name) for path in left]
    return found


def guarded_in(book: ledger.Ledger, release: str, file: str) -> frozenset[str]:
    """What guards cover where the code of a file runs: those of patches with a setting, in theirs alone."""
    module = f"fse_patch.adapters.{file.removesuffix('.py').replace('/', '.')}:"
    patches = [
        p for p in book.patches_for(Version(release)) if p.setting is None or p.factory.startswith(module)
    ]
    return frozenset(r for p in patches for r in (p.target, *(s.reference for s in (p.source, *p.relies_on))))


@pytest.mark.parametrize(("engine", "release"), LISTED)
def test_every_name_is_guarded_or_public(engine: str, release: str) -> None:
    assert missing(BOOKS[engine], release, serving_path()) == [], "add them to patches/, or to a table here"


@pytest.mark.parametrize("release", BOOKS["vllm"].listed)
def test_kernels_that_are_known_by_the_names_of_their_classes(release: str) -> None:
    patches = BOOKS["vllm"].patches_for(Version(release))
    classes = {split(source.reference)[1] for patch in patches for source in patch.relies_on}
    assert DENSE.keys() <= classes


def test_tables_hold_what_is_used_and_nothing_else() -> None:
    names = serving_path()
    used = {name.path for name in names} | {path for name in names for path in paths(name)}
    assert [r for r in PUBLIC if not any(is_covered(path, [r]) for path in used)] == []
    keys = {*DEFINED_IN, *PRIVATE, *AT_RUN_TIME, *ONLY_IN}
    assert keys - used - {name.file for name in names} == set()
    assert all(reason for reason in (*PUBLIC.values(), *(why for _, why in PRIVATE.values())))
    assert all(AT_RUN_TIME.values())
    for engine in ENGINES:
        named = {s.reference for p in BOOKS[engine].patches for s in (p.source, *p.relies_on)}
        assert named & PUBLIC.keys() == set()


@pytest.mark.skipif(not installed(), reason="no engine here and none in ENGINE_SITES")
@pytest.mark.parametrize(
    ("engine", "release", "site"), [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in installed()]
)
def test_imported_names_lead_to_where_they_are_defined(
    engine: str, release: str, site: tuple[str, ...]
) -> None:
    here = {n.path for n in serving_path() if runs_in(BOOKS[engine], Version(release).public, n)}
    for path in here & DEFINED_IN.keys():
        module, _, name = path.rpartition(".")
        assert DEFINED_IN[path] in homes(module, name, site), path


def homes(module: str, name: str, site: tuple[str, ...]) -> set[str]:
    """Modules in which ``name`` is bound, on the way from an import of it to its definition."""
    file = source_file(module, site)
    if file is None:
        return set()
    bound = nodes(f"{module}:{name}", site)
    stars = [
        node
        for node in ast.parse(file.read_bytes()).body
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
    ]
    found = {module} if bound else set()
    package = module.split(".")[: None if file.name == "__init__.py" else -1]
    for node in [n for n in bound if isinstance(n, ast.ImportFrom)] or ([] if bound else stars):
        base = package[: len(package) - node.level + 1] if node.level else []
        found |= homes(".".join([*base, *filter(None, [node.module])]), name, site)
    return found


# Controls: a definition that the ledger leaves out, and a call that nobody wrote down.


def without(engine: str, tmp_path: Path, row: str, instead: str = "") -> ledger.Ledger:
    """The ledger of ``engine`` from a copy in which lines with ``row`` are left out, or read otherwise."""
    data = Path(shutil.copytree(FOLDER, tmp_path / "patches"))
    path = data / f"{engine}.yaml"
    lines = path.read_text().splitlines()
    assert any(row in line for line in lines)
    kept = [line.replace(row, instead) for line in lines if instead or row not in line]
    path.write_text("\n".join(kept))
    return ledger.load(engine, data)


@pytest.mark.parametrize(
    ("engine", "row", "reported"),
    [
        ("vllm", "kernels.linear:init_fp8_linear_kernel", "vllm/formats.py"),
        ("vllm", "oracle.fp8:select_fp8_moe_backend", "vllm/formats.py"),
        ("vllm", "quant_utils:kFp8Dynamic128Sym", "quant_utils.{key}"),
        ("vllm", "fused_moe.layer:make_parallel_config", "vllm/plan.py"),
        ("vllm", "fused_moe.config:FusedMoEConfig", "vllm/plan.py"),
        ("vllm", "deep_gemm_warmup:_deepgemm_fp8_gemm_nt_warmup", "vllm/fp8.py"),
        ("vllm", "modular_kernel:FusedMoEKernelModularImpl", "._allocate_buffers"),
        ("vllm", "moe_runner:MoERunner._forward_impl", "vllm/run.py"),
        ("vllm", "_aiter_ops:rocm_aiter_ops", "vllm/native.py"),
        ("vllm", "communication_op:tensor_model_parallel_all_reduce", "vllm/prove.py"),
        ("sglang", "fused_moe:outplace_fused_experts", "sglang/experts.py"),
        ("sglang", "utils:get_model_architecture", "sglang/build.py"),
        ("sglang", "utils:should_skip_post_experts_all_reduce", "sglang/run.py"),
        ("sglang", "topk:_use_aiter", "sglang/check.py"),
        ("sglang", "runtime_context:get_exec", "sglang/native.py"),
        ("sglang", "capture_mode:get_is_capture_mode", "sglang/experts.py"),
        ("sglang", "glm4_moe:Glm4MoeGate", "._weight_fp32"),
    ],
)
def test_control_a_definition_is_left_out(engine: str, row: str, reported: str, tmp_path: Path) -> None:
    book = without(engine, tmp_path, row)
    reports = [missing(book, release, serving_path()) for release in book.tested]
    assert any(reported in line for report in reports for line in report)
    attribute = row.rpartition(":")[2].rpartition(".")[2]
    assert {line for report in reports for line in report if attribute not in line} == set()


def test_control_a_definition_is_left_out_for_one_release(tmp_path: Path) -> None:
    book = without("sglang", tmp_path, 'versions: ">=0.5.21,<0.5.22"', 'versions: ">=0.5.22,<0.5.23"')
    reports = {release: missing(book, release, serving_path()) for release in book.listed}
    assert [release for release, report in reports.items() if report] == ["0.5.21"]


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("def f():\n    from vllm.made import called\n    called()", "vllm.made.called"),
        ("from vllm.made import unused", "vllm.made.unused"),
        ("from vllm import made as m\nm.inner.called()", "vllm.made.inner.called"),
        ("import vllm.made", "vllm.made"),
        ("import vllm.made\nvllm.made.called()", "vllm.made.called"),
        ("import vllm.made as m\nm.called = 1", "vllm.made.called"),
        ("import vllm.made as m\nother = m\nother.called()", "vllm.made.called"),
        ("from vllm import made\nNAME = 'set'\nsetattr(made, NAME, 1)", "vllm.made.set"),
        ("from vllm import made\nvars(made)['asked']", "vllm.made.asked"),
        ("from vllm import made\nfor name in names: getattr(made, name)", "vllm.made.{name}"),
        ("import importlib\nimportlib.import_module('vllm.made').called()", "vllm.made.called"),
        ("import importlib\nimportlib.import_module(f'vllm.{part}')", "vllm.{part}"),
        ("import importlib\nimportlib.import_module(name)", "{name}"),
        ("from vllm.made import Base\nclass C(Base):\n    def _run(self): ...", "vllm.made.Base._run"),
        ("def f(kernel):\n    kernel._allocate()", "._allocate"),
        ("def f(kernel):\n    getattr(kernel, '_allocate')", "._allocate"),
        ("def put(self):\n    self._inner()", "._inner"),
    ],
)
def test_control_a_call_that_nobody_wrote_down(source: str, path: str) -> None:
    names = engine_names(source, "vllm/made.py")
    assert path in [name.path for name in names]
    reported = missing(BOOKS["vllm"], "0.28.0", names)
    assert any(line.startswith("vllm/made.py:") and line.endswith(f": {path}") for line in reported)


@pytest.mark.parametrize(
    "source",
    [
        "from ..role import _own\n_own()",
        "class C:\n    _a: int = 1\n    def _f(self):\n        self._x = self._a\n        self._f(self._x)",
        "def f(name, model):\n    setattr(model, '_fse_patch_mark', f'{name}_weight')",
        "import torch\ntorch.nn.Module",
        "import importlib\nimportlib.import_module('json').loads",
        "from vllm import envs\ndef f(envs):\n    return envs.VLLM_X",
    ],
)
def test_names_of_others_are_left_alone(source: str) -> None:
    assert missing(BOOKS["vllm"], "0.28.0", engine_names(source, "vllm/made.py")) == []
