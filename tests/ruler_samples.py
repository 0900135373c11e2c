"""Files that RULER's questions about documents are made of, in their published formats, and what examples hold."""

import random
import string

from gemfilter_jax.evals.example import Example


def spanned(example: Example) -> list[str]:
    return [example.text[start:end] for start, end in example.spans]


def prose(rng: random.Random, words: int) -> str:
    return " ".join("".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(words)).capitalize() + "."


def squad() -> dict:
    """Six articles of five paragraphs; each paragraph has two questions with answers and one without."""
    rng, articles = random.Random(0), []
    for article in range(6):
        paragraphs = []
        for number in range(5):
            name = f"{article}{number}"
            context = f"{prose(rng, 30)} Town{name} has {name} towers of Stone{name}. {prose(rng, 20)} "
            asked = [
                {"question": f"What has {name} towers?", "answers": [f"Town{name}", f"Town{name}", f"has {name}"]},
                {"question": f"What are the towers of Town{name} made of?", "answers": [f"Stone{name}"]},
                {"question": f"Who built Town{name}?", "answers": []},
            ]
            qas = [
                {
                    "id": f"{name}{index}",
                    "question": one["question"],
                    "is_impossible": not one["answers"],
                    "answers": [{"text": text, "answer_start": context.index(text)} for text in one["answers"]],
                }
                for index, one in enumerate(asked)
            ]
            paragraphs.append({"context": context, "qas": qas})
        articles.append({"title": f"Article {article}", "paragraphs": paragraphs})
    return {"version": "v2.0", "data": articles}


def hotpot() -> list:
    """Eight questions with ten paragraphs each, of which the second and the seventh are needed."""
    rng, entries = random.Random(1), []
    for number in range(8):
        context = [[f"Title {number} {one}", [prose(rng, 8), f" {prose(rng, 6)}"]] for one in range(10)]
        context[6][1].append(f" It was Answer{number}.")
        entries.append(
            {
                "_id": str(number),
                "question": f"Who was it in question {number}?",
                "answer": f"Answer{number}",
                "type": "bridge",
                "level": "hard",
                "supporting_facts": [[f"Title {number} 1", 0], [f"Title {number} 6", 0], [f"Title {number} 6", 2]],
                "context": context,
            }
        )
    return entries
