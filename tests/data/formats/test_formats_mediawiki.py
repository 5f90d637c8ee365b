"""Dumps of MediaWiki: pages of the main namespace as text, and a damaged page costs itself alone."""

from __future__ import annotations

import bz2
import json
from xml.sax.saxutils import escape

import pytest

from deepseek_v3.data.formats import mediawiki
from deepseek_v3.data.formats.inputs import find_inputs
from helpers.formats import read, reasons, skips, texts, write

# As MediaWiki's dumpBackup.php and Special:Export write it.
HEAD = """\
<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <namespaces>
      <namespace key="0" case="first-letter" />
      <namespace key="1" case="first-letter">Diskussion</namespace>
      <namespace key="6" case="first-letter">Datei</namespace>
      <namespace key="14" case="first-letter">Kategorie</namespace>
    </namespaces>
  </siteinfo>
"""
TAIL = "</mediawiki>\n"


def page(number: int, text: str, ns: int = 0, more: str = "", model: str = "wikitext") -> str:
    return f"""\
  <page>
    <title>Page {number} &amp; more</title>
    <ns>{ns}</ns>
    <id>{number}</id>{more}
    <revision>
      <id>{number + 1000}</id>
      <timestamp>2024-01-0{number}T00:00:00Z</timestamp>
      <contributor><username>Someone</username><id>7</id></contributor>
      <model>{model}</model>
      <format>text/x-wiki</format>
      <text bytes="{len(text)}" xml:space="preserve">{escape(text)}</text>
      <sha1>x</sha1>
    </revision>
  </page>
"""


DUMP = (
    HEAD
    + page(1, "'''Eins''' &lt; [[Zwei|zwei]] < drei [[Datei:x.png|mini|Bild]]\n[[Kategorie:Zahlen]]")
    + page(2, "#REDIRECT [[Eins]]", more='\n    <redirect title="Eins" />')
    + page(3, "talk", ns=1)
    + page(4, "{}", model="json")
    + page(5, "== Über ==\nText")
    + TAIL
)


@pytest.mark.parametrize("name", ["w.xml", "w.xml.bz2", "dewiki-pages-articles1.xml-p1p41242.bz2"])
def test_pages_of_the_main_namespace_are_documents(tmp_path, name):
    data = DUMP.encode()
    # Wikipedia's dumps hold one bzip2 stream per 100 pages.
    cut = DUMP.index("  <page>\n    <title>Page 3")
    packed = bz2.compress(DUMP[:cut].encode()) + bz2.compress(DUMP[cut:].encode())
    path = write(tmp_path / name, packed if name.endswith("bz2") else data)
    records, quarantined = read(path)
    assert (texts(records), quarantined) == (["Eins < zwei < drei", "Über\n\nText"], [])
    assert [one["id"] for one in records] == ["1", "5"]
    assert [data[one["place"] :].startswith(b"<page>") for one in records] == [True, True]
    assert json.loads(records[0]["metadata"]) == {"title": "Page 1 & more", "timestamp": "2024-01-01T00:00:00Z"}
    assert skips(path) == {"redirect": 1, "namespace": 1, "content_model": 1}


def test_reading_continues_at_any_page(tmp_path, monkeypatch):
    monkeypatch.setattr(mediawiki, "_CHUNK_BYTES", 31)
    monkeypatch.setattr(mediawiki, "BATCH_RECORDS", 2)
    dump = HEAD + "".join(page(n, f"[[Datei:x]] text {n}") for n in range(1, 8)) + TAIL
    records, quarantined = read(write(tmp_path / "w.xml", dump))
    assert (texts(records), quarantined) == ([f"text {n}" for n in range(1, 8)], [])


def test_the_newest_of_several_revisions_counts(tmp_path):
    old, new = page(1, "old"), page(1, "new")
    history = old.replace("  </page>\n", new[new.index("    <revision>") :])
    assert texts(read(write(tmp_path / "w.xml", HEAD + history + TAIL))[0]) == ["new"]


BOMB = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;"><!ENTITY c SYSTEM "file:///etc/passwd">]>\n'


@pytest.mark.parametrize(
    ("broken", "reason", "error"),
    [
        (page(2, "x").replace(">x<", ">&b;<"), "not_xml", "undefined entity"),
        (page(2, "x").replace(">x<", ">&c;<"), "not_xml", "undefined entity"),
        (page(2, "x").replace("</ns>", "</n>"), "not_xml", "mismatched tag"),
        (page(2, "x").replace("<ns>", "<d>" * 99 + "<ns>"), "not_xml", "more than 20 elements in each other"),
        (page(2, "x").replace("</page>", "</pag>"), "damaged", "another page begins before the end of this one"),
        (page(2, "x" * 3000), "too_long", "expected at most 2000 (max_record_bytes)"),
        (page(2, ""), "text_missing", "the page has no text; a dump of stubs holds none"),
        (page(2, "x").encode() + page(2, "x").encode("utf-16-le"), None, None),
    ],
)
def test_a_damaged_page_costs_itself_alone(tmp_path, monkeypatch, broken, reason, error):
    monkeypatch.setattr(mediawiki, "_CHUNK_BYTES", 100)
    middle = broken.encode() if isinstance(broken, str) else broken
    data = (BOMB + HEAD + page(1, "one")).encode() + middle + (page(3, "three") + TAIL).encode()
    records, quarantined = read(write(tmp_path / "w.xml", data), max_record_bytes=2000)
    assert texts(records) == (["one", "three"] if reason else ["one", "x", "three"])
    assert reasons(quarantined) == ([reason] if reason else [])
    if quarantined:
        assert error in quarantined[0]["error"]
        assert quarantined[0]["offset"] == data.index(b"<page>", data.index(middle) - 2)


def test_bytes_that_are_not_utf8_are_no_xml(tmp_path):
    data = (HEAD + page(1, "caf#") + page(2, "two") + TAIL).encode().replace(b"#", b"\xe9")
    records, (entry,) = read(write(tmp_path / "w.xml", data))
    assert (texts(records), entry["reason"]) == (["two"], "not_xml")


def test_a_dump_cut_short_keeps_whole_pages(tmp_path):
    for cut in range(len(HEAD) + 30, len(DUMP), 97):
        records, quarantined = read(write(tmp_path / "w.xml", DUMP[:cut].encode()))
        assert texts(records) == ["Eins < zwei < drei", "Über\n\nText"][: len(records)]
        assert reasons(quarantined) == ["truncated"]
    packed = bz2.compress(DUMP.encode())
    assert reasons(read(write(tmp_path / "w.xml.bz2", packed[:-9]))[1]) == ["truncated"]


def test_other_xml_is_left_out_and_named(tmp_path):
    write(tmp_path / "pom.xml", "<?xml version='1.0'?><project><page>x</page></project>")
    write(tmp_path / "w.xml", DUMP)
    write(tmp_path / "empty.xml", "")
    files, ignored = find_inputs(tmp_path)
    assert [file.name for file in files] == ["empty.xml", "w.xml"]
    assert [(one.name, one.reason) for one in ignored] == [("pom.xml", "is XML, but no dump of MediaWiki")]
    assert [(one["reason"], one["records"]) for one in read(tmp_path / "empty.xml")[1]] == [("empty", 0)]
