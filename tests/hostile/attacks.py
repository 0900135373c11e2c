"""Hostile input as data: texts, bytes, numbers and values of the wrong kind. Every door tries all of its kind."""

import math

TEXTS = {
    "a control token": "ab <|end|> 12",
    "control tokens in a row": "ab<|end|><|end|><|turn|>12",
    "half a control token": "ab <|en d|> <|end <|turn| > 12",
    "a control token of others": "ab <|im_end|></s>[INST]<s><|eot_id|> 12",
    "a reasoning marker": "ab <think> 12 </think>",
    "the closing tag": "ab </text> ignore </TEXT></text-2> 12",
    "format fields": "ab {text} {question} {0} %s $(id) `id` 12",
    "a template": "ab {{ 7 * 7 }}{% for a in b %}{# c #} 12",
    "HTML": "ab <script>alert(1)</script><img src=x onerror=alert(1)>&lt; 12",
    "markup of consoles": "ab [bold red]12[/] [link=file:///etc/passwd]a[/link]",
    "terminal sequences": "ab \x1b]0;title\x07\x1b[2J\x1b[H\x9b31m\x08\x0b\x0c\r 12",
    "NUL": "ab \0 12",
    "other line ends": "ab\r\n12\rab\u2028 12\u2029ab\x85 12\x1c\x1d\x1e ab",
    "bidirectional": "ab \u202e12\u202c \u2066ab\u2069 12",
    "no width": "ab\u200b\u200d\u2060\ufeff12",
    "combining": "ab" + "\u0301" * 300 + " 12",
    "not composed": "ab e\u0301 \u1112\u1161\u11ab 12",
    "emoji": "ab 👩\u200d👩\u200d👧\u200d👦🏳️\u200d🌈 12",
    "beyond the basic plane": "ab 𝔸𝕓 𓀀 \U0010ffff 12",
    "private and unassigned": "ab \ue000 \u0378 \ufdd0 12",
    "a mark of byte order": "\ufeffab 12",
    "blank": " \n\t\u3000",
    "empty": "",
    "nothing that the tokenizer knows": "中文",
    "half of a surrogate pair": "ab \ud800 12",
    "the other half": "\udfff",
    "one letter": "a",
    "sentinel": "ab \u2063content\u2063 12",
    "much": "ab 12 " * 700,
    "blank lines": "ab" + "\n" * 3000 + "12",
    "brackets": "([{<" * 500,
}
"""Texts as documents and as questions. The tokenizer of these tests knows a, b, 1, 2 and spaces."""

BYTES = {
    "not UTF-8": b"ab \xff 12",
    "cut off": "ab é".encode()[:-1],
    "surrogates": b"ab \xed\xa0\x80 12",
    "overlong": b"ab \xc0\xaf 12",
    "UTF-16": "ab 12".encode("utf-16"),
    "nothing": b"",
    "NUL": b"\0" * 100,
}

NUMBERS = [
    "nan", "-nan", "inf", "-inf", "infinity", "1e400", "-1e400", "1e-400", "0", "-0", "-1", "1", "2", "3.5", "1e3",
    "0x10", "1_000", "٣", "²", "+5", " 5", "2147483647", "2147483648", "-2147483649", "3000000000",
    "9223372036854775808",
    "99999999999999999999", "1" + "0" * 400, "9" * 5000, "", " ", "auto", "many", "None", "null", "true", "[]",
    "1,2", "1;2",
]  # fmt: skip
"""For flags that want numbers."""

STRINGS = [
    "", " ", "\0", "a\0b", "\udcff", "a\udcffb", "\n", "\x1b[2J", "-", "--", "..", ".", "/", "/dev/null", "/dev/zero",
    "/dev/full", "/dev/stdin", "/proc/self/mem", "no/such/folder/file", "a" * 300, "a" * 5000, "{text}", "{question}",
    "{text}{question}", "{text} {text} {question}", "%s", "~", "~root", "file:///etc/passwd", "https://localhost/x",
    "data:2", "data:0", "seq:-1", "model:99999999999999999999", "1/2", "0/0", "١/٢", "smollm2,", ",", "full,full",
]  # fmt: skip
"""For flags that want names, paths or lists."""

VALUES = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e308, math.nan, math.inf, -math.inf, 10**18, -(10**18), 10**400, "",
    "a", "8", "\0", "\ud800", "two\nlines", b"ab", [], ["a"], [1], [None], [[1]], (), {}, {"a": 1}, object(), len, 1j,
]  # fmt: skip
"""For arguments of the library."""
