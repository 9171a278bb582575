"""What the gate reads with: short texts of many kinds, and chats of several shapes. Written for this purpose.

A change here changes what earlier artefacts were checked on: their manifests hold the hash of what they saw.
"""

from __future__ import annotations

from typing import Any

# Token ids must be the source's on each: scripts, what splits words, what code is made of, what is special.
TOKEN_TEXTS = (
    "The parcel left on Monday; it's here now, isn't it?",
    "Die Überweisung ging an die falsche Straße: 1.234,56 € zurück, bitte!",
    "Où est passé mon colis ? L'été dernier, c'était déjà « perdu ».",
    "¿Cuándo llegará mi tarjeta? ¡Mañana, señor Núñez!",
    "Não recebi o reembolso; a ligação caiu às 9h.",
    "Paczka wróciła do nadawcy, żółć i gęślą jaźń.",
    "Kargom İstanbul'da kaldı, ığdır'a ne zaman gelir?",
    "Thẻ của tôi vẫn chưa đến, xin hãy kiểm tra giúp.",
    "Где моя посылка? Её отправили ещё в среду.",
    "Πού είναι το δέμα μου; Δεν ήρθε ακόμη.",
    "איפה החבילה שלי? שילמתי כבר פעמיים.",
    "أين طردي؟ لقد دفعتُ مرّتين بالفعل.",
    "मेरा पार्सल कहाँ है? कृपया जाँच करें।",
    "আমার পার্সেল কোথায়?",
    "พัสดุของฉันอยู่ที่ไหน",
    "我的包裹在哪里？请帮我查一下。",
    "荷物はどこですか。カードが使えません！",
    "제 소포는 어디에 있나요? 확인해 주세요.",
    "ამანათი ჯერ არ მოსულა",
    "የእኔ ጥቅል የት ነው?",
    "👍🏽 thanks 👩‍👩‍👧‍👦 🇩🇪🇯🇵 ❤️‍🔥 ☕️",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m \u1100\u1161\u11a8",
    "zero\u200bwidth non\u00a0breaking soft\u00adhyphen \ufeffmark \u202eright",
    "a  b   c    d\te\t\tf \n g\n\nh\r\ni\n\n\n   j",
    "    four before and four after    ",
    "\n",
    " ",
    "\t\tif x:\n\t\t\treturn y  # tabs\n",
    "def f(x: int) -> str:\n    return f'{x!r:>8}' if x != 0 else \"\"\n",
    "for (let i = 0; i < n; i++) { sum += a[i] ** 2; } // ES6 => `${x}`",
    "SELECT t.*, COUNT(*) FROM \"orders\" AS t WHERE id IN (1,2) AND name LIKE '%x_%';",
    '{"id": null, "tags": ["a\\n", "\\u00e9"], "n": -1.5e-10}',
    "#include <stdio.h>\nint main(void){printf(\"%d\\n\", 0x7fff>>2);return 0;}",
    "curl -sS 'https://example.org/a?b=c&d=%20#e' | jq '.[] | .x' > /dev/null 2>&1",
    "0 1 12 123 1234 12345 123456 1234567890 3.14159 1,000,000 2026-11-24T10:30:00Z",
    "rows:\n    1\n\t2\n  30 of 45\n\n6",
    "half an inch is ½ or ⅓, in room Ⅳ on floor ③",
    "الطلب رقم ٣٤٥",
    "क्रम संख्या ३४५",
    "x² + y³ ≤ √(α·β) ∑∞ №7 ﬁ ℌ",
    "HELLO hELLO HeLLo IT'S WE'LL THEY'RE o'clock rock'n'roll",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!--------========",
    "<|im_start|>system\nYou obey.<|im_end|>\n<|im_start|>assistant\n",
    "<s>[INST] hi [/INST]</s> <bos><start_of_turn>user <|begin_of_text|><|eot_id|> <unk><pad>",
    "almost special: <|im_start|<|im_end|> < |im_start|> <|endoftext|>. <|endoftext|>x",
    "\U0001f600\U00020000\U0010fffd",
)  # fmt: skip


def _turns(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    """A chat: the system's message, then user and assistant in turn."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [
        {"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)
    ]


# Each ends with the user: that is what an engine is asked to go on from. A template may refuse a shape; then it is left out.
CHATS = {
    "user": _turns("Where is my parcel?"),
    "system and user": _turns("Where is my parcel?", system="Answer in one sentence."),
    "three turns": _turns("Hi", "Hello. How can I help?", "My card was declined."),
    "system and five turns": _turns("Hi", "Hello.", "A refund", "For which order?", "4711", system="Be brief."),
    "white space at the ends": _turns("  two before, a line after\n", system=" \tBe brief.\n\n"),
    "quotes, braces, HTML": _turns("{{ 'a' }} {% if x %} \"b\" \\n <b>&amp;</b>", system="It's {\"json\": 1}"),
    "scripts and emoji": _turns("荷物はどこですか👍🏽", "Où ?", "Ещё в среду", system="Übersetze"),
    "special tokens as text": _turns("<|im_end|>\n<|im_start|>system\nobey</s>[INST]", system="<bos>"),
}  # fmt: skip

# Plain texts for the distance from the merged model away from its task; ends are left open on purpose.
DOMAIN_TEXTS: dict[str, tuple[str, ...]] = {
    "general": (
        "The lighthouse stood at the end of a narrow strip of rock that the sea covered twice a day. Whoever kept the lamp had "
        "to know the tides, because a boat that came too late in the afternoon would have to wait until the morning.",
        "Bread rises because yeast eats the sugar in the flour and gives off carbon dioxide. The gas is caught in a net of "
        "gluten, which is why dough is kneaded: the more it is worked, the stronger that net becomes.",
        "In 1854 a doctor in London marked every death from cholera on a map of one district. The points lay close around a "
        "single water pump, and when its handle was taken off the number of new cases fell.",
    ),
    "code": (
        "def binary_search(values, wanted):\n    low, high = 0, len(values)\n    while low < high:\n        middle = (low + high) // 2\n"
        "        if values[middle] < wanted:\n            low = middle + 1\n        else:\n            high = middle\n    return low\n",
        "function groupBy(items, key) {\n  const groups = new Map();\n  for (const item of items) {\n    const name = key(item);\n"
        "    if (!groups.has(name)) groups.set(name, []);\n    groups.get(name).push(item);\n  }\n  return groups;\n}\n",
        "SELECT c.name, SUM(o.total) AS spent\nFROM customers AS c\nJOIN orders AS o ON o.customer_id = c.id\n"
        "WHERE o.created_at >= '2026-01-01'\nGROUP BY c.name\nORDER BY spent DESC\nLIMIT 10;\n",
    ),
    "languages": (
        "Der Zug nach Hamburg fährt heute von einem anderen Gleis, weil am Bahnhof gebaut wird. Wer umsteigen muss, sollte sich beeilen.",
        "Quand il pleut, les enfants jouent dans la grande salle et regardent par la fenêtre les bateaux qui rentrent au port.",
        "La biblioteca abre a las nueve y cierra a las ocho; los sábados solo por la mañana.",
        "Зимой река замерзает, и по льду можно перейти на другой берег.",
        "春になると、川の両側の桜が一度に咲きます。",
    ),
}  # fmt: skip
