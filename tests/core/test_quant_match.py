"""How lists of module names match: dotted boundaries, globs, regexes, and regexes that could hang."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fse_patch.fusion_core.quant import match
from fse_patch.fusion_core.quant.claims import Doubt

ROUTED = "model.layers.1.mlp.experts.12.gate_proj"
SHARED = "model.layers.1.mlp.shared_expert.gate_proj"


@pytest.mark.parametrize(
    ("entry", "name", "covers"),
    [
        ("model.layers.1.mlp.shared_expert", SHARED, True),
        ("shared_expert", SHARED, True),
        ("mlp.shared_expert.", SHARED, True),
        ("gate_proj", SHARED, True),
        # The case that upstream got wrong: the gate is not the expert.
        ("model.layers.1.mlp.shared_expert_gate", SHARED, False),
        ("shared_exper", SHARED, False),
        ("gate", SHARED, False),
        ("mlp.gate", ROUTED, False),
        ("expert", ROUTED, False),
        ("experts", "model.layers.1.mlp.shared_experts.up_proj", False),
        ("model.layers.1", ROUTED, True),
        ("model.layers.1", "model.layers.12.mlp.experts.0.up_proj", False),
        ("layers.1.mlp.experts.1", ROUTED, False),
        ("", ROUTED, False),
        (".", ROUTED, False),
    ],
)
def test_dotted_boundaries(entry: str, name: str, covers: bool) -> None:
    assert match.dotted([entry])(name) is covers


words = st.lists(st.sampled_from(["a", "ab", "b", "1", "12", "gate", "gate_proj"]), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(st.lists(words, max_size=4), words)
def test_dotted_is_a_run_of_components(entries: list[list[str]], name: list[str]) -> None:
    def run(entry: list[str]) -> bool:
        return any(name[i : i + len(entry)] == entry for i in range(len(name)))

    assert match.dotted(map(".".join, entries))(".".join(name)) == any(map(run, entries))


@pytest.mark.parametrize(
    ("entry", "covers"),
    [
        ("*shared_expert*", True),
        ("model.layers.1.mlp.shared_expert*", True),
        ("*.mlp.shared_expert", True),  # a module that holds it
        ("*.mlp.shared_expert.*", True),
        ("model.layers.?.mlp", True),
        ("*.mlp.gate", False),
        ("*.shared_expert_gate*", False),
        ("lm_head", False),
        ("model.layers.1.mlp", True),
    ],
)
def test_globs_cover_a_module_and_what_it_holds(entry: str, covers: bool) -> None:
    assert match.globs([entry])(SHARED) is covers


def test_regexes_match_from_the_start_or_anywhere() -> None:
    assert match.regexes([".*shared_expert.*"])(SHARED)
    assert not match.regexes(["shared_expert.*"])(SHARED)
    assert match.regexes(["shared_expert.*"], search=True)(SHARED)
    assert match.mixed(["re:.*mlp.gate$", "lm_head"], match.exact)("model.layers.1.mlp.gate")
    assert not match.mixed(["re:.*mlp.gate$", "lm_head"], match.exact)(ROUTED)
    assert match.mixed(["re:.*mlp.gate$", "lm_head"], match.exact)("lm_head")
    # "re:" belongs to the format: an entry without it is no regex.
    assert not match.mixed([".*"], match.exact)(ROUTED)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*mlp.gate$",
        r".*linear_attn.*",
        r"model\.layers\.(0|1|2|45)\..*",
        r".*\.mlp\.(?!shared_experts?\.).*proj",
        r"(?:.*\.)?layers\.\d+\.mlp\.experts\.\d+\.(gate|up)_proj$",
        r"^model\.layers\.([5-9]|[1-3][0-9])\.mlp\.experts\.[0-9]+\..*",
    ],
)
def test_regexes_of_published_checkpoints_are_taken(pattern: str) -> None:
    assert match.regexes([pattern] * 3)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(.*a.*)*$",
        "(a|aa)+$",
        "(a?a)+$",
        "((a+)+c)+",
        "(x|(a+)+c)*",
        "(?:x{1,9}){1,9}$",
        r"(.*)\1$",
        ".*.*.*.*x",
        "(.*a){12}b",
        "(",
        "a{99999999999}",
        "[",
        "*a",
    ],
)
def test_regexes_that_could_hang_or_are_none_are_doubts(pattern: str) -> None:
    with pytest.raises(Doubt):
        match.regexes([pattern])


def test_a_search_costs_more_than_a_match() -> None:
    assert match.regexes([".*a.*b.*"], search=False)
    assert match.regexes(["a.*b"], search=True)
    with pytest.raises(Doubt, match="too long"):
        match.regexes([".*a.*b.*"] * 2, search=True)


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: match.globs(["*a*b*c*"]), "the pattern '*a*b*c*' has too many wildcards"),
        (lambda: match.regexes([".*a.*b"] * 1000), "the regexes from '.*a.*b' on could take too long"),
        (lambda: match.regexes(["(a+)+$"]), "the regex '(a+)+$' could take too long"),
        (lambda: match.regexes(["(a|aa)+$"]), "the regex '(a|aa)+$' could take too long"),
        (lambda: match.regexes([r"(a)\1"]), r"the regex '(a)\\1' could take too long"),
        (lambda: match.mixed(["re:("], match.exact), "'(' is no regex (missing ), unterminated subpattern"),
        (lambda: match.regexes(["("]), "'(' is no regex (missing ), unterminated subpattern at position 0)"),
    ],
)
def test_the_words_of_a_doubt(refused: Callable[[], object], words: str) -> None:
    with pytest.raises(Doubt) as doubt:
        refused()
    assert str(doubt.value).startswith(words)


def test_three_wildcards_are_taken() -> None:
    assert match.globs(["*.mlp.*expert.*"])(SHARED)


def test_what_no_release_of_python_reads_as_a_glob(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match.fnmatch, "translate", lambda _: "(")
    with pytest.raises(Doubt, match=r"a pattern in \['a\*', 'b\?'\] is none \(missing \), unterminated"):
        match.globs(["a*", "b?"])


def test_a_glob_that_is_none() -> None:
    assert match.globs(["a[0-9]"])("a3")
    # A doubt is what older releases of Python make of it.
    with contextlib.suppress(Doubt):
        assert not match.globs(["a[9-0]"])("a3")


def test_many_costly_regexes_are_a_doubt() -> None:
    assert match.regexes([".*a.*b"] * 10)
    with pytest.raises(Doubt, match="too long"):
        match.regexes([".*a.*b"] * 1000)


pieces = st.sampled_from(
    ["a", ".", ".*", "a*", "(a|b)", "[ab]+", "x?", r"\d+", "(ab)*", "(.a)+", "$", "^", "b"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(pieces, min_size=1, max_size=8))
def test_what_is_taken_is_fast_and_matches_as_re_does(parts: list[str]) -> None:
    pattern = "".join(parts)
    try:
        matches = match.regexes([pattern])
    except Doubt:
        return
    name = "a" * 58 + "!!"
    start = time.process_time()
    found = matches(name)
    assert time.process_time() - start < 0.25
    assert found == bool(re.match(pattern, name))


@pytest.mark.parametrize(
    ("pattern", "ways"), [("a.*", 1), (".*.*.*", 1), ("a.*b.*", 61), ("(?:ab)*", 61), ("a.*b", 61)]
)
def test_what_repeats_at_the_end_has_one_way_if_it_is_one_character(pattern: str, ways: int) -> None:
    assert match.ways(pattern) == ways
