"""One self-contained HTML page: the whole prompt with the kept passages highlighted."""

from typing import TYPE_CHECKING

import jinja2

if TYPE_CHECKING:  # so that a command reports mistakes before it imports JAX
    from gemfilter_jax.results import KeptText

_PAGE = jinja2.Environment(autoescape=True).from_string("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ kept.kept_tokens }} of {{ kept.prompt_tokens }} tokens kept</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222;
       background: #fff; }
dl { display: grid; grid-template-columns: max-content auto; gap: .2rem 1rem; }
dt { color: #666; } dd { margin: 0; white-space: pre-wrap; }
nav { color: #666; } nav a { margin-right: .4rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; color: #777;
      border-top: 1px solid #ccc; padding-top: 1rem; }
mark { background: #ffe58a; color: #000; }
@media (prefers-color-scheme: dark) {
  body { background: #161616; color: #ddd; } pre { color: #888; } mark { background: #6b5500; color: #fff; }
  a { color: #8ab4f8; }
}
</style>
</head>
<body>
<h1>{{ "{:,}".format(kept.kept_tokens) }} of {{ "{:,}".format(kept.prompt_tokens) }} tokens kept
({{ "%.1f"|format(100 * kept.kept_tokens / kept.prompt_tokens) }} %)</h1>
<dl>{% if question %}<dt>Question</dt><dd>{{ question }}</dd>{% endif %}
{% if answer %}<dt>Answer</dt><dd>{{ answer }}</dd>{% endif %}</dl>
<nav>Kept passages:
{% for start, end in kept.spans %}<a href="#p{{ loop.index }}">{{ loop.index }}</a>{% endfor %}</nav>
<pre>{% for is_kept, number, text in pieces %}{% if is_kept %}<mark id="p{{ number }}">{{ text }}</mark>
{%- else %}{{ text }}{% endif %}{% endfor %}</pre>
</body>
</html>
""")


def page(kept: "KeptText", question: str | None = None, answer: str | None = None) -> str:
    """The page as a string; all text is escaped."""
    pieces, reached = [], 0
    for number, (start, end) in enumerate(kept.spans, 1):
        pieces += [(False, 0, kept.prompt[reached:start]), (True, number, kept.prompt[start:end])]
        reached = end
    pieces.append((False, 0, kept.prompt[reached:]))
    return _PAGE.render(kept=kept, question=question, answer=answer, pieces=pieces)
