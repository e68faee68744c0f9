"""Fusion policy: ordered rules over a layer's evidence; the first that matches decides, none denies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ...patches import ENGINES
from ..checkpoint.families import Role, families
from ..evidence.agreement import State
from ..evidence.specs import MlpSpec
from ..quant.methods import FORMATS
from ..reasons import Code


@dataclass(frozen=True)
class PolicyFacts:
    """Facts that rules look at: one layer of one role, for one engine.

    ``routed`` and ``shared`` are None where the checkpoint folder holds no safetensors headers; so is
    ``config``, whether config.json agrees with them. ``format`` is the routed experts' one by config.json, ""
    where that is not understood.
    """

    quant_method: str
    quant_scheme: str
    family: str
    engine: str
    role: Role
    num_shared_slots: int
    routed: MlpSpec | None = None
    shared: MlpSpec | None = None
    format: str = ""
    config: State | None = None

    @property
    def headers(self) -> bool:
        """Return whether safetensors headers were there."""
        return self.routed is not None and self.shared is not None

    @property
    def specs_equal(self) -> bool | None:
        """Return whether routed and shared experts are alike, in the headers and in what the config says."""
        return self.routed == self.shared and self.config != "differs" if self.headers else None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, regex_engine="python-re")


class When(_Strict):
    """Conditions of a rule. All that are given must hold; one on tensors never holds without headers."""

    quant_methods: list[str] | None = Field(default=None, description="quant_method; 'none' is unquantised")
    quant_schemes: list[str] | None = Field(default=None, description="the method's word for its format")
    formats: list[str] | None = Field(
        default=None, description="format of the routed experts, as config.json has it for this layer"
    )
    config: list[State] | None = Field(
        default=None, description="whether config.json and the headers say the same"
    )
    families: list[str] | None = Field(default=None, description="names of model families")
    engines: list[str] | None = Field(default=None, description="names of engines")
    roles: list[Role] | None = Field(default=None, description="main model or MTP draft")
    headers: bool | None = Field(default=None, description="whether safetensors headers were there to read")
    dtypes: list[str] | None = Field(default=None, description="every expert tensor has one of these dtypes")
    suffixes: list[str] | None = Field(
        default=None, description="every expert tensor has one of these suffixes"
    )
    specs_equal: bool | None = Field(default=None, description="routed and shared experts are stored alike")
    max_shared_slots: int | None = Field(default=None, ge=1, description="largest number of shared slots")

    @field_validator("families")
    @classmethod
    def _known_families(cls, names: list[str] | None) -> list[str] | None:
        return _known(names, [family.name for family in families()])

    @field_validator("formats")
    @classmethod
    def _known_formats(cls, names: list[str] | None) -> list[str] | None:
        return _known(names, FORMATS)

    @field_validator("engines")
    @classmethod
    def _known_engines(cls, names: list[str] | None) -> list[str] | None:
        return _known(names, ENGINES)

    def matches(self, facts: PolicyFacts) -> bool:
        """Return whether every given condition holds for ``facts``."""
        return (
            _is_in(facts.quant_method, self.quant_methods)
            and _is_in(facts.quant_scheme, self.quant_schemes)
            and _is_in(facts.format, self.formats)
            and _is_in(facts.config, self.config)
            and _is_in(facts.family, self.families)
            and _is_in(facts.engine, self.engines)
            and _is_in(facts.role, self.roles)
            and self.headers in (None, facts.headers)
            and self.specs_equal in (None, facts.specs_equal)
            and (self.max_shared_slots is None or facts.num_shared_slots <= self.max_shared_slots)
            and _tensors_within(facts, "dtype", self.dtypes)
            and _tensors_within(facts, "suffix", self.suffixes)
        )


class Rule(_Strict):
    """One row of the policy."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", description="unique name, shown in reports")
    when: When = Field(description="conditions; an empty object matches everything")
    fuse: bool
    pair: bool | None = Field(
        default=None,
        description="whether weights that stay apart may be read in one pass; as 'fuse' where left out",
    )
    reason: Code = Field(default="ok", description="refusal code; 'ok' for a rule that fuses, and only there")
    why: str = Field(min_length=1, description="one line for people")
    source: str = Field(min_length=1, description="where this was learnt: a URL or a file of this project")

    @model_validator(mode="after")
    def _reason_fits(self) -> Rule:
        if self.fuse != (self.reason == "ok"):
            raise ValueError("a rule that fuses has reason 'ok', a rule that refuses names another code")
        return self

    @property
    def pairs(self) -> bool:
        """Return whether layers may be paired."""
        return self.fuse if self.pair is None else self.pair


class PolicyFile(_Strict):
    """A policy file: rules in order."""

    version: Literal[1] = Field(description="version of this format")
    rules: list[Rule]


DEFAULT_DENY = Rule(
    id="default-deny",
    when=When(),
    fuse=False,
    reason="quant.unknown",
    why="no policy rule covers this checkpoint",
    source="patches/policy.yaml",
)


@dataclass(frozen=True)
class Policy:
    """The effective rules, first match wins; where none matches, DEFAULT_DENY does."""

    rules: tuple[Rule, ...]

    def rule_for(self, facts: PolicyFacts) -> Rule:
        """Return the rule that decides ``facts``."""
        return next((rule for rule in self.rules if rule.when.matches(facts)), DEFAULT_DENY)

    @cached_property
    def hash(self) -> str:
        """Return 12 hex digits that change with what the rules decide, not with how they are worded."""
        effect = [rule.model_dump(include={"id", "when", "fuse", "reason"}) for rule in self.rules]
        pairs = [rule.pairs for rule in self.rules]
        return hashlib.sha256(json.dumps([effect, pairs], sort_keys=True).encode()).hexdigest()[:12]


def schema_text() -> str:
    """Write the JSON Schema of a policy file, as patches/policy.schema.json holds it."""
    schema: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(schema | PolicyFile.model_json_schema(), indent=2) + "\n"


def _known(names: list[str] | None, known: Iterable[str]) -> list[str] | None:
    # A misspelt name would make a rule that silently never fires.
    if unknown := sorted(set(names or ()) - set(known)):
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return names


def _is_in(value: str | None, allowed: list[str] | list[Role] | list[State] | None) -> bool:
    return allowed is None or value in allowed


def _tensors_within(facts: PolicyFacts, field: str, allowed: list[str] | None) -> bool:
    if allowed is None:
        return True
    if facts.routed is None or facts.shared is None:
        return False
    return all(getattr(t, field) in allowed for t in facts.routed.tensors + facts.shared.tensors)


if __name__ == "__main__":
    print(schema_text(), end="")
