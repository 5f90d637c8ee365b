"""The cheap test before ftfy finds everything that ftfy's own test finds."""

from __future__ import annotations

import re
from itertools import product

import ftfy
from ftfy.badness import MOJIBAKE_CATEGORIES, is_bad
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.data.preliminary_cleaning.mojibake import SUSPECT, repair_mojibake


def unfolded(characters):
    """The characters of a regex class, with its ranges expanded."""
    return re.sub(r"(.)-(.)", lambda ends: "".join(map(chr, range(ord(ends[1]), ord(ends[2]) + 1))), characters)


CHARACTERS = sorted(set("".join(map(unfolded, MOJIBAKE_CATEGORIES.values()))) | set("ŒœÂÃÎÐØÙà×√≈‚вЂВГРСΒΓΞΟβā€"))


def test_the_pattern_finds_every_suspicious_pair():
    suspect = re.compile(SUSPECT)
    pairs = ("".join(pair) for pair in product(CHARACTERS, repeat=2))

    assert [pair for pair in pairs if not suspect.search(pair) and is_bad(f"a {pair}a")] == []


@given(st.text(alphabet=[*CHARACTERS, *"aZ .,1\n"], max_size=8))
@settings(max_examples=500)
def test_lines_are_repaired_as_ftfy_repairs_them(text):
    assert repair_mojibake(text) == "\n".join(map(ftfy.fix_encoding, text.split("\n")))


@given(st.text(max_size=20), st.sampled_from(["latin-1", "cp1252", "cp1251", "cp437", "macroman"]))
def test_wrongly_decoded_text_is_repaired_as_ftfy_repairs_it(text, encoding):
    wrong = text.encode().decode(encoding, "replace")

    assert repair_mojibake(wrong) == "\n".join(map(ftfy.fix_encoding, wrong.split("\n")))
