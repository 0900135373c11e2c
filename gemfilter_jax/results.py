"""What a pipeline gives: an answer, and the kept part of its prompt."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class KeptText:
    """The kept tokens and passages of a prompt.

    Attributes:
      prompt: the prompt's text as given.
      prompt_tokens: number of tokens in the prompt, template and question included.
      indices: indices of the kept tokens, increasing.
      spans: (start, end) character offsets into `prompt` of the kept passages, in order.
      recall_estimate: estimated probability that the kept passages hold the answer, if the text does; None where the
        method, or the model's preset, has no estimate, or all is kept.
    """

    prompt: str
    prompt_tokens: int
    indices: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    recall_estimate: float | None = None

    @property
    def kept_tokens(self) -> int:
        """Number of kept tokens."""
        return len(self.indices)

    @property
    def passages(self) -> tuple[str, ...]:
        """The kept passages, in order."""
        return tuple(self.prompt[start:end] for start, end in self.spans)

    @property
    def text(self) -> str:
        """The kept passages, separated by line breaks."""
        return "\n".join(self.passages)

    def __repr__(self) -> str:
        return (
            f"KeptText(kept_tokens={self.kept_tokens}, prompt_tokens={self.prompt_tokens}, passages={len(self.spans)})"
        )

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the JSON form."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "kept_tokens": self.kept_tokens,
            "indices": self.indices,
            "spans": self.spans,
            "recall_estimate": self.recall_estimate,
        }


@dataclasses.dataclass(frozen=True)
class Result:
    """An answer, the kept part of the prompt, and timings.

    Attributes:
      text: the answer.
      tokens: token ids of the answer, without the stop token.
      stop_reason: "stop" (the model ended its answer) or "length" (max_new_tokens was reached).
      selection: the kept tokens and passages of the prompt.
      timings: seconds per stage ("tokenize", "filter", "prefill", "decode"), and "compile" for XLA. Each result of a
        batch has the timings of the whole batch.
    """

    text: str
    tokens: tuple[int, ...]
    stop_reason: str
    selection: KeptText
    timings: dict[str, float]

    def __repr__(self) -> str:
        return f"Result(text={self.text!r}, stop_reason={self.stop_reason!r}, selection={self.selection!r})"

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the JSON form."""
        return self.selection.fields | {"timings": self.timings, "text": self.text, "stop_reason": self.stop_reason}
