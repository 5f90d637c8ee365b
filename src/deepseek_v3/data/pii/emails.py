"""The detector of e-mail addresses, and the top-level domains that they use."""

from __future__ import annotations

import re

from deepseek_v3.data.pii.detectors import Detector, TextSpans, without_upper_bounds

# ISO 3166 and the few others of two letters; then the generic ones in common use; then those in other scripts.
_COUNTRIES = (
    "ac ad ae af ag ai al am ao aq ar as at au aw ax az ba bb bd be bf bg bh bi bj bm bn bo br bs bt bw by bz "
    "ca cc cd cf cg ch ci ck cl cm cn co cr cu cv cw cx cy cz de dj dk dm do dz ec ee eg er es et eu fi fj fk "
    "fm fo fr ga gd ge gf gg gh gi gl gm gn gp gq gr gs gt gu gw gy hk hm hn hr ht hu id ie il im in io iq ir "
    "is it je jm jo jp ke kg kh ki km kn kp kr kw ky kz la lb lc li lk lr ls lt lu lv ly ma mc md me mg mh mk "
    "ml mm mn mo mp mq mr ms mt mu mv mw mx my mz na nc ne nf ng ni nl no np nr nu nz om pa pe pf pg ph pk pl "
    "pm pn pr ps pt pw py qa re ro rs ru rw sa sb sc sd se sg sh si sk sl sm sn so sr ss st su sv sx sy sz tc "
    "td tf tg th tj tk tl tm tn to tr tt tv tw tz ua ug uk us uy uz va vc ve vg vi vn vu wf ws ye yt za zm zw"
)
_GENERIC = (
    "academy aero agency app art asia berlin bio biz blog business buzz cafe cat center city click cloud club "
    "codes com community company computer consulting coop day dev digital directory edu education email "
    "engineering events expert family farm finance foundation fun fund games global gmbh gov group guru health "
    "help host hosting house icu inc info ink int international jobs kim land law legal life link live lol "
    "london ltd market marketing media mil mobi moe museum name net network news ngo ninja ong online org paris "
    "partners party photo photography plus post press pro productions rocks school science security services "
    "shop site social software solutions space store studio support systems team tech technology tel today "
    "tokyo tools top trade training travel university vip wales website wiki win work works world xyz zone"
)
_OTHER_SCRIPTS = (
    "рф укр бел срб мкд қаз бг ею ελ ευ հայ გე भारत বাংলা ไทย 中国 中國 公司 网络 香港 台灣 日本 한국 みんな".split()
)
_TOP_LEVEL = frozenset([*_COUNTRIES.split(), *_GENERIC.split(), *_OTHER_SCRIPTS])

# E-mail addresses, with the lengths of RFC 5321 §4.5.3.1 and RFC 1035 §2.3.4.
_LONGEST_LOCAL = 64
# Letters of names beyond ASCII (RFC 6531): Latin, Greek, Cyrillic, Armenian, Hebrew, Arabic, Indic.
_LETTERS = "À-ÖØ-öø-ʯͰ-ԯԱ-ևא-תء-يऀ-෿Ḁ-ỿ"
_OTHER_DOMAINS = "|".join(_OTHER_SCRIPTS)
_DOMAIN = (
    rf"@(?:[A-Za-z0-9{_LETTERS}-]{{1,63}}\.){{1,8}}[A-Za-z]{{2,24}}"
    rf"|@(?:[^\s@.,;:<>()]{{1,63}}\.){{1,8}}(?:{_OTHER_DOMAINS})"
)
_AT_DOMAIN = re.compile(rf"(?:{_DOMAIN})(?![\w-])", re.ASCII)
_LOCAL = re.compile(rf"[\w.%+{_LETTERS}-]*\Z", re.ASCII)


def _emails(text: str) -> TextSpans:
    free = 0
    for match in _AT_DOMAIN.finditer(text):
        at = match.start()
        # One character more than allowed, to recognise a local part that is too long.
        local = _LOCAL.search(text, max(free, at - _LONGEST_LOCAL - 1), at)
        found = local[0].lstrip(".%+-") if local else ""
        end = _domain_end(text, at, match.end())
        if end and found and len(found) <= _LONGEST_LOCAL and not found.endswith("."):
            yield at - len(found), end
            free = end


def _domain_end(text: str, at: int, end: int) -> int:
    """The end of the domain after the @, if it has a top-level domain; 0 if not, as in code.

    A capitalised word after it begins a sentence, and E< the end of Perl's documentation of brackets (perlpod).
    """
    if text[end : end + 1] == "(":
        return 0
    end -= text.startswith("E<", end - 1)
    while (dot := text.rfind(".", at, end)) > 0:
        last = text[dot + 1 : end]
        if last.lower() in _TOP_LEVEL and (
            last.islower() or last.isupper() or last.istitle() or not last.isascii()
        ):
            return end
        if not last[:1].isupper():
            return 0
        end = dot
    return 0


EMAIL = Detector(without_upper_bounds(_DOMAIN), _emails)
