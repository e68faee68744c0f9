"""The vLLM adapter on stand-ins for vLLM: what it refuses, and what construction leaves behind."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fse_patch import runtime
from fse_patch.adapters.vllm import construct, decide, fusion
from fse_patch.errors import AuditError, FsePatchError
from fse_patch.fusion_core.families import family_of
from fse_patch.fusion_core.naming import TensorNaming

from .checkpoints import config_of, model_tensors, write_checkpoint

CLASS = "vllm.model_executor.models.qwen2_moe:Qwen2MoeForCausalLM"
E, K, H, I = 4, 2, 64, 32  # noqa: E741


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A vLLM that runs on a CPU."""
    stand_in, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    envs = SimpleNamespace(VLLM_MOE_ROUTING_SIMULATION_STRATEGY="")
    platform = SimpleNamespace(is_cpu=lambda: True)
    vars(stand_in)["envs"], vars(platforms)["current_platform"] = envs, platform
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    for name in ("FSE_PATCH_POLICY", "FSE_PATCH_ALLOW_UNMEASURED"):
        monkeypatch.delenv(name, raising=False)
    runtime.clear()
    return SimpleNamespace(envs=envs, platform=platform)


def model_config(folder: Path, config: dict[str, Any], **changes: Any) -> SimpleNamespace:
    text = SimpleNamespace(**{**config.get("text_config", config), **changes})
    return SimpleNamespace(model=str(folder), revision=None, hf_text_config=text, quantization=None)


def engine(folder: Path, family: str = "qwen2_moe", **text: Any) -> SimpleNamespace:
    """The vllm_config of a checkpoint; ``text`` overrides its values at run time."""
    model = model_config(folder, config_of(family, num_nextn_predict_layers=1), **text)
    return SimpleNamespace(
        model_config=model,
        load_config=SimpleNamespace(load_format="auto", download_dir=None),
        parallel_config=SimpleNamespace(
            enable_expert_parallel=False,
            enable_eplb=False,
            data_parallel_size=1,
            pipeline_parallel_size=1,
        ),
        lora_config=None,
        quant_config=None,
        speculative_config=None,
        additional_config={},
    )


def checkpoint(tmp_path: Path, family: str = "qwen2_moe", layers: list[int] | None = None) -> Path:
    config = config_of(family, num_nextn_predict_layers=1)
    return write_checkpoint(tmp_path / family, config, model_tensors(family, layers))


def entry(name: str = CLASS) -> type:
    """A class under the name of an entry class."""
    module, _, qualname = name.partition(":")
    return type(qualname, (torch.nn.Module,), {"__module__": module, "__qualname__": qualname})


def outcome(cls: type, config: SimpleNamespace) -> str:
    """The reason code of the decision that was recorded."""
    made = decide.decide_for(cls, config)
    (recorded,) = runtime.decisions()
    assert (made is not None) == recorded["fuse"]
    return str(recorded["reason"])


def test_a_plain_checkpoint_fuses(tmp_path: Path) -> None:
    assert outcome(entry(), engine(checkpoint(tmp_path))) == "ok"


def put(path: str, value: Any) -> Any:
    """A change of the vllm_config, by dotted path."""

    def change(config: SimpleNamespace) -> None:
        *owners, name = path.split(".")
        for owner in owners:
            config = getattr(config, owner)
        setattr(config, name, value)

    return pytest.param(change, id=path)


REFUSED = [
    ("parallel.ep", put("parallel_config.enable_expert_parallel", True)),
    ("parallel.eplb", put("parallel_config.enable_eplb", True)),
    ("parallel.dp", put("parallel_config.data_parallel_size", 2)),
    ("lora", put("lora_config", object())),
    ("routing.capture", put("model_config.enable_return_routed_experts", True)),
    ("load.format", put("load_config.load_format", "sharded_state")),
    ("quant.online", put("quant_config", object())),
    ("quant.online", put("model_config.quantization", "fp8")),
    ("config.differs", put("model_config.hf_text_config.num_experts_per_tok", 1)),
    ("config.differs", put("model_config.hf_text_config.norm_topk_prob", True)),
    ("config.differs", put("model_config.hf_text_config.num_hidden_layers", 1)),
]


@pytest.mark.parametrize(
    ("reason", "change"), [pytest.param(r, p.values[0], id=f"{r}-{p.id}") for r, p in REFUSED]
)
def test_what_is_not_proven_is_refused(tmp_path: Path, reason: str, change: Any) -> None:
    config = engine(checkpoint(tmp_path))
    change(config)
    assert outcome(entry(), config) == reason


def test_the_engine_s_environment_is_looked_at(tmp_path: Path, vllm: SimpleNamespace) -> None:
    vllm.envs.VLLM_MOE_ROUTING_SIMULATION_STRATEGY = "uniform"
    assert outcome(entry(), engine(checkpoint(tmp_path))) == "routing.simulator"


def test_other_devices_need_a_measurement(
    tmp_path: Path, vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm.platform.is_cpu = lambda: False
    config = engine(checkpoint(tmp_path))
    assert outcome(entry(), config) == "slower.unmeasured"
    runtime.clear()
    monkeypatch.setenv("FSE_PATCH_ALLOW_UNMEASURED", "1")
    assert outcome(entry(), config) == "ok"


def test_online_quantisation_is_refused_whatever_the_rule_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = "{id: mine, when: {quant_methods: [none]}, fuse: true, why: test, source: 'none: test'}"
    (tmp_path / "policy.yaml").write_text(f"version: 1\nrules:\n  - {rule}\n")
    monkeypatch.setenv("FSE_PATCH_POLICY", str(tmp_path / "policy.yaml"))
    config = engine(checkpoint(tmp_path))
    assert outcome(entry(), config) == "ok"
    assert runtime.decisions()[0]["rule"] == "mine"
    runtime.clear()
    config.quant_config = object()
    assert outcome(entry(), config) == "quant.online"


DRAFT = "vllm.model_executor.models.glm4_moe_mtp:Glm4MoeMTP"


def speculating(tmp_path: Path) -> SimpleNamespace:
    """GLM-4 with layer 3 as its draft."""
    config = engine(checkpoint(tmp_path, "glm4_moe", [1, 2, 3]), "glm4_moe")
    draft = model_config(Path(config.model_config.model), config_of("glm4_moe"))
    config.speculative_config = SimpleNamespace(draft_model_config=draft, draft_load_config=None)
    return config


def test_a_draft_is_decided_by_its_own_checkpoint(tmp_path: Path) -> None:
    config = speculating(tmp_path)
    assert outcome(entry(DRAFT), config) == "ok"
    runtime.clear()
    config.speculative_config.draft_model_config.model = str(checkpoint(tmp_path, "qwen2_moe"))
    assert outcome(entry(DRAFT), config) == "family.unknown"


@pytest.mark.parametrize(
    ("reason", "path", "value"),
    [
        ("load.format", "draft_load_config", SimpleNamespace(load_format="sharded_state", download_dir=None)),
        ("quant.online", "draft_model_config.quantization", "fp8"),
    ],
)
def test_a_draft_may_come_in_another_way(tmp_path: Path, reason: str, path: str, value: Any) -> None:
    config = speculating(tmp_path)
    put(path, value).values[0](config.speculative_config)
    assert outcome(entry(DRAFT), config) == reason


def test_a_draft_after_the_main_layers_needs_their_number(tmp_path: Path) -> None:
    config = speculating(tmp_path)
    config.model_config.hf_text_config.num_hidden_layers = 2
    assert outcome(entry(DRAFT), config) == "config.differs"


class Experts(torch.nn.Module):
    """Stands in for RoutedExperts: the fused tensors and their loader."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        shapes = {"w13": (2 * intermediate_size, hidden_size), "w2": (hidden_size, intermediate_size)}
        for name, shape in shapes.items():
            parameter = torch.nn.Parameter(torch.zeros(num_experts, *shape), requires_grad=False)
            vars(parameter)["weight_loader"] = self.weight_loader
            self.register_parameter(f"{name}_weight", parameter)

    @staticmethod
    def weight_loader(
        param: Any, loaded: torch.Tensor, name: str, shard_id: str, expert_id: int, return_success: bool
    ) -> bool:
        rows = param.data[expert_id]
        half = rows.shape[0] // 2
        place = {"w1": rows[:half], "w3": rows[half:], "w2": rows}[shard_id]
        place.copy_(loaded)
        return True


class SharedMlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expert_gate = torch.nn.Linear(H, 1)
        self.weight = torch.nn.Parameter(torch.zeros(H, H))


def stock_factory(**kwargs: Any) -> torch.nn.Module:
    runner = torch.nn.Module()
    runner.routed_experts = Experts(kwargs["num_experts"], kwargs["hidden_size"], kwargs["intermediate_size"])
    runner.kwargs = kwargs
    return runner


class Block(torch.nn.Module):
    factory = staticmethod(construct.layer_factory(stock_factory))

    def __init__(self, prefix: str, **changes: Any) -> None:
        super().__init__()
        self.shared_expert = SharedMlp()
        self.experts = self.factory(
            **{
                "shared_experts": self.shared_expert,
                "num_experts": E,
                "top_k": K,
                "hidden_size": H,
                "intermediate_size": I,
                "renormalize": False,
                "prefix": f"{prefix}.experts",
                **changes,
            }
        )


Block.__init__ = construct.block_init(Block.__init__)  # type: ignore[method-assign]


def model_class(name: str = CLASS, layers: int = 2, **changes: Any) -> type:
    """An entry class that builds ``layers`` blocks and loads nothing by itself."""

    def init(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        torch.nn.Module.__init__(self)
        self.layers = torch.nn.ModuleList(Block(f"model.layers.{n}.mlp", **changes) for n in range(layers))

    made = entry(name)
    made.__init__ = construct.entry_init(init)  # type: ignore[misc]
    return made


def shared_stream() -> list[tuple[str, torch.Tensor]]:
    shapes = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
    return [
        (f"model.layers.{n}.mlp.shared_expert.{p}.weight", torch.full(s, n + 1.0))
        for n in range(2)
        for p, s in shapes.items()
    ]


def test_blocks_below_an_entry_class_are_fused(tmp_path: Path) -> None:
    model = model_class()(vllm_config=engine(checkpoint(tmp_path)))
    for block in model.layers:
        assert block.shared_expert is None
        assert block.experts.kwargs["num_experts"] == E + 1
        assert block.experts.kwargs["top_k"] == K + 1
        rows = block.experts.routed_experts.w13_weight
        assert bool(rows[E:].isnan().all())
        assert not bool(rows[:E].isnan().any())
    assert fusion.ACTIVE.get() is None
    assert model._fse_patch in fusion.constructed()


def is_stock(model: Any) -> bool:
    return all(
        block.shared_expert is not None and block.experts.kwargs["num_experts"] == E for block in model.layers
    )


def test_an_entry_class_inside_another_model_stays_stock(tmp_path: Path) -> None:
    """A pooling model is a subclass of its entry class, and builds others of them as parts of itself."""
    config, cls = engine(checkpoint(tmp_path)), model_class()
    assert is_stock(cls(vllm_config=config, prefix="language_model"))
    assert is_stock(type("ForEmbedding", (cls,), {})(vllm_config=config))
    assert runtime.decisions() == []
    assert not is_stock(cls(vllm_config=config))  # control


def test_the_dropped_mlp_is_freed(tmp_path: Path) -> None:
    mlps: list[weakref.ref[Any]] = []
    honest = SharedMlp.__init__

    def noted(self: Any) -> None:
        honest(self)
        mlps.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedMlp, "__init__", noted)
        model = model_class()(vllm_config=engine(checkpoint(tmp_path)))
    gc.collect()
    assert len(mlps) == 2
    assert all(mlp() is None for mlp in mlps)
    router = model._fse_patch.routers[0]
    assert router.shared_gate(torch.zeros(3, H)) is not None


def test_a_model_that_is_gone_keeps_nothing(tmp_path: Path) -> None:
    model = model_class()(vllm_config=engine(checkpoint(tmp_path)))
    experts = weakref.ref(model.layers[0].experts.routed_experts)
    count = len(fusion.constructed())
    assert experts() is not None
    del model
    gc.collect()
    assert experts() is None
    assert len(fusion.constructed()) < count


@pytest.mark.parametrize(
    "change",
    [{"top_k": 1}, {"activation": "gelu"}, {"is_sequence_parallel": True}, {"shared_experts": None}],
    ids=str,
)
def test_another_layer_than_was_decided_stops(tmp_path: Path, change: dict[str, Any]) -> None:
    config = engine(checkpoint(tmp_path))
    with pytest.raises(FsePatchError, match="does not build what was decided"):
        model_class(**change)(vllm_config=config)
    assert fusion.ACTIVE.get() is None
    assert not is_stock(model_class()(vllm_config=config))  # the failure has left nothing behind


def test_fewer_layers_than_were_decided_stop_unless_a_pipeline_has_them(tmp_path: Path) -> None:
    config = engine(checkpoint(tmp_path))
    with pytest.raises(FsePatchError, match=r"layers \[1\] were decided"):
        model_class(layers=1)(vllm_config=config)
    config.parallel_config.pipeline_parallel_size = 2
    assert sorted(model_class(layers=1)(vllm_config=config)._fse_patch.routers) == [0]


def test_the_first_load_is_audited(tmp_path: Path) -> None:
    made = model_class()(vllm_config=engine(checkpoint(tmp_path)))._fse_patch
    passed: list[Any] = []
    with pytest.raises(AuditError, match="never written"):
        made.load(passed.extend, shared_stream()[:-1])
    made.load(passed.extend, [*shared_stream(), ("lm_head.weight", torch.zeros(1))])
    assert [name for name, _ in passed] == ["lm_head.weight"]
    assert made.report()["slots_loaded"] == 2
    for layer, experts in made.experts.items():
        assert bool((experts.w13_weight[E] == layer + 1).all())
        assert bool((experts.w2_weight[E] == layer + 1).all())


def test_a_loader_that_writes_a_part_of_a_slot_is_seen(tmp_path: Path) -> None:
    """vLLM's loader narrows a slot to the tensor that it gets, and reports success."""
    made = model_class()(vllm_config=engine(checkpoint(tmp_path)))._fse_patch

    def narrow(param: Any, loaded: torch.Tensor, *_: Any, expert_id: int, **__: Any) -> bool:
        param.data[expert_id][: loaded.shape[0] // 2, : loaded.shape[1]].copy_(loaded[: loaded.shape[0] // 2])
        return True

    for experts in made.experts.values():
        experts.w13_weight.weight_loader = narrow
    with pytest.raises(AuditError, match=r"unwritten values .* layers \[0, 1\]"):
        made.load(list, shared_stream())


def test_a_stream_that_is_not_read_to_its_end_is_seen(tmp_path: Path) -> None:
    made = model_class()(vllm_config=engine(checkpoint(tmp_path)))._fse_patch
    with pytest.raises(AuditError, match="never written"):
        made.load(lambda stream: None, shared_stream())


def test_names_of_another_layer_count_are_not_ours() -> None:
    family = family_of("glm4_moe")
    assert family is not None
    name = "model.layers.3.mlp.shared_experts.up_proj.weight"
    roles = [TensorNaming(family, n).parse(name).role for n in (3, 4)]  # type: ignore[union-attr]
    assert roles == ["draft", "main"]
