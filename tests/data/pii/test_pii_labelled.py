"""Precision and recall of every kind of personal data on labelled sentences.

The sentences are made up after what documentation and source code hold. ⟦ and ⟧ enclose what must be masked, and ~
joins the parts of a secret, so that no scanner reports this file.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest

from deepseek_v3.data.pii.masker import _DETECTORS

LABELLED = {
    "email": """
        Write to ⟦ann.lee@example.org⟧ or ⟦bob@mail.example.co.uk⟧ today.
        Copyright 2004-2011 Carla Diaz <⟦cdiaz@example.net⟧>
        author_email="⟦dev-team@example.io⟧",
        Schreibt an ⟦jürgen.groß@example.de⟧ oder ⟦info@müller-söhne.de⟧.
        Пишите на ⟦иван@почта.рф⟧ или ⟦olga@example.ru⟧.
        Contact: ⟦zoë@example.com⟧; Γράψτε στο ⟦νίκος@example.gr⟧.
        The list is ⟦help-list@lists.example.org⟧. Next we install.
        请联系⟦li@example.cn⟧。 後で⟦sato@example.co.jp⟧へ。
        url(img/icon@2x.png) and logo@3x.webp and sprite@2x.min.css
        scores = q@k.transpose(-2, -1) / scale
        y = x@self.weight.T + b; z = A@B.dot(C); w = q@k.mT
        return self.a@self.b.data
        npm install left-pad@1.3.0 @scope/tool@next.beta core@2.x.y
        =item * Kim Lee E<lt>⟦kim@example.org⟧E<gt>
        ssh root@server.local and git clone git@host:team/repo
        @app.route("/") @pytest.mark.skip @media.print
        foo@bar.baz and user@localhost and a@b.c
        import x@lib.so.old and model@run.ckpt
    """,
    "card": """
        Paid with ⟦4539578763621486⟧, expires 12/27.
        Visa ⟦4539 5787 6362 1486⟧ 11/29 123
        "number": "⟦371449635398431⟧",
        Amex ⟦3714-496353-98431⟧; Mastercard ⟦5555-5555-5555-4444⟧.
        ⟦4539578763621486⟧, ⟦5105105105105100⟧
        1000000000000037 4539578763621486 1000000000000091
        primes = [4111111111111111, 4111111111111147, 4111111111111159]
        + 4539578763621486*t**12 + 59897686*t
        5508 5509 5510 5511 4000 0000 0000 0002 550C 550D
        5110 5118 5112 5114 5115 5180
        seeds [4539578763621486 7177518203184491332]
        0x4539 5787 6362 1486ab and 4539578763621487
        4539578763621486 % 97 == 3
    """,
    "phone": """
        Call ⟦+49 30 23125 123⟧ or ⟦(212) 555-0123⟧ between 9 and 5.
        fax: ⟦+1.2125550123⟧, phone: ⟦212.555.0199⟧
        Tel. ⟦01 99 00 12 34⟧, London ⟦020 7946 0958⟧
        <⟦+442079460958⟧> is the office, ⟦1-800-555-0123⟧ the shop
        Ring ⟦555 0123⟧? no: seven local digits stay.
        The year 2024-10-11 12:30:45 and +1980-02-29 01:02:03Z
        array([+1.12345679+2.12345678j, -0.98765432])
        np.arange(6)+98172489) and x+12345678
        at +48.85837009, -2.29448100 on the map; lat=+40.71280000
        Clause 252.227-7014 and 202.227-7015 of the rules
        <Buffer 01 02 03 04 05> and 00 01 02 03 04
        ISBN 978-3-16-148410-0, version 2024.10.11.1200
        11/10/2024 and 2024.10.11 and 3.14159265358979
        @@ -120,7 +120,8 @@ and +1697328000
    """,
    "ip_address": """
        ping ⟦93.184.216.34⟧ from the host ⟦81.2.69.160⟧
        nameserver ⟦8.8.4.4⟧? no: all small numbers stay.
        Accepted publickey for root from ⟦203.98.7.65⟧ port 22
        ["⟦74.125.79.104⟧", "⟦74.125.79.105⟧"]
        GET http://⟦93.184.216.34⟧:8080/index and ⟦2a00:1450:4001:81b::200e⟧
        EXTENSION = ObjectIdentifier("2.5.29.37") and 1.3.101.113
        id-ce 2.5.29.46 and 1.2.840.113
        deps: update V8 to 9.5.172.19 and patch it to 11.8.172.15
        Chrome/91.0.44.124 and version 4.6.85.31 and libfoo-2.6.32.71
        <path d="M8.2-.87 2.83-2.12 3.51.98.32 2.03.5"/>
        Section 3.2.41.5 and 10.0.0.1 and 192.168.1.77
        Upgraded to 4.6.85.25 from 4.5.103.35
    """,
    "key": """
        OPENAI=⟦sk-~proj-Ab3dEf6hIj9kLmN2pQr5tUvW8x⟧
        token ⟦hf_~aBcDeFgHiJkLmNoPqRsTuVwXyZ0123456789⟧
        ⟦glpat~-xY7kLm2nPq9rSt4uVw6z⟧ in the pipeline
        //registry/:_authToken=⟦npm_~Zx8cVb5nM2aS9dF3gH7jK1lQ4wE6rT0yU2iO⟧
        Stripe.key = "⟦sk_~live_4eC39HqLyjWDarjtT1zdp7dc⟧"
        id ⟦AK~IA2QWERTY3UIOPASDF⟧ and ⟦gh~p_a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8⟧
        class="sk-folding-cube sk-circle-fade-dot"
        hf_hub_download and hf_model_config_for_causal_language_models
        npm_config_registry and npm_package_dependencies_typescript
        risk_live_update and task_live_view_component
        key="-----BEGIN PRIVATE KEY-----\\nXXXX\\nXXXX\\n-----END PRIVATE KEY-----"
        START = b"-----BEGIN OPENSSH PRIVATE KEY-----" END = b"-----END OPENSSH PRIVATE KEY-----"
        sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    """,
}
NOT_MASKED = {"⟦555 0123⟧", "⟦8.8.4.4⟧"}  # the sentence says why


def _labelled(kind):
    """Yields each line of a kind without marks, and the spans to mask in it."""
    for line in LABELLED[kind].strip().splitlines():
        text, spans = "", set()
        for part in re.split(r"(⟦.*?⟧)", line.strip().replace("~", "")):
            shown = part.strip("⟦⟧")
            if shown != part and part not in NOT_MASKED:
                spans.add((len(text), len(text) + len(shown)))
            text += shown
        yield text, spans


@pytest.mark.parametrize("kind", sorted(LABELLED))
def test_every_label_is_found_and_nothing_else(kind):
    wrong = Counter()
    for text, spans in _labelled(kind):
        found = {*_DETECTORS[kind].find(text)}
        wrong.update(f"missed {text[a:b]}" for a, b in spans - found)
        wrong.update(f"masked {text[a:b]}" for a, b in found - spans)

    assert wrong == {}


@pytest.mark.parametrize("kind", sorted(LABELLED))
def test_text_of_one_kind_holds_no_other(kind):
    others = [other for other in _DETECTORS if other != kind]
    for text, _ in _labelled(kind):
        assert [
            (other, [*_DETECTORS[other].find(text)]) for other in others if [*_DETECTORS[other].find(text)]
        ] == []
