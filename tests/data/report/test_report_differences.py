"""Marked differences and triggers in the report."""

import random

from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.data.report import drops
from deepseek_v3.data.report.duplicates import differences, occurrences


def without(text: str, spans: list[tuple[int, int]]) -> str:
    for start, stop in reversed(spans):
        text = text[:start] + " " + text[stop:]
    return " ".join(text.split())


@given(
    st.lists(st.sampled_from("a b c dog the . , 人 口\n\n".split(" "))),
    st.lists(st.sampled_from("a b dog 人 .".split())),
)
def test_unmarked_text_is_the_same_in_both(one: list[str], other: list[str]) -> None:
    texts = [" ".join(one), " ".join(other)]
    left, right = differences(*texts)
    assert without(texts[0], left) == without(texts[1], right)
    assert differences(texts[0], texts[0]) == ([], [])


def test_a_changed_word_is_marked_and_nothing_else() -> None:
    one = "The quick brown fox jumps over the lazy dog, again and again."
    left, right = differences(one, one.replace("quick brown", "slow   grey"))
    assert [one[start:stop] for start, stop in left] == ["quick brown"]
    assert right == [(4, 15)]
    assert differences("天地玄黄宇宙", "天地黄宇宙洪") == ([(2, 3)], [(5, 6)])


def test_triggers_are_found_in_any_case_and_across_lines() -> None:
    text = "Read more.\nREAD\n more (about) it"
    assert [text[start:stop] for start, stop in occurrences(text, "read more")] == ["Read more", "READ\n more"]
    assert [text[start:stop] for start, stop in occurrences(text, "( ABOUT )")] == ["(about)"]
    assert occurrences("{{{ x {", "{") == [(0, 3), (6, 7)]
    assert occurrences(text, " \n") == occurrences(text, "nowhere") == []


def test_random_texts_keep_their_words_in_order() -> None:
    chooser = random.Random(1)
    words = [chooser.choice("abcdefgh") for _ in range(300)]
    changed = [word.upper() if chooser.random() < 0.1 else word for word in words]
    left, _ = differences(" ".join(words), " ".join(changed))
    assert sum(stop - start + 1 for start, stop in left) // 2 >= sum(map(str.isupper, changed))


def test_quarantine_of_one_empty_file() -> None:
    assert "empty" in str(drops.quarantine_section({"quarantined": {"empty": 0}}))
