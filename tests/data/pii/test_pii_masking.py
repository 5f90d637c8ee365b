"""Personal data is masked, similar text stays, and every text takes linear time."""

from __future__ import annotations

import pickle
import random
import string

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepseek_v3.config.filter_config import PII_KINDS
from deepseek_v3.data.documents import record_batch
from deepseek_v3.data.pii import PiiMasker
from deepseek_v3.utils.errors import ConfigError

MASKER = PiiMasker()
KEY_CHARACTERS = string.ascii_letters + string.digits


def secret(prefix: str, length: int, characters: str = KEY_CHARACTERS) -> str:
    """A fake key, built at run time so that no scanner reports this file."""
    draw = random.Random(f"{prefix} {length}")
    return prefix + "".join(draw.choice(characters) for _ in range(length))


AWS = secret("AK" + "IA", 16, string.ascii_uppercase + "234567")
GITHUB = secret("gh" + "p_", 36)
SLACK = secret("xo" + "xb-", 24)
GOOGLE = secret("AI" + "za", 35)
JWT = ".".join([secret("ey" + "J", 30), secret("ey" + "J", 40), secret("", 43)])
HEX = secret("", 40, "0123456789abcdef")
BODY = "\n".join(secret("", 64) + str(i) for i in range(4))
PEM = f"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\n{BODY}\n-----END RSA PRIVATE KEY-----"


def masked(text: str, **options: object) -> str:
    masker = PiiMasker(**options) if options else MASKER
    result = masker.apply(batch([text]))
    assert result.kept_rows.all()
    return result.kept["text"][0].as_py()


def batch(texts: list[str]) -> pa.RecordBatch:
    rows = range(len(texts))
    return record_batch([f"d{row}" for row in rows], texts, ["f"] * len(texts), rows, [None] * len(texts))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to ann@example.org.", "write to <EMAIL>."),
        ("<first.last+tag@mail.example.co.uk>", "<<EMAIL>>"),
        ("mailto:o_neill-7%x@a-b.museum?subject", "mailto:<EMAIL>?subject"),
        ("…ann@example.org,bob@example.org;", "…<EMAIL>,<EMAIL>;"),
        ("请联系ann@example.com。", "请联系<EMAIL>。"),
        (f"{'a' * 64}@example.org", "<EMAIL>"),
        ("from 203.0.114.77 today", "from <IP_ADDRESS> today"),
        ("GET http://93.184.216.34:8080/x", "GET http://<IP_ADDRESS>:8080/x"),
        ("ping 93.184.216.34. Then", "ping <IP_ADDRESS>. Then"),
        ("host:93.184.216.34/24", "host:<IP_ADDRESS>/24"),
        ("(2606:2800:220:1:248:1893:25c8:1946)", "(<IP_ADDRESS>)"),
        ("at 2a00:1450:4001:81b::200e: up", "at <IP_ADDRESS>: up"),
        ("4539 5787 6362 1486", "<CARD>"),
        ("card 4539578763621486, exp", "card <CARD>, exp"),
        ("3714-496353-98431", "<CARD>"),
        ("call +49 30 23125 123 now", "call <PHONE> now"),
        ("+442079460958", "<PHONE>"),
        ("+44 (0)20 7946 0958", "<PHONE>"),
        ("(+44) 20 7946 0958", "<PHONE>"),
        ("+1-212-555-0123x", "+1-212-555-0123x"),
        ("tel. (212) 555-0123;", "tel. <PHONE>;"),
        ("212-555-0123, 212.555.0199", "<PHONE>, <PHONE>"),
        ("1-800-555-0123", "<PHONE>"),
        ("London 020 7946 0958, York (01632) 960123", "London <PHONE>, York <PHONE>"),
        ("0161 496 0123 / 07700 900123", "<PHONE> / <PHONE>"),
        ("Tél. 01 99 00 12 34.", "Tél. <PHONE>."),
        ("Tel.: 030/23125123", "Tel.: <PHONE>"),
        (f"id {AWS} ok", "id <KEY> ok"),
        (f"git clone https://{GITHUB}@host", "git clone https://<KEY>@host"),
        (f"{SLACK} {GOOGLE}", "<KEY> <KEY>"),
        (f"Authorization: Bearer {JWT}", "Authorization: Bearer <KEY>"),
        (f'api_key = "{HEX}"', 'api_key = "<KEY>"'),
        (f"AWS_SECRET_ACCESS_KEY={secret('', 40)}", "AWS_SECRET_ACCESS_KEY=<KEY>"),
        (f'{{"password": "{secret("", 22)}"}}', '{"password": "<KEY>"}'),
        (f"before\n{PEM}\nafter", "before\n<KEY>\nafter"),
        (f"cut -----BEGIN PRIVATE KEY-----\n{BODY}", "cut <KEY>"),
        (f"token: {GITHUB}", "token: <KEY>"),
    ],
)
def test_personal_data_is_masked(text: str, expected: str) -> None:
    assert masked(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a @decorator and user@localhost, a@b.c, @ann, x@1.2.3.4, git@",
        f"{'a' * 65}@example.org",
        "name@example.c0m name@-.",
        "10.0.0.1 192.168.178.20 127.0.0.1 172.16.4.5 169.254.1.1 0.0.0.0 224.0.0.251 203.0.113.7 255.255.255.0",
        "version 91.0.4472.124, v91.0.4472.124, Chrome-91.0.44.124, driver: 31.0.101.44",
        "release 2.6.32.71 and libfoo-2.6.32.71 and 2.6.32.71-rc1",
        "see Section 3.2.41.5 and §3.2.41.5 and 1.2.3.4 and Figure 12.40.1.1",
        "1.3.6.1.4.1.311.21 300.1.2.3 1.2.3 01.02.03.04 1.2.3.4.5",
        "std::vector<int> a::b 12:34:56 fe80::1 ::1 2001:db8::1 abcd:1234 2024:10:11",
        "ISBN 978-3-16-148410-0, ISBN 0-306-40615-2, ISBN-13: 9780306406157, ISSN 2049-3630",
        "4539 5787 6362 1487, 4111-1111 1111-1111, 0000 0000 0000 0000, 1234 5678 9012 3452",
        "6,4539578763621486 and 4539578763621486.5 and x4539578763621486",
        "2024-10-11 12:30:45, 11/10/2024, 20241011123045, 1697328000, +1697328000, @@ -1,5 +1,7 @@",
        "d41d8cd98f00b204e9800998ecf8427e 550e8400-e29b-41d4-a716-446655440000",
        "000 001 010 011 100, 10 000 000, 1 234 567 890, 3.14159265358979, 212 555 0123",
        "02 23 44 30 13 40 ac 34 df",
        "a+1234567, x = +12345678, 2+3",
        "123-45-6789 and 555-0123 and 12-345-6789 and 112-555-0123",
        f"sha1 {HEX}, commit {HEX}",
        "password = correcthorsebatterystaple, token: aaaaaaaaaaaaaaaaaaaaaaaaa1, api_key=YOUR_API_KEY_GOES_HERE",
        "the password: is kept in a file; secret = os.environ['SECRET_KEY']",
        "lines such as -----BEGIN PRIVATE KEY----- open a key",
        "-----BEGIN PUBLIC KEY-----\n" + BODY,
        "AKIA is a prefix, ghp_short too, eyJhbGciOi alone",
    ],
)
def test_text_that_only_looks_like_personal_data_stays(text: str) -> None:
    assert masked(text) == text


def test_replacements_are_counted_by_kind() -> None:
    texts = ["nothing", "a@example.org b@example.org 93.184.216.34", f"{AWS} +44 20 7946 0958"]
    result = MASKER.apply(batch(texts))
    assert result.dropped.num_rows == 0
    assert result.observed == {
        "pii": [0, 3, 2],
        "pii_key": [0, 0, 1],
        "pii_email": [0, 2, 0],
        "pii_card": [0, 0, 0],
        "pii_ip_address": [0, 1, 0],
        "pii_phone": [0, 0, 1],
    }
    assert result.kept["text"].to_pylist() == ["nothing", "<EMAIL> <EMAIL> <IP_ADDRESS>", "<KEY> <PHONE>"]


def test_kinds_and_the_replacement_can_be_chosen() -> None:
    text = "a@example.org 93.184.216.34"
    assert masked(text, kinds=["ip_address"]) == "a@example.org <IP_ADDRESS>"
    assert masked(text, replacement="[[{kind}]]") == "[[EMAIL]] [[IP_ADDRESS]]"
    for replacement in ("{kind}", "<PII>", "x@{kind}>", "<1.1.{kind}>"):
        with pytest.raises(ConfigError, match="replacement"):
            PiiMasker(replacement=replacement)


FRAGMENTS = [
    "a@example.org",
    "93.184.216.34",
    "2606:2800:220:1:248:1893:25c8:1946",
    "4539578763621486",
    "+44 20 7946 0958",
    "212-555-0123",
    AWS,
    GITHUB,
    JWT,
    HEX,
    "password=",
    "-----BEGIN PRIVATE KEY-----",
    *" .,:;-+@/()_v1<>\n",
]


def texts_of(fragments: int) -> st.SearchStrategy[list[str]]:
    """Batches of several texts, because every batch compiles all pretests, which takes longer than a text."""
    text = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=fragments).map("".join)
    return st.lists(text, min_size=8, max_size=8)


@settings(max_examples=60)
@given(texts_of(fragments=12))
@example(["+44 20 7946 0958" * 2])  # masking the first uncovers the second
def test_masking_twice_changes_nothing(texts: list[str]) -> None:
    once = MASKER.apply(batch(texts)).kept
    again = MASKER.apply(once)
    assert again.kept["text"] == once["text"]
    assert sum(again.observed["pii"]) == 0


@settings(max_examples=50)
@given(texts_of(fragments=8))
def test_the_pretest_misses_nothing(texts: list[str]) -> None:
    """A batch, in which only texts that pass the pretest are searched, gives the results of searching all texts."""
    suspicious = " ".join(FRAGMENTS)  # has every kind
    found = MASKER.apply(batch([*texts, suspicious])).kept["text"].to_pylist()
    searched = MASKER.apply(batch([f"{text}\n\f\n{suspicious}" for text in texts])).kept["text"].to_pylist()
    assert found[:-1] == [text.split("\n\f\n")[0] for text in searched]


@pytest.mark.parametrize(
    "fragment",
    [
        "a",
        "a.",
        "a@",
        "a@a.",
        "@a.bc",
        "1",
        "1.",
        "1 ",
        "1-",
        "+1",
        "+1 (1) ",
        "4539 ",
        "2606:",
        "2001::",
        "eyJ",
        "eyJaaaaaaaa.",
        "token=",
        "password: ",
        "ghp_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "-----BEGIN PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----AAAA\n",
        "-----BEGIN PRIVATE KEY-----x-----END ",
        "x" * 62 + " @a.bc ",
    ],
)
def test_no_text_takes_long(fragment: str) -> None:
    """A quarter of a megabyte of text on which a backtracking pattern would take hours."""
    text = fragment * (250_000 // len(fragment))
    text = f"{text} a@example.org 93.184.216.34 4539578763621486 +44 20 7946 0958 {AWS}"  # so that all patterns run
    assert "<KEY>" in masked(text)


def test_stages_pickle_and_take_lists() -> None:
    stage = pickle.loads(pickle.dumps(MASKER))
    kept, ids, stats = stage.filter([{"text": "a@example.org", "id": 7}, {"text": "b", "id": 8}])
    assert kept == [{"text": "<EMAIL>", "id": 7}, {"text": "b", "id": 8}]
    assert ids == [7, 8]
    assert stats["dropped"] == 0
    assert stage.apply(batch([])).observed == {name: [] for name in ("pii", *(f"pii_{kind}" for kind in PII_KINDS))}
