"""Stop words by language, and how many of them a text has.

A text in any language has some of that language's most frequent words; lists of names, numbers and keywords have
none. Gopher's rule (Rae et al. 2021, A.1) asks for two of eight English words. Here each language has a list of its
own, and the language with the most different words in the text counts, so the language need not be known. A text in
a script of which no language is listed has no stop words to look for, and passes.
"""

from __future__ import annotations

import re
from collections.abc import Set

# Words of texts with spaces, as they are written within a sentence; English as in Gopher.
STOP_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "en": "the be to of and that have with",
        "de": "der die das und ist nicht mit von ein eine zu den auf für sich",
        "fr": "le la les de des et est un une dans que pour qui pas sur",
        "es": "el la los las de que y en un una es por con para del",
        "pt": "o a os as de que e do da em um uma para com não",
        "it": "il la di che e è un una per non con del della sono le",
        "nl": "de het een en van is dat niet op te voor met zijn aan",
        "sv": "och att det som en är av för på med den inte till",
        "da": "og at det en er af for på med den ikke til som",
        "no": "og at det en er av for på med den ikke til som",
        "fi": "ja on ei se että oli ovat mutta myös kun tai joka",
        "pl": "i w na z nie się jest do to że po jak od",
        "cs": "a je se na v že to s z do pro ne jako",
        "sk": "a je sa na v že to s z do pre ako nie",
        "hu": "a az és hogy nem is egy ez volt meg csak van",
        "ro": "și în de la cu nu pe este care un o din pentru",
        "tr": "ve bir bu için ile de da olarak olan çok daha gibi",
        "id": "yang dan di dari ini untuk dengan pada tidak adalah itu",
        "vi": "và của là có cho được trong một các không với những",
        "ca": "el la els les de que i en un una per amb és del",
        "ru": "и в не на что с по как это к из у за от",
        "uk": "і в не на що з до як це та у за від є",
        "bg": "и на в да се е за от не с по са като",
        "sr": "и у је да на се за од са не као što и",
        "el": "και το να του η της με που για από είναι την",
        "ar": "في من على أن إلى التي عن هذا مع ما لا هذه كان",
        "fa": "و در به از که این را با است برای آن یک",
        "ur": "کے کی میں اور ہے سے کا کو نے پر یہ کہ",
        "he": "של את על לא הוא זה עם אל כי גם היא או",
        "hi": "के का की में है और से को पर ने यह कि",
        "mr": "आहे आणि या व तो हे ते की मध्ये आहेत",
        "bn": "ও এই এবং করে থেকে না একটি যে তার হয়",
        "ta": "மற்றும் ஒரு இந்த என்று அந்த என உள்ள",
        "ko": "이 그 및 수 있는 있다 것은 것이 등 한 는 은 대한",
    }.items()
}
# Of scripts without spaces: words that are looked for anywhere in the text.
UNSPACED_STOP_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "zh": "的 了 是 在 不 和 有 我 這 这 也 為 为",
        "ja": "の は に を た が で と も です ます する",
        "th": "ที่ และ ของ ใน เป็น มี ได้ ไม่ การ จะ",
        "lo": "ທີ່ ແລະ ຂອງ ໃນ ເປັນ ມີ ໄດ້ ບໍ່",
        "km": "និង ដែល ជា របស់ នៅ មាន បាន ក្នុង",
        "my": "သည် နှင့် တွင် များ မှ ကို ၏ ဖြစ်",
        "bo": "དང གི ལ ནས ཡིན དེ ཀྱི ན",
    }.items()
}
_LISTED = re.compile(
    "[A-Za-z\u00aa-\u024f\u0370-\u03ff\u0400-\u052f\u0590-\u06ff\u0900-\u09ff\u0b80-\u0bff\u0e00-\u0fff\u1000-\u109f"
    "\u1100-\u11ff\u1780-\u17ff\u1e00-\u1fff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
)
_MANY = 10**6  # of a text for which there is no list


def most_stop_words(words: Set[str]) -> int:
    """The number of different stop words among the words of a text, in the language that has most of them."""
    return max(len(words & listed) for listed in STOP_WORDS.values())


def stop_words_of_other_scripts(text: str) -> int:
    """The number of different stop words in a text without spaces; a million if its script has no list.

    0 for ASCII text, which `most_stop_words` settles.
    """
    if text.isascii():
        return 0
    found = max(sum(word in text for word in listed) for listed in UNSPACED_STOP_WORDS.values())
    letters = sum(map(str.isalpha, text))
    return _MANY if 2 * len(_LISTED.findall(text)) < letters else found
