"""The hash of a policy: it follows what rules decide, and nothing else."""

from __future__ import annotations

from typing import Any

from fse_patch.fusion_core.decision.policy import Policy, Rule


def rule(**changes: Any) -> Rule:
    fields: dict[str, Any] = {"id": "a", "when": {}, "fuse": True, "why": "w", "source": "s"}
    return Rule.model_validate(fields | changes)


def test_the_hash_follows_what_rules_decide() -> None:
    base = Policy((rule(),))
    assert base.hash == Policy((rule(why="said otherwise", source="elsewhere"),)).hash
    others = [
        Policy(()),
        Policy((rule(id="b"),)),
        Policy((rule(when={"headers": True}),)),
        Policy((rule(fuse=False, reason="disabled"),)),
        Policy((rule(fuse=False, reason="quant.mixed"),)),
        Policy((rule(), rule(id="b"))),
        Policy((rule(id="b"), rule())),
    ]
    assert len({base.hash, *(other.hash for other in others)}) == 8


class Turned(Rule):
    """A rule whose fields stand in another order in the code."""

    def model_dump(self, **options: Any) -> dict[str, Any]:
        return dict(reversed(super().model_dump(**options).items()))


def test_the_order_in_the_code_does_not_matter() -> None:
    one = rule(when={"headers": True, "engines": ["vllm"]})
    other = Turned.model_validate(one.model_dump())
    assert list(other.model_dump()) != list(one.model_dump())
    assert Policy((other,)).hash == Policy((one,)).hash
